"""The backward scan on a CPU. A task is a part of one sequence's channels, the chunks of this run, last chunk first.

Within a chunk the decays a_t and the carried parts a_t h_{t-1} are computed again from the saved state, BLOCK states
at a time, and then run through backwards. What is summed over channels (dB, dC) is summed within the part here; the
parts are added by a kernel of their own, in their order.
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
    FLOAT32,
    add_to_doubles,
    broadcast,
    claim,
    load,
    load_row,
    store,
    store_row,
    sum_each_of_16,
)
from mambagen.kernels.cpu_simd import LANES, exp2, fma, keep_apart, sigmoid, softplus_and_slope, splat
from mambagen.kernels.selective_scan.cpu_tiles import (
    BLOCK,
    LN2,
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
)


def backward_scratch(state: int, chunk: int, part_tiles: int) -> int:
    """Bytes for one thread."""
    fixed = 16 * BYTES + (part_tiles + 2) * padded(state) * ROW + 2 * part_tiles * ROW + 4 * chunk
    a_chunk = 8 * chunk * ROW + 2 * chunk * padded(state) * 4 + 2 * chunk * BLOCK * ROW
    return fixed + a_chunk + 2 * (chunk * state + LANES) * BYTES


@Kernel
def backward_kernel(p):
    scratch = get(p, SCRATCH) + claim(p + NEXT_THREAD) * get(p, SCRATCH_BYTES)
    task = claim(p + NEXT_TASK)
    while task < get(p, TASKS):
        _backward_part(p, scratch, task)
        task = claim(p + NEXT_TASK)


@njit
def _backward_part(p, scratch, task):
    batch = task // get(p, P.PARTS)
    part = task - batch * get(p, P.PARTS)
    group = part // get(p, P.GROUP_PARTS)
    first_tile = (part - group * get(p, P.GROUP_PARTS)) * get(p, P.PART_TILES)  # in its group
    tiles = min(get(p, P.PART_TILES), get(p, P.GROUP_TILES) - first_tile)
    first = group * get(p, P.GROUP_CHANNELS) + first_tile * TILE
    channels = min(tiles * TILE, get(p, P.GROUP_CHANNELS) - first_tile * TILE)
    tile_number = batch * get(p, P.TILES) + group * get(p, P.GROUP_TILES) + first_tile
    states, length, chunk = get(p, P.STATE), get(p, P.LENGTH), get(p, P.CHUNK)
    width = -(-states // LANES) * BYTES  # of a row of B or C
    tile_bytes = states * ROW

    block = scratch
    A = block + 16 * BYTES
    parameters = A + get(p, P.PART_TILES) * width * TILE  # D and bias of each tile
    h = parameters + get(p, P.PART_TILES) * 2 * ROW
    dA = h + width * TILE
    work = dA + width * TILE  # eight rows a step
    decays = work + 8 * chunk * ROW
    B = decays + 2 * chunk * BLOCK * ROW
    C = B + chunk * width
    sums = C + chunk * width  # of dB, then of dC, a vector for each step and state
    cut = sums + 2 * (chunk * states + LANES) * BYTES
    sums_C = sums + (chunk * states + LANES) * BYTES

    for i in range(tiles):
        here = min(TILE, channels - i * TILE)
        source = get(p, P.A) + (first + i * TILE) * states * 4
        read_states(source, states * 4, here, states, block, A + i * width * TILE)
        scale(A + i * width * TILE, LOG2E, 2 * states)
        read_parameter(get(p, P.D), first + i * TILE, here, parameters + i * 2 * ROW)
        read_parameter(get(p, P.BIAS), first + i * TILE, here, parameters + i * 2 * ROW + ROW)
        if get(p, P.LAST_CHUNK) == get(p, P.CHUNKS):
            dfinal = get(p, P.DFINAL)
            if not leaves(p, batch):
                dfinal = 0
            if dfinal != 0:
                dfinal += (batch * get(p, P.CHANNELS) + first + i * TILE) * states * 4
            read_states(dfinal, states * 4, here, states, block, h)
            copy(h, get(p, P.CARRIED) + (tile_number + i) * tile_bytes, 2 * states)

    for k in range(get(p, P.LAST_CHUNK) - 1, get(p, P.FIRST_CHUNK) - 1, -1):
        t = k * chunk
        steps = min(chunk, length - t)
        read_B_or_C(p, R.B, batch, group, t, steps, B)
        read_B_or_C(p, R.C, batch, group, t, steps, C)
        read_cuts(p, batch, t, steps, cut)
        fill(sums, steps * states)
        fill(sums_C, steps * states)
        for i in range(tiles):
            here = min(TILE, channels - i * TILE)
            at = first + i * TILE
            number = tile_number + i
            copy(get(p, P.SAVED) + (number * get(p, P.CHUNKS) + k) * tile_bytes, h, 2 * states)
            fill(dA, 2 * states)
            _read_backward(p, batch, at, here, t, steps, parameters + i * 2 * ROW, work, chunk * ROW)
            for name in (R.X, R.DT, R.DY, R.Z):
                if i + 1 < tiles:
                    ask_for(p, name, batch, at + TILE, here, t, steps)
                else:
                    ask_for(p, name, batch, first, TILE, t - chunk, chunk)
            for n in range(0, states, BLOCK):
                few = min(BLOCK, states - n)
                A_n, h_n, B_n, C_n = A + i * width * TILE + n * ROW, h + n * ROW, B + 4 * n, C + 4 * n
                w_n = get(p, P.CARRIED) + number * tile_bytes + n * ROW
                _decay(steps, few, width, A_n, B_n, C_n, cut, work, chunk * ROW, h_n, decays)
                _run_back(
                    steps, few, states, width, A_n, B_n, C_n, work, chunk * ROW, decays,
                    w_n, dA + n * ROW, sums + n * BYTES, sums_C + n * BYTES,
                )  # fmt: skip
            for j in range(2 * states):
                add_to_doubles(get(p, P.DA) + (number * states * 2 + j) * 2 * BYTES, load(dA + j * BYTES))
            _write_backward(p, batch, at, here, t, steps, number, parameters + i * 2 * ROW, work, chunk * ROW)
        run_steps = (get(p, P.LAST_CHUNK) - get(p, P.FIRST_CHUNK)) * chunk
        partial = (task * run_steps + (k - get(p, P.FIRST_CHUNK)) * chunk) * states * 4
        _sum_channels(sums, steps * states, get(p, P.DB_PARTS) + partial)
        _sum_channels(sums_C, steps * states, get(p, P.DC_PARTS) + partial)


# What a chunk keeps for each step, in `work`: rows of a tile at these multiples of chunk * ROW.
DT, U, DY, DDT, DU, Y_ROW, X_ROW, SLOPE = range(8)


@njit
def _read_backward(p, batch, first, channels, t0, steps, parameters, work, apart):
    """dt after softplus and its slope, u = dt x, dy before the gate; the sums over states start at 0, y at the skip."""
    kind, offset = get(p, P.KIND), first * get(p, P.SIZE)
    for t in range(steps):
        x_row = row(p, R.X, batch, t0 + t) + offset
        dt_row = row(p, R.DT, batch, t0 + t) + offset
        dy_row = row(p, R.DY, batch, t0 + t) + offset
        z_row = row(p, R.Z, batch, t0 + t) + offset
        for half in range(2):
            here = channels - half * LANES
            step = half * LANES * get(p, P.SIZE)
            at = work + t * ROW + half * BYTES
            d = load_row(dt_row + step, kind, here) + load(parameters + ROW + half * BYTES)
            slope = splat(1.0)
            if get(p, P.SOFTPLUS) != 0:
                d, slope = softplus_and_slope(d)
            x = load_row(x_row + step, kind, here)
            dy = load_row(dy_row + step, kind, here)
            if get(p, R.Z) != 0:
                z = load_row(z_row + step, kind, here)
                dy = dy * (z * sigmoid(z))
            store(at + DT * apart, d)
            store(at + U * apart, d * x)
            store(at + DY * apart, dy)
            store(at + DDT * apart, 0.0)
            store(at + DU * apart, 0.0)
            store(at + Y_ROW * apart, load(parameters + half * BYTES) * x)
            store(at + X_ROW * apart, x)
            store(at + SLOPE * apart, slope)


@njit
def _decay(steps, states, width, A, B, C, cut, work, apart, h, decays):
    """a_t and a_t h_{t-1} for a few states and all steps of the chunk, and y."""
    keep_apart()
    for t in range(steps):
        at = work + t * ROW
        no_past = broadcast(cut + 4 * t)
        d0, d1 = load(at + DT * apart), load(at + DT * apart + BYTES)
        u0, u1 = load(at + U * apart), load(at + U * apart + BYTES)
        y0, y1 = load(at + Y_ROW * apart), load(at + Y_ROW * apart + BYTES)
        for n in range(states):
            k = n * ROW
            b, c = broadcast(B + t * width + 4 * n), broadcast(C + t * width + 4 * n)
            keep = decays + (t * BLOCK + n) * 2 * ROW
            a0 = exp2(fma(d0, load(A + k), no_past))
            a1 = exp2(fma(d1, load(A + k + BYTES), no_past))
            past0, past1 = a0 * load(h + k), a1 * load(h + k + BYTES)
            store(keep, a0)
            store(keep + BYTES, a1)
            store(keep + ROW, past0)
            store(keep + ROW + BYTES, past1)
            h0, h1 = fma(u0, b, past0), fma(u1, b, past1)
            store(h + k, h0)
            store(h + k + BYTES, h1)
            y0, y1 = fma(c, h0, y0), fma(c, h1, y1)
        store(at + Y_ROW * apart, y0)
        store(at + Y_ROW * apart + BYTES, y1)


@njit
def _run_back(steps, states, all_states, width, A, B, C, work, apart, decays, w, dA, sums_B, sums_C):
    """The adjoint: g = C dy + w, w = a g; with past = a_t h_{t-1}, d(dt) += A g past, dA += dt g past, du += B g."""
    keep_apart()
    for t in range(steps - 1, -1, -1):
        at = work + t * ROW
        d0, d1 = load(at + DT * apart), load(at + DT * apart + BYTES)
        u0, u1 = load(at + U * apart), load(at + U * apart + BYTES)
        dy0, dy1 = load(at + DY * apart), load(at + DY * apart + BYTES)
        ddt0, ddt1 = load(at + DDT * apart), load(at + DDT * apart + BYTES)
        du0, du1 = load(at + DU * apart), load(at + DU * apart + BYTES)
        for n in range(states):
            k = n * ROW
            b, c = broadcast(B + t * width + 4 * n), broadcast(C + t * width + 4 * n)
            keep = decays + (t * BLOCK + n) * 2 * ROW
            past0, past1 = load(keep + ROW), load(keep + ROW + BYTES)
            g0, g1 = fma(c, dy0, load(w + k)), fma(c, dy1, load(w + k + BYTES))
            store(w + k, load(keep) * g0)
            store(w + k + BYTES, load(keep + BYTES) * g1)
            q0, q1 = g0 * past0, g1 * past1
            ddt0, ddt1 = fma(q0, load(A + k), ddt0), fma(q1, load(A + k + BYTES), ddt1)
            du0, du1 = fma(g0, b, du0), fma(g1, b, du1)
            store(dA + k, fma(q0, d0, load(dA + k)))
            store(dA + k + BYTES, fma(q1, d1, load(dA + k + BYTES)))
            s = (t * all_states + n) * BYTES
            store(sums_B + s, fma(g0, u0, fma(g1, u1, load(sums_B + s))))
            h0, h1 = fma(u0, b, past0), fma(u1, b, past1)
            store(sums_C + s, fma(h0, dy0, fma(h1, dy1, load(sums_C + s))))
        store(at + DDT * apart, ddt0)
        store(at + DDT * apart + BYTES, ddt1)
        store(at + DU * apart, du0)
        store(at + DU * apart + BYTES, du1)


@njit
def _write_backward(p, batch, first, channels, t0, steps, number, parameters, work, apart):
    """dx, d(dt), dz out; dD and the bias's gradient to their sums."""
    kind, offset = get(p, P.KIND), first * get(p, P.SIZE)
    for half in range(2):
        here = channels - half * LANES
        step = offset + half * LANES * get(p, P.SIZE)
        skip = load(parameters + half * BYTES)
        dD, dbias = splat(0.0), splat(0.0)
        for t in range(steps):
            at = work + t * ROW + half * BYTES
            x, du, dy = load(at + X_ROW * apart), load(at + DU * apart), load(at + DY * apart)
            ddt = fma(du, x, load(at + DDT * apart) * LN2) * load(at + SLOPE * apart)
            dD = fma(dy, x, dD)
            dbias = dbias + ddt
            dx = fma(du, load(at + DT * apart), skip * dy)
            store_row(row(p, R.DX, batch, t0 + t) + step, kind, here, dx)
            store_row(row(p, R.DDT, batch, t0 + t) + step, kind, here, ddt)
            if get(p, R.Z) != 0:
                z = load_row(row(p, R.Z, batch, t0 + t) + step, kind, here)
                out = load_row(row(p, R.DY, batch, t0 + t) + step, kind, here)
                s = sigmoid(z)
                dz = out * load(at + Y_ROW * apart) * (s * fma(z, 1.0 - s, 1.0))
                store_row(row(p, R.DZ, batch, t0 + t) + step, kind, here, dz)
        add_to_doubles(get(p, P.DD) + (number * 2 + half) * 2 * BYTES, dD)
        add_to_doubles(get(p, P.DBIAS) + (number * 2 + half) * 2 * BYTES, dbias)


@njit
def _sum_channels(sums, count, target):
    for i in range(0, count, LANES):
        store_row(target + i * 4, FLOAT32, count - i, sum_each_of_16(sums + i * BYTES))


# ---- dB and dC: the parts of a group, added in their order; a task is STAGE steps of one sequence


@Kernel
def add_parts_kernel(p):
    task = claim(p + NEXT_TASK)
    chunk = get(p, P.CHUNK)
    first = get(p, P.FIRST_CHUNK) * chunk
    run_steps = (get(p, P.LAST_CHUNK) - get(p, P.FIRST_CHUNK)) * chunk
    steps = min(run_steps, get(p, P.LENGTH) - first)
    stages = -(-steps // STAGE)
    while task < get(p, TASKS):
        batch = task // stages
        begin = (task - batch * stages) * STAGE
        for t in range(begin, min(begin + STAGE, steps)):
            _add_parts(p, batch, run_steps, t, get(p, P.DB_PARTS), row(p, R.DB, batch, first + t))
            _add_parts(p, batch, run_steps, t, get(p, P.DC_PARTS), row(p, R.DC, batch, first + t))
        task = claim(p + NEXT_TASK)


@njit
def _add_parts(p, batch, run_steps, t, parts, target):
    states, group_parts = get(p, P.STATE), get(p, P.GROUP_PARTS)
    for part in range(0, get(p, P.PARTS), group_parts):
        for n in range(0, states, LANES):
            total = splat(0.0)
            for i in range(part, part + group_parts):
                source = parts + (((batch * get(p, P.PARTS) + i) * run_steps + t) * states + n) * 4
                total = total + load_row(source, FLOAT32, states - n)
            offset = (part // group_parts * states + n) * get(p, P.SIZE)
            store_row(target + offset, get(p, P.KIND), states - n, total)
