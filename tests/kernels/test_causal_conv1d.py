"""The convolution on the CPU, and what holds for the op on any backend, against the float64 reference and torch's."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambagen.kernels import causal_conv1d, cpu_common
from mambagen.kernels.causal_conv1d import cpu
from tests.kernels.helpers import Case, Result, assert_close, draw_conv, errors, part, run_conv

TOLERANCE = 2e-6
TIMED = ("x", "resets")  # arguments of (batch, length, ...)
pytestmark = pytest.mark.usefixtures("poisoned")


def exact(case: Case) -> Result:
    """What the reference gives; it runs step by step, and filling its outputs first would double its time."""
    torch.use_deterministic_algorithms(False)
    result = run_conv(case, "reference")
    torch.use_deterministic_algorithms(True)
    return result


def hold(case: Case, tolerance: float = TOLERANCE) -> None:
    assert_close(run_conv(case, "cpu"), exact(case), tolerance)


# ---- against the reference, forward and all gradients


@pytest.mark.parametrize("length", [1, 2, 3, 17, 63, 64, 65, 1000, 4097])
def test_odd_lengths_equal_the_reference(length: int) -> None:
    hold(draw_conv(seed=length, batch=1, length=length, channels=40))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", range(1, 9))
def test_every_width_equals_the_reference(width: int, reverse: bool) -> None:
    for length in (1, width, 70):
        hold(draw_conv(seed=width, length=length, channels=20, width=width, resets=0.1, reverse=reverse))


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 100, 255, 256, 257, 600])
def test_any_number_of_channels_equals_the_reference(channels: int) -> None:
    hold(draw_conv(seed=channels, length=37, channels=channels, strided=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_off_by_the_rounding_of_outputs_alone(dtype: torch.dtype) -> None:
    case = draw_conv(length=150, channels=37, dtype=dtype, strided=True, resets=0.05)
    ours = run_conv(case, "cpu")
    assert_close(ours, exact(case), TOLERANCE)
    assert ours["dweight"].dtype == ours["dbias"].dtype == torch.float32
    assert ours["y"].dtype == ours["dx"].dtype == ours["final_state"].dtype == dtype


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_calls_equal_the_reference(data: st.DataObject) -> None:
    flags = {name: data.draw(st.booleans(), name) for name in ("bias", "initial", "reverse", "strided")}
    case = draw_conv(
        seed=data.draw(st.integers(0, 1000)),
        batch=data.draw(st.integers(1, 3)),
        length=data.draw(st.integers(1, 140)),
        channels=data.draw(st.integers(1, 300)),
        width=data.draw(st.integers(1, 8)),
        activation=data.draw(st.sampled_from([None, "silu"])),
        resets=data.draw(st.sampled_from([None, 0.03, 0.5, 1.0])),
        dtype=data.draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
        **flags,
    )
    hold(case, 1e-5)


def test_many_spans_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "MAX_SPANS", 3)
    hold(draw_conv(batch=2, length=1100, channels=20, resets=0.01))


@pytest.mark.parametrize("width", [1, 4])
def test_it_equals_the_convolution_of_torch(width: int) -> None:
    case = draw_conv(length=50, channels=24, width=width, initial=False)
    x, weight = case["x"].transpose(1, 2), case["weight"][:, None]
    y = torch.nn.functional.conv1d(x, weight, case["bias"], padding=width - 1, groups=24)[..., :50]
    expected = torch.nn.functional.silu(y).transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(**case), expected, rtol=1e-5, atol=1e-6)


# ---- streaming, direction, documents


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_chunks_with_a_carried_state_equal_the_whole(width: int, reverse: bool) -> None:
    case = draw_conv(length=131, channels=40, width=width, resets=0.05, reverse=reverse)
    whole, state = causal_conv1d(**case, return_final_state=True)
    pieces = list(itertools.pairwise([0, 1, 2, 5, 64, 131]))
    ys: dict[int, Tensor] = {}
    carried = case["initial_state"]
    for begin, end in reversed(pieces) if reverse else pieces:
        ys[begin], carried = causal_conv1d(
            **part(case, TIMED, begin, end, initial_state=carried), return_final_state=True
        )
    assert torch.equal(torch.cat([ys[begin] for begin, _ in pieces], 1), whole)
    assert torch.equal(carried, state)


def test_gradients_through_a_carried_state_equal_the_whole() -> None:
    case = draw_conv(length=90, channels=24)
    x = case["x"].requires_grad_()
    (whole,) = torch.autograd.grad(causal_conv1d(**case).square().sum(), x)
    first, state = causal_conv1d(**part(case, TIMED, 0, 41), return_final_state=True)
    second = causal_conv1d(**part(case, TIMED, 41, 90, initial_state=state))
    (chunks,) = torch.autograd.grad(first.square().sum() + second.square().sum(), x)
    assert errors({"dx": chunks}, {"dx": whole})["dx"] < 1e-6


def test_reverse_equals_flipping_in_and_out() -> None:
    case = draw_conv(length=77, channels=40)
    y, final = causal_conv1d(**{**case, "reverse": True}, return_final_state=True)
    y_flipped, final_flipped = causal_conv1d(**{**case, "x": case["x"].flip(1)}, return_final_state=True)
    assert torch.equal(y, y_flipped.flip(1))
    assert torch.equal(final, final_flipped)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_documents_equal_separate_ones(reverse: bool) -> None:
    case = draw_conv(batch=1, length=100, channels=40, initial=False, reverse=reverse)
    starts = [0, 1, 30, 31, 64, 100]
    resets = torch.zeros(1, 100, dtype=torch.bool)
    resets[0, starts[:-1]] = True
    packed = causal_conv1d(**{**case, "resets": resets})
    separate = [causal_conv1d(**part(case, TIMED, *ends)) for ends in itertools.pairwise(starts)]
    assert torch.equal(packed, torch.cat(separate, 1))


def test_nan_reaches_no_further_than_the_taps() -> None:
    case = draw_conv(batch=2, length=60, channels=40, width=4)
    clean = causal_conv1d(**case)
    case["x"][0, 25, 3] = float("nan")
    y = causal_conv1d(**case)
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[0, 25:29, 3] = True
    assert y[touched].isnan().all()
    assert torch.equal(y[~touched], clean[~touched])


# ---- what a caller relies on


def test_results_are_the_same_bits_again_and_on_any_number_of_threads(threads: Callable[[int], None]) -> None:
    case = draw_conv(batch=2, length=700, channels=300, resets=0.01)
    threads(1)
    first = run_conv(case, "cpu")
    for count in (1, 2, 3, 7):
        threads(count)
        again = run_conv(case, "cpu")
        assert all(torch.equal(first[name], again[name]) for name in first), count


def test_calls_from_several_threads_at_once_do_not_disturb_one_another(threads: Callable[[int], None]) -> None:
    threads(2)
    cases = [draw_conv(seed=seed, batch=2, length=300, channels=96) for seed in range(4)]
    alone = [run_conv(case, "cpu") for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda case: run_conv(case, "cpu"), cases * 3))
    for i, result in enumerate(together):
        assert all(torch.equal(alone[i % 4][name], result[name]) for name in result)


def test_scratch_memory_does_not_grow_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    zeros, run = torch.Tensor.new_zeros, cpu_common.Kernel.run

    def new_zeros(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        made = zeros(self, *shape, **options)
        taken.append(made.numel() * made.element_size())
        return made

    def spy(self: Any, parameters: Any, tasks: int, scratch_bytes: int, elements: int) -> None:
        taken.append(scratch_bytes)
        run(self, parameters, tasks, scratch_bytes, elements)

    monkeypatch.setattr(torch.Tensor, "new_zeros", new_zeros)
    monkeypatch.setattr(cpu_common.Kernel, "run", spy)
    totals = []
    for length in (100_000, 200_000):
        taken.clear()
        run_conv(draw_conv(batch=1, length=length, channels=16, initial=False), "cpu")
        totals.append(sum(taken))
    assert totals[0] == totals[1]


@pytest.mark.parametrize("reverse", [False, True])
def test_rows_more_than_two_gigabytes_apart_are_found(reverse: bool) -> None:
    torch.use_deterministic_algorithms(False)  # which would fill what is only reserved here
    apart = 2**31 + 64
    try:
        room = torch.empty(2 * apart + 64, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no address space for 8 GB that are never touched")
    case = draw_conv(batch=1, length=3, channels=32, dtype=torch.bfloat16, reverse=reverse)
    far = room.as_strided((1, 3, 32), (3 * apart, apart, 1))
    far.copy_(case["x"])
    assert torch.equal(causal_conv1d(**{**case, "x": far}), causal_conv1d(**case))


def test_a_second_derivative_is_refused_in_words() -> None:
    case = draw_conv(length=5, channels=16)
    x = case["x"].requires_grad_()
    (dx,) = torch.autograd.grad(causal_conv1d(**case).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(dx.sum(), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, "x must be a real"),
        ({"x": torch.zeros(2, 5, 16, dtype=torch.long)}, "x must be a real"),
        ({"weight": torch.zeros(8, 4)}, "channels=16"),
        ({"weight": torch.zeros(16, 9)}, "width 1 to 8"),
        ({"bias": torch.zeros(8)}, "bias has shape"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"initial_state": torch.zeros(2, 4, 16)}, "initial_state has shape"),
        ({"resets": torch.zeros(2, 6, dtype=torch.bool)}, "resets has shape"),
        ({"x": torch.zeros(2, 0, 16)}, "empty"),
        ({"backend": "cuda"}, "cannot run this"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    case = draw_conv(length=5, channels=16)
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**case, **change})


# ---- the reference itself, and the registration with torch


@pytest.mark.parametrize("reverse", [False, True])
def test_the_reference_passes_gradcheck(reverse: bool) -> None:
    case = draw_conv(batch=1, length=5, channels=2, width=3, resets=0.3, reverse=reverse)
    leaves = {k: v.double().requires_grad_() for k, v in case.items() if isinstance(v, Tensor) and k != "resets"}
    rest = {k: v for k, v in case.items() if k not in leaves}

    def call(*values: Tensor) -> Any:
        arguments = dict(zip(leaves, values, strict=True))
        return causal_conv1d(**arguments, **rest, return_final_state=True, backend="reference")

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


def test_the_registered_ops_pass_opcheck() -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares outputs that it makes itself
    case = draw_conv(length=9, channels=16)
    inputs = [case[name] for name in ("x", "weight", "bias")]
    for value in inputs:
        value.requires_grad_()
    forward = (*inputs, True, case["initial_state"], None, False, "cpu")
    torch.library.opcheck(torch.ops.mambagen.causal_conv1d_forward.default, forward)
    inputs = [value.detach() for value in inputs]
    dy, dfinal = torch.randn_like(inputs[0]), torch.randn_like(case["initial_state"])
    backward = (dy, dfinal, *inputs, True, case["initial_state"], None, False, "cpu")
    torch.library.opcheck(torch.ops.mambagen.causal_conv1d_backward.default, backward)


@pytest.mark.slow
def test_torch_compile_takes_the_op_into_its_graph() -> None:
    torch.use_deterministic_algorithms(False)
    case = draw_conv(length=20, channels=32)

    def model(x: Tensor) -> Tensor:
        return causal_conv1d(**{**case, "x": torch.tanh(x)}) * 2

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        x = case["x"].clone().requires_grad_()
        y = run(x)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)
