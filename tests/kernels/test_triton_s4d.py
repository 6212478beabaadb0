"""The Vandermonde product in Triton against its definition in float64; without a GPU in Triton's interpreter."""

from collections.abc import Iterator

import pytest
import torch

from mambagen.kernels.dispatch import backend_module
from mambagen.kernels.s4d import s4d
from mambagen.kernels.s4d.blocks import _carry
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


@pytest.mark.parametrize("backwards", [False, True])
def test_states_are_carried_as_by_the_loop(backwards: bool) -> None:
    make = torch.Generator().manual_seed(0)
    entered = torch.randn(3 * 7, 10, 70, generator=make).to(DEVICE)
    a = torch.polar(torch.rand(5, generator=make), torch.rand(5, generator=make) * 6).to(DEVICE)
    exact = _carry(entered.double(), a.to(torch.complex128), 3, backwards)
    ours = backend_module("s4d", "triton").carry(entered.clone(), a, 3, backwards)
    assert relative_error(ours, exact) < 1e-6


def test_float64_is_refused_by_the_op() -> None:
    case = draw(initial=False)
    case["x"] = case["x"].double()
    with pytest.raises(ValueError, match="float64 runs on the reference only"):
        s4d(**{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in case.items()}, backend="triton")
