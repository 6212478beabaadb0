"""The long convolution in Triton against numpy's and float64; without a GPU in Triton's interpreter."""

from typing import Any

import numpy as np
import pytest
import torch

from mambagen.kernels.fft_conv import long_conv
from tests.kernels.helpers import relative_error
from tests.kernels.test_s4d import draw, run

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES: dict[str, dict[str, Any]] = {
    "a system for two channels": {"batch": 2, "length": 37, "channels": 6, "kernels": 3},
    "one step": {"batch": 3, "length": 1, "channels": 4, "kernels": 1, "skip": False},
    "kernels in two slabs": {"batch": 2, "length": 60, "channels": 70, "kernels": 70, "slab": 64 * 80, "reverse": True},
    "a shared kernel's rows in slabs": {"batch": 3, "length": 40, "channels": 70, "kernels": 1, "slab": 40 * 80},
    "a row a slab": {"batch": 2, "length": 20, "channels": 4, "kernels": 2, "slab": 1, "reverse": True},
    "rows of several blocks": {"batch": 3, "length": 1100, "channels": 2, "kernels": 1, "reverse": True},
    "without a skip": {"batch": 2, "length": 64, "channels": 33, "kernels": 33, "skip": False},
}


def inputs(batch: int, length: int, channels: int, kernels: int, skip: bool = True) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    shapes = [(batch, length, channels), (kernels, length), *([(channels,)] if skip else [])]
    return [torch.randn(shape, generator=make).to(DEVICE) for shape in shapes]


def convolved(tensors: list[torch.Tensor], reverse: bool, backend: str) -> list[torch.Tensor]:
    """y and the gradients of all inputs."""
    leaves = [v.detach().requires_grad_() for v in tensors]
    x, k, *skip = leaves
    y = long_conv(x, k, reverse, skip[0] if skip else None, backend)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("name", CASES)
def test_it_is_numpys_convolution_with_all_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = dict(CASES[name])
    reverse, slab = case.pop("reverse", False), case.pop("slab", 2**17)
    for constant in ("SLAB_CPU", "SLAB_GPU"):
        monkeypatch.setattr(f"mambagen.kernels.fft_conv.{constant}", slab)
    monkeypatch.setattr("mambagen.kernels.fft_conv.LEAST_ROWS", 1)
    tensors = inputs(**case)
    ours = convolved(tensors, reverse, "triton")
    exact = convolved([v.double() for v in tensors], reverse, "torch")
    for a, b in zip(ours, exact, strict=True):
        assert relative_error(a, b) < 1e-6

    x, k, *skip = (v.double().cpu().numpy() for v in tensors)
    step, each = -1 if reverse else 1, x.shape[2] // len(k)
    for c in range(0, x.shape[2], 5):
        row = x[-1, ::step, c]
        y = np.convolve(row, k[c // each])[: len(row)] + (skip[0][c] * row if skip else 0)
        np.testing.assert_allclose(ours[0][-1, :, c].cpu().numpy()[::step], y, atol=1e-5 * len(row) ** 0.5)


def test_sequences_of_bfloat16_are_off_by_their_rounding_only() -> None:
    tensors = inputs(2, 50, 6, 6)
    tensors[0] = tensors[0].bfloat16()
    ours = convolved(tensors, False, "triton")
    exact = convolved([v.double() for v in tensors], False, "torch")
    assert ours[0].dtype == ours[1].dtype == torch.bfloat16
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=2**-7, atol=1e-5)  # the interpreter cuts bits off
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert relative_error(a, b) < 1e-2  # the gradient that entered was rounded too


def test_any_strides_will_do() -> None:
    x, k, skip = inputs(2, 30, 8, 4)
    twisted = x.permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    y = long_conv(twisted, k.mT.contiguous().mT, False, skip, "triton")
    torch.testing.assert_close(y, long_conv(x, k, False, skip, "triton"), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), twisted)  # dy without strides
    assert relative_error(gradient, convolution_of_ones(k, skip).expand(x.shape)) < 1e-6


def convolution_of_ones(k: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """d sum(y) / d x_t: the sum of the kernel's first length - t values, and the skip; (length, channels)."""
    sums = torch.from_numpy(np.cumsum(k.double().cpu().numpy(), 1))
    return sums.flip(1).repeat_interleave(2, 0).T.to(DEVICE) + skip.double()


def test_the_same_numbers_every_time() -> None:
    tensors = inputs(4, 64, 8, 1)
    first, second = (convolved(tensors, False, "triton") for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    "options",
    [{"resets": 0.1, "reverse": True}, {"initial": False, "channels": 66, "ssms": 1}],
    ids=["documents", "shared by 66 channels"],
)
def test_s4d_by_it_equals_the_recurrence(options: dict[str, Any]) -> None:
    case = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in draw(**options).items()}
    exact = run(case, "reference", double=True)
    for name, value in run(case, "triton").items():
        assert relative_error(value, exact[name]) < 5e-6, name


def test_what_it_cannot_do_is_named() -> None:
    x, k, skip = inputs(2, 30, 8, 4)
    with pytest.raises(ValueError, match="float64"):
        long_conv(x, k.double(), backend="triton")
    with pytest.raises(ValueError, match="one of auto, triton, torch"):
        long_conv(x, k, backend="cuda")
    with pytest.raises(ValueError, match=r"skip has shape \(4,\)"):
        long_conv(x, k, False, skip[:4])
    with pytest.raises(ValueError, match="do not fit"):
        long_conv(x, k[:3])
    y = long_conv(x.requires_grad_(), k, backend="triton")
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
