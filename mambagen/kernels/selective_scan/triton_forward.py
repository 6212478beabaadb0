"""Triton kernels of the selective scan's forward: the scan of one segment, and the states that segments hand on.

    segment_ends   the state at each segment's end, started from zero, and the sums that give its whole decay
    pass_on        the state that enters each segment, from the ends in order (also for the adjoint, backwards)
    scan           the outputs, and the states that backward starts its chunks from

One segment a sequence needs `scan` alone.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from mambagen.kernels.selective_scan.triton_steps import SIZES, decay, load_cuts, located, step_size
from mambagen.kernels.triton_rows import LOG2E, load_rows, oriented, silu


@triton.jit
def scan_rows(
    x, dt, B, C, z, x_time, dt_time, B_time, C_time, z_time, start, end, c, has_c, n, has_n, ROWS: tl.constexpr
):  # fmt: skip
    """The rows of x, dt, B, C and z (of x again where there is no z)."""
    xs = load_rows(x, x_time, start, end, c, has_c, ROWS)
    dts = load_rows(dt, dt_time, start, end, c, has_c, ROWS)
    Bs = load_rows(B, B_time, start, end, n, has_n, ROWS)
    Cs = load_rows(C, C_time, start, end, n, has_n, ROWS)
    zs = xs if z is None else load_rows(z, z_time, start, end, c, has_c, ROWS)
    return xs, dts, Bs, Cs, zs


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    resets,
    entry,
    y,
    saved,
    final,
    x_batch,
    x_time,
    dt_batch,
    dt_time,
    B_batch,
    B_time,
    C_batch,
    C_time,
    z_batch,
    z_time,
    length,
    segment_length,
    segments,
    channels,
    tiles,
    group_tiles,
    group_channels,
    STATE: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """y of one segment from the state that enters it; `saved` gets the state before every CHUNK steps.

    entry is (batch, segments, channels, state) or None for zeros, saved (batch, chunks, channels, state) or None.
    """
    batch, segment, _, group, c, has_c = located(tiles, group_tiles, group_channels, segments, TILE)
    n = tl.arange(0, PADDED)
    has_n = n < STATE
    inside = has_n[:, None] & has_c[None, :]
    state = c[None, :] * STATE + n[:, None]
    state_size = tl.cast(channels, tl.int64) * STATE

    x, x_time = oriented(x + batch * x_batch, x_time, length, REVERSE)
    dt, dt_time = oriented(dt + batch * dt_batch, dt_time, length, REVERSE)
    B, B_time = oriented(B + batch * B_batch + group * STATE, B_time, length, REVERSE)
    C, C_time = oriented(C + batch * C_batch + group * STATE, C_time, length, REVERSE)
    y, y_time = oriented(y + batch * length * channels, channels, length, REVERSE)
    if z is not None:
        z, z_time = oriented(z + batch * z_batch, z_time, length, REVERSE)
    if resets is not None:
        resets += batch * length
    if saved is not None:
        saved += batch * tl.cdiv(length, CHUNK) * state_size

    a2 = tl.load(A + state, mask=inside, other=0.0) * LOG2E
    skip = 0.0 if D is None else tl.load(D + c, mask=has_c, other=0.0)
    bias = 0.0 if dt_bias is None else tl.load(dt_bias + c, mask=has_c, other=0.0)
    if entry is None:
        h = tl.zeros([PADDED, TILE], tl.float32)
    else:
        h = tl.load(entry + (batch * segments + segment) * state_size + state, mask=inside, other=0.0)

    first = segment * segment_length
    end = tl.minimum(first + segment_length, length)
    xs, dts, Bs, Cs, zs = scan_rows(
        x, dt, B, C, z, x_time, dt_time, B_time, C_time, z_time, first, end, c, has_c, n, has_n, ROWS
    )
    for start in range(first, end, ROWS):
        if saved is not None:  # noqa: SIM102 (the first is decided when compiling, the second when running)
            if start % CHUNK == 0:
                tl.store(saved + tl.cast(start // CHUNK, tl.int64) * state_size + state, h, mask=inside)
        # the next rows are on their way while these are worked on
        xs_next, dts_next, Bs_next, Cs_next, zs_next = scan_rows(
            x, dt, B, C, z, x_time, dt_time, B_time, C_time, z_time, start + ROWS, end, c, has_c, n, has_n, ROWS
        )
        cuts = load_cuts(resets, start, length, REVERSE, ROWS)
        for k in tl.static_range(ROWS):
            step = start + k
            xk = xs[k].to(tl.float32)
            d = step_size(dts[k], bias, step < end, SOFTPLUS)
            h = decay(d, a2, cuts[k]) * h + (d * xk)[None, :] * Bs[k].to(tl.float32)[:, None]
            out = tl.sum(h * Cs[k].to(tl.float32)[:, None], 0) + skip * xk
            if z is not None:
                out *= silu(zs[k].to(tl.float32))
            row = y + tl.cast(step, tl.int64) * y_time
            tl.store(row + c, out.to(y.dtype.element_ty), mask=has_c & (step < end))
        xs, dts, Bs, Cs, zs = xs_next, dts_next, Bs_next, Cs_next, zs_next

    if end == length:
        tl.store(final + batch * state_size + state, h, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def segment_ends_kernel(
    x,
    dt,
    A,
    B,
    dt_bias,
    resets,
    ends,
    step_sums,
    cut_sums,
    x_batch,
    x_time,
    dt_batch,
    dt_time,
    B_batch,
    B_time,
    length,
    segment_length,
    segments,
    channels,
    tiles,
    group_tiles,
    group_channels,
    STATE: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The state at a segment's end when it starts from zero, the sum of its steps, and of its cuts (0 or -inf)."""
    batch, segment, tile, group, c, has_c = located(tiles, group_tiles, group_channels, segments, TILE)
    n = tl.arange(0, PADDED)
    has_n = n < STATE
    inside = has_n[:, None] & has_c[None, :]
    state = c[None, :] * STATE + n[:, None]

    x, x_time = oriented(x + batch * x_batch, x_time, length, REVERSE)
    dt, dt_time = oriented(dt + batch * dt_batch, dt_time, length, REVERSE)
    B, B_time = oriented(B + batch * B_batch + group * STATE, B_time, length, REVERSE)
    if resets is not None:
        resets += batch * length

    a2 = tl.load(A + state, mask=inside, other=0.0) * LOG2E
    bias = 0.0 if dt_bias is None else tl.load(dt_bias + c, mask=has_c, other=0.0)
    h = tl.zeros([PADDED, TILE], tl.float32)
    step_sum = tl.zeros([TILE], tl.float32)
    cut_sum = 0.0

    first = segment * segment_length
    end = tl.minimum(first + segment_length, length)
    for start in range(first, end, ROWS):
        xs = load_rows(x, x_time, start, end, c, has_c, ROWS)
        dts = load_rows(dt, dt_time, start, end, c, has_c, ROWS)
        Bs = load_rows(B, B_time, start, end, n, has_n, ROWS)
        cuts = load_cuts(resets, start, length, REVERSE, ROWS)
        for k in tl.static_range(ROWS):
            d = step_size(dts[k], bias, start + k < end, SOFTPLUS)
            u = d * xs[k].to(tl.float32)
            h = decay(d, a2, cuts[k]) * h + u[None, :] * Bs[k].to(tl.float32)[:, None]
            step_sum += d
            cut_sum += cuts[k]

    place = batch * segments + segment
    tl.store(ends + place * channels * STATE + state, h, mask=inside)
    tl.store(step_sums + place * channels + c, step_sum, mask=has_c)
    if tile == 0:
        tl.store(cut_sums + place, cut_sum)


@triton.jit(do_not_specialize=["segments", "channels"])
def pass_on_kernel(
    states,
    first,
    A,
    step_sums,
    cut_sums,
    segments,
    channels,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    """In place: from what each segment adds to the state to the state that enters it.

    states is (batch, segments, channels, state), first (batch, channels, state) or None for zeros. BACKWARDS begins at
    the last segment, as the adjoint does.
    """
    state_size = tl.cast(channels, tl.int64) * STATE
    blocks = tl.cdiv(state_size, BLOCK)
    batch = tl.program_id(0) // blocks
    j = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = j < state_size
    c = j // STATE
    a2 = tl.load(A + j, mask=inside, other=0.0) * LOG2E
    if first is None:
        h = tl.zeros([BLOCK], tl.float32)
    else:
        h = tl.load(first + batch * state_size + j, mask=inside, other=0.0)
    for start in range(0, segments, AHEAD):
        added, steps, cuts = (), (), ()
        for k in tl.static_range(AHEAD):
            i = start + k
            exists = i < segments
            place = batch * segments + (segments - 1 - i if BACKWARDS else i)
            added += (tl.load(states + place * state_size + j, mask=inside & exists, other=0.0),)
            steps += (tl.load(step_sums + place * channels + c, mask=inside & exists, other=0.0),)
            cuts += (tl.load(cut_sums + place, mask=exists, other=0.0),)
        for k in tl.static_range(AHEAD):
            i = start + k
            place = batch * segments + (segments - 1 - i if BACKWARDS else i)
            tl.store(states + place * state_size + j, h, mask=inside & (i < segments))
            h = tl.exp2(steps[k] * a2 + cuts[k]) * h + added[k]
