"""The convolution with a diagonal system as matrix products over blocks of steps: for kernels that many channels share.

Within a block of T steps the outputs are a Toeplitz matrix of the kernel's first T values times the inputs. Between
blocks only the N complex states of a channel pass:

    entered_i = W x_i,    h_(i+1) = a h_i + entered_i,    y_i = K x_i + R h_i

where W (2N, T) holds the powers that the inputs decay by up to the block's end, a = Abar^T, and R (T, 2N) reads the
state that a block begins with at each of its steps. Every matrix is one for all channels of a system, so with many
channels nearly all of the work is large matrix products, T + 4N multiply-adds an element whatever the length. Backward
is the same three products transposed; of the forward it needs x alone.

In float32 that is as much as an FFT of some thousand steps or, on a CPU, more; so it is for short sequences, of one
block. In bfloat16 on a GPU the products run on the tensor cores: inputs and matrices are then bfloat16, sums and the
states between blocks float32. Passing those states is what makes long sequences slower than the FFT all the same.
"""

import contextlib

import torch
from torch import Tensor

from mambagen.kernels.dispatch import backend_module
from mambagen.kernels.s4d.vandermonde import powers, vandermonde_product

LEAST_CHANNELS = 32  # a system, below which the products are too narrow and the FFT is used
LONGEST_CPU, LONGEST_GPU = 128, 512  # lengths up to which the products are quicker than the FFT
ONE_BLOCK = 512  # up to this length the Toeplitz matrix of the whole sequence is the cheapest
PARTIAL = 2**24  # elements of the partial sums of a weight's gradient that are there at once


def pays(x: Tensor, ssms: int) -> bool:
    """Whether this convolution should be quicker than the FFT's."""
    if x.shape[2] < LEAST_CHANNELS * ssms:
        return False
    return x.shape[1] <= (LONGEST_GPU if x.is_cuda else LONGEST_CPU)


def block_conv(
    x: Tensor, c: Tensor, z: Tensor, reverse: bool = False, backend: str = "torch", block: int = 0
) -> Tensor:
    """The same as `long_conv(x, vandermonde_product(c, z, length), reverse)`.

    Args:
        x: (batch, length, channels), float32, bfloat16, float16 (computed in float32) or float64.
        c: (ssms, state) complex, C Bbar; its precision is that of the computation. z: (ssms, state) complex128.
        backend: of the kernel, see `vandermonde_product`.
        block: T; 0 chooses.

    Returns:
        y like x. Differentiable once in x, c and z.
    """
    length, state = x.shape[1], c.shape[1]
    T = block or (length if length <= ONE_BLOCK else min(max(1 << (4 * state - 1).bit_length(), 64), 256))
    T = min(T, length)
    kernel = vandermonde_product(c, z, T, backend)
    if length == T:
        none = kernel.new_zeros(len(c), 0)
        return _forward(x, kernel, none[..., None], none[:, None], c[:, :0], reverse)
    decays = powers(z, T, torch.complex128)  # (ssms, state, T)
    entering = decays.flip(-1)
    reading = 2 * c[..., None] * decays * torch.exp(z)[..., None]
    W = torch.cat([entering.real, entering.imag], 1).to(kernel.dtype)
    R = torch.cat([reading.real, -reading.imag], 1).mT.to(kernel.dtype)
    return _forward(x, kernel, R.contiguous(), W.contiguous(), torch.exp(z * T).to(c.dtype), reverse)


def toeplitz(kernel: Tensor, reverse: bool) -> Tensor:
    """(T,) -> (T, T), K[t, s] = kernel[t - s] where that is in the past (in reverse: its transpose)."""
    T = len(kernel)
    shifted = torch.cat([kernel.new_zeros(T), kernel]).unfold(0, T, 1)  # [r, v]: value r + v - T
    lower = shifted[1:].flip(1)  # [t, s]: t + 1 + T - 1 - s - T
    return lower.mT.contiguous() if reverse else lower.contiguous()


def diagonal_sums(gradient: Tensor, reverse: bool) -> Tensor:
    """The adjoint of `toeplitz`."""
    T = len(gradient)
    lower = gradient.mT if reverse else gradient
    skewed = torch.nn.functional.pad(lower.flip(1), (0, T)).flatten()[: T * (2 * T - 1)].view(T, 2 * T - 1)
    return skewed.sum(0)[T - 1 :]


def _blocks(v: Tensor, T: int, dtype: torch.dtype) -> Tensor:
    """(batch, length, channels) -> (batch * blocks, T, channels), zeros after the end."""
    missing = -v.shape[1] % T
    v = torch.nn.functional.pad(v.to(dtype), (0, 0, 0, missing))
    return v.reshape(-1, T, v.shape[2])


def product_dtype(x: Tensor, kernel: Tensor) -> torch.dtype:
    """The dtype in which x and the matrices are multiplied."""
    return x.dtype if x.is_cuda and x.dtype == torch.bfloat16 else kernel.dtype


def _carry(entered: Tensor, a: Tensor, batch: int, backwards: bool) -> Tensor:
    """The states that blocks begin with, (batch * blocks, 2N, channels), from what entered in each.

    `backwards` passes from the last block to the first. `entered` may be written over.
    """
    entered = entered.to(a.dtype.to_real())
    if entered.is_cuda and entered.dtype == torch.float32:
        with contextlib.suppress(ImportError):
            return backend_module("s4d", "triton").carry(entered.contiguous(), a, batch, backwards)
    re, im = entered.unflatten(0, (batch, -1)).chunk(2, 2)
    blocks, (a_re, a_im) = re.shape[1], (a.real[:, None], a.imag[:, None])
    order = range(blocks - 1, -1, -1) if backwards else range(blocks)
    h_re, h_im = torch.zeros_like(re[:, 0]), torch.zeros_like(im[:, 0])
    for i in order:
        next_re = a_re * h_re - a_im * h_im + re[:, i]
        next_im = a_re * h_im + a_im * h_re + im[:, i]
        re[:, i], im[:, i] = h_re, h_im
        h_re, h_im = next_re, next_im
    return entered


def _outer(u: Tensor, v: Tensor) -> Tensor:
    """The sum over blocks of u v^T: (blocks, m, channels), (blocks, n, channels) -> (m, n)."""
    step = max(1, PARTIAL // (u.shape[1] * v.shape[1]))
    return sum(
        (a @ b.mT).sum(0, dtype=torch.promote_types(a.dtype, torch.float32))
        for a, b in zip(u.split(step), v.split(step), strict=True)
    )


def _cuts(x: Tensor, ssms: int) -> list[slice]:
    each = x.shape[2] // ssms
    return [slice(s * each, (s + 1) * each) for s in range(ssms)]


def _oriented(R: Tensor, W: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    return (R.flip(0), W.flip(1)) if reverse else (R, W)


@torch.library.custom_op("mambagen::s4d_block_conv", mutates_args=())
def _forward(x: Tensor, kernel: Tensor, R: Tensor, W: Tensor, a: Tensor, reverse: bool) -> Tensor:
    batch, length, _ = x.shape
    T, low = kernel.shape[1], product_dtype(x, kernel)
    parts = []
    for s, cut in enumerate(_cuts(x, len(kernel))):
        rows = _blocks(x[..., cut], T, low)
        y = torch.matmul(toeplitz(kernel[s].to(low), reverse), rows)
        if length > T:
            reading, entering = _oriented(R[s].to(low), W[s].to(low), reverse)
            h = _carry(torch.matmul(entering, rows), a[s], batch, reverse)
            y += torch.matmul(reading, h.to(low))
        parts.append(y.reshape(batch, -1, y.shape[2])[:, :length].to(x.dtype))
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0].contiguous()


@_forward.register_fake
def _(x: Tensor, kernel: Tensor, R: Tensor, W: Tensor, a: Tensor, reverse: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mambagen::s4d_block_conv_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, kernel: Tensor, R: Tensor, W: Tensor, a: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, _ = x.shape
    T, low = kernel.shape[1], product_dtype(x, kernel)
    parts = []
    dkernel, dR, dW, da = torch.empty_like(kernel), torch.zeros_like(R), torch.zeros_like(W), torch.zeros_like(a)
    for s, cut in enumerate(_cuts(x, len(kernel))):
        rows, adjoint = (_blocks(v[..., cut], T, low) for v in (x, dy))
        dkernel[s] = diagonal_sums(_outer(adjoint, rows), reverse)
        dx = torch.matmul(toeplitz(kernel[s].to(low), not reverse), adjoint)
        if length > T:
            reading, entering = _oriented(R[s].to(low), W[s].to(low), reverse)
            h = _carry(torch.matmul(entering, rows), a[s], batch, reverse)
            dR[s] = _outer(adjoint, h.to(low))
            # what is read from a block's first state came in before it: the adjoint passes the other way
            dentered = _carry(torch.matmul(reading.mT, adjoint), a[s].conj_physical(), batch, not reverse)
            dW[s] = _outer(dentered.to(low), rows)
            dx += torch.matmul(entering.mT, dentered.to(low))
            (h_re, h_im), (g_re, g_im) = h.chunk(2, 1), dentered.chunk(2, 1)
            da[s] = torch.complex(
                (h_re * g_re + h_im * g_im).sum((0, 2)),
                (h_re * g_im - h_im * g_re).sum((0, 2)),
            )
        parts.append(dx.reshape(batch, -1, dx.shape[2])[:, :length].to(x.dtype))
    if reverse:
        dR, dW = dR.flip(1), dW.flip(2)
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0].contiguous(), dkernel, dR, dW, da


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, kernel: Tensor, R: Tensor, W: Tensor, a: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = [v.new_empty(v.shape) for v in (x, kernel, R, W, a)]
    return like[0], like[1], like[2], like[3], like[4]


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy):  # type: ignore[no-untyped-def]
    with torch.autocast(dy.device.type, enabled=False):
        return *_backward(dy, *ctx.saved_tensors, ctx.reverse), None


_forward.register_autograd(_gradients, setup_context=_setup)
