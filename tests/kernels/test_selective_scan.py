"""The scan on the CPU, and what holds for the op on any backend, against the float64 reference and closed forms.

Backends that need a GPU or an interpreter have files of their own beside this one.
"""

import itertools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambagen.kernels import cpu_common, selective_scan
from mambagen.kernels.dispatch import backend_module
from mambagen.kernels.selective_scan import cpu
from tests.kernels.helpers import Case, Result, assert_close, draw_scan, errors, part, run_scan

TOLERANCE = 1e-5
BARE = {"skip": False, "gate": False, "bias": False, "softplus": False, "initial": False}
TIMED = ("x", "dt", "B", "C", "z", "resets")  # arguments of (batch, length, ...)
pytestmark = pytest.mark.usefixtures("poisoned")


def exact(case: Case) -> Result:
    """What the reference gives; it runs step by step, and filling its outputs first would double its time."""
    torch.use_deterministic_algorithms(False)
    result = run_scan(case, "reference")
    torch.use_deterministic_algorithms(True)
    return result


def hold(case: Case, tolerance: float = TOLERANCE) -> None:
    assert_close(run_scan(case, "cpu"), exact(case), tolerance)


# ---- against the reference, forward and all gradients


@pytest.mark.parametrize("length", [1, 2, 3, 17, 1000, 4097])
def test_odd_lengths_equal_the_reference(length: int) -> None:
    hold(draw_scan(seed=length, batch=1, length=length, channels=40, state=4 if length > 1000 else 16))


@pytest.mark.parametrize("state", [1, 2, 5, 8, 15, 16, 17, 33, 64, 100, 256])
def test_any_state_size_equals_the_reference(state: int) -> None:
    hold(draw_scan(seed=state, batch=2, length=70, channels=20, state=state, resets=0.02))


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 31, 32, 33, 64, 100, 300])
def test_any_number_of_channels_equals_the_reference(channels: int) -> None:
    hold(draw_scan(seed=channels, batch=2, length=45, channels=channels, state=6, strided=True))


@pytest.mark.parametrize(("groups", "channels"), [(2, 32), (3, 36), (4, 160), (5, 5), (2, 130)])
def test_groups_of_B_and_C_equal_the_reference(groups: int, channels: int) -> None:
    hold(draw_scan(batch=2, length=40, channels=channels, groups=groups, state=9, strided=True, resets=0.1))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("without", [(), *((name,) for name in BARE), tuple(BARE)], ids=lambda names: "-".join(names))
def test_every_optional_part_may_be_absent(without: tuple[str, ...], reverse: bool) -> None:
    hold(draw_scan(length=50, channels=24, reverse=reverse, resets=0.1, **dict.fromkeys(without, False)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [64, 37])
def test_half_precision_is_off_by_the_rounding_of_outputs_alone(dtype: torch.dtype, channels: int) -> None:
    case = draw_scan(length=90, channels=channels, dtype=dtype, strided=True, resets=0.05)
    ours = run_scan(case, "cpu")
    assert_close(ours, exact(case), TOLERANCE)
    assert ours["dA"].dtype == ours["final_state"].dtype == torch.float32
    assert ours["y"].dtype == ours["dx"].dtype == ours["dB"].dtype == dtype


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_calls_equal_the_reference(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    flags = {name: data.draw(st.booleans(), name) for name in (*BARE, "reverse", "strided")}
    case = draw_scan(
        seed=data.draw(st.integers(0, 1000)),
        batch=data.draw(st.integers(1, 3)),
        length=data.draw(st.integers(1, 100)),
        channels=groups * data.draw(st.integers(1, 70)),
        state=data.draw(st.integers(1, 40)),
        groups=groups,
        resets=data.draw(st.sampled_from([None, 0.03, 0.5, 1.0])),
        dtype=data.draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
        **flags,
    )
    hold(case, 2e-5)  # a sum over a handful of channels may cancel


def test_the_backward_in_many_runs_over_the_length_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "PARTIAL_BYTES", 1)  # a run for each chunk
    hold(draw_scan(batch=2, length=150, channels=70, groups=2, state=5, resets=0.02))


# ---- closed forms and extremes


def test_without_decay_the_state_is_the_sum_of_the_inputs() -> None:
    case = draw_scan(batch=1, length=500, channels=16, state=3, softplus=False, bias=False, initial=False)
    case["A"] = torch.zeros(16, 3)
    x, dt, B = (case[name].double() for name in ("x", "dt", "B"))
    total = torch.einsum("blc,blc,bln->bcn", dt, x, B[:, :, 0])
    assert errors({"h": run_scan(case, "cpu")["final_state"]}, {"h": total})["h"] < 1e-6
    hold(case)


def test_a_constant_input_settles_where_the_geometric_series_does() -> None:
    x = torch.ones(1, 2000, 16)
    A, B = torch.full((16, 1), -1.0), torch.ones(1, 2000, 1)
    y = selective_scan(x, 0.1 * x, A, B, B, backend="cpu")
    assert y[0, -1, 0].item() == pytest.approx(0.1 / (1 - torch.tensor(-0.1).exp().item()), rel=1e-5)


def test_a_huge_step_forgets_everything_before_it() -> None:
    case = draw_scan(batch=2, length=40, channels=33, state=4, gate=False, bias=False)
    case["dt"] = torch.full_like(case["dt"], 1e4)
    ours = run_scan(case, "cpu")
    last = 1e4 * case["x"][:, -1, :, None] * case["B"][:, -1, 0, None, :]
    torch.testing.assert_close(ours["final_state"], last, rtol=1e-6, atol=0)
    assert_close(ours, exact(case), TOLERANCE)


@pytest.mark.parametrize("bias", [-20.0, -80.0, -200.0, 30.0, 95.0])
def test_tiny_and_large_steps_equal_the_reference(bias: float) -> None:
    case = draw_scan(length=40, channels=20, state=8, initial=True)
    case["dt_bias"] = torch.full_like(case["dt_bias"], bias)
    ours, expected = run_scan(case, "cpu"), exact(case)
    if bias < -87:  # below the smallest float32 step: nothing moves but y's skip
        tiny = {name for name in expected if expected[name].abs().max() < 1e-30}
        ours, expected = ({k: v for k, v in side.items() if k not in tiny} for side in (ours, expected))
        assert {"ddt", "ddt_bias"} <= tiny
        assert {"y", "dinitial_state"} <= ours.keys()
    assert_close(ours, expected, TOLERANCE)


def test_a_growing_state_overflows_to_infinity_and_no_further_than_its_channel() -> None:
    case = draw_scan(batch=1, length=50, channels=40, state=4, softplus=False, bias=False, gate=False, skip=False)
    case["A"][7] = 60.0
    case["dt"][:, :, 7] = 1.0
    y = run_scan(case, "cpu", backward=False)["y"]
    rest = [c for c in range(40) if c != 7]
    assert not torch.isfinite(y[0, -1, 7])
    assert torch.isfinite(y[..., rest]).all()


def test_nan_stays_in_its_channel_and_after_its_step() -> None:
    case = draw_scan(batch=2, length=60, channels=40)
    clean = run_scan(case, "cpu", backward=False)["y"]
    case["x"][0, 25, 3] = float("nan")
    y = run_scan(case, "cpu", backward=False)["y"]
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[0, 25:, 3] = True
    assert y[touched].isnan().all()
    assert torch.equal(y[~touched], clean[~touched])


# ---- streaming, direction, documents


@pytest.mark.parametrize("reverse", [False, True])
def test_chunks_with_a_carried_state_equal_the_whole(reverse: bool) -> None:
    case = draw_scan(length=131, channels=40, resets=0.03, reverse=reverse)
    whole, state = selective_scan(**case, return_final_state=True)
    borders = [0, 1, 2, 35, 64, 131]
    pieces = list(itertools.pairwise(borders))
    ys: dict[int, Tensor] = {}
    carried = case["initial_state"]
    for begin, end in reversed(pieces) if reverse else pieces:
        piece = part(case, TIMED, begin, end, initial_state=carried)
        ys[begin], carried = selective_scan(**piece, return_final_state=True)
    assert torch.equal(torch.cat([ys[begin] for begin, _ in pieces], 1), whole)
    assert torch.equal(carried, state)


def test_gradients_through_a_carried_state_equal_the_whole() -> None:
    case = draw_scan(length=90, channels=24)
    x = case["x"].requires_grad_()
    (whole,) = torch.autograd.grad(selective_scan(**case).square().sum(), x)
    first, state = selective_scan(**part(case, TIMED, 0, 41), return_final_state=True)
    second = selective_scan(**part(case, TIMED, 41, 90, initial_state=state))
    (chunks,) = torch.autograd.grad(first.square().sum() + second.square().sum(), x)
    assert errors({"dx": chunks}, {"dx": whole})["dx"] < 1e-6


def test_reverse_equals_flipping_in_and_out() -> None:
    case = draw_scan(length=77, channels=40)
    flipped = {k: v.flip(1) if k in TIMED and v is not None else v for k, v in case.items()}
    y, final = selective_scan(**{**case, "reverse": True}, return_final_state=True)
    y_flipped, final_flipped = selective_scan(**flipped, return_final_state=True)
    assert torch.equal(y, y_flipped.flip(1))
    assert torch.equal(final, final_flipped)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_documents_equal_separate_ones(reverse: bool) -> None:
    case = draw_scan(batch=1, length=100, channels=40, initial=False, reverse=reverse)
    starts = [0, 1, 30, 31, 64, 100]
    resets = torch.zeros(1, 100, dtype=torch.bool)
    resets[0, starts[:-1]] = True
    packed = selective_scan(**{**case, "resets": resets})
    separate = [selective_scan(**part(case, TIMED, *ends)) for ends in itertools.pairwise(starts)]
    assert torch.equal(packed, torch.cat(separate, 1))


# ---- what a caller relies on


@pytest.mark.parametrize("shape", [(1, 700, 96), (3, 300, 200)], ids=str)
def test_results_are_the_same_bits_again_and_on_any_number_of_threads(
    shape: tuple[int, int, int], threads: Callable[[int], None]
) -> None:
    case = draw_scan(batch=shape[0], length=shape[1], channels=shape[2], resets=0.01)
    threads(1)
    first = run_scan(case, "cpu")
    for count in (1, 2, 3, 7):
        threads(count)
        again = run_scan(case, "cpu")
        assert all(torch.equal(first[name], again[name]) for name in first), count


def test_without_openmp_a_pool_of_threads_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    case = draw_scan(batch=2, length=300, channels=96)
    threads(2)
    first = run_scan(case, "cpu")
    monkeypatch.setattr(cpu_common, "_openmp", lambda: None)
    again = run_scan(case, "cpu")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_calls_from_several_threads_at_once_do_not_disturb_one_another(threads: Callable[[int], None]) -> None:
    threads(2)
    cases = [draw_scan(seed=seed, batch=2, length=200, channels=96) for seed in range(4)]
    alone = [run_scan(case, "cpu") for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda case: run_scan(case, "cpu"), cases * 3))
    for i, result in enumerate(together):
        assert all(torch.equal(alone[i % 4][name], result[name]) for name in result)


def _scan_in_a_child(case: Case, out: Any) -> None:
    out.put(selective_scan(**case).numpy().tobytes())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_can_go_on(threads: Callable[[int], None]) -> None:
    torch.use_deterministic_algorithms(False)  # torch's own filling would wait for threads that are not in the child
    threads(2)
    case = draw_scan(batch=2, length=300, channels=96)
    expected = selective_scan(**case).numpy().tobytes()  # with threads, which do not follow into the child
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    child = context.Process(target=_scan_in_a_child, args=(case, out))
    child.start()
    try:
        assert out.get(timeout=30) == expected
    finally:
        child.kill()
        child.join()


def test_halves_of_a_projection_reach_the_kernel_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw_scan(length=20, channels=32, strided=True, groups=2)
    met: dict[str, int] = {}
    forward = cpu.forward

    def spy(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, *rest: Any) -> Any:
        met.update({n: v.data_ptr() for n, v in (("x", x), ("dt", dt), ("B", B), ("C", C), ("z", z), ("A", A))})
        return forward(x, dt, A, B, C, D, z, *rest)

    monkeypatch.setattr(backend_module("selective_scan", "cpu"), "forward", spy)
    selective_scan(**case)
    assert met == {name: case[name].data_ptr() for name in met}


def test_scratch_memory_does_not_grow_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    scratch: set[int] = set()  # of one thread; runs over the length use it one after the other
    empty = torch.Tensor.new_empty
    run = cpu_common.Kernel.run

    def new_empty(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        made = empty(self, *shape, **options)
        taken.append(made.numel() * made.element_size())
        return made

    def spy(self: Any, parameters: Any, tasks: int, scratch_bytes: int, elements: int) -> None:
        scratch.add(scratch_bytes)
        run(self, parameters, tasks, scratch_bytes, elements)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(cpu_common.Kernel, "run", spy)

    def beyond_results(length: int) -> int:
        case = draw_scan(batch=1, length=length, channels=256, state=16, initial=False)
        taken.clear()
        results = run_scan(case, "cpu")
        row = 256 * 16 * 4  # float32 state, of which one is saved every chunk
        saved = -(-length // cpu.chunk_length(16)) * row
        length_long = sum(results[name].numel() * 4 for name in ("y", "dx", "ddt", "dz", "dB", "dC"))
        assert saved <= 0.5 * results["y"].numel() * 4 + row
        return sum(taken) + sum(scratch) - length_long - saved

    assert beyond_results(40_000) == beyond_results(20_000) < 2 * cpu.PARTIAL_BYTES


@pytest.mark.parametrize("reverse", [False, True])
def test_rows_more_than_two_gigabytes_apart_are_found(reverse: bool) -> None:
    torch.use_deterministic_algorithms(False)  # which would fill what is only reserved here
    apart = 2**31 + 64
    try:
        room = torch.empty(2 * apart + 64, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no address space for 8 GB that are never touched")
    case = draw_scan(batch=1, length=3, channels=32, dtype=torch.bfloat16, reverse=reverse)
    far = room.as_strided((1, 3, 32), (3 * apart, apart, 1))
    far.copy_(case["x"])
    assert torch.equal(selective_scan(**{**case, "x": far}), selective_scan(**case))


def test_mixed_dtypes_are_computed_in_the_wider_and_returned_in_that_of_x() -> None:
    case = draw_scan(length=20, channels=24, dtype=torch.bfloat16)
    mixed = {**case, "dt": case["dt"].float(), "z": case["z"].float()}
    y = selective_scan(**mixed)
    assert y.dtype == torch.bfloat16
    assert torch.equal(
        y, selective_scan(**{k: v.float() if k in TIMED[:5] else v for k, v in mixed.items()}).bfloat16()
    )


def test_B_and_C_may_come_without_groups() -> None:
    case = draw_scan(length=20, channels=24)
    plain = {**case, "B": case["B"][:, :, 0], "C": case["C"][:, :, 0]}
    assert torch.equal(selective_scan(**plain), selective_scan(**case))


def test_a_second_derivative_is_refused_in_words() -> None:
    case = draw_scan(length=5, channels=16)
    x = case["x"].requires_grad_()
    (dx,) = torch.autograd.grad(selective_scan(**case).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(dx.sum(), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, "x must be a real"),
        ({"x": torch.zeros(2, 5, 16, dtype=torch.long)}, "x must be a real"),
        ({"A": torch.zeros(8, 4)}, "channels=16"),
        ({"A": torch.zeros(16, 257)}, "state size 257"),
        ({"B": torch.zeros(2, 5, 1, 3)}, "B has shape"),
        ({"B": torch.zeros(2, 5, 3, 4)}, "3 groups"),
        ({"C": torch.zeros(2, 4, 1, 4)}, "C has shape"),
        ({"dt": torch.zeros(2, 5, 8)}, "dt has shape"),
        ({"z": torch.zeros(1, 5, 16)}, "z has shape"),
        ({"D": torch.zeros(4)}, "D has shape"),
        ({"dt_bias": torch.zeros(16, 1)}, "dt_bias has shape"),
        ({"initial_state": torch.zeros(2, 16)}, "initial_state has shape"),
        ({"resets": torch.zeros(2, 6, dtype=torch.bool)}, "resets has shape"),
        ({"backend": "numba"}, "backend is 'numba'"),
        ({"backend": "cuda"}, "cannot run this"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    case = draw_scan(length=5, channels=16, state=4, gate=True)
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**case, **change})


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_an_empty_sequence_is_refused(batch: int, length: int) -> None:
    with pytest.raises(ValueError, match="empty"):
        selective_scan(**draw_scan(batch=batch, length=length, channels=16))


# ---- the reference itself, and the registration with torch


def test_the_reference_passes_gradcheck() -> None:
    case = draw_scan(batch=1, length=4, channels=2, state=3, resets=0.3)
    leaves = {k: v.double().requires_grad_() for k, v in case.items() if isinstance(v, Tensor) and k != "resets"}
    rest = {k: v for k, v in case.items() if k not in leaves}

    def call(*values: Tensor) -> Any:
        arguments = dict(zip(leaves, values, strict=True))
        return selective_scan(**arguments, **rest, return_final_state=True, backend="reference")

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


def test_the_registered_ops_pass_opcheck() -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares outputs that it makes itself
    case = draw_scan(length=9, channels=16, state=4)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    inputs = [case[name] for name in names]
    for value in inputs:
        value.requires_grad_()
    forward = (*inputs, True, case["initial_state"], None, False, True, "cpu")
    torch.library.opcheck(torch.ops.mambagen.selective_scan_forward.default, forward)
    y, final, saved = torch.ops.mambagen.selective_scan_forward(*forward)
    inputs = [value.detach() for value in inputs]
    dy, dfinal = torch.randn_like(y.detach()), torch.randn_like(final.detach())
    backward = (dy, dfinal, *inputs, True, case["initial_state"], None, False, saved, "cpu")
    torch.library.opcheck(torch.ops.mambagen.selective_scan_backward.default, backward)


@pytest.mark.slow
def test_torch_compile_takes_the_op_into_its_graph() -> None:
    torch.use_deterministic_algorithms(False)
    case = draw_scan(length=20, channels=32)

    def model(x: Tensor) -> Tensor:
        return selective_scan(**{**case, "x": torch.nn.functional.silu(x)}) * 2

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        x = case["x"].clone().requires_grad_()
        y = run(x)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)
