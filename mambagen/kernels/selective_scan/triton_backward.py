"""Triton kernels of the selective scan's backward: the adjoint of one segment, and what segments hand back.

The adjoint runs against the scan in the scaled form w_t = a_t g_t, where g_t = C_t dy_t + w_{t+1} is the adjoint of
h_t and a_t = exp(dt_t A): one a_t serves both sweeps. With p_t = a_t h_{t-1}, what the state keeps of its past, every
use of da_t is da_t a_t = g_t p_t, so dA += dt_t g_t p_t and d(dt_t) += sum_n A g_t p_t without division or a shifted h.

    adjoint_ends   w at each segment's start when nothing enters at its end (then pass_on, backwards)
    backward       all gradients of one segment
    sum_tiles      dB and dC from their parts, one a tile of channels

Nothing is added atomically, so results repeat bit for bit.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from mambagen.kernels.selective_scan.triton_steps import (
    SIZES,
    decay,
    exponent_of,
    load_cuts,
    located,
    softplus_slope,
    step_size,
)
from mambagen.kernels.triton_rows import LN2, LOG2E, load_rows, logistic, oriented, silu


@triton.jit(do_not_specialize=SIZES)
def adjoint_ends_kernel(
    dy,
    dt,
    A,
    C,
    z,
    dt_bias,
    resets,
    ends,
    step_sums,
    cut_sums,
    dy_batch,
    dy_time,
    dt_batch,
    dt_time,
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
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The adjoint that leaves a segment at its start when none enters at its end, and the segment's sums of steps."""
    batch, segment, tile, group, c, has_c = located(tiles, group_tiles, group_channels, segments, TILE)
    n = tl.arange(0, PADDED)
    has_n = n < STATE
    inside = has_n[:, None] & has_c[None, :]
    state = c[None, :] * STATE + n[:, None]

    dy, dy_time = oriented(dy + batch * dy_batch, dy_time, length, REVERSE)
    dt, dt_time = oriented(dt + batch * dt_batch, dt_time, length, REVERSE)
    C, C_time = oriented(C + batch * C_batch + group * STATE, C_time, length, REVERSE)
    if z is not None:
        z, z_time = oriented(z + batch * z_batch, z_time, length, REVERSE)
    if resets is not None:
        resets += batch * length

    a2 = tl.load(A + state, mask=inside, other=0.0) * LOG2E
    bias = 0.0 if dt_bias is None else tl.load(dt_bias + c, mask=has_c, other=0.0)
    w = tl.zeros([PADDED, TILE], tl.float32)
    step_sum = tl.zeros([TILE], tl.float32)
    cut_sum = 0.0

    first = segment * segment_length
    end = tl.minimum(first + segment_length, length)
    blocks = tl.cdiv(end - first, ROWS)
    for block in range(blocks):
        start = first + (blocks - 1 - block) * ROWS
        dys = load_rows(dy, dy_time, start, end, c, has_c, ROWS)
        dts = load_rows(dt, dt_time, start, end, c, has_c, ROWS)
        Cs = load_rows(C, C_time, start, end, n, has_n, ROWS)
        if z is not None:
            zs = load_rows(z, z_time, start, end, c, has_c, ROWS)
        cuts = load_cuts(resets, start, length, REVERSE, ROWS)
        for k in tl.static_range(ROWS - 1, -1, -1):
            g = dys[k].to(tl.float32)
            if z is not None:
                g *= silu(zs[k].to(tl.float32))
            d = step_size(dts[k], bias, start + k < end, SOFTPLUS)
            w = decay(d, a2, cuts[k]) * (g[None, :] * Cs[k].to(tl.float32)[:, None] + w)
            step_sum += d
            cut_sum += cuts[k]

    place = batch * segments + segment
    tl.store(ends + place * channels * STATE + state, w, mask=inside)
    tl.store(step_sums + place * channels + c, step_sum, mask=has_c)
    if tile == 0:
        tl.store(cut_sums + place, cut_sum)


@triton.jit
def adjoint_rows(
    x, dt, B, dy, C, z, x_time, dt_time, B_time, dy_time, C_time, z_time, start, end, c, has_c, n, has_n,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The rows of x, dt, B, dy, C and z (of x again where there is no z)."""
    xs = load_rows(x, x_time, start, end, c, has_c, ROWS)
    dts = load_rows(dt, dt_time, start, end, c, has_c, ROWS)
    Bs = load_rows(B, B_time, start, end, n, has_n, ROWS)
    dys = load_rows(dy, dy_time, start, end, c, has_c, ROWS)
    Cs = load_rows(C, C_time, start, end, n, has_n, ROWS)
    zs = xs if z is None else load_rows(z, z_time, start, end, c, has_c, ROWS)
    return xs, dts, Bs, dys, Cs, zs


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    dy,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    resets,
    saved,
    entry,
    scratch,
    dx,
    ddt,
    dz,
    dA,
    dB,
    dC,
    dD,
    ddt_bias,
    dinitial,
    dy_batch,
    dy_time,
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
    dz_batch,
    dz_time,
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
    """All gradients of one segment, from the last chunk to the first.

    A chunk's states are computed twice: once through the chunk, leaving the state before every ROWS steps in `scratch`
    (CHUNK / ROWS, PADDED, TILE a program), and once more ROWS steps at a time, into registers, before the adjoint takes
    those steps. entry is the adjoint at each segment's end, (batch, segments, channels, state), or None for zeros.
    Sums over time go to parts: dA (batch, segments, channels, state), dD and ddt_bias (batch, segments, channels); sums
    over channels to dB and dC (batch, tiles, length, state). dinitial (batch, channels, state) may be None.
    """
    batch, segment, tile, group, c, has_c = located(tiles, group_tiles, group_channels, segments, TILE)
    n = tl.arange(0, PADDED)
    has_n = n < STATE
    inside = has_n[:, None] & has_c[None, :]
    state = c[None, :] * STATE + n[:, None]
    state_size = tl.cast(channels, tl.int64) * STATE
    chunks = tl.cdiv(length, CHUNK)
    BLOCKS: tl.constexpr = CHUNK // ROWS

    dy, dy_time = oriented(dy + batch * dy_batch, dy_time, length, REVERSE)
    x, x_time = oriented(x + batch * x_batch, x_time, length, REVERSE)
    dt, dt_time = oriented(dt + batch * dt_batch, dt_time, length, REVERSE)
    B, B_time = oriented(B + batch * B_batch + group * STATE, B_time, length, REVERSE)
    C, C_time = oriented(C + batch * C_batch + group * STATE, C_time, length, REVERSE)
    dx, out_time = oriented(dx + batch * length * channels, channels, length, REVERSE)
    ddt, _ = oriented(ddt + batch * length * channels, channels, length, REVERSE)
    dB, part_time = oriented(dB + (batch * tiles + tile) * length * STATE, STATE, length, REVERSE)
    dC, _ = oriented(dC + (batch * tiles + tile) * length * STATE, STATE, length, REVERSE)
    if z is not None:
        z, z_time = oriented(z + batch * z_batch, z_time, length, REVERSE)
        dz, dz_time = oriented(dz + batch * dz_batch, dz_time, length, REVERSE)
    if resets is not None:
        resets += batch * length
    saved += batch * chunks * state_size
    scratch += tl.program_id(0).to(tl.int64) * (BLOCKS * PADDED * TILE)
    scratch_tile = tl.arange(0, TILE)[None, :] * PADDED + n[:, None]

    a2 = tl.load(A + state, mask=inside, other=0.0) * LOG2E
    skip = 0.0 if D is None else tl.load(D + c, mask=has_c, other=0.0)
    bias = 0.0 if dt_bias is None else tl.load(dt_bias + c, mask=has_c, other=0.0)
    place = batch * segments + segment
    if entry is None:
        w = tl.zeros([PADDED, TILE], tl.float32)
    else:
        w = tl.load(entry + place * state_size + state, mask=inside, other=0.0)
    sum_A = tl.zeros([PADDED, TILE], tl.float32)
    sum_D = tl.zeros([TILE], tl.float32)
    sum_bias = tl.zeros([TILE], tl.float32)

    first = segment * segment_length
    end = tl.minimum(first + segment_length, length)
    first_chunk = first // CHUNK
    own_chunks = tl.cdiv(end - first, CHUNK)
    for i in range(own_chunks):
        chunk = first_chunk + own_chunks - 1 - i
        h = tl.load(saved + tl.cast(chunk, tl.int64) * state_size + state, mask=inside, other=0.0)
        start = chunk * CHUNK
        xs = load_rows(x, x_time, start, end, c, has_c, ROWS)
        dts = load_rows(dt, dt_time, start, end, c, has_c, ROWS)
        Bs = load_rows(B, B_time, start, end, n, has_n, ROWS)
        for block in range(BLOCKS):
            tl.store(scratch + block * (PADDED * TILE) + scratch_tile, h)
            start = chunk * CHUNK + block * ROWS
            xs_next = load_rows(x, x_time, start + ROWS, end, c, has_c, ROWS)
            dts_next = load_rows(dt, dt_time, start + ROWS, end, c, has_c, ROWS)
            Bs_next = load_rows(B, B_time, start + ROWS, end, n, has_n, ROWS)
            cuts = load_cuts(resets, start, length, REVERSE, ROWS)
            for k in tl.static_range(ROWS):
                d = step_size(dts[k], bias, start + k < end, SOFTPLUS)
                u = d * xs[k].to(tl.float32)
                h = decay(d, a2, cuts[k]) * h + u[None, :] * Bs[k].to(tl.float32)[:, None]
            xs, dts, Bs = xs_next, dts_next, Bs_next
        tl.debug_barrier()  # a thread may read scratch that another wrote

        start = chunk * CHUNK + (BLOCKS - 1) * ROWS
        xs, dts, Bs, dys, Cs, zs = adjoint_rows(
            x, dt, B, dy, C, z, x_time, dt_time, B_time, dy_time, C_time, z_time, start, end, c, has_c, n, has_n, ROWS
        )
        for i_block in range(BLOCKS):
            block = BLOCKS - 1 - i_block
            h = tl.load(scratch + block * (PADDED * TILE) + scratch_tile)
            start = chunk * CHUNK + block * ROWS
            xs_next, dts_next, Bs_next, dys_next, Cs_next, zs_next = adjoint_rows(
                x, dt, B, dy, C, z, x_time, dt_time, B_time, dy_time, C_time, z_time,
                tl.maximum(start - ROWS, 0), end, c, has_c, n, has_n, ROWS,
            )  # fmt: skip
            cuts = load_cuts(resets, start, length, REVERSE, ROWS)
            past = ()
            for k in tl.static_range(ROWS):
                d = step_size(dts[k], bias, start + k < end, SOFTPLUS)
                u = d * xs[k].to(tl.float32)
                p = decay(d, a2, cuts[k]) * h
                h = p + u[None, :] * Bs[k].to(tl.float32)[:, None]
                past += (p,)

            for k in tl.static_range(ROWS - 1, -1, -1):
                step = start + k
                exists = has_c & (step < end)
                xk = xs[k].to(tl.float32)
                Bk = Bs[k].to(tl.float32)[:, None]
                Ck = Cs[k].to(tl.float32)[:, None]
                d = step_size(dts[k], bias, step < end, SOFTPLUS)
                u = (d * xk)[None, :]
                h = past[k] + u * Bk
                dyk = dys[k].to(tl.float32)
                out = tl.cast(step, tl.int64) * out_time
                if z is not None:
                    zk = zs[k].to(tl.float32)
                    open_ = logistic(zk)
                    before_gate = tl.sum(h * Ck, 0) + skip * xk
                    dzk = dyk * before_gate * open_ * (1.0 + zk * (1.0 - open_))
                    row = dz + tl.cast(step, tl.int64) * dz_time
                    tl.store(row + c, dzk.to(dz.dtype.element_ty), mask=exists)
                    dyk *= zk * open_
                g = dyk[None, :] * Ck + w
                w = decay(d, a2, cuts[k]) * g
                gp = g * past[k]
                sum_A += gp * d[None, :]
                du = tl.sum(g * Bk, 0)
                dd = tl.sum(gp * a2, 0) * LN2 + du * xk
                if SOFTPLUS:
                    v = dts[k].to(tl.float32) + bias
                    dd *= softplus_slope(v, exponent_of(v))
                dd = tl.where(exists, dd, 0.0)
                sum_bias += dd
                sum_D += dyk * xk
                tl.store(dx + out + c, (du * d + skip * dyk).to(dx.dtype.element_ty), mask=exists)
                tl.store(ddt + out + c, dd.to(ddt.dtype.element_ty), mask=exists)
                part = tl.cast(step, tl.int64) * part_time
                tl.store(dB + part + n, tl.sum(g * u, 1), mask=has_n & (step < end))
                tl.store(dC + part + n, tl.sum(h * dyk[None, :], 1), mask=has_n & (step < end))
            xs, dts, Bs, dys, Cs, zs = xs_next, dts_next, Bs_next, dys_next, Cs_next, zs_next
        tl.debug_barrier()  # all have read scratch before it is written again

    tl.store(dA + place * state_size + state, sum_A, mask=inside)
    tl.store(dD + place * channels + c, sum_D, mask=has_c)
    tl.store(ddt_bias + place * channels + c, sum_bias, mask=has_c)
    if dinitial is not None:  # noqa: SIM102 (the first is decided when compiling, the second when running)
        if segment == 0:
            tl.store(dinitial + batch * state_size + state, w, mask=inside)


@triton.jit(do_not_specialize=["length", "groups", "group_tiles"])
def sum_tiles_kernel(parts, total, length, groups, group_tiles, STATE: tl.constexpr, BLOCK: tl.constexpr):
    """total (batch, length, groups, state) from parts (batch, groups * group_tiles, length, state), in fixed order."""
    rows = tl.cast(length, tl.int64) * STATE
    blocks = tl.cdiv(rows, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    owner = program // blocks  # one (batch, group)
    j = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = j < rows
    part = parts + owner * group_tiles * rows + j
    added = tl.zeros([BLOCK], tl.float32)
    for _ in range(group_tiles):
        added += tl.load(part, mask=inside, other=0.0)
        part += rows
    batch = owner // groups
    group = owner - batch * groups
    place = ((batch * length + j // STATE) * groups + group) * STATE + j % STATE
    tl.store(total + place, added.to(total.dtype.element_ty), mask=inside)
