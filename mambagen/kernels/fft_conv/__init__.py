"""The long convolution of a sequence with a kernel as long as itself, by FFT: `long_conv`.

y_t = sum_(s <= t) k_(t - s) x_s, or with `reverse` sum_(s >= t) k_(s - t) x_s, which costs the same: the transform of
the kernel is conjugated. Channels-last; the spectra live for one slab of rows at a time and none is kept for the
backward, which transforms x again: what stays in memory is x and k.

Here in torch, by real transforms of twice the length; triton.py on a GPU, by complex ones of the length itself.
Conjugates are made at once (`conj_physical`): what `conj` leaves for later is left undone where torch.compile runs
registered ops.
"""

from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambagen.kernels.dispatch import backend_module, check_shape, entered_directly, is_plain_eager, triton_or_torch

# Complex elements of a spectrum that are there at once. On a CPU a slab should fit the cache; on a GPU its kernels
# should run for longer than it takes to launch them, and a training step should not need much more than its tensors:
# up to five slabs are there at once, 134 MB each.
SLAB_CPU, SLAB_GPU = 2**18, 2**24
LEAST_ROWS = 4  # of a slab, however long they are: one channel at a time is read three times as slowly
LEAST_CHANNELS = 32  # of a slab where rows enough fit: narrower ones read and write parts of cache lines


def long_conv(x: Tensor, k: Tensor, reverse: bool = False, skip: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Convolve every channel with its kernel, causally.

    Args:
        x: (batch, length, channels), float32, bfloat16, float16 (transformed in float32) or float64.
        k: (kernels, length) real, of float32 or float64; kernels divides channels: neighbouring channels share one.
        reverse: from the last position to the first.
        skip: (channels,) D, which adds D x.
        backend: "torch" (any device), "triton" (GPU, k float32), or "auto": triton where that can run.

    Returns:
        y like x. Differentiable once in x, k and skip.

    Raises:
        ValueError: shapes do not fit, or the backend cannot run this call.
    """
    if x.dim() != 3 or k.dim() != 2 or k.shape[1] != x.shape[1] or x.shape[2] % k.shape[0]:
        raise ValueError(f"long_conv: kernels {tuple(k.shape)} do not fit x {tuple(x.shape)}")
    check_shape("long_conv", "skip", skip, (x.shape[2],), "(channels,)")
    if skip is not None:
        skip = skip.to(k.dtype)
    backend = triton_or_torch("fft_conv", backend, x, "long_conv", k=k)
    run = _direct if is_plain_eager(x, k, skip) else _forward
    y: Tensor = run(x, k, skip, reverse, backend)
    return y


def fast_length(least: int) -> int:
    """The smallest 2^a, 3 * 2^a or 5 * 2^a that is no less: lengths that FFTs are quick at."""
    power = 1 << max(least - 1, 0).bit_length()
    return min(n for n in (power, power * 3 // 4, power * 5 // 8) if n >= least)


def slabs(x: Tensor, kernels: int, spectrum: int) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
    """Cuts over the kernels, each with the cuts over (batch, channels) that they serve.

    `spectrum`: complex elements of a row's transform. A kernel's channels are cut apart only where a slab cannot hold
    them, so that it is transformed once.
    """
    batch, _, channels = x.shape
    room = max(LEAST_ROWS, (SLAB_GPU if x.is_cuda else SLAB_CPU) // spectrum)
    each = channels // kernels
    wide = max(room // (batch * each), -(-LEAST_CHANNELS // each))  # kernels at once
    wide = max(1, min(wide, room // each, kernels))
    width = min(wide * each, room)  # channels
    rows = max(1, room // width)
    for first in range(0, kernels, wide):
        last = min(first + wide, kernels)
        yield (
            slice(first, last),
            [
                (slice(b, b + rows), slice(c, min(c + width, last * each)))
                for c in range(first * each, last * each, width)
                for b in range(0, batch, rows)
            ],
        )


def _triton() -> ModuleType:
    return backend_module("fft_conv", "triton")


def _spectrum(v: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """The transform of v (batch, length, channels) along its length: (batch, channels, n / 2 + 1)."""
    return torch.fft.rfft(v.transpose(1, 2).to(dtype).contiguous(), n)


def _shared(spectrum: Tensor, kernels: int) -> Tensor:
    """(batch, channels, f) as (batch, kernels, channels a kernel, f)."""
    return spectrum.unflatten(1, (kernels, -1))


@torch.library.custom_op("mambagen::long_conv", mutates_args=())
def _forward(x: Tensor, k: Tensor, skip: Tensor | None, reverse: bool, backend: str) -> Tensor:
    return _forward_now(x, k, skip, reverse, backend)


def _forward_now(x: Tensor, k: Tensor, skip: Tensor | None, reverse: bool, backend: str) -> Tensor:
    if backend == "triton":
        y: Tensor = _triton().forward(x, k, skip, reverse)
        return y
    length = x.shape[1]
    n = fast_length(2 * length - 1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for kernels, pieces in slabs(x, k.shape[0], max(n // 2, 1)):
        weight = torch.fft.rfft(k[kernels], n)[:, None]
        for rows, channels in pieces:
            signal = _shared(_spectrum(x[rows, :, channels], n, k.dtype), len(weight))
            signal *= weight.conj_physical() if reverse else weight
            out = torch.fft.irfft(signal, n)[..., :length].flatten(1, 2).transpose(1, 2)
            if skip is not None:
                out = out + skip[channels] * x[rows, :, channels]
            y[rows, :, channels] = out
    return y


@_forward.register_fake
def _(x: Tensor, k: Tensor, skip: Tensor | None, reverse: bool, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mambagen::long_conv_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, k: Tensor, skip: Tensor | None, reverse: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_now(dy, x, k, skip, reverse, backend)


def _backward_now(
    dy: Tensor, x: Tensor, k: Tensor, skip: Tensor | None, reverse: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dk and dskip, which is empty where there is no skip."""
    if backend == "triton":
        dx, dk, dskip = _triton().backward(dy, x, k, skip, reverse)
        return dx, dk, dskip
    length = x.shape[1]
    n = fast_length(2 * length - 1)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dk = torch.empty_like(k)
    dskip = k.new_zeros(0 if skip is None else len(skip))
    for kernels, pieces in slabs(x, k.shape[0], max(n // 2, 1)):
        weight = torch.fft.rfft(k[kernels], n)[:, None]
        gradient = torch.zeros_like(weight[:, 0])
        for rows, channels in pieces:
            signal = _shared(_spectrum(x[rows, :, channels], n, k.dtype), len(weight))
            adjoint = _shared(_spectrum(dy[rows, :, channels], n, k.dtype), len(weight))
            gradient += (signal.conj_physical_() * adjoint).sum((0, 2))
            adjoint *= weight if reverse else weight.conj_physical()
            out = torch.fft.irfft(adjoint, n)[..., :length].flatten(1, 2).transpose(1, 2)
            if skip is not None:
                out = out + skip[channels] * dy[rows, :, channels]
                dskip[channels] += (dy[rows, :, channels].to(k.dtype) * x[rows, :, channels]).sum((0, 1))
            dx[rows, :, channels] = out
        if reverse:
            gradient.conj_physical_()
        dk[kernels] = torch.fft.irfft(gradient, n)[:, :length]
    return dx, dk, dskip


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, k: Tensor, skip: Tensor | None, reverse: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), k.new_empty(k.shape), k.new_empty(0 if skip is None else len(skip))


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, k, skip, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(x, k, skip)


def _gradients(ctx, dy, *, backward=None):  # type: ignore[no-untyped-def]
    x, k, skip = ctx.saved_tensors
    dx, dk, dskip = (backward or _backward)(dy, x, k, skip, ctx.reverse, ctx.backend)
    return dx, dk, None if skip is None else dskip, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
_direct = entered_directly(_forward_now, _setup, once_differentiable(partial(_gradients, backward=_backward_now)))
