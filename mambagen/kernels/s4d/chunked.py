"""The convolution with a diagonal system's kernel as products over chunks of steps, the state handed from one to the
next: on a Hopper GPU, in bfloat16, where many channels share a system. `chunked_conv`.

A chunk of J steps is a (J, J) Toeplitz matrix times x and, for all that came before, a (J, 2N) matrix times the state.
Channels that share a system share the matrices, so these are products for tensor cores: about J + 6N multiply-adds an
element, where the FFT moves 68 bytes. x is read once or twice and y written once. See chunked_triton.py.
"""

from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambagen.kernels.dispatch import backend_module, entered_directly, is_plain_eager
from mambagen.kernels.launching import is_hopper

LEAST_CHANNELS = 16  # a system
MOST_STATES = 64  # `chunked_triton.LANES`


def pays(x: Tensor, ssms: int, state: int) -> bool:
    """Whether this can do the call and is quicker than the FFT; x (batch, length, channels).

    On Hopper: what came before has not the shared memory, and what came after would need other shapes, as its products
    have a memory of their own.
    """
    fits = x.dtype == torch.bfloat16 and x.shape[2] >= LEAST_CHANNELS * ssms and state <= MOST_STATES
    return fits and (not x.is_cuda or is_hopper(x.device))


def chunked_conv(x: Tensor, c: Tensor, z: Tensor, reverse: bool = False, skip: Tensor | None = None) -> Tensor:
    """y_t = sum_(s <= t) k_(t - s) x_s + D x_t with k_j = 2 Re sum_n c_n exp(j z_n), or the other way in time.

    Args:
        x: (batch, length, channels) bfloat16, on a Hopper GPU (or anywhere in Triton's interpreter).
        c: (ssms, state) complex64, z: (ssms, state) complex128; ssms divides channels: neighbours share a system.
        reverse: from the last position to the first.
        skip: (channels,) D.

    Returns:
        y like x. Differentiable once in x, c, z and skip.
    """
    if skip is not None:
        skip = skip.float()
    run = _direct if is_plain_eager(x, c, z, skip) else _forward
    y: Tensor = run(x, c, z, skip, reverse)
    return y


@torch.library.custom_op("mambagen::s4d_chunked", mutates_args=())
def _forward(x: Tensor, c: Tensor, z: Tensor, skip: Tensor | None, reverse: bool) -> Tensor:
    return _forward_now(x, c, z, skip, reverse)


def _forward_now(x: Tensor, c: Tensor, z: Tensor, skip: Tensor | None, reverse: bool) -> Tensor:
    y: Tensor = backend_module("s4d", "chunked_triton").forward(x, c, z, skip, reverse)
    return y


@_forward.register_fake
def _(x: Tensor, c: Tensor, z: Tensor, skip: Tensor | None, reverse: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mambagen::s4d_chunked_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, c: Tensor, z: Tensor, skip: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward_now(dy, x, c, z, skip, reverse)


def _backward_now(
    dy: Tensor, x: Tensor, c: Tensor, z: Tensor, skip: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dc, dz and dskip, which is empty where there is no skip."""
    dx, dc, dz, dskip = backend_module("s4d", "chunked_triton").backward(dy, x, c, z, skip, reverse)
    return dx, dc, dz, dskip


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, c: Tensor, z: Tensor, skip: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dskip = x.new_empty(0 if skip is None else len(skip), dtype=torch.float32)
    return x.new_empty(x.shape), c.new_empty(c.shape), z.new_empty(z.shape), dskip


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, c, z, skip, ctx.reverse = inputs
    ctx.save_for_backward(x, c, z, skip)


def _gradients(ctx, dy, *, backward=None):  # type: ignore[no-untyped-def]
    x, c, z, skip = ctx.saved_tensors
    dx, dc, dz, dskip = (backward or _backward)(dy, x, c, z, skip, ctx.reverse)
    return dx, dc, dz, None if skip is None else dskip, None


_forward.register_autograd(_gradients, setup_context=_setup)
_direct = entered_directly(_forward_now, _setup, once_differentiable(partial(_gradients, backward=_backward_now)))
