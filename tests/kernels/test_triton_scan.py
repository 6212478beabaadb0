"""The Triton scan against the float64 reference; without a GPU in Triton's interpreter, on small shapes."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mambagen.kernels import selective_scan
from mambagen.kernels.dispatch import backend_module
from tests.kernels.helpers import assert_close, draw_scan, run_scan

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ORDER = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus", "initial_state", "resets", "reverse")
BARE = {"skip": False, "gate": False, "bias": False, "softplus": False, "initial": False}


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The backend as on a GPU of two processors, with chunks and segments so short that small cases have several."""
    module = backend_module("selective_scan", "triton")
    monkeypatch.setattr(module, "SHORTEST_SEGMENT", 8)
    monkeypatch.setattr(module, "TILINGS", {state: t._replace(chunk=4) for state, t in module.TILINGS.items()})
    monkeypatch.setattr(module, "processors", lambda device: 2)
    return module


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN, so that what a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        BARE,
        {"length": 1, "batch": 1},
        {"length": 2, "channels": 1, "state": 1, "batch": 3},
        {"length": 3, "channels": 65, "state": 3, "batch": 1},
        {"length": 33, "channels": 20, "state": 20, "batch": 1},
        {"length": 5, "channels": 17, "state": 64, "batch": 1},
        {"length": 3, "channels": 20, "state": 100, "batch": 1},
        {"length": 2, "channels": 9, "state": 256, "batch": 1},
        {"length": 6, "groups": 3, "channels": 36, "strided": True, "batch": 1},
        {"length": 9, "gate": False, "strided": True, "batch": 1},
        {"length": 9, "skip": False, "reverse": True},
        {"length": 9, "bias": False, "batch": 1},
        {"length": 9, "softplus": False, "resets": 0.3},
        {"length": 9, "initial": False, "resets": 0.3, "reverse": True},
    ],
    ids=str,
)
def test_one_segment_equals_the_reference(options: dict[str, Any]) -> None:
    case = draw_scan(**options, device=DEVICE)
    assert_close(run_scan(case, "triton"), run_scan(case, "reference"), 2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"length": 16},
        {"length": 17, "strided": True, "groups": 2},
        {"length": 22, "resets": 0.1},
        {"length": 22, "resets": 0.1, "reverse": True},
        {"length": 19, "state": 3, "reverse": True, **BARE},
        {"length": 17, "state": 70, "channels": 20},
    ],
    ids=str,
)
def test_several_segments_equal_the_reference(options: dict[str, Any], backend: ModuleType) -> None:
    case = draw_scan(**{"batch": 1, **options}, device=DEVICE)
    tiling = backend.tiling_for(case["A"].shape[1])
    for tile, fill in ((tiling.forward, backend.FILL_FORWARD), (tiling.backward, backend.FILL_BACKWARD)):
        assert backend._Cut.of(case["x"], case["A"], case["B"], tile, fill).segments > 1
    assert_close(run_scan(case, "triton"), run_scan(case, "reference"), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_off_by_its_rounding_only(dtype: torch.dtype) -> None:
    case = draw_scan(dtype=dtype, resets=0.1, length=9, batch=1, device=DEVICE)
    ours, exact = run_scan(case, "triton"), run_scan(case, "reference")
    # rounded once, on the way out
    for name in ("y", "dx", "ddt", "dB", "dC", "dz"):
        assert ours[name].dtype == dtype
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=1.01 * torch.finfo(dtype).eps, atol=1e-5)
    assert_close({k: ours[k] for k in ("dA", "final_state")}, {k: exact[k] for k in ("dA", "final_state")}, 2e-6)


@pytest.mark.parametrize("dt", [0.0, 1e-6, 30.0, 1e4])
@pytest.mark.parametrize("decaying", [True, False])
def test_steps_of_any_size(dt: float, decaying: bool) -> None:
    """Nothing, almost nothing, steps after which nothing is left, and A = 0, which never forgets."""
    case = draw_scan(softplus=False, bias=False, length=9, batch=1, device=DEVICE)
    case["dt"] = case["dt"].abs() * dt
    case["A"] = case["A"] * decaying
    assert_close(run_scan(case, "triton"), run_scan(case, "reference"), 5e-6)


@pytest.mark.parametrize("shift", [-15.0, -6.0, 25.0, 100.0])
def test_softplus_keeps_its_digits_at_both_ends(shift: float) -> None:
    case = draw_scan(length=9, batch=1, device=DEVICE)
    case["dt_bias"] = case["dt_bias"] + 4 + shift
    assert_close(run_scan(case, "triton"), run_scan(case, "reference"), 5e-6)


def test_splitting_the_length_changes_only_rounding(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw_scan(length=20, batch=1, resets=0.1, device=DEVICE)
    split = run_scan(case, "triton")
    monkeypatch.setattr(backend, "SHORTEST_SEGMENT", 32)
    assert_close(split, run_scan(case, "triton"), 1e-6)


def test_gradients_repeat_bit_for_bit(backend: ModuleType) -> None:
    case = draw_scan(length=17, batch=1, device=DEVICE)
    first, second = run_scan(case, "triton"), run_scan(case, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_chunks_with_a_carried_state_equal_the_whole() -> None:
    case = draw_scan(length=14, initial=False, resets=0.1, device=DEVICE)

    def part(start: int, end: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        cut = {k: case[k][:, start:end] for k in ("x", "dt", "B", "C", "z", "resets")}
        return selective_scan(**{**case, **cut, "initial_state": state}, return_final_state=True, backend="triton")  # type: ignore[return-value]

    whole, final = part(0, 14, None)
    state, pieces = None, []
    for start, end in ((0, 1), (1, 6), (6, 14)):
        piece, state = part(start, end, state)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-6)


def test_forward_saves_what_its_shape_promises(backend: ModuleType) -> None:
    case = draw_scan(length=9, device=DEVICE)
    arguments = [case[name] for name in ORDER]
    saved = backend.forward(*arguments, True)[2]
    assert saved.shape == backend.saved_shape(2, 9, 24, 1, 16, case["x"])
    torch.testing.assert_close(saved[:, 0], case["initial_state"])
    assert backend.forward(*arguments, False)[2].numel() == 0


def test_dz_goes_where_it_is_told(backend: ModuleType) -> None:
    case = draw_scan(length=9, device=DEVICE)
    arguments = [case[name] for name in ORDER]
    y, final, saved = backend.forward(*arguments, True)
    wanted = backend.backward(y, final, *arguments, saved)[6]
    both = torch.zeros(2, 9, 48, device=DEVICE)
    assert (
        backend.backward(y, final, *arguments, saved, dz_out=both[..., 24:])[6].data_ptr() == both[..., 24:].data_ptr()
    )
    assert torch.equal(both[..., 24:], wanted)
    assert not both[..., :24].any()


def test_the_registered_op_stands_up_to_opcheck() -> None:
    case = draw_scan(length=3, channels=8, batch=1, device=DEVICE)
    arguments = [v.requires_grad_() if isinstance(v, Tensor) else v for v in (case[name] for name in ORDER)]
    torch.library.opcheck(torch.ops.mambagen.selective_scan_forward, (*arguments, True, "triton"))


def test_what_cannot_run_is_said(backend: ModuleType) -> None:
    assert "float64" in str(backend.unsupported(torch.zeros(1, 1, 1, dtype=torch.float64)))
    assert "steps" in str(backend.unsupported(torch.zeros(1).expand(1, 2**31, 1)))
    assert "2^31" in str(backend.unsupported(torch.zeros(1).expand(1, 1, 2**24), state=256))
    assert backend.unsupported(torch.zeros(1, 1, 1), state=256, groups=1, channels=1) is None
