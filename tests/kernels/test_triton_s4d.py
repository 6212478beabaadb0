"""Coefficients and the Vandermonde product in Triton against float64; without a GPU in Triton's interpreter."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mambagen.kernels.s4d import s4d
from mambagen.kernels.s4d.discretise import coefficients, discretise
from mambagen.kernels.s4d.vandermonde import vandermonde_product
from tests.kernels.helpers import assert_close, relative_error
from tests.kernels.test_s4d import draw, run

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN, so that what a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def system(ssms: int, state: int) -> tuple[torch.Tensor, torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    c = torch.randn(ssms, state, dtype=torch.complex64, generator=make)
    decay = -torch.exp(torch.randn(ssms, state, generator=make) - 6)
    turns = torch.rand(ssms, state, generator=make) * 40
    return c.to(DEVICE), torch.complex(decay, turns).to(torch.complex128).to(DEVICE)


@pytest.mark.parametrize(
    ("ssms", "state", "length"), [(1, 1, 1), (1, 64, 2500), (3, 5, 65), (2, 33, 2048), (5, 16, 31), (1, 3, 9000)]
)
def test_product_and_gradients_equal_their_definition(ssms: int, state: int, length: int) -> None:
    c, z = (v.requires_grad_() for v in system(ssms, state))
    exact_c, exact_z = (v.detach().to(torch.complex128).requires_grad_() for v in (c, z))
    t = torch.arange(length, device=DEVICE)
    exact = 2 * (exact_c[..., None] * torch.exp(exact_z[..., None] * t)).sum(1).real
    ours = vandermonde_product(c, z, length, "triton")
    assert ours.shape == (ssms, length)
    assert relative_error(ours, exact) < 3e-6
    g = torch.randn(ssms, length, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = torch.autograd.grad((ours * g).sum(), [c, z])
    wanted = torch.autograd.grad((exact * g.double()).sum(), [exact_c, exact_z])
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())) < 5e-6


@pytest.mark.parametrize("options", [{}, {"ssms": 1, "reverse": True}, {"real": True}, {"resets": 0.1}], ids=str)
def test_the_op_equals_the_recurrence_with_all_gradients(options: dict[str, object]) -> None:
    case = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in draw(**options).items()}
    assert_close(run(case, "triton"), run(case, "reference", double=True), 5e-6)


def test_gradients_repeat_bit_for_bit() -> None:
    c, z = (v.requires_grad_() for v in system(2, 8))
    first, second = (
        torch.autograd.grad(vandermonde_product(c, z, 5000, "triton").square().sum(), [c, z]) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def continuous(ssms: int, state: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """dt, A and C in which every branch is met: steps down to 1e-9, a pole at 0, tens of radians a step."""
    make = torch.Generator().manual_seed(0)
    dt = torch.logspace(-9, -0.5, ssms, dtype=dtype)
    real = -torch.exp(3 * torch.randn(ssms, state, generator=make, dtype=dtype))
    A = torch.complex(real, 100 * torch.rand(ssms, state, generator=make, dtype=dtype))
    A[-1, 0] = 0
    C = torch.randn(ssms, state, dtype=A.dtype, generator=make)
    return dt.to(DEVICE), A.to(DEVICE), C.to(DEVICE)


@pytest.mark.parametrize(
    ("ssms", "state", "real"), [(20, 5, False), (1, 64, False), (9, 33, True), (7, 1, False)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_coefficients_and_gradients_are_those_of_the_discretisation(
    ssms: int, state: int, real: bool, dtype: torch.dtype
) -> None:
    tensors = continuous(ssms, state, dtype)
    if real:
        tensors = tuple(v.real.contiguous() for v in tensors)
    dt, A, C = leaves = [v.requires_grad_() for v in tensors]
    z, b = discretise(dt, A)
    ours = coefficients(dt, A, C, "zoh", torch.complex64, "triton")
    torch.testing.assert_close(ours[0], z, rtol=1e-15, atol=0)
    torch.testing.assert_close(ours[1], (C * b).to(torch.complex64), rtol=1e-6, atol=0)
    make = torch.Generator().manual_seed(1)
    dz, dc = (torch.randn(v.shape, generator=make, dtype=torch.complex64).to(v) for v in ours)
    found = torch.autograd.grad(ours, leaves, (dz, dc))
    exact = [v.detach().to(torch.complex128 if v.is_complex() else torch.float64).requires_grad_() for v in leaves]
    z, b = discretise(*exact[:2])
    wanted = torch.autograd.grad((z, b * exact[2]), exact, (dz.to(z.dtype), dc.to(z.dtype)))
    for value, right, leaf in zip(found, wanted, leaves, strict=True):
        assert value.dtype == leaf.dtype
        torch.testing.assert_close(value.to(right.dtype), right, rtol=2e-7 if dtype == torch.float32 else 1e-9, atol=0)


def test_no_gradient_of_one_part_is_zero_of_it() -> None:
    dt, A, C = (v.requires_grad_() for v in continuous(3, 4))
    z, c = coefficients(dt, A, C, "zoh", torch.complex64, "triton")
    d_dt, dC = torch.autograd.grad(z.real.sum(), [dt, C], retain_graph=True)
    torch.testing.assert_close(d_dt, A.detach().real.sum(1))
    assert not dC.any()
    (dA,) = torch.autograd.grad(torch.view_as_real(c).sum(), A)
    assert torch.view_as_real(dA).all()


def test_coefficients_are_registered_in_full() -> None:
    tensors = tuple(v.requires_grad_() for v in continuous(3, 4))
    torch.library.opcheck(torch.ops.mambagen.s4d_coefficients.default, tensors)


def test_torch_compile_takes_the_op_into_its_graph() -> None:
    case = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in draw(initial=False).items()}

    def gradients(of: Callable[..., Any]) -> tuple[torch.Tensor, ...]:
        leaves = {name: case[name].clone().requires_grad_() for name in ("x", "dt", "A", "C", "D")}
        y = of(**{**case, **leaves}, backend="triton")
        return y.detach(), *torch.autograd.grad(y.square().sum(), list(leaves.values()))

    compiled = torch.compile(s4d, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(gradients(compiled), gradients(s4d), strict=True):
        torch.testing.assert_close(ours, eager)


def test_float64_is_refused_by_the_op() -> None:
    case = draw(initial=False)
    case["x"] = case["x"].double()
    with pytest.raises(ValueError, match="float64 runs on the reference only"):
        s4d(**{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in case.items()}, backend="triton")
