"""The long convolution on a GPU: complex transforms of the length itself, and three Triton kernels around them.

With w = exp(i pi / (2 n)), n >= length, and the sequences turned, x_t w^t and k_t w^t, the product of their transforms
of length n is that of polynomials modulo z^n - i. So what passes the end of the sequence is multiplied by i: after the
product has been turned back its real part is the convolution, and the imaginary part, the overflow, is dropped. Nothing
is padded to twice the length and the rows stay apart, for as many bytes as a real transform of length 2 n.

The transforms move 16 bytes an element each, and all else is arranged to move little more:

    pack_kernel       (batch, length, channels) to turned complex rows (batch, channels, n), and the sums of x dy
    filter_kernel     a row's spectrum times its kernel's, in place; the skip D x is D added to the kernel's spectrum
    adjoint_kernel    the same for dy, and dk's spectrum summed over the rows of a kernel: one sum a program, which are
                      added in fixed order
    unpack_kernel     rows turned back, their real part as (batch, length, channels)
"""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambagen.kernels.fft_conv import fast_length, slabs
from mambagen.kernels.launching import on_device_of, processors
from mambagen.kernels.triton_turns import half_turn

TILE, WIDEST = 2048, 32  # elements that a program packs or unpacks, and channels of them
BLOCK = 512  # complex numbers of a row that are multiplied at a time
PROGRAMS = 8  # a multiprocessor, at least, among which the sums over rows are shared out


def unsupported(x: Tensor, k: Tensor) -> str | None:
    """Why this call cannot run here, or None."""
    if k.dtype != torch.float32:
        return f"kernels of {k.dtype}; it computes in float32"
    if x.shape[1] >= 2**29:
        return f"{x.shape[1]} steps; fewer than 2^29 are supported in one call"
    return None


def forward(x: Tensor, k: Tensor, skip: Tensor | None, reverse: bool) -> Tensor:
    """y like x; see `long_conv`."""
    n = fast_length(x.shape[1])
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with on_device_of(x):
        for kernels, pieces in slabs(x, len(k), n):
            weight = _spectrum(k[kernels].T[None], n)
            for rows, channels in pieces:
                signal = _spectrum(x[rows, :, channels], n)
                _filter(signal, weight, None if skip is None else skip[channels], reverse)
                signal = _inverse(signal)
                _unpack(signal, y[rows, :, channels])
                del signal  # before the next is made
    return y


def backward(dy: Tensor, x: Tensor, k: Tensor, skip: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dk and dskip (empty without a skip)."""
    n = fast_length(x.shape[1])
    dx, dk = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(k)
    dskip = k.new_zeros(0 if skip is None else len(skip))
    with on_device_of(x):
        for kernels, pieces in slabs(x, len(k), n):
            weight = _spectrum(k[kernels].T[None], n)
            gradient: Tensor | None = None
            for rows, channels in pieces:
                signal, adjoint = x[rows, :, channels], dy[rows, :, channels]
                if skip is not None:
                    own = skip[channels]
                    signal, sums = _pack(signal, n, adjoint)
                    dskip[channels] += sums
                    signal = torch.fft.fft(signal).contiguous()
                else:
                    own = None
                    signal = _spectrum(signal, n)
                adjoint = _spectrum(adjoint, n)
                part = _adjoint(signal, adjoint, weight, own, reverse)
                gradient = part if gradient is None else gradient + part
                del signal
                adjoint = _inverse(adjoint)
                _unpack(adjoint, dx[rows, :, channels])
                del adjoint
            _unpack(_inverse(gradient[None]), dk[kernels].T[None])
    return dx, dk, dskip


def _spectrum(v: Tensor, n: int) -> Tensor:
    """The transform of turned v (batch, length, channels): (batch, channels, n) complex64."""
    return torch.fft.fft(_pack(v, n)[0]).contiguous()


def _inverse(spectrum: Tensor) -> Tensor:
    """n times the inverse transform; the products are divided by n, which costs them nothing."""
    return torch.fft.ifft(spectrum, norm="forward").contiguous()


def _tiles(channels: int, n: int) -> tuple[int, int]:
    """Steps and channels that a program packs or unpacks."""
    wide = min(triton.next_power_of_2(channels), WIDEST)
    return min(TILE // wide, triton.next_power_of_2(n)), wide


def _pack(v: Tensor, n: int, other: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """v (batch, length, channels) turned, as (batch, channels, n) complex64; and sum v other, (channels,)."""
    batch, length, channels = v.shape
    steps, wide = _tiles(channels, n)
    out = torch.empty(batch, channels, n, dtype=torch.complex64, device=v.device)
    real = torch.view_as_real(out)
    blocks, columns = triton.cdiv(n, steps), triton.cdiv(channels, wide)
    sums = None
    if other is not None:
        sums = torch.empty(batch * blocks, channels, dtype=torch.float32, device=v.device)
    pack_kernel[(batch * blocks * columns,)](
        v, v if other is None else other, real, real if sums is None else sums,
        length, n, channels, blocks, columns, 0.5 / n,
        *v.stride(), *(v if other is None else other).stride(),
        SUMS=sums is not None, STEPS=steps, WIDE=wide, num_warps=4,
    )  # fmt: skip
    return out, None if sums is None else sums.sum(0)


def _unpack(rows: Tensor, out: Tensor) -> None:
    """The real part of rows (batch, channels, n) turned back, into out (batch, length, channels)."""
    batch, length, channels = out.shape
    n = rows.shape[2]
    steps, wide = _tiles(channels, length)
    blocks, columns = triton.cdiv(length, steps), triton.cdiv(channels, wide)
    unpack_kernel[(batch * blocks * columns,)](
        torch.view_as_real(rows), out, length, n, channels, blocks, columns, 0.5 / n, *out.stride(),
        STEPS=steps, WIDE=wide, num_warps=4,
    )  # fmt: skip


def _filter(spectrum: Tensor, weight: Tensor, skip: Tensor | None, conjugate: bool) -> None:
    """spectrum (batch, channels, n) times weight (1, kernels, n) + skip (channels,), over n, in place."""
    batch, channels, n = spectrum.shape
    block = min(BLOCK, triton.next_power_of_2(n))
    blocks = triton.cdiv(n, block)
    real = torch.view_as_real(spectrum)
    filter_kernel[(batch * channels * blocks,)](
        real, torch.view_as_real(weight), real if skip is None else skip,
        batch, channels, channels // weight.shape[1], n, blocks, 1.0 / n,
        SKIP=skip is not None, CONJUGATE=conjugate, BLOCK=block, num_warps=4,
    )  # fmt: skip


def _adjoint(signal: Tensor, adjoint: Tensor, weight: Tensor, skip: Tensor | None, reverse: bool) -> Tensor:
    """dk's spectrum over n, (kernels, n), from those of x and dy, which is written over by dx's over n."""
    batch, channels, n = signal.shape
    kernels = weight.shape[1]
    each = channels // kernels
    block = min(BLOCK, triton.next_power_of_2(n))
    blocks = triton.cdiv(n, block)
    rows = batch * each
    parts = min(rows, triton.cdiv(PROGRAMS * processors(signal.device), blocks * kernels))
    share = triton.cdiv(rows, parts)
    parts = triton.cdiv(rows, share)
    sums = torch.empty(parts, kernels, n, dtype=torch.complex64, device=signal.device)
    real = torch.view_as_real(adjoint)
    adjoint_kernel[(blocks * kernels * parts,)](
        torch.view_as_real(signal), real, torch.view_as_real(weight), real if skip is None else skip,
        torch.view_as_real(sums), channels, each, n, blocks, kernels, rows, share, 1.0 / n,
        SKIP=skip is not None, REVERSE=reverse, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return sums.sum(0) if parts > 1 else sums[0]


@triton.jit(do_not_specialize=["blocks", "columns"])
def pack_kernel(
    x, other, out, sums, length, n, channels, blocks, columns, half,
    x_batch, x_time, x_channel, o_batch, o_time, o_channel,
    SUMS: tl.constexpr, STEPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // columns
    first = (tile % blocks) * STEPS
    c = (tl.program_id(0) % columns) * WIDE + tl.arange(0, WIDE)
    t = first + tl.arange(0, STEPS)
    batch = (tile // blocks).to(tl.int64)
    inside = (c < channels)[:, None] & (t < length)[None, :]
    at = batch * x_batch + t[None, :].to(tl.int64) * x_time + c[:, None].to(tl.int64) * x_channel
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if SUMS:
        at = batch * o_batch + t[None, :].to(tl.int64) * o_time + c[:, None].to(tl.int64) * o_channel
        u = tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(sums + tile.to(tl.int64) * channels + c, tl.sum(u * v, 1), mask=c < channels)
    sine, cosine = half_turn(t.to(tl.float32) * half)
    values = tl.interleave(v * cosine[None, :], v * sine[None, :])
    place = 2 * first + tl.arange(0, 2 * STEPS)
    row = (batch * channels + c[:, None]) * (2 * tl.cast(n, tl.int64))
    tl.store(out + row + place[None, :], values, mask=(c < channels)[:, None] & (place < 2 * n)[None, :])


@triton.jit(do_not_specialize=["blocks", "columns"])
def unpack_kernel(
    rows, out, length, n, channels, blocks, columns, half, o_batch, o_time, o_channel,
    STEPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // columns
    first = (tile % blocks) * STEPS
    c = (tl.program_id(0) % columns) * WIDE + tl.arange(0, WIDE)
    t = first + tl.arange(0, STEPS)
    batch = (tile // blocks).to(tl.int64)
    place = 2 * first + tl.arange(0, 2 * STEPS)
    row = (batch * channels + c[:, None]) * (2 * tl.cast(n, tl.int64))
    read = (c < channels)[:, None] & (place < 2 * length)[None, :]
    values = tl.load(rows + row + place[None, :], mask=read, other=0.0)
    re, im = tl.split(tl.reshape(values, (WIDE, STEPS, 2)))
    sine, cosine = half_turn(t.to(tl.float32) * half)
    y = re * cosine[None, :] + im * sine[None, :]
    at = batch * o_batch + t[None, :].to(tl.int64) * o_time + c[:, None].to(tl.int64) * o_channel
    inside = (c < channels)[:, None] & (t < length)[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def load_complex(base, place, inside, BLOCK: tl.constexpr):
    """Real and imaginary parts of BLOCK neighbours, read as they lie."""
    return tl.split(tl.reshape(tl.load(base + place, mask=inside, other=0.0), (BLOCK, 2)))


@triton.jit(do_not_specialize=["batch", "channels", "each", "blocks"])
def filter_kernel(
    spectrum, weight, skip, batch, channels, each, n, blocks, scale,
    SKIP: tl.constexpr, CONJUGATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) // batch  # neighbouring programs read the same of the weight
    c = part // blocks
    place = (part % blocks) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    inside = place < 2 * n
    length = 2 * tl.cast(n, tl.int64)
    row = spectrum + ((tl.program_id(0) % batch).to(tl.int64) * channels + c) * length
    re, im = load_complex(row, place, inside, BLOCK)
    w_re, w_im = load_complex(weight + (c // each) * length, place, inside, BLOCK)
    if SKIP:
        w_re += tl.load(skip + c)
    w_re *= scale
    w_im *= -scale if CONJUGATE else scale
    tl.store(row + place, tl.interleave(re * w_re - im * w_im, re * w_im + im * w_re), mask=inside)


@triton.jit(do_not_specialize=["channels", "each", "blocks", "kernels", "rows", "share"])
def adjoint_kernel(
    signal, adjoint, weight, skip, sums, channels, each, n, blocks, kernels, rows, share, scale,
    SKIP: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = (tl.program_id(0) % blocks) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    kernel = (tl.program_id(0) // blocks) % kernels
    part = tl.program_id(0) // (blocks * kernels)
    inside = place < 2 * n
    length = 2 * tl.cast(n, tl.int64)
    w_re, w_im = load_complex(weight + kernel * length, place, inside, BLOCK)
    w_re *= scale
    w_im *= scale if REVERSE else -scale
    k_re = tl.zeros([BLOCK], tl.float32)
    k_im = tl.zeros([BLOCK], tl.float32)
    for r in range(part * share, min(part * share + share, rows)):
        c = kernel * each + r % each
        row = ((r // each).to(tl.int64) * channels + c) * length
        re, im = load_complex(signal + row, place, inside, BLOCK)
        g_re, g_im = load_complex(adjoint + row, place, inside, BLOCK)
        k_re += re * g_re + im * g_im
        k_im += re * g_im - im * g_re
        a_re = w_re
        if SKIP:
            a_re += tl.load(skip + c) * scale
        out = tl.interleave(g_re * a_re - g_im * w_im, g_re * w_im + g_im * a_re)
        tl.store(adjoint + row + place, out, mask=inside)
    if REVERSE:
        k_im = -k_im
    at = sums + (part.to(tl.int64) * kernels + kernel) * length + place
    tl.store(at, tl.interleave(k_re * scale, k_im * scale), mask=inside)
