"""The Triton convolution against the float64 reference; without a GPU in Triton's interpreter, on small shapes."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from mambagen.kernels import causal_conv1d
from mambagen.kernels.dispatch import backend_module
from tests.kernels.helpers import assert_close, draw_conv, run_conv

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The backend with segments so short that small cases have several."""
    module = backend_module("causal_conv1d", "triton")
    monkeypatch.setattr(module, "SHORTEST_SEGMENT", 8)
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
        {"bias": False, "activation": None, "initial": False},
        {"length": 1, "width": 8, "batch": 1},
        {"length": 2, "width": 4, "channels": 1, "batch": 3},
        {"length": 3, "width": 5, "resets": 0.5, "reverse": True},
        {"length": 3, "width": 5, "resets": 0.5},
        {"width": 1, "resets": 0.3},
        {"width": 2, "channels": 130, "strided": True},
        {"width": 8, "reverse": True, "initial": False},
    ],
    ids=str,
)
def test_one_segment_equals_the_reference(options: dict[str, Any]) -> None:
    case = draw_conv(**options, device=DEVICE)
    assert_close(run_conv(case, "triton"), run_conv(case, "reference"), 2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"length": 16},
        {"length": 30, "channels": 70, "strided": True, "width": 8},
        {"length": 30, "resets": 0.2},
        {"length": 30, "resets": 0.2, "reverse": True, "width": 3},
        {"length": 17, "width": 1, "activation": None},
    ],
    ids=str,
)
def test_several_segments_equal_the_reference(options: dict[str, Any], backend: ModuleType) -> None:
    case = draw_conv(**{"batch": 1, **options}, device=DEVICE)
    assert backend._Cut.of(case["x"], backend.FORWARD).segments > 1
    assert backend._Cut.of(case["x"], backend.BACKWARD).segments > 1
    assert_close(run_conv(case, "triton"), run_conv(case, "reference"), 2e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("borders", [[0], [1], [4], [0, 1, 2, 3, 4], []])
def test_what_leaves_and_enters_stops_at_borders(borders: list[int], reverse: bool) -> None:
    """Five steps under four taps: every border is within reach of the states at both ends."""
    case = draw_conv(length=5, batch=1, resets=0.0, reverse=reverse, device=DEVICE)
    case["resets"][:, borders] = True
    assert_close(run_conv(case, "triton"), run_conv(case, "reference"), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_off_by_its_rounding_only(dtype: torch.dtype) -> None:
    case = draw_conv(dtype=dtype, device=DEVICE)
    ours, exact = run_conv(case, "triton"), run_conv(case, "reference")
    for name in ("y", "dx", "dinitial_state"):
        assert ours[name].dtype == dtype
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=1.01 * torch.finfo(dtype).eps, atol=1e-6)
    assert_close({"dweight": ours["dweight"]}, {"dweight": exact["dweight"]}, 2e-6)


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, in the interpreter: exp of a large number is meant
def test_silu_far_from_zero() -> None:
    case = draw_conv(activation="silu", device=DEVICE)
    case["x"] = case["x"] * 200
    assert_close(run_conv(case, "triton"), run_conv(case, "reference"), 1e-5)


def test_gradients_repeat_bit_for_bit(backend: ModuleType) -> None:
    case = draw_conv(length=30, device=DEVICE)
    first, second = run_conv(case, "triton"), run_conv(case, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("reverse", [False, True])
def test_chunks_with_a_carried_state_equal_the_whole(reverse: bool) -> None:
    case = draw_conv(length=20, initial=False, reverse=reverse, device=DEVICE)
    whole, final = causal_conv1d(**case, return_final_state=True, backend="triton")
    state, pieces = None, []
    cuts = [(0, 2), (2, 13), (13, 20)]
    for start, end in reversed(cuts) if reverse else cuts:
        part = {**case, "x": case["x"][:, start:end], "initial_state": state}
        piece, state = causal_conv1d(**part, return_final_state=True, backend="triton")
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces[::-1] if reverse else pieces, 1), whole)
    assert torch.equal(state, final)


def test_dx_goes_where_it_is_told(backend: ModuleType) -> None:
    case = draw_conv(length=9, device=DEVICE)
    arguments = (case["x"], case["weight"], case["bias"], True, case["initial_state"], None, False)
    wanted = backend.backward(case["x"], None, *arguments)[0]
    both = torch.zeros(2, 9, 48, device=DEVICE)
    backend.backward(case["x"], None, *arguments, dx_out=both[..., :24])
    assert torch.equal(both[..., :24], wanted)
    assert not both[..., 24:].any()


def test_the_registered_op_stands_up_to_opcheck() -> None:
    case = draw_conv(length=3, channels=8, batch=1, device=DEVICE)
    x, weight, bias, past = (case[k].requires_grad_() for k in ("x", "weight", "bias", "initial_state"))
    arguments = (x, weight, bias, True, past, None, False, "triton")
    torch.library.opcheck(torch.ops.mambagen.causal_conv1d_forward, arguments)


def test_what_cannot_run_is_said(backend: ModuleType) -> None:
    assert "float64" in str(backend.unsupported(torch.zeros(1, 1, 1, dtype=torch.float64)))
    assert "steps" in str(backend.unsupported(torch.zeros(1).expand(1, 2**31, 1)))
