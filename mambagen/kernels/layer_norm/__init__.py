"""A residual stream and its LayerNorm in one pass: `add_layer_norm`.

total = h + branch and y = (total - mean) / sqrt(variance + epsilon) * weight + bias over the last axis (arXiv
1607.06450), mean and variance in float32 and y rounded once to the dtype that its readers compute in. What is kept for
the backward is the total, which the stream holds anyway, and two numbers a row. In Triton on a GPU; elsewhere torch
does it, operation by operation.
"""

from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambagen.kernels.dispatch import backend_module, entered_directly, is_plain_eager, triton_or_torch

__all__ = ["add_layer_norm"]


def add_layer_norm(
    h: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    dtype: torch.dtype,
    branch_bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add to a residual stream and normalise the sum.

    Args:
        h: (..., channels), the stream, float32 or float64.
        branch: like h, of any floating dtype: what is added. None where nothing is.
        weight, bias: (channels,).
        epsilon: is added to the variance.
        dtype: of y.
        branch_bias: (channels,), already part of the branch: it gets the sum of the branch's gradient, which then has
            not to be read once more (see `mambagen.kernels.gelu`).
        backend: "torch" (any device), "triton" (a GPU, h float32), or "auto": Triton where that can run.

    Returns:
        The sum, like h (h itself without a branch), and y of `dtype`. Differentiable; once by Triton.

    Raises:
        ValueError: shapes do not fit, or the backend cannot run this call.
    """
    last = h.shape[-1:]
    if not last or weight.shape != last or bias.shape != last:
        raise ValueError(f"add_layer_norm: {tuple(weight.shape)} and {tuple(bias.shape)} do not fit {tuple(h.shape)}")
    if branch is not None and branch.shape != h.shape:
        raise ValueError(f"add_layer_norm: branch {tuple(branch.shape)} does not fit h {tuple(h.shape)}")
    if branch_bias is not None and (branch is None or branch_bias.shape != last):
        raise ValueError(f"add_layer_norm: a branch's bias {tuple(branch_bias.shape)} does not fit {tuple(h.shape)}")
    if triton_or_torch("layer_norm", backend, h) == "torch":
        if branch is not None and branch_bias is not None:
            branch = branch + (branch_bias - branch_bias.detach()).to(branch.dtype)
        total = h if branch is None else h + branch
        if weight.dtype != h.dtype or bias.dtype != h.dtype:
            weight, bias = weight.to(h.dtype), bias.to(h.dtype)
        y = F.layer_norm(total, last, weight, bias, epsilon)
        return total, y if y.dtype == dtype else y.to(dtype)
    run = _direct if is_plain_eager(h, branch, weight, bias, branch_bias) else _forward
    total, y, _ = run(h, branch, weight, bias, branch_bias, epsilon, dtype)
    return (h if branch is None else total), y


def _triton() -> ModuleType:
    return backend_module("layer_norm", "triton")


def _forward_now(
    h: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (empty without a branch), y, and mean and 1 / deviation (2, rows)."""
    total, y, moments = _triton().forward(h, branch, weight, bias, epsilon, dtype)
    return total, y, moments


def _backward_now(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    moments: Tensor,
    low: torch.dtype | None,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, the same in dtype `low` (empty where that is None), and dweight, dbias and with `sums` dbranch_bias.

    The latter are (2 or 3, channels) float32.
    """
    dh, dbranch, parameters = _triton().backward(dy, dtotal, total, weight, moments, low, sums)
    return dh, dbranch, parameters


_forward = torch.library.custom_op("mambagen::add_layer_norm", _forward_now, mutates_args=())
_backward = torch.library.custom_op("mambagen::add_layer_norm_backward", _backward_now, mutates_args=())


@_forward.register_fake
def _(
    h: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    total = h.new_empty(0 if branch is None else h.shape)
    return total, h.new_empty(h.shape, dtype=dtype), h.new_empty(2, h.numel() // h.shape[-1])


@_backward.register_fake
def _(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    moments: Tensor,
    low: torch.dtype | None,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dbranch = total.new_empty(0) if low is None else total.new_empty(total.shape, dtype=low)
    return total.new_empty(total.shape), dbranch, total.new_empty(3 if sums else 2, total.shape[-1])


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    h, branch, *parameters, _, _ = inputs
    total, _, moments = output
    ctx.set_materialize_grads(False)
    ctx.branch = None if branch is None else branch.dtype
    ctx.dtypes = [None if v is None else v.dtype for v in parameters]
    ctx.save_for_backward(h if branch is None else total, parameters[0], moments)


def _gradients(ctx, dtotal, dy, _, *, backward=_backward):  # type: ignore[no-untyped-def]
    total, weight, moments = ctx.saved_tensors
    if ctx.branch is None:
        dtotal = None  # of an empty tensor
    if dy is None:  # nothing but the sum was used
        dbranch = None if dtotal is None else dtotal.to(ctx.branch)
        sums = None if dtotal is None or ctx.dtypes[2] is None else dtotal.flatten(0, -2).sum(0).to(ctx.dtypes[2])
        return dtotal, dbranch, None, None, sums, None, None
    low = None if ctx.branch == total.dtype else ctx.branch
    dh, dbranch, parameters = backward(dy, dtotal, total, weight, moments, low, ctx.dtypes[2] is not None)
    own = [v.to(dtype) for v, dtype in zip(parameters, ctx.dtypes, strict=False)]
    dweight, dbias, sums = own if len(own) == 3 else (*own, None)
    return dh, None if ctx.branch is None else dh if low is None else dbranch, dweight, dbias, sums, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
_direct = entered_directly(_forward_now, _setup, once_differentiable(partial(_gradients, backward=_backward_now)))
