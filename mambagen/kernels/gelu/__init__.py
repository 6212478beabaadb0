"""GELU with what stands around it, in one pass over memory: `gelu_product`, `masked_gelu`.

gelu(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the usual approximation (arXiv 1606.08415). Only the inputs
are kept for the backward. In Triton on a GPU; elsewhere torch does it, operation by operation.
"""

from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambagen.kernels.dispatch import backend_module, entered_directly, is_plain_eager, triton_or_torch

__all__ = ["gelu", "gelu_product", "masked_gelu"]


def gelu(x: Tensor) -> Tensor:
    """The approximation by tanh, of any tensor."""
    return F.gelu(x, approximate="tanh")


def gelu_product(a: Tensor, b: Tensor, backend: str = "auto") -> Tensor:
    """gelu(a) * gelu(b), computed in float32 at least.

    Args:
        a, b: of one shape and dtype, with any strides.
        backend: "torch" (any device), "triton" (a GPU, not float64), or "auto": Triton where that can run.

    Returns:
        Like a. Differentiable; once by Triton.

    Raises:
        ValueError: a and b do not match, or the backend cannot run this call.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"gelu_product: a is {a.dtype} {tuple(a.shape)}, but b is {b.dtype} {tuple(b.shape)}")
    if triton_or_torch("gelu", backend, a) == "torch":
        return gelu(a) * gelu(b)
    y: Tensor = (_product_direct if is_plain_eager(a, b) else _product)(a, b)
    return y


def masked_gelu(x: Tensor, mask: Tensor | None, backend: str = "auto") -> Tensor:
    """gelu(x), with zeros where the mask is true, whatever x holds there, NaN included.

    Args:
        x: (..., channels).
        mask: (..., 1) bool, one for all channels; None where nothing is masked.
        backend: as of `gelu_product`.

    Returns:
        Like x. Differentiable; once by Triton.

    Raises:
        ValueError: the mask does not fit x, or the backend cannot run this call.
    """
    if mask is None:
        return gelu(x)
    if mask.dtype != torch.bool or x.dim() == 0 or mask.shape != (*x.shape[:-1], 1):
        raise ValueError(f"masked_gelu: a mask of {mask.dtype} {tuple(mask.shape)} does not fit x {tuple(x.shape)}")
    if triton_or_torch("gelu", backend, x) == "torch":
        return gelu(x).masked_fill(mask, 0.0)
    y: Tensor = (_masked_direct if is_plain_eager(x, mask) else _masked)(x, mask)
    return y


def _triton() -> ModuleType:
    return backend_module("gelu", "triton")


def _product_now(a: Tensor, b: Tensor) -> Tensor:
    y: Tensor = _triton().product(a, b)
    return y


def _product_gradients_now(dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    da, db = _triton().product_gradients(dy, a, b)
    return da, db


def _masked_now(x: Tensor, mask: Tensor) -> Tensor:
    y: Tensor = _triton().masked(x, mask)
    return y


def _masked_gradient_now(dy: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    dx: Tensor = _triton().masked_gradient(dy, x, mask)
    return dx


_product = torch.library.custom_op("mambagen::gelu_product", _product_now, mutates_args=())
_product_gradients = torch.library.custom_op("mambagen::gelu_product_backward", _product_gradients_now, mutates_args=())
_masked = torch.library.custom_op("mambagen::masked_gelu", _masked_now, mutates_args=())
_masked_gradient = torch.library.custom_op("mambagen::masked_gelu_backward", _masked_gradient_now, mutates_args=())


@_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape)


@_product_gradients.register_fake
def _(dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


@_masked.register_fake
def _(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_masked_gradient.register_fake
def _(dy: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _of_product(ctx, dy, *, run=_product_gradients):  # type: ignore[no-untyped-def]
    return run(dy, *ctx.saved_tensors)


def _of_masked(ctx, dy, *, run=_masked_gradient):  # type: ignore[no-untyped-def]
    return run(dy, *ctx.saved_tensors), None


_product.register_autograd(_of_product, setup_context=_save)
_masked.register_autograd(_of_masked, setup_context=_save)
_product_direct = entered_directly(
    _product_now, _save, once_differentiable(partial(_of_product, run=_product_gradients_now))
)
_masked_direct = entered_directly(
    _masked_now, _save, once_differentiable(partial(_of_masked, run=_masked_gradient_now))
)
