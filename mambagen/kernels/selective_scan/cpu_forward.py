"""The forward scan on a CPU. A task is a tile of one sequence, all steps of it, STAGE of them at a time.

The state at the start of every chunk is left for the backward.
"""

# mypy: disallow-untyped-defs=False

from numba import njit

from mambagen.kernels.cpu_common import (
    NEXT_TASK,
    NEXT_THREAD,
    SCRATCH,
    SCRATCH_BYTES,
    TASKS,
    Kernel,
    get,
    row,
)
from mambagen.kernels.cpu_memory import (
    BYTES,
    broadcast,
    claim,
    load,
    load_row,
    store,
    store_row,
)
from mambagen.kernels.cpu_simd import LANES, exp2, fma, keep_apart, sigmoid, softplus_and_slope
from mambagen.kernels.selective_scan.cpu_tiles import (
    LOG2E,
    ROW,
    STAGE,
    TILE,
    P,
    R,
    ask_for,
    copy,
    fill,
    leaves,
    padded,
    read_B_or_C,
    read_cuts,
    read_parameter,
    read_states,
    scale,
    write_states,
)


def forward_scratch(state: int) -> int:
    """Bytes for one thread."""
    return 16 * BYTES + 2 * padded(state) * ROW + 3 * STAGE * ROW + 2 * STAGE * padded(state) * 4 + STAGE * 4 + 2 * ROW


@Kernel
def forward_kernel(p):
    scratch = get(p, SCRATCH) + claim(p + NEXT_THREAD) * get(p, SCRATCH_BYTES)
    task = claim(p + NEXT_TASK)
    while task < get(p, TASKS):
        _forward_tile(p, scratch, task)
        task = claim(p + NEXT_TASK)


@njit
def _forward_tile(p, scratch, task):
    batch = task // get(p, P.TILES)
    tile = task - batch * get(p, P.TILES)
    group = tile // get(p, P.GROUP_TILES)
    in_group = (tile - group * get(p, P.GROUP_TILES)) * TILE
    first = group * get(p, P.GROUP_CHANNELS) + in_group
    channels = min(TILE, get(p, P.GROUP_CHANNELS) - in_group)
    states, length, chunk = get(p, P.STATE), get(p, P.LENGTH), get(p, P.CHUNK)
    tile_bytes = states * ROW
    width = -(-states // LANES) * BYTES  # of a row of B or C

    block = scratch
    A = block + 16 * BYTES
    h = A + width * TILE
    dt = h + width * TILE
    u = dt + STAGE * ROW
    y = u + STAGE * ROW
    B = y + STAGE * ROW
    C = B + STAGE * width
    D = C + STAGE * width
    bias = D + ROW
    cut = bias + ROW

    read_states(get(p, P.A) + first * states * 4, states * 4, channels, states, block, A)
    scale(A, LOG2E, 2 * states)
    initial = get(p, P.INITIAL)
    if initial != 0:
        initial += (batch * get(p, P.CHANNELS) + first) * states * 4
    read_states(initial, states * 4, channels, states, block, h)
    read_parameter(get(p, P.D), first, channels, D)
    read_parameter(get(p, P.BIAS), first, channels, bias)

    for t in range(0, length, STAGE):
        steps = min(STAGE, length - t)
        if get(p, P.SAVED) != 0 and t % chunk == 0:
            copy(h, get(p, P.SAVED) + (task * get(p, P.CHUNKS) + t // chunk) * tile_bytes, 2 * states)
        read_B_or_C(p, R.B, batch, group, t, steps, B)
        read_B_or_C(p, R.C, batch, group, t, steps, C)
        read_cuts(p, batch, t, steps, cut)
        _read_forward(p, batch, first, channels, t, steps, D, bias, dt, u, y)
        ask_for(p, R.X, batch, first, channels, t + STAGE, STAGE)
        ask_for(p, R.DT, batch, first, channels, t + STAGE, STAGE)
        ask_for(p, R.Z, batch, first, channels, t, STAGE)
        _advance(steps, states, width, A, B, C, cut, dt, u, h, y)
        _write_forward(p, batch, first, channels, t, steps, y)

    if not leaves(p, batch):
        fill(h, 2 * states)
    final = get(p, P.FINAL) + (batch * get(p, P.CHANNELS) + first) * states * 4
    write_states(h, final, states * 4, channels, states, block)


@njit
def _read_forward(p, batch, first, channels, t0, steps, D, bias, dt, u, y):
    """dt after bias and softplus, u = dt x, and y as far as the skip."""
    kind, offset = get(p, P.KIND), first * get(p, P.SIZE)
    for t in range(steps):
        x_row = row(p, R.X, batch, t0 + t) + offset
        dt_row = row(p, R.DT, batch, t0 + t) + offset
        for half in range(2):
            here = channels - half * LANES
            step = half * LANES * get(p, P.SIZE)
            at = t * ROW + half * BYTES
            d = load_row(dt_row + step, kind, here) + load(bias + half * BYTES)
            if get(p, P.SOFTPLUS) != 0:
                d, _ = softplus_and_slope(d)
            x = load_row(x_row + step, kind, here)
            store(dt + at, d)
            store(u + at, d * x)
            store(y + at, load(D + half * BYTES) * x)


@njit
def _advance(steps, states, width, A, B, C, cut, dt, u, h, y):
    """The recurrence itself: y += C h over the steps, h left as it is after the last."""
    keep_apart()
    for t in range(steps):
        at = t * ROW
        no_past = broadcast(cut + 4 * t)
        d0, d1 = load(dt + at), load(dt + at + BYTES)
        u0, u1 = load(u + at), load(u + at + BYTES)
        y0, y1 = load(y + at), load(y + at + BYTES)
        for n in range(states):
            k = n * ROW
            b, c = broadcast(B + t * width + 4 * n), broadcast(C + t * width + 4 * n)
            h0 = fma(exp2(fma(d0, load(A + k), no_past)), load(h + k), u0 * b)
            h1 = fma(exp2(fma(d1, load(A + k + BYTES), no_past)), load(h + k + BYTES), u1 * b)
            store(h + k, h0)
            store(h + k + BYTES, h1)
            y0, y1 = fma(c, h0, y0), fma(c, h1, y1)
        store(y + at, y0)
        store(y + at + BYTES, y1)


@njit
def _write_forward(p, batch, first, channels, t0, steps, y):
    """The gate, and out."""
    kind, offset = get(p, P.KIND), first * get(p, P.SIZE)
    for t in range(steps):
        y_row = row(p, R.Y, batch, t0 + t) + offset
        z_row = row(p, R.Z, batch, t0 + t) + offset
        for half in range(2):
            here = channels - half * LANES
            step = half * LANES * get(p, P.SIZE)
            out = load(y + t * ROW + half * BYTES)
            if get(p, R.Z) != 0:
                z = load_row(z_row + step, kind, here)
                out = out * (z * sigmoid(z))
            store_row(y_row + step, kind, here, out)
