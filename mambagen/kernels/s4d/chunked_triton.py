"""The chunked convolution (`chunked.py`) on tensor cores, in Triton: x is bfloat16, all else float32 or wider.

A program owns WIDE channels of one system and walks along a segment of a sequence, CHUNK steps at a time, with the
states of these channels in registers. A chunk is three products on tensor cores:

    y = T x + Re(V H)        T[t, s] = k_(t - s) (0 for t < s),  V[t, n] = 2 c_n exp(t z_n)
    H = exp(CHUNK z) H + U x                                      U[n, s] = exp((CHUNK - s) z_n)

where H holds what came before, decayed to the chunk's first step. x is exact in bfloat16; a float32 matrix is split
into two bfloat16 ones, a rounding and what it leaves, so the products are as good as float32 ones (2^-17) at twice the
work; of V H, where both are split, three of four products are taken. Sequences too few to fill the GPU are cut into
segments: `segment_states_kernel` finds what each leaves from zero, `segment_carry_kernel` hands it on.

The gradient of x is the convolution of dy in the other direction, by the same kernel. Those of c and z come from one
more walk (`chunked_gradients_kernel`), with H' = dH/dz beside H. Over a chunk P = sum_t exp(t z) dy_t and
P' = sum_t t exp(t z) dy_t give, with the sums over chunks and channels,

    sum_j dk_j exp(j z) = sum P H + within chunks,    sum_j j dk_j exp(j z) = sum (P H' + P' H) + within chunks,

and within a chunk dk_j is a sum over a diagonal of dy x^T. Partial sums are added in fixed order.
"""

# mypy: ignore-errors

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambagen.kernels.launching import on_device_of, processors
from mambagen.kernels.s4d.triton import load_pairs, pairs, powers, store_moments

# What products take. Triton's interpreter multiplies bfloat16 as the integers that hold it; float32 keeps the values.
FACTOR = tl.constexpr(tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else tl.bfloat16)

CHUNK = 64
LANES = 64  # states a program holds, whatever there are: Hopper's products have 64 rows
LEAST_WIDE = 16  # channels: the least that a product takes
WIDE, WARPS = 64, 4  # of the convolution
WIDE_GRADIENTS, WARPS_GRADIENTS = 64, 4
LEAST_CHUNKS = 4  # of a segment
ROUNDS = 2  # programs a multiprocessor for which a sequence is cut into segments
ROWS = 16  # of the tables, a program
AHEAD = tl.constexpr(4)  # segments whose states are read at a time
SUMMED = 16  # partial sums that are read at a time
STATES = 16  # states a program, of what is added up or carried on


def forward(x: Tensor, c: Tensor, z: Tensor, skip: Tensor | None, reverse: bool) -> Tensor:
    """y like x (batch, length, channels); c (ssms, state) complex64, z complex128, skip (channels,) float32."""
    with on_device_of(x):
        return _convolve(x, _Tables.of(c, z), z, skip, reverse)


def backward(
    dy: Tensor, x: Tensor, c: Tensor, z: Tensor, skip: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dc, dz and dskip, which is empty where there is no skip."""
    with on_device_of(x):
        tables = _Tables.of(c, z)
        dx = _convolve(dy, tables, z, skip, not reverse)
        return dx, *_gradients(dy, x, tables, c, z, skip, reverse)


class _Tables(NamedTuple):
    """What the products take, each number as two bfloat16: (..., 2 halves, steps, state)."""

    E: Tensor  # exp(t z) and t exp(t z), t up to CHUNK: (ssms, 2, real and imaginary, 2, CHUNK + 1, state)
    V: Tensor  # 2 c exp(t z), the imaginary part negated: (ssms, real and imaginary, 2, CHUNK, state)
    k: Tensor  # the kernel's first values: (ssms, 2, CHUNK)
    decay: Tensor  # exp(CHUNK z), float32: (ssms, real and imaginary, state)

    @staticmethod
    def of(c: Tensor, z: Tensor) -> "_Tables":
        ssms, state = z.shape
        shapes = ((ssms, 2, 2, 2, CHUNK + 1, state), (ssms, 2, 2, CHUNK, state), (ssms, 2, CHUNK))
        made = [torch.empty(shape, dtype=torch.bfloat16, device=z.device) for shape in shapes]
        tables = _Tables(*made, torch.empty(ssms, 2, state, dtype=torch.float32, device=z.device))
        blocks = triton.cdiv(CHUNK + 1, ROWS)
        chunk_tables_kernel[(ssms * blocks,)](
            pairs(c), pairs(z), *tables, blocks,
            STATE=state, LANES=LANES, CHUNK=CHUNK, ROWS=ROWS, num_warps=4,
        )  # fmt: skip
        return tables


class _Cut:
    """How a call is shared out: WIDE channels of a system each, and segments of a sequence."""

    def __init__(self, x: Tensor, ssms: int, widest: int) -> None:
        batch, self.length, channels = x.shape
        self.each = channels // ssms
        self.wide = max(LEAST_WIDE, min(widest, triton.next_power_of_2(self.each)))
        self.columns = triton.cdiv(self.each, self.wide)  # of a system
        chunks = triton.cdiv(self.length, CHUNK)
        rows = batch * ssms * self.columns
        wanted = triton.cdiv(ROUNDS * processors(x.device), rows)
        segments = max(1, min(wanted, chunks // LEAST_CHUNKS))
        self.chunks = triton.cdiv(chunks, segments)  # of a segment
        self.segments = triton.cdiv(chunks, self.chunks)
        self.programs = rows * self.segments


def _convolve(x: Tensor, tables: _Tables, z: Tensor, skip: Tensor | None, reverse: bool) -> Tensor:
    ssms, state = z.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cut = _Cut(x, ssms, WIDE)
    start = _segment_starts(x, cut, tables, z, reverse, 2)
    chunked_conv_kernel[(cut.programs,)](
        x, *tables, tables.decay if skip is None else skip, tables.decay if start is None else start, y,
        cut.length, cut.each, ssms, cut.columns, cut.segments, cut.chunks, *x.stride(), *y.stride(),
        STATE=state, LANES=LANES, CHUNK=CHUNK, WIDE=cut.wide, REVERSE=reverse,
        SKIP=skip is not None, CARRIED=start is not None, num_warps=WARPS,
    )  # fmt: skip
    return y


def _segment_starts(x: Tensor, cut: _Cut, tables: _Tables, z: Tensor, reverse: bool, parts: int) -> Tensor | None:
    """The states before each segment, (batch, segments, parts, state, channels) float32; None where there is one.

    `parts` is 2, real and imaginary part of H, or 4, also of H'.
    """
    if cut.segments == 1:
        return None
    (ssms, state), (batch, _, channels) = z.shape, x.shape
    states = torch.empty(batch, cut.segments, parts, state, channels, dtype=torch.float32, device=x.device)
    segment_states_kernel[(cut.programs,)](
        x, tables.E, tables.decay, states,
        cut.length, cut.each, ssms, cut.columns, cut.segments, cut.chunks, *x.stride(),
        STATE=state, LANES=LANES, CHUNK=CHUNK, WIDE=cut.wide, REVERSE=reverse, SLOPE=parts == 4,
        num_warps=WARPS if parts == 2 else WARPS_GRADIENTS,
    )  # fmt: skip
    wide = min(64, triton.next_power_of_2(cut.each))
    columns, bands = triton.cdiv(cut.each, wide), triton.cdiv(state, STATES)
    segment_carry_kernel[(batch * ssms * columns * bands,)](
        states, pairs(z), cut.segments, cut.each, ssms, columns, bands, cut.chunks * CHUNK,
        STATE=state, STATES=STATES, WIDE=wide, SLOPE=parts == 4, num_warps=4,
    )  # fmt: skip
    return states


def _gradients(
    dy: Tensor, x: Tensor, tables: _Tables, c: Tensor, z: Tensor, skip: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    ssms, state = z.shape
    cut = _Cut(x, ssms, WIDE_GRADIENTS)
    start = _segment_starts(x, cut, tables, z, reverse, 4)
    each = cut.programs // ssms  # programs of a system
    sums = torch.empty(ssms, each, 4, state, dtype=torch.float32, device=x.device)
    products = torch.empty(ssms, each, CHUNK, CHUNK, dtype=torch.float32, device=x.device)
    near = torch.empty(ssms, each, CHUNK, dtype=torch.float32, device=x.device)
    batch, _, channels = x.shape
    dskip = torch.empty(batch * cut.segments, channels if skip is not None else 0, dtype=torch.float32, device=x.device)
    chunked_gradients_kernel[(cut.programs,)](
        x, dy, tables.E, tables.decay, tables.decay if start is None else start, sums, products, dskip,
        cut.length, cut.each, ssms, cut.columns, cut.segments, cut.chunks, each, *x.stride(), *dy.stride(),
        STATE=state, LANES=LANES, CHUNK=CHUNK, WIDE=cut.wide, REVERSE=reverse,
        SKIP=skip is not None, CARRIED=start is not None, num_warps=WARPS_GRADIENTS,
    )  # fmt: skip
    diagonals_kernel[(cut.programs,)](products, near, CHUNK=CHUNK, num_warps=4)
    dc, dz = torch.empty_like(c), torch.empty_like(z)
    bands = triton.cdiv(state, STATES)
    chunked_sums_kernel[(ssms * bands,)](
        sums, near, pairs(c), pairs(z), torch.view_as_real(dc), torch.view_as_real(dz), each, bands,
        STATE=state, STATES=STATES, CHUNK=CHUNK, SUMMED=SUMMED, num_warps=4,
    )  # fmt: skip
    return dc, dz, dskip.sum(0)


@triton.jit
def halves(v):
    """A bfloat16 near v, and one near what that leaves."""
    high = v.to(tl.bfloat16)
    return high.to(FACTOR), (v - high.to(tl.float32)).to(tl.bfloat16).to(FACTOR)


@triton.jit
def store_halves(place, apart, v, mask):
    high, low = halves(v)
    tl.store(place, high.to(tl.bfloat16), mask=mask)
    tl.store(place + apart, low.to(tl.bfloat16), mask=mask)


@triton.jit
def load_halves(place, apart, mask):
    """A matrix as it is stored, so that products read it from shared memory, where it stays."""
    return tl.load(place, mask=mask, other=0.0).to(FACTOR), tl.load(place + apart, mask=mask, other=0.0).to(FACTOR)


@triton.jit
def load_complex(place, apart, mask):
    """The halves of the real part, and those of the imaginary part, which come after it."""
    re, re_low = load_halves(place, apart, mask)
    im, im_low = load_halves(place + 2 * apart, apart, mask)
    return re, re_low, im, im_low


@triton.jit
def load_decay(place, real, STATE: tl.constexpr):
    """exp(CHUNK z), (LANES, 1): real and imaginary part."""
    re, im = tl.load(place, mask=real, other=0.0), tl.load(place + STATE, mask=real, other=0.0)
    return re[:, None], im[:, None]


@triton.jit(do_not_specialize=["blocks"])
def chunk_tables_kernel(
    c, z, E, V, k, decay, blocks, STATE: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    ssm = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, LANES)
    real = n < STATE
    at = (ssm * STATE + n) * 2
    re, im = load_pairs(z, at, real)
    c_re, c_im = tl.load(c + at, mask=real, other=0.0), tl.load(c + at + 1, mask=real, other=0.0)
    e_re, e_im = powers(re[None, :], im[None, :], t[:, None].to(tl.float64))
    inside = (t <= CHUNK)[:, None] & real[None, :]
    own = E + ssm * (8 * (CHUNK + 1) * STATE) + t[:, None] * STATE + n[None, :]
    store_halves(own, (CHUNK + 1) * STATE, e_re, inside)
    store_halves(own + 2 * (CHUNK + 1) * STATE, (CHUNK + 1) * STATE, e_im, inside)
    steps = t[:, None].to(tl.float32)
    store_halves(own + 4 * (CHUNK + 1) * STATE, (CHUNK + 1) * STATE, steps * e_re, inside)
    store_halves(own + 6 * (CHUNK + 1) * STATE, (CHUNK + 1) * STATE, steps * e_im, inside)
    last = (t == CHUNK)[:, None] & real[None, :]
    tl.store(decay + ssm * (2 * STATE) + n[None, :] + t[:, None] * 0, e_re, mask=last)
    tl.store(decay + ssm * (2 * STATE) + STATE + n[None, :] + t[:, None] * 0, e_im, mask=last)
    v_re = 2.0 * (c_re[None, :] * e_re - c_im[None, :] * e_im)
    v_im = 2.0 * (c_re[None, :] * e_im + c_im[None, :] * e_re)
    inside = (t < CHUNK)[:, None] & real[None, :]
    own = V + ssm * (4 * CHUNK * STATE) + t[:, None] * STATE + n[None, :]
    store_halves(own, CHUNK * STATE, v_re, inside)
    store_halves(own + 2 * CHUNK * STATE, CHUNK * STATE, -v_im, inside)
    store_halves(k + ssm * (2 * CHUNK) + t, CHUNK, tl.sum(tl.where(real[None, :], v_re, 0.0), 1), t < CHUNK)


@triton.jit
def place_of(program, ssms, columns, segments):
    """System, row, segment and first channel of a program: columns run fastest, so neighbours read the same rows."""
    column = program % columns
    ssm = (program // columns) % ssms
    segment = (program // (columns * ssms)) % segments
    row = program // (columns * ssms * segments)
    return ssm.to(tl.int64), row.to(tl.int64), segment, column


@triton.jit
def load_chunk(base, at, length, stride, channels, inside, REVERSE: tl.constexpr):
    """CHUNK steps from `at` on in the order of time, (CHUNK, WIDE) bfloat16; zeros past the end."""
    place = (length - 1 - at if REVERSE else at).to(tl.int64) * stride
    inside = (at < length)[:, None] & inside[None, :]
    return tl.load(base + place[:, None] + channels[None, :], mask=inside, other=0.0).to(FACTOR)


@triton.jit
def advanced(decay_re, decay_im, H_re, H_im, U_re, U_re_low, U_im, U_im_low, v):
    """decay H + U v. The last sum comes after the last product, so that all have ended when the step of the loop does:
    products that went on into the next one would read v's buffer while the copy of a later chunk is written there."""
    old_re, old_im = decay_re * H_re - decay_im * H_im, decay_re * H_im + decay_im * H_re
    new_re = tl.dot(U_re, v, tl.dot(U_re_low, v, old_re))
    return new_re, old_im + tl.dot(U_im, v, tl.dot(U_im_low, v))


@triton.jit(do_not_specialize=["length", "ssms", "columns", "segments", "chunks"])
def chunked_conv_kernel(
    x, E, V, k, decay, skip, start, y, length, each, ssms, columns, segments, chunks,
    x_row, x_step, x_channel, y_row, y_step, y_channel,
    STATE: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, REVERSE: tl.constexpr,
    SKIP: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    ssm, row, segment, column = place_of(tl.program_id(0), ssms, columns, segments)
    n, t, d = tl.arange(0, LANES), tl.arange(0, CHUNK), column * WIDE + tl.arange(0, WIDE)
    real, inside = n < STATE, d < each
    d = ssm * each + d
    E += ssm * (8 * (CHUNK + 1) * STATE) + (CHUNK - t)[None, :] * STATE + n[:, None]
    V += ssm * (4 * CHUNK * STATE) + t[:, None] * STATE + n[None, :]
    x += row * x_row
    y += row * y_row
    U_re, U_re_low, U_im, U_im_low = load_complex(E, (CHUNK + 1) * STATE, real[:, None])
    V_re, V_re_low, V_im, V_im_low = load_complex(V, CHUNK * STATE, real[None, :])
    lag = t[:, None] - t[None, :]
    T, T_low = load_halves(k + ssm * (2 * CHUNK) + lag, CHUNK, lag >= 0)
    decay_re, decay_im = load_decay(decay + ssm * (2 * STATE) + n, real, STATE)
    if SKIP:
        D = tl.load(skip + d, mask=inside, other=0.0)[None, :]
    if CARRIED:
        own = start + (row * segments + segment) * (2 * STATE * each * ssms) + n[:, None] * (each * ssms) + d[None, :]
        H_re = tl.load(own, mask=real[:, None] & inside[None, :], other=0.0)
        H_im = tl.load(own + STATE * each * ssms, mask=real[:, None] & inside[None, :], other=0.0)
    else:
        H_re = tl.zeros([LANES, WIDE], tl.float32)
        H_im = tl.zeros([LANES, WIDE], tl.float32)

    first = segment * chunks * CHUNK
    for begin in range(first, tl.minimum(first + chunks * CHUNK, length), CHUNK):
        v = load_chunk(x, begin + t, length, x_step, d * x_channel, inside, REVERSE)
        out = tl.dot(T, v)
        out = tl.dot(T_low, v, out)
        high, low = halves(H_re)
        out = tl.dot(V_re, high, out)
        out = tl.dot(V_re_low, high, out)
        out = tl.dot(V_re, low, out)
        high, low = halves(H_im)
        out = tl.dot(V_im, high, out)
        out = tl.dot(V_im_low, high, out)
        out = tl.dot(V_im, low, out)
        if SKIP:
            out += D * v.to(tl.float32)
        at = begin + t
        place = (length - 1 - at if REVERSE else at).to(tl.int64) * y_step
        tl.store(
            y + place[:, None] + (d * y_channel)[None, :], out.to(y.dtype.element_ty),
            mask=(at < length)[:, None] & inside[None, :],
        )  # fmt: skip
        H_re, H_im = advanced(decay_re, decay_im, H_re, H_im, U_re, U_re_low, U_im, U_im_low, v)


@triton.jit(do_not_specialize=["length", "ssms", "columns", "segments", "chunks"])
def segment_states_kernel(
    x, E, decay, states, length, each, ssms, columns, segments, chunks, x_row, x_step, x_channel,
    STATE: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, REVERSE: tl.constexpr,
    SLOPE: tl.constexpr,
):  # fmt: skip
    ssm, row, segment, column = place_of(tl.program_id(0), ssms, columns, segments)
    n, t, d = tl.arange(0, LANES), tl.arange(0, CHUNK), column * WIDE + tl.arange(0, WIDE)
    real, inside = n < STATE, d < each
    d = ssm * each + d
    E += ssm * (8 * (CHUNK + 1) * STATE) + (CHUNK - t)[None, :] * STATE + n[:, None]
    x += row * x_row
    U_re, U_re_low, U_im, U_im_low = load_complex(E, (CHUNK + 1) * STATE, real[:, None])
    if SLOPE:
        S_re, S_re_low, S_im, S_im_low = load_complex(E + 4 * (CHUNK + 1) * STATE, (CHUNK + 1) * STATE, real[:, None])
        G_re = tl.zeros([LANES, WIDE], tl.float32)
        G_im = tl.zeros([LANES, WIDE], tl.float32)
    decay_re, decay_im = load_decay(decay + ssm * (2 * STATE) + n, real, STATE)
    H_re = tl.zeros([LANES, WIDE], tl.float32)
    H_im = tl.zeros([LANES, WIDE], tl.float32)
    first = segment * chunks * CHUNK
    for begin in range(first, tl.minimum(first + chunks * CHUNK, length), CHUNK):
        v = load_chunk(x, begin + t, length, x_step, d * x_channel, inside, REVERSE)
        if SLOPE:
            g_re, g_im = G_re + CHUNK * H_re, G_im + CHUNK * H_im
            G_re, G_im = advanced(decay_re, decay_im, g_re, g_im, S_re, S_re_low, S_im, S_im_low, v)
        H_re, H_im = advanced(decay_re, decay_im, H_re, H_im, U_re, U_re_low, U_im, U_im_low, v)
    part = STATE * each * ssms
    PARTS: tl.constexpr = 4 if SLOPE else 2
    own = states + (row * segments + segment) * (PARTS * part) + n[:, None] * (each * ssms) + d[None, :]
    inside = real[:, None] & inside[None, :]
    tl.store(own, H_re, mask=inside)
    tl.store(own + part, H_im, mask=inside)
    if SLOPE:
        tl.store(own + 2 * part, G_re, mask=inside)
        tl.store(own + 3 * part, G_im, mask=inside)


@triton.jit(do_not_specialize=["segments", "ssms", "columns", "bands", "steps"])
def segment_carry_kernel(
    states, z, segments, each, ssms, columns, bands, steps,
    STATE: tl.constexpr, STATES: tl.constexpr, WIDE: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """In place: what each segment leaves becomes what it begins with."""
    program = tl.program_id(0)
    n = (program % bands) * STATES + tl.arange(0, STATES)
    d = ((program // bands) % columns) * WIDE + tl.arange(0, WIDE)
    ssm = ((program // (bands * columns)) % ssms).to(tl.int64)
    row = (program // (bands * columns * ssms)).to(tl.int64)
    real = n < STATE
    inside = real[:, None] & (d < each)[None, :]
    at = (ssm * STATE + n) * 2
    re, im = load_pairs(z, at, real)
    steps += tl.zeros([1], tl.float64)
    decay_re, decay_im = powers(re, im, steps)
    steps = steps.to(tl.float32)
    decay_re, decay_im = decay_re[:, None], decay_im[:, None]
    part = STATE * each * ssms
    PARTS: tl.constexpr = 4 if SLOPE else 2
    own = states + row * segments * (PARTS * part) + n[:, None] * (each * ssms) + (ssm * each + d)[None, :]
    H_re = tl.zeros([STATES, WIDE], tl.float32)
    H_im = tl.zeros([STATES, WIDE], tl.float32)
    G_re = tl.zeros([STATES, WIDE], tl.float32)
    G_im = tl.zeros([STATES, WIDE], tl.float32)
    for first in range(0, segments, AHEAD):
        for i in tl.static_range(AHEAD):  # their loads do not wait for one another
            known = inside & (first + i < segments)
            here = own + i * (PARTS * part)
            left_re = tl.load(here, mask=known, other=0.0)
            left_im = tl.load(here + part, mask=known, other=0.0)
            tl.store(here, H_re, mask=known)
            tl.store(here + part, H_im, mask=known)
            if SLOPE:
                slope_re = tl.load(here + 2 * part, mask=known, other=0.0)
                slope_im = tl.load(here + 3 * part, mask=known, other=0.0)
                tl.store(here + 2 * part, G_re, mask=known)
                tl.store(here + 3 * part, G_im, mask=known)
                g_re, g_im = G_re + steps[:, None] * H_re, G_im + steps[:, None] * H_im
                G_re = decay_re * g_re - decay_im * g_im + slope_re
                G_im = decay_re * g_im + decay_im * g_re + slope_im
            next_re = decay_re * H_re - decay_im * H_im + left_re
            H_im = decay_re * H_im + decay_im * H_re + left_im
            H_re = next_re
        own += AHEAD * PARTS * part


@triton.jit(do_not_specialize=["length", "ssms", "columns", "segments", "chunks", "programs"])
def chunked_gradients_kernel(
    x, dy, E, decay, start, sums, products, dskip, length, each, ssms, columns, segments, chunks, programs,
    x_row, x_step, x_channel, y_row, y_step, y_channel,
    STATE: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, REVERSE: tl.constexpr,
    SKIP: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    ssm, row, segment, column = place_of(tl.program_id(0), ssms, columns, segments)
    n, t, d = tl.arange(0, LANES), tl.arange(0, CHUNK), column * WIDE + tl.arange(0, WIDE)
    real, inside = n < STATE, d < each
    d = ssm * each + d
    x += row * x_row
    dy += row * y_row
    E += ssm * (8 * (CHUNK + 1) * STATE) + n[:, None]
    later = E + (CHUNK - t)[None, :] * STATE
    U_re, U_re_low, U_im, U_im_low = load_complex(later, (CHUNK + 1) * STATE, real[:, None])
    S_re, S_re_low, S_im, S_im_low = load_complex(later + 4 * (CHUNK + 1) * STATE, (CHUNK + 1) * STATE, real[:, None])
    sooner = E + t[None, :] * STATE
    W_re, W_re_low, W_im, W_im_low = load_complex(sooner, (CHUNK + 1) * STATE, real[:, None])
    R_re, R_re_low, R_im, R_im_low = load_complex(sooner + 4 * (CHUNK + 1) * STATE, (CHUNK + 1) * STATE, real[:, None])
    decay_re, decay_im = load_decay(decay + ssm * (2 * STATE) + n, real, STATE)
    H_re = tl.zeros([LANES, WIDE], tl.float32)
    H_im = tl.zeros([LANES, WIDE], tl.float32)
    G_re = tl.zeros([LANES, WIDE], tl.float32)
    G_im = tl.zeros([LANES, WIDE], tl.float32)
    if CARRIED:
        part = STATE * each * ssms
        own = start + (row * segments + segment) * (4 * part) + n[:, None] * (each * ssms) + d[None, :]
        held = real[:, None] & inside[None, :]
        H_re = tl.load(own, mask=held, other=0.0)
        H_im = tl.load(own + part, mask=held, other=0.0)
        G_re = tl.load(own + 2 * part, mask=held, other=0.0)
        G_im = tl.load(own + 3 * part, mask=held, other=0.0)

    a_re = tl.zeros([LANES], tl.float32)  # sum P H
    a_im = tl.zeros([LANES], tl.float32)
    b_re = tl.zeros([LANES], tl.float32)  # sum P H' + P' H
    b_im = tl.zeros([LANES], tl.float32)
    within = tl.zeros([CHUNK, CHUNK], tl.float32)
    straight = tl.zeros([WIDE], tl.float32)
    first = segment * chunks * CHUNK
    for begin in range(first, tl.minimum(first + chunks * CHUNK, length), CHUNK):
        v = load_chunk(x, begin + t, length, x_step, d * x_channel, inside, REVERSE)
        g = load_chunk(dy, begin + t, length, y_step, d * y_channel, inside, REVERSE)
        within = tl.dot(g, tl.trans(v), within)
        if SKIP:
            straight += tl.sum(g.to(tl.float32) * v.to(tl.float32), 0)
        p_re = tl.dot(W_re, g, tl.dot(W_re_low, g))
        p_im = tl.dot(W_im, g, tl.dot(W_im_low, g))
        a_re += tl.sum(p_re * H_re - p_im * H_im, 1)
        a_im += tl.sum(p_re * H_im + p_im * H_re, 1)
        b_re += tl.sum(p_re * G_re - p_im * G_im, 1)
        b_im += tl.sum(p_re * G_im + p_im * G_re, 1)
        p_re = tl.dot(R_re, g, tl.dot(R_re_low, g))
        p_im = tl.dot(R_im, g, tl.dot(R_im_low, g))
        b_re += tl.sum(p_re * H_re - p_im * H_im, 1)
        b_im += tl.sum(p_re * H_im + p_im * H_re, 1)
        g_re, g_im = G_re + CHUNK * H_re, G_im + CHUNK * H_im
        G_re, G_im = advanced(decay_re, decay_im, g_re, g_im, S_re, S_re_low, S_im, S_im_low, v)
        H_re, H_im = advanced(decay_re, decay_im, H_re, H_im, U_re, U_re_low, U_im, U_im_low, v)

    mine = ssm * programs + (row * segments + segment) * columns + column
    own = sums + mine * (4 * STATE) + n
    tl.store(own, a_re, mask=real)
    tl.store(own + STATE, a_im, mask=real)
    tl.store(own + 2 * STATE, b_re, mask=real)
    tl.store(own + 3 * STATE, b_im, mask=real)
    if SKIP:
        tl.store(dskip + (row * segments + segment) * (each * ssms) + d, straight, mask=inside)
    tl.store(products + mine * (CHUNK * CHUNK) + t[:, None] * CHUNK + t[None, :], within)


@triton.jit
def diagonals_kernel(products, near, CHUNK: tl.constexpr):
    """near[lag] = sum_t products[t, t - lag]."""
    t, mine = tl.arange(0, CHUNK), tl.program_id(0).to(tl.int64)
    own = products + mine * (CHUNK * CHUNK) + t[None, :] * CHUNK + t[None, :] - t[:, None]  # [lag, t]
    tl.store(near + mine * CHUNK + t, tl.sum(tl.load(own, mask=t[None, :] >= t[:, None], other=0.0), 1))


@triton.jit(do_not_specialize=["programs", "bands"])
def chunked_sums_kernel(
    sums, near, c, z, dc, dz, programs, bands,
    STATE: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    ssm = (tl.program_id(0) // bands).to(tl.int64)
    n = (tl.program_id(0) % bands) * STATES + tl.arange(0, STATES)
    t = tl.arange(0, CHUNK)
    real = n < STATE
    a_re = tl.zeros([SUMMED, STATES], tl.float64)
    a_im = tl.zeros([SUMMED, STATES], tl.float64)
    b_re = tl.zeros([SUMMED, STATES], tl.float64)
    b_im = tl.zeros([SUMMED, STATES], tl.float64)
    lags = tl.zeros([SUMMED, CHUNK], tl.float64)
    for first in range(0, programs, SUMMED):
        program = first + tl.arange(0, SUMMED)
        known = program < programs
        program = ssm * programs + program
        inside = known[:, None] & real[None, :]
        own = sums + program[:, None] * (4 * STATE) + n[None, :]
        a_re += tl.load(own, mask=inside, other=0.0).to(tl.float64)
        a_im += tl.load(own + STATE, mask=inside, other=0.0).to(tl.float64)
        b_re += tl.load(own + 2 * STATE, mask=inside, other=0.0).to(tl.float64)
        b_im += tl.load(own + 3 * STATE, mask=inside, other=0.0).to(tl.float64)
        lags += tl.load(near + program[:, None] * CHUNK + t[None, :], mask=known[:, None], other=0.0).to(tl.float64)
    dk = tl.sum(lags, 0)[:, None]
    place = (ssm * STATE + n) * 2
    re, im = load_pairs(z, place, real)
    e_re, e_im = powers(re[None, :], im[None, :], t[:, None].to(tl.float64))
    e_re, e_im = e_re.to(tl.float64), e_im.to(tl.float64)
    steps = t[:, None].to(tl.float64)
    s_re, s_im = tl.sum(a_re, 0) + tl.sum(dk * e_re, 0), tl.sum(a_im, 0) + tl.sum(dk * e_im, 0)
    m_re = tl.sum(b_re, 0) + tl.sum(steps * dk * e_re, 0)
    m_im = tl.sum(b_im, 0) + tl.sum(steps * dk * e_im, 0)
    store_moments(c, dc, dz, place, real, s_re, s_im, m_re, m_im)
