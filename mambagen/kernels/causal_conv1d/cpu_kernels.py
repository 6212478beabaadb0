"""The convolution on a CPU: what one thread computes (README.md has the derivation; cpu.py calls these).

Channels lie on the lanes; a step reads the rows of its taps, which are still in the cache, and writes one row. Which
taps a step has (a document may begin, the state may lie before it) is found once a step, for all channels. Time runs
with the addresses: in reverse they start at the last step and strides are negative.
"""

# mypy: disallow-untyped-defs=False

from enum import auto

from numba import njit

from mambagen.kernels.cpu_common import (
    NEXT_TASK,
    NEXT_THREAD,
    SCRATCH,
    SCRATCH_BYTES,
    TASKS,
    Kernel,
    Number,
    Rows,
    get,
    row,
)
from mambagen.kernels.cpu_memory import (
    FLOAT32,
    add_to_doubles,
    claim,
    load,
    load_flag,
    load_int,
    load_row,
    store,
    store_int,
    store_row,
)
from mambagen.kernels.cpu_simd import LANES, fma, sigmoid

CHANNELS_AT_ONCE = 256
STEPS_AT_ONCE = 64
MAX_TAPS = 8


class P(Number):
    KIND = auto()  # of the elements of x and y
    SIZE = auto()  # their bytes
    LENGTH = auto()
    CHANNELS = auto()
    WIDTH = auto()
    SILU = auto()
    LATE = auto()  # 1 in reverse, where a reset cuts off the step that runs after it
    CHANNEL_BLOCKS = auto()
    SPANS = auto()  # pieces of a sequence, a task each
    SPAN = auto()  # their steps
    BIAS = auto()  # addresses from here on; 0 where there is no such tensor
    WEIGHT = auto()  # (width, channels), the present step's tap first
    PAST = auto()  # (batch, width - 1, channels)
    FINAL = auto()
    # the backward's own
    DFINAL = auto()
    DPAST = auto()
    SUMS = auto()  # (batch, span, width + 1, padded channels) float64: of dweight in WEIGHT's order, and of dbias


class R(Rows):
    X = auto()
    RESETS = auto()
    Y = auto()
    DY = auto()
    DX = auto()


# ---- shared by both directions


@njit
def begins(p, batch, step):
    """Whether this step sees nothing of those that ran before it; step LENGTH stands for what follows the sequence."""
    if get(p, R.RESETS) == 0:
        return False
    at = step - get(p, P.LATE)
    return 0 <= at < get(p, P.LENGTH) and load_flag(row(p, R.RESETS, batch, at))


@njit
def reach(p, batch, step):
    """How many steps back this one sees, at most width - 1; steps before the first count."""
    for k in range(get(p, P.WIDTH) - 1):
        if begins(p, batch, step - k):
            return k
    return get(p, P.WIDTH) - 1


@njit
def past_row(p, name, batch, step):
    """The address of a step before the first (-1 is the latest) in a tensor like PAST."""
    at = batch * (get(p, P.WIDTH) - 1) + get(p, P.WIDTH) - 1 + step
    return get(p, name) + at * get(p, P.CHANNELS) * get(p, P.SIZE)


@njit
def find_taps(p, batch, step, taps):
    """Writes the addresses of the inputs that this step sees, the present one first, and returns their number."""
    count = reach(p, batch, step) + 1
    if get(p, P.PAST) == 0:
        count = min(count, step + 1)
    for k in range(count):
        if k <= step:
            store_int(taps + 8 * k, row(p, R.X, batch, step - k))
        else:
            store_int(taps + 8 * k, past_row(p, P.PAST, batch, step - k))
    return count


@njit
def read_weights(p, first, channels, target):
    """A row of CHANNELS_AT_ONCE for each tap, then one of the bias."""
    width = get(p, P.WIDTH)
    for k in range(width + 1):
        source = get(p, P.WEIGHT) + (k * get(p, P.CHANNELS) + first) * 4
        if k == width:
            source = get(p, P.BIAS)
            if source != 0:
                source += first * 4
        for c in range(0, channels, LANES):
            here = channels - c if source != 0 else 0
            store(target + (k * CHANNELS_AT_ONCE + c) * 4, load_row(source + c * 4, FLOAT32, here))


@njit(forceinline=True)
def convolve(p, taps, count, weights, first, c, here):
    """bias + sum over the taps, for the channels first + c and on."""
    total = load(weights + (get(p, P.WIDTH) * CHANNELS_AT_ONCE + c) * 4)
    offset = (first + c) * get(p, P.SIZE)
    for k in range(count):
        x = load_row(load_int(taps + 8 * k) + offset, get(p, P.KIND), here)
        total = fma(load(weights + (k * CHANNELS_AT_ONCE + c) * 4), x, total)
    return total


# ---- forward: a task is a span of one sequence and a block of channels


def forward_scratch() -> int:
    """Bytes for one thread."""
    return (MAX_TAPS + 1) * CHANNELS_AT_ONCE * 4 + 8 * MAX_TAPS


@Kernel
def forward_kernel(p):
    scratch = get(p, SCRATCH) + claim(p + NEXT_THREAD) * get(p, SCRATCH_BYTES)
    task = claim(p + NEXT_TASK)
    while task < get(p, TASKS):
        _forward_span(p, scratch, task)
        task = claim(p + NEXT_TASK)


@njit
def _forward_span(p, scratch, task):
    pair = task // get(p, P.CHANNEL_BLOCKS)
    first = (task - pair * get(p, P.CHANNEL_BLOCKS)) * CHANNELS_AT_ONCE
    batch = pair // get(p, P.SPANS)
    begin = (pair - batch * get(p, P.SPANS)) * get(p, P.SPAN)
    end = min(begin + get(p, P.SPAN), get(p, P.LENGTH))
    channels = min(CHANNELS_AT_ONCE, get(p, P.CHANNELS) - first)
    kind, size = get(p, P.KIND), get(p, P.SIZE)
    weights, taps = scratch, scratch + (MAX_TAPS + 1) * CHANNELS_AT_ONCE * 4
    read_weights(p, first, channels, weights)
    for t in range(begin, end):
        count = find_taps(p, batch, t, taps)
        y_row = row(p, R.Y, batch, t) + first * size
        for c in range(0, channels, LANES):
            y = convolve(p, taps, count, weights, first, c, channels - c)
            if get(p, P.SILU) != 0:
                y = y * sigmoid(y)
            store_row(y_row + c * size, kind, channels - c, y)
    if end == get(p, P.LENGTH):
        _leave_state(p, batch, first, channels)


@njit
def _leave_state(p, batch, first, channels):
    """The last width - 1 inputs, with zeros for those that the next step would not see."""
    size, length = get(p, P.SIZE), get(p, P.LENGTH)
    seen = reach(p, batch, length)
    for k in range(1, get(p, P.WIDTH)):
        step = length - k
        source = 0
        if k <= seen and step >= 0:
            source = row(p, R.X, batch, step)
        elif k <= seen and get(p, P.PAST) != 0:
            source = past_row(p, P.PAST, batch, step)
        target = past_row(p, P.FINAL, batch, -k)
        for c in range(0, channels, LANES):
            offset = (first + c) * size
            here = channels - c
            value = load_row(source + offset, get(p, P.KIND), here if source != 0 else 0)
            store_row(target + offset, get(p, P.KIND), here, value)


# ---- backward: the same tasks; a span goes in pieces, whose dy before the activation is computed with width - 1 more


def backward_scratch() -> int:
    """Bytes for one thread."""
    return (2 * (MAX_TAPS + 1) + STEPS_AT_ONCE + MAX_TAPS) * CHANNELS_AT_ONCE * 4 + 8 * MAX_TAPS


@Kernel
def backward_kernel(p):
    scratch = get(p, SCRATCH) + claim(p + NEXT_THREAD) * get(p, SCRATCH_BYTES)
    task = claim(p + NEXT_TASK)
    while task < get(p, TASKS):
        _backward_span(p, scratch, task)
        task = claim(p + NEXT_TASK)


@njit
def _backward_span(p, scratch, task):
    pair = task // get(p, P.CHANNEL_BLOCKS)
    block = task - pair * get(p, P.CHANNEL_BLOCKS)
    first = block * CHANNELS_AT_ONCE
    batch = pair // get(p, P.SPANS)
    begin = (pair - batch * get(p, P.SPANS)) * get(p, P.SPAN)
    end = min(begin + get(p, P.SPAN), get(p, P.LENGTH))
    channels = min(CHANNELS_AT_ONCE, get(p, P.CHANNELS) - first)
    width, length = get(p, P.WIDTH), get(p, P.LENGTH)
    weights = scratch
    sums = weights + (MAX_TAPS + 1) * CHANNELS_AT_ONCE * 4
    inner = sums + (MAX_TAPS + 1) * CHANNELS_AT_ONCE * 4  # d(before the activation), a row a step
    taps = inner + (STEPS_AT_ONCE + MAX_TAPS) * CHANNELS_AT_ONCE * 4
    read_weights(p, first, channels, weights)
    for piece in range(begin, end, STEPS_AT_ONCE):
        stop = min(piece + STEPS_AT_ONCE, end)
        for i in range(0, (width + 1) * CHANNELS_AT_ONCE, LANES):
            store(sums + i * 4, 0.0)
        for t in range(piece, min(stop + width - 1, length)):
            count = find_taps(p, batch, t, taps)
            mine = t < stop  # else the next piece counts it
            _inner_gradient(
                p,
                batch,
                t,
                first,
                channels,
                taps,
                count,
                weights,
                inner + (t - piece) * CHANNELS_AT_ONCE * 4,
                sums,
                mine,
            )
        for t in range(piece, stop):
            _input_gradient(p, batch, t, piece, first, channels, weights, inner, row(p, R.DX, batch, t))
        if piece == 0 and get(p, P.DPAST) != 0:
            for k in range(1, width):
                _input_gradient(p, batch, -k, 0, first, channels, weights, inner, past_row(p, P.DPAST, batch, -k))
        target = get(p, P.SUMS) + (pair * get(p, P.CHANNEL_BLOCKS) + block) * (width + 1) * CHANNELS_AT_ONCE * 8
        for i in range(0, (width + 1) * CHANNELS_AT_ONCE, LANES):
            add_to_doubles(target + i * 8, load(sums + i * 4))


@njit
def _inner_gradient(p, batch, t, first, channels, taps, count, weights, target, sums, mine):
    """dy through the activation, and its share of dweight and dbias."""
    kind, size, width = get(p, P.KIND), get(p, P.SIZE), get(p, P.WIDTH)
    dy_row = row(p, R.DY, batch, t) + first * size
    for c in range(0, channels, LANES):
        here = channels - c
        d = load_row(dy_row + c * size, kind, here)
        if get(p, P.SILU) != 0:
            y = convolve(p, taps, count, weights, first, c, here)
            s = sigmoid(y)
            d = d * (s * fma(y, 1.0 - s, 1.0))
        store(target + c * 4, d)
        if mine:
            for k in range(count):
                x = load_row(load_int(taps + 8 * k) + (first + c) * size, kind, here)
                at = sums + (k * CHANNELS_AT_ONCE + c) * 4
                store(at, fma(d, x, load(at)))
            at = sums + (width * CHANNELS_AT_ONCE + c) * 4
            store(at, load(at) + d)


@njit
def _input_gradient(p, batch, t, piece, first, channels, weights, inner, target):
    """The gradient of the input at step t (before the first where negative): of the steps that see it, and dfinal."""
    kind, size, width, length = get(p, P.KIND), get(p, P.SIZE), get(p, P.WIDTH), get(p, P.LENGTH)
    used = 0  # the steps t + k with k < used see this one; the state after the last step is step LENGTH
    while used < width and t + used <= length and not (used > 0 and begins(p, batch, t + used)):
        used += 1
    dfinal = 0
    if t + used > length:
        used -= 1
        if get(p, P.DFINAL) != 0:
            dfinal = past_row(p, P.DFINAL, batch, t - length)
    skip = max(0, -t)
    for c in range(0, channels, LANES):
        here = channels - c
        total = load_row(dfinal + (first + c) * size, kind, here if dfinal != 0 else 0)
        for k in range(skip, used):
            d = load(inner + ((t + k - piece) * CHANNELS_AT_ONCE + c) * 4)
            total = fma(load(weights + (k * CHANNELS_AT_ONCE + c) * 4), d, total)
        store_row(target + (first + c) * size, kind, here, total)
