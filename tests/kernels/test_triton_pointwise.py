"""GELU's products and masks and the residual LayerNorm: Triton (interpreted without a GPU) against torch in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambagen.kernels.gelu import gelu_product, masked_gelu, product
from mambagen.kernels.layer_norm import add_layer_norm
from tests.kernels.helpers import relative_error

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "one element": (1, 1),
    "odd": (3, 37, 5),
    "no batch": (48,),
    "two blocks": (3, 19, 48),
    "one row": (1, 1, 272),
    "wide": (2, 1100),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# one unit in the last place: on a GPU half of it, but the interpreter cuts bfloat16's bits off
UNIT = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def results(run: Callable[..., Any], tensors: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """All outputs, and the gradients of all inputs for these of the outputs."""
    leaves = [v.detach().requires_grad_() for v in tensors]
    outputs = run(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    gradients = torch.autograd.grad(outputs, leaves, [g.to(y) for g, y in zip(given, outputs, strict=False)])
    return [*(y.detach() for y in outputs), *gradients]


def exact_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def assert_near(ours: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float = 2e-6) -> None:
    for a, b in zip(ours, exact, strict=True):
        assert b.dtype == torch.float64
        if a.dtype == torch.float32:
            assert relative_error(a, b) <= tolerance
        else:
            torch.testing.assert_close(a.double(), b, rtol=UNIT[a.dtype], atol=1e-6)


@shapes
@dtypes
def test_a_product_of_two_gelus_is_its_formula_with_both_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b, dy = (draw(*shape, seed=i, dtype=dtype) for i in (1, 2, 3))
    ours = results(lambda a, b: gelu_product(a, b, backend="triton"), [a, b], [dy])
    exact = results(lambda a, b: exact_gelu(a) * exact_gelu(b), [a.double(), b.double()], [dy])
    assert {v.dtype for v in ours} == {dtype}
    assert_near(ours, exact)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("value", [-1e4, -30.0, -8.0, -1e-6, 0.0, 1e-6, 8.0, 30.0, 1e4])
def test_gelus_ends_are_no_nan_and_no_difference_of_near_numbers(value: float) -> None:
    x, one = torch.full((40,), value, device=DEVICE), torch.full((40,), 2.0, device=DEVICE)
    y, dx, _ = results(lambda a, b: gelu_product(a, b, backend="triton"), [x, one], [one])
    exact = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    share = torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (exact + 0.044715 * exact**3))
    want = exact * share * exact_gelu(torch.tensor(2.0).double())
    (slope,) = torch.autograd.grad(2 * want, exact)
    # relative: torch's own formula knows nothing of gelu(-8), which is about -1e-15
    torch.testing.assert_close(y.double().cpu(), want.detach().expand(40), rtol=1e-4, atol=1e-30)
    torch.testing.assert_close(dx.double().cpu(), slope.expand(40), rtol=1e-4, atol=1e-30)


@shapes
@dtypes
def test_a_masked_gelu_is_silent_where_the_mask_is_true(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, dy = (draw(*shape, seed=i, dtype=dtype) for i in (1, 3))
    mask = draw(*shape[:-1], 1, seed=5) > 0.5
    exact = results(lambda x: exact_gelu(x).masked_fill(mask, 0.0), [x.double()], [dy])
    spoilt = x.masked_fill(mask, float("nan"))
    ours = results(
        lambda x: masked_gelu(x, mask=mask, backend="triton"), [spoilt], [dy.masked_fill(mask, float("inf"))]
    )
    assert {v.dtype for v in ours} == {dtype}
    assert_near(ours, exact)


def exact_norm(h: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = h if branch is None else h + branch
    centred = total - total.mean(-1, keepdim=True)
    return total, centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias


@shapes
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("add", [True, False], ids=["with a branch", "alone"])
def test_a_stream_and_its_norm_are_their_formulas_with_all_gradients(
    shape: tuple[int, ...], low: torch.dtype, add: bool
) -> None:
    h, branch = draw(*shape, seed=1) + 3, draw(*shape, seed=2, dtype=low)
    weight, bias = draw(shape[-1], seed=3), draw(shape[-1], seed=4)
    tensors = [h, *([branch] if add else []), weight, bias]
    given = [draw(*shape, seed=5), draw(*shape, seed=6, dtype=low)]

    def run(norm: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*v: Tensor) -> tuple[Tensor, ...]:
            outputs = norm(v[0], v[1] if add else None, *v[-2:])
            return outputs if add else outputs[1:]

        return forward

    ours = results(
        run(lambda *v: add_layer_norm(*v, 1e-3, low, backend="triton")), tensors, given if add else given[1:]
    )
    exact = results(run(exact_norm), [v.double() for v in tensors], given if add else given[1:])
    assert [v.dtype for v in ours] == [*([torch.float32] if add else []), low, *(v.dtype for v in tensors)]
    near = 2e-6 if shape[-1] > 1 else 1e-5  # one channel: all but the bias is zero but for rounding
    for a, b in zip(ours, exact, strict=True):
        if a.dtype == torch.float32:
            assert (a.double() - b).abs().max() <= near * b.abs().max() + 1e-6
        else:
            torch.testing.assert_close(a.double(), b, rtol=UNIT[low], atol=2e-5)


def of_positions(v: Tensor) -> Tensor:
    return v.flatten(0, -2).sum(0) if v.dim() > 1 else v


def assert_sums(found: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Sums of exact gradients, in float32; their terms may cancel."""
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        terms = b.abs().flatten(0, -2).sum(0) if b.dim() > 1 else b.abs()
        assert ((a.double() - of_positions(b)).abs() <= 2e-6 * terms.max() + 1e-6).all()


@shapes
@dtypes
@pytest.mark.parametrize("op", ["gelu_product", "product", "masked_gelu", "gelu alone"])
def test_biases_get_the_sums_of_gradients_that_are_otherwise_the_same(
    shape: tuple[int, ...], dtype: torch.dtype, op: str
) -> None:
    a, b, dy = (draw(*shape, seed=i, dtype=dtype) for i in (1, 2, 3))
    p, q = (draw(shape[-1], seed=i) for i in (4, 5))  # their values are part of a and b already
    mask = None if op == "gelu alone" else draw(*shape[:-1], 1, seed=5) > 0.5
    if op in ("masked_gelu", "gelu alone"):
        ours = results(lambda x, p: masked_gelu(x, p, mask, backend="triton"), [a, p], [dy])
        exact = results(
            lambda x: exact_gelu(x).masked_fill(mask if mask is not None else x != x, 0), [a.double()], [dy]
        )
    else:
        function = gelu_product if op == "gelu_product" else product
        exactly = (lambda a, b: exact_gelu(a) * exact_gelu(b)) if op == "gelu_product" else torch.mul
        ours = results(lambda *v: function(*v, backend="triton"), [a, b, p, q], [dy])
        exact = results(exactly, [a.double(), b.double()], [dy])
    plain = len(exact)
    assert_near(ours[:plain], exact)
    assert_sums(ours[plain:], exact[1:])


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_branchs_bias_gets_the_sum_of_its_gradient(low: torch.dtype) -> None:
    tensors = [draw(3, 37, 20, seed=1), draw(3, 37, 20, seed=2, dtype=low), *(draw(20, seed=i) for i in (3, 4, 5))]
    given = [draw(3, 37, 20, seed=6), draw(3, 37, 20, seed=7)]
    ours = results(
        lambda h, x, w, b, p: add_layer_norm(h, x, w, b, 1e-3, torch.float32, p, backend="triton"), tensors, given
    )
    exact = results(exact_norm, [v.double() for v in tensors[:4]], given)
    assert_near(ours[:-1], exact)
    assert_sums(ours[-1:], exact[3:4])
    leaves = [v.clone().requires_grad_() for v in tensors]
    total, _ = add_layer_norm(*leaves[:4], 1e-3, torch.float32, leaves[4], backend="triton")  # type: ignore[arg-type]
    (sums,) = torch.autograd.grad(total, leaves[4], given[0])
    assert_sums([sums], [given[0].double()])


def test_torch_and_triton_give_biases_the_same() -> None:
    a, b, w = draw(6, 20, seed=1), draw(6, 20, seed=2), draw(20, seed=3)
    runs: list[Callable[..., Any]] = [
        lambda a, b, w, backend: gelu_product(a, b, w, w, backend=backend),
        lambda a, b, w, backend: product(a, b, w, w, backend=backend),
        lambda a, b, w, backend: masked_gelu(a, w, b[:, :1] > 0, backend=backend) + b,
        lambda a, b, w, backend: add_layer_norm(a, b, w.detach(), w.detach(), 1e-3, a.dtype, w, backend=backend),
    ]
    for run in runs:
        exact = results(lambda *v, run=run: run(*v, "torch"), [v.double() for v in (a, b, w)], [a, b])
        assert_near(results(lambda *v, run=run: run(*v, "triton"), [a, b, w], [a, b]), exact)


@pytest.mark.parametrize("used", [0, 1], ids=["only the sum", "only the norm"])
def test_a_part_that_nothing_uses_gives_no_gradient(used: int) -> None:
    shape = (5, 33)
    tensors = [draw(*shape, seed=1), draw(*shape, seed=2), draw(33, seed=3), draw(33, seed=4)]
    own = [0, 1] if used == 0 else [0, 1, 2, 3]
    found = []
    for run in (lambda *v: add_layer_norm(*v, 1e-3, torch.float32, backend="triton"), exact_norm):
        leaves = [v.to(torch.float64 if run is exact_norm else torch.float32).requires_grad_() for v in tensors]
        y = run(*leaves)[used]
        found.append(torch.autograd.grad(y, [leaves[i] for i in own], draw(*shape, seed=5).to(y)))
    assert_near(*found)


def test_any_strides_will_do_and_gradients_may_be_expanded() -> None:
    def twisted(v: Tensor) -> Tensor:
        return v.permute(2, 0, 1).contiguous().permute(1, 2, 0)

    a, b = draw(2, 15, 24, seed=1), draw(2, 15, 24, seed=2)
    mask = draw(2, 15, 1, seed=3) > 0
    weight, bias = draw(24, seed=4), draw(48, seed=5)[::2]
    runs: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda a, b: gelu_product(a, b, backend="triton"),
        lambda a, b: masked_gelu(a, mask=mask.expand(2, 15, 24)[..., 3:4], backend="triton") + b,
        lambda a, b: sum(add_layer_norm(a, b, weight, bias, 1e-5, torch.float32, backend="triton")),  # type: ignore[arg-type,return-value]
    ]
    for run in runs:
        found = []
        for x, y in ((a, b), (twisted(a), twisted(b))):
            leaves = [v.detach().requires_grad_() for v in (x, y)]
            out = run(*leaves)
            found.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 5)], ids=["no rows", "no channels", "no steps"])
def test_without_elements_there_is_nothing_to_do(shape: tuple[int, ...]) -> None:
    a, b = (draw(*shape).requires_grad_() for _ in range(2))
    weight, bias = (draw(shape[-1]).requires_grad_() for _ in range(2))
    mask = torch.zeros(*shape[:-1], 1, dtype=torch.bool, device=DEVICE)
    total, y = add_layer_norm(a, b, weight, bias, 1e-5, torch.bfloat16, backend="triton")
    for out in (gelu_product(a, b, backend="triton"), masked_gelu(a, mask=mask, backend="triton"), total, y):
        assert out.shape == shape
        out.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_the_same_numbers_every_time_whatever_the_number_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from mambagen.kernels.layer_norm import triton

    for tile in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(triton, tile, (64, 16))
    tensors = [draw(45, 24, seed=1), draw(45, 24, seed=2), draw(24, seed=3), draw(24, seed=4)]
    given = [draw(45, 24, seed=5), draw(45, 24, seed=6)]

    def run() -> list[Tensor]:
        return results(lambda *v: add_layer_norm(*v, 1e-3, torch.float32, backend="triton"), tensors, given)

    first, again = run(), run()
    assert all(map(torch.equal, first, again))
    exact = results(exact_norm, [v.double() for v in tensors], given)
    assert_near(first, exact)
    monkeypatch.setattr(triton, "PROGRAMS", 1)
    monkeypatch.setattr(triton, "processors", lambda device: 3)
    assert_near(run(), exact)


def layer(h: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, backend: str) -> Tensor:
    h, x = add_layer_norm(h, branch, weight, bias, 1e-5, torch.float32, backend=backend)
    h, x = add_layer_norm(
        h,
        gelu_product(x, masked_gelu(x, mask=mask, backend=backend), backend=backend),
        weight,
        bias,
        1e-5,
        x.dtype,
        backend=backend,
    )
    return h + add_layer_norm(x, None, weight, bias, 1e-5, x.dtype, backend=backend)[1]


def layer_inputs() -> list[Tensor]:
    return [*(draw(2, 7, 10, seed=i) for i in (1, 2)), *(draw(10, seed=i) for i in (3, 4))]


def test_triton_and_torch_agree_in_a_layer_and_torch_compile_takes_the_ops_into_its_graph() -> None:
    mask = draw(2, 7, 1, seed=8) > 0
    given = [draw(2, 7, 10, seed=9)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    exact = results(lambda *v: layer(*v, mask, "torch"), [v.double() for v in layer_inputs()], given)
    exact32 = results(lambda *v: layer(*v, mask, "triton"), layer_inputs(), given)
    for a, b in zip(exact32, exact, strict=True):
        assert relative_error(a, b) < 5e-6
    for backend in ("triton", "torch", "auto"):
        ours = results(lambda *v, backend=backend: compiled(*v, mask, backend), layer_inputs(), given)
        for a, b in zip(ours, exact, strict=True):
            assert relative_error(a, b) < 5e-6


def test_the_registered_triton_ops_pass_opcheck() -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares outputs that it makes itself
    h, branch, weight, bias = (v.requires_grad_() for v in layer_inputs())
    mask = draw(2, 7, 1, seed=8) > 0
    ops = torch.ops.mambagen
    torch.library.opcheck(ops.gelu_product.default, (h, branch, weight, bias, True))
    torch.library.opcheck(ops.masked_gelu.default, (h, mask, bias))
    moments = torch.stack([h.detach().mean(-1).flatten(), h.detach().var(-1).flatten() ** -0.5])
    for other in (branch, None):
        torch.library.opcheck(
            ops.add_layer_norm.default, (h, other, weight, bias, None if other is None else bias, 1e-5, torch.float32)
        )
    for given, low in ((branch.detach(), torch.bfloat16), (None, None)):
        inputs = (branch.detach(), given, h.detach(), weight.detach(), moments, low, low is not None)
        torch.library.opcheck(ops.add_layer_norm_backward.default, inputs)


def test_what_triton_cannot_do_is_said() -> None:
    x, w = draw(2, 3, dtype=torch.float64), draw(3)
    with pytest.raises(ValueError, match="float64"):
        gelu_product(x, x, backend="triton")
    with pytest.raises(ValueError, match="adds in float32"):
        add_layer_norm(x.bfloat16(), None, w, w, 1e-5, torch.float32, backend="triton")
    with pytest.raises(ValueError, match="at most 8192"):
        add_layer_norm(draw(1, 8193), None, draw(8193), draw(8193), 1e-5, torch.float32, backend="triton")
    with pytest.raises(ValueError, match="but b is"):
        gelu_product(x, x.float())
    with pytest.raises(ValueError, match="does not fit x"):
        masked_gelu(x, mask=torch.zeros(2, 3, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match=r"branch .* does not fit h"):
        add_layer_norm(x, x[:1], w, w, 1e-5, torch.float32)
    with pytest.raises(ValueError, match=r"\(2,\) do not fit"):
        add_layer_norm(x, x, w, w[:2], 1e-5, torch.float32)
    with pytest.raises(ValueError, match="backend is 'numba'"):
        gelu_product(x, x, backend="numba")


def test_auto_is_triton_on_a_gpu_alone_and_float64_has_second_derivatives() -> None:
    x = draw(2, 4, dtype=torch.float64).requires_grad_()
    other = draw(2, 4, seed=1, dtype=torch.float64).requires_grad_()
    w = draw(4, seed=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(gelu_product, (x, other))
    assert torch.autograd.gradcheck(lambda h, b, w: add_layer_norm(h, b, w, w, 1e-5, torch.float64), (x, other, w))
    low = gelu_product(x.float(), other.float())
    torch.testing.assert_close(low, F.gelu(x.float(), approximate="tanh") * F.gelu(other.float(), approximate="tanh"))
