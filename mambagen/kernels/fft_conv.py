"""The long convolution of a sequence with a kernel as long as itself, by FFT: `long_conv`.

y_t = sum_(s <= t) k_(t - s) x_s, or with `reverse` sum_(s >= t) k_(s - t) x_s, which costs the same: the transform of
the kernel is conjugated. Channels-last; the spectra live for one slab of channels at a time and none is kept for the
backward, which transforms x again: what stays in memory is x and k.
"""

import torch
from torch import Tensor

# Elements of a spectrum that are there at once. On a CPU a slab should fit the cache, a GPU wants to be filled.
SLAB_CPU, SLAB_GPU = 2**18, 2**26


def long_conv(x: Tensor, k: Tensor, reverse: bool = False) -> Tensor:
    """Convolve every channel with its kernel, causally.

    Args:
        x: (batch, length, channels), float32, bfloat16, float16 (transformed in float32) or float64.
        k: (kernels, length) real, of float32 or float64; kernels divides channels: neighbouring channels share one.
        reverse: from the last position to the first.

    Returns:
        y like x. Differentiable once in x and k.
    """
    if x.dim() != 3 or k.dim() != 2 or k.shape[1] != x.shape[1] or x.shape[2] % k.shape[0]:
        raise ValueError(f"long_conv: kernels {tuple(k.shape)} do not fit x {tuple(x.shape)}")
    return _forward(x, k, reverse)


def fast_length(least: int) -> int:
    """The smallest 2^a, 3 * 2^a or 5 * 2^a that is no less: lengths that FFTs are quick at."""
    power = 1 << max(least - 1, 0).bit_length()
    return min(n for n in (power, power * 3 // 4, power * 5 // 8) if n >= least)


def _slabs(x: Tensor, kernels: int, n: int) -> list[tuple[slice, slice, slice]]:
    """Cuts over (batch, channels, kernels); channels that share a kernel may be cut apart."""
    batch, _, channels = x.shape
    room = max(1, (SLAB_GPU if x.is_cuda else SLAB_CPU) // n)
    each = channels // kernels
    if room >= each:  # whole kernels at once
        width = min(kernels, room // each)
        cuts = [
            (slice(a * each, min(a + width, kernels) * each), slice(a, a + width)) for a in range(0, kernels, width)
        ]
        rows = max(1, room // (width * each))
    else:
        cuts = [
            (slice(first, min(first + room, (a + 1) * each)), slice(a, a + 1))
            for a in range(kernels)
            for first in range(a * each, (a + 1) * each, room)
        ]
        rows = 1
    return [(slice(b, b + rows), channel, kernel) for channel, kernel in cuts for b in range(0, batch, rows)]


def _spectrum(v: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """The transform of v (batch, length, channels) along its length: (batch, channels, n / 2 + 1)."""
    return torch.fft.rfft(v.transpose(1, 2).to(dtype).contiguous(), n)


def _shared(spectrum: Tensor, kernels: int) -> Tensor:
    """(batch, channels, f) as (batch, kernels, channels a kernel, f)."""
    return spectrum.unflatten(1, (kernels, -1))


@torch.library.custom_op("mambagen::long_conv", mutates_args=())
def _forward(x: Tensor, k: Tensor, reverse: bool) -> Tensor:
    length = x.shape[1]
    n = fast_length(2 * length - 1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for rows, channels, kernels in _slabs(x, k.shape[0], n):
        weight = torch.fft.rfft(k[kernels], n)[:, None]
        signal = _shared(_spectrum(x[rows, :, channels], n, k.dtype), len(weight))
        signal *= weight.conj() if reverse else weight
        y[rows, :, channels] = torch.fft.irfft(signal, n)[..., :length].flatten(1, 2).transpose(1, 2)
    return y


@_forward.register_fake
def _(x: Tensor, k: Tensor, reverse: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mambagen::long_conv_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, k: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    length = x.shape[1]
    n = fast_length(2 * length - 1)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dk = k.new_zeros(k.shape[0], n // 2 + 1, dtype=k.dtype.to_complex())
    for rows, channels, kernels in _slabs(x, k.shape[0], n):
        weight = torch.fft.rfft(k[kernels], n)[:, None]
        signal = _shared(_spectrum(x[rows, :, channels], n, k.dtype), len(weight))
        adjoint = _shared(_spectrum(dy[rows, :, channels], n, k.dtype), len(weight))
        product = signal * adjoint.conj() if reverse else signal.conj() * adjoint
        dk[kernels] += product.sum((0, 2))
        adjoint *= weight if reverse else weight.conj()
        dx[rows, :, channels] = torch.fft.irfft(adjoint, n)[..., :length].flatten(1, 2).transpose(1, 2)
    return dx, torch.fft.irfft(dk, n)[:, :length].contiguous()


@_backward.register_fake
def _(dy: Tensor, x: Tensor, k: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), k.new_empty(k.shape)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, k, ctx.reverse = inputs
    ctx.save_for_backward(x, k)


def _gradients(ctx, dy):  # type: ignore[no-untyped-def]
    x, k = ctx.saved_tensors
    return *_backward(dy, x, k, ctx.reverse), None


_forward.register_autograd(_gradients, setup_context=_setup)
