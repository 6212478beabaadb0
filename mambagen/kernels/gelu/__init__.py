"""GELU with what stands around it, in one pass over memory: `gelu_product`, `product`, `masked_gelu`.

gelu(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the usual approximation (arXiv 1606.08415). Only the inputs
are kept for the backward. In Triton on a GPU; elsewhere torch does it, operation by operation.

An input is mostly what a projection gives, W x + bias, and the gradient of the bias the sum of the input's over all
positions, for which torch reads that gradient once more. The backward pass here takes the sum while it has the gradient
at hand, where it is given the bias; the projection then has to be one of a detached bias (see mambagen.models.bigs).
The sums are taken in float32 and in fixed order.
"""

from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambagen.kernels.dispatch import backend_module, entered_directly, is_plain_eager, triton_or_torch

__all__ = ["gelu", "gelu_product", "masked_gelu", "product"]


def gelu(x: Tensor) -> Tensor:
    """The approximation by tanh, of any tensor."""
    return F.gelu(x, approximate="tanh")


def gelu_product(
    a: Tensor, b: Tensor, a_bias: Tensor | None = None, b_bias: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """gelu(a) * gelu(b), computed in float32 at least.

    Args:
        a, b: (..., channels), of one shape and dtype, with any strides.
        a_bias, b_bias: (channels,), already part of a and b: they get the sum of a's and b's gradient. Both or none.
        backend: "torch" (any device), "triton" (a GPU, not float64), or "auto": Triton where that can run.

    Returns:
        Like a. Differentiable; once by Triton.

    Raises:
        ValueError: a and b or the biases do not match, or the backend cannot run this call.
    """
    return _either("gelu_product", a, b, a_bias, b_bias, True, backend)


def product(
    a: Tensor, b: Tensor, a_bias: Tensor | None = None, b_bias: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """a * b; see `gelu_product`. Without biases there is nothing to join."""
    return _either("product", a, b, a_bias, b_bias, False, backend)


def masked_gelu(x: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, backend: str = "auto") -> Tensor:
    """gelu(x), with zeros where the mask is true, whatever x holds there, NaN included.

    Args:
        x: (..., channels).
        bias: (channels,), already part of x: it gets the sum of x's gradient.
        mask: (..., 1) bool, one for all channels; None where nothing is masked.
        backend: as of `gelu_product`.

    Returns:
        Like x. Differentiable; once by Triton.

    Raises:
        ValueError: mask or bias do not fit x, or the backend cannot run this call.
    """
    if mask is None and bias is None:
        return gelu(x)
    if mask is not None and (mask.dtype != torch.bool or x.dim() == 0 or mask.shape != (*x.shape[:-1], 1)):
        raise ValueError(f"masked_gelu: a mask of {mask.dtype} {tuple(mask.shape)} does not fit x {tuple(x.shape)}")
    _check_bias("masked_gelu", x, bias)
    if triton_or_torch("gelu", backend, x) == "torch":
        y = gelu(_with_sum(x, bias))
        return y if mask is None else y.masked_fill(mask, 0.0)
    out: Tensor = (_masked_direct if is_plain_eager(x, mask, bias) else _masked)(x, mask, bias)
    return out


def _either(
    op: str, a: Tensor, b: Tensor, a_bias: Tensor | None, b_bias: Tensor | None, activate: bool, backend: str
) -> Tensor:
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"{op}: a is {a.dtype} {tuple(a.shape)}, but b is {b.dtype} {tuple(b.shape)}")
    if (a_bias is None) != (b_bias is None):
        raise ValueError(f"{op}: only one of two biases was given")
    _check_bias(op, a, a_bias)
    _check_bias(op, b, b_bias)
    if triton_or_torch("gelu", backend, a) == "torch" or (a_bias is None and not activate):
        a, b = _with_sum(a, a_bias), _with_sum(b, b_bias)
        return gelu(a) * gelu(b) if activate else a * b
    run = _product_direct if is_plain_eager(a, b, a_bias, b_bias) else _product
    y: Tensor = run(a, b, a_bias, b_bias, activate)
    return y


def _check_bias(op: str, x: Tensor, bias: Tensor | None) -> None:
    if bias is not None and (not x.dim() or bias.shape != x.shape[-1:]):
        raise ValueError(f"{op}: a bias {tuple(bias.shape)} does not fit {tuple(x.shape)}")


def _with_sum(x: Tensor, bias: Tensor | None) -> Tensor:
    """x, whose gradient sums up in the bias too."""
    return x if bias is None else x + (bias - bias.detach()).to(x.dtype)


def _triton() -> ModuleType:
    return backend_module("gelu", "triton")


def _product_now(a: Tensor, b: Tensor, a_bias: Tensor | None, b_bias: Tensor | None, activate: bool) -> Tensor:
    y: Tensor = _triton().product(a, b, activate)
    return y


def _product_gradients_now(
    dy: Tensor, a: Tensor, b: Tensor, activate: bool, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """da, db, and their sums (2, channels) float32, empty where they are not asked for."""
    da, db, summed = _triton().product_gradients(dy, a, b, activate, sums)
    return da, db, summed


def _masked_now(x: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    y: Tensor = gelu(x) if mask is None else _triton().masked(x, mask)
    return y


def _masked_gradient_now(dy: Tensor, x: Tensor, mask: Tensor | None, sums: bool) -> tuple[Tensor, Tensor]:
    """dx and its sum (channels,) float32, empty where it is not asked for."""
    dx, summed = _triton().masked_gradient(dy, x, mask, sums)
    return dx, summed


_product = torch.library.custom_op("mambagen::gelu_product", _product_now, mutates_args=())
_product_gradients = torch.library.custom_op("mambagen::gelu_product_backward", _product_gradients_now, mutates_args=())
_masked = torch.library.custom_op("mambagen::masked_gelu", _masked_now, mutates_args=())
_masked_gradient = torch.library.custom_op("mambagen::masked_gelu_backward", _masked_gradient_now, mutates_args=())


@_product.register_fake
def _(a: Tensor, b: Tensor, a_bias: Tensor | None, b_bias: Tensor | None, activate: bool) -> Tensor:
    return a.new_empty(a.shape)


@_product_gradients.register_fake
def _(dy: Tensor, a: Tensor, b: Tensor, activate: bool, sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    summed = a.new_empty((2, a.shape[-1]) if sums else (0,), dtype=torch.float32)
    return a.new_empty(a.shape), b.new_empty(b.shape), summed


@_masked.register_fake
def _(x: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@_masked_gradient.register_fake
def _(dy: Tensor, x: Tensor, mask: Tensor | None, sums: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1:] if sums else (0,), dtype=torch.float32)


def _setup_product(ctx, inputs, output):  # type: ignore[no-untyped-def]
    a, b, a_bias, b_bias, ctx.activate = inputs
    ctx.dtypes = None if a_bias is None else (a_bias.dtype, b_bias.dtype)
    ctx.save_for_backward(a, b)


def _of_product(ctx, dy, *, run=_product_gradients):  # type: ignore[no-untyped-def]
    da, db, sums = run(dy, *ctx.saved_tensors, ctx.activate, ctx.dtypes is not None)
    biases = (None, None) if ctx.dtypes is None else (v.to(t) for v, t in zip(sums, ctx.dtypes, strict=True))
    return da, db, *biases, None


def _setup_masked(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, mask, bias = inputs
    ctx.dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, mask)


def _of_masked(ctx, dy, *, run=_masked_gradient):  # type: ignore[no-untyped-def]
    dx, sums = run(dy, *ctx.saved_tensors, ctx.dtype is not None)
    return dx, None, None if ctx.dtype is None else sums.to(ctx.dtype)


_product.register_autograd(_of_product, setup_context=_setup_product)
_masked.register_autograd(_of_masked, setup_context=_setup_masked)
_product_direct = entered_directly(
    _product_now, _setup_product, once_differentiable(partial(_of_product, run=_product_gradients_now))
)
_masked_direct = entered_directly(
    _masked_now, _setup_masked, once_differentiable(partial(_of_masked, run=_masked_gradient_now))
)
