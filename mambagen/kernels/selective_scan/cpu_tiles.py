"""What the CPU scan's two directions share: the kernels' parameters, and how tiles are read (README.md derives them).

Channels lie on the lanes: a tile is 32 channels, two vectors, and its state is rows of 32 in the first-level cache.
Resets cost nothing: the exponent of the decay is dt_t A + cut_t, with cut_t = -inf where a document begins. Reverse
costs nothing either: addresses start at the last step and strides are negative.
"""

# mypy: disallow-untyped-defs=False

from enum import auto

import numpy as np
from numba import njit

from mambagen.kernels.cpu_common import (
    Number,
    Rows,
    get,
    row,
)
from mambagen.kernels.cpu_memory import (
    BYTES,
    FLOAT32,
    load,
    load_flag,
    load_row,
    prefetch,
    store,
    store_float,
    store_row,
    transpose_16,
)
from mambagen.kernels.cpu_simd import LANES

TILE = 2 * LANES  # channels
ROW = 2 * BYTES  # bytes of one row of a tile
STAGE = 32  # steps of the forward that are read, computed and written together
BLOCK = 8  # states of which the backward holds all steps of a chunk
LOG2E = np.float32(1.4426950408889634)
LN2 = np.float32(0.6931471805599453)
MINUS_INFINITY = np.float32(-np.inf)


class P(Number):
    KIND = auto()  # of the elements of x, dt, B, C, z and their gradients
    SIZE = auto()  # their bytes
    BATCH = auto()
    LENGTH = auto()
    STATE = auto()
    CHUNK = auto()  # steps of a chunk
    CHUNKS = auto()
    TILES = auto()  # of all channels
    GROUP_TILES = auto()  # of the channels of one group of B and C
    CHANNELS = auto()
    GROUP_CHANNELS = auto()  # of one group
    SOFTPLUS = auto()
    LATE = auto()  # 1 in reverse, where a reset cuts off the step that runs after it
    A = auto()  # addresses from here on; 0 where there is no such tensor
    D = auto()
    BIAS = auto()
    INITIAL = auto()
    FINAL = auto()
    SAVED = auto()  # (batch, tile, chunk, state, TILE)
    # the backward's own
    PART_TILES = auto()  # tiles of a part: the channels over which one task sums dB and dC
    GROUP_PARTS = auto()
    PARTS = auto()
    FIRST_CHUNK = auto()  # the chunks of this run, from FIRST_CHUNK up to LAST_CHUNK
    LAST_CHUNK = auto()
    DFINAL = auto()
    CARRIED = auto()  # (batch, tile, state, TILE) float32: a_t times the adjoint of h_t at the earliest step done
    DA = auto()  # (batch, tile, state, TILE) float64
    DD = auto()  # (batch, tile, TILE) float64
    DBIAS = auto()
    DB_PARTS = auto()  # (batch, part, step of this run, state) float32
    DC_PARTS = auto()


class R(Rows):
    X = auto()
    DT = auto()
    B = auto()
    C = auto()
    Z = auto()
    RESETS = auto()
    Y = auto()
    DY = auto()
    DX = auto()
    DDT = auto()
    DB = auto()
    DC = auto()
    DZ = auto()


def padded(state: int) -> int:
    """States of a tile in scratch memory, where blocks of 16 are transposed."""
    return -(-state // LANES) * LANES


# ---- shared by both directions


@njit
def read_states(source, row_bytes, channels, states, block, tile):
    """(channels, states) float32 into rows of a tile, one a state; channels that do not exist are 0."""
    for half in range(2):
        for n in range(0, states, LANES):
            for i in range(LANES):
                c = half * LANES + i
                here = states - n if c < channels and source != 0 else 0
                store(block + i * BYTES, load_row(source + c * row_bytes + n * 4, FLOAT32, here))
            transpose_16(block, BYTES, tile + n * ROW + half * BYTES, ROW)


@njit
def write_states(tile, target, row_bytes, channels, states, block):
    """The way back."""
    for half in range(2):
        for n in range(0, states, LANES):
            transpose_16(tile + n * ROW + half * BYTES, ROW, block, BYTES)
            for i in range(LANES):
                c = half * LANES + i
                if c < channels:
                    store_row(target + c * row_bytes + n * 4, FLOAT32, states - n, load(block + i * BYTES))


@njit
def read_B_or_C(p, name, batch, group, first, steps, target):
    """Rows of `padded` float32."""
    states = get(p, P.STATE)
    width = -(-states // LANES) * BYTES
    for t in range(steps):
        source = row(p, name, batch, first + t) + group * states * get(p, P.SIZE)
        for n in range(0, states, LANES):
            value = load_row(source + n * get(p, P.SIZE), get(p, P.KIND), states - n)
            store(target + t * width + n * 4, value)


@njit
def read_cuts(p, batch, first, steps, target):
    """For each step -inf where it takes nothing over from the step that ran before it, else 0."""
    for t in range(steps):
        cut = np.float32(0.0)
        if get(p, R.RESETS) != 0:
            at = first + t - get(p, P.LATE)
            if at >= 0 and load_flag(row(p, R.RESETS, batch, at)):
                cut = MINUS_INFINITY
        store_float(target + 4 * t, cut)


@njit
def leaves(p, batch):
    """Whether the state after the last step leaves the sequence: in reverse not past a document that begins there."""
    if get(p, P.LATE) == 0 or get(p, R.RESETS) == 0:
        return True
    return not load_flag(row(p, R.RESETS, batch, get(p, P.LENGTH) - 1))


@njit
def read_parameter(source, first, channels, target):
    """A float32 for each channel of the tile, 0 where there is none."""
    for half in range(2):
        here = channels - half * LANES if source != 0 else 0
        store(target + half * BYTES, load_row(source + first * 4 + half * BYTES, FLOAT32, here))


@njit
def ask_for(p, name, batch, first, channels, t0, steps):
    """Starts to fetch a tile of rows, so that it is there when its turn comes: no prefetcher follows such strides."""
    if get(p, name) != 0:
        offset = first * get(p, P.SIZE)
        for t in range(max(t0, 0), min(t0 + steps, get(p, P.LENGTH))):
            for line in range(0, channels * get(p, P.SIZE), 64):
                prefetch(row(p, name, batch, t) + offset + line)


@njit
def fill(target, vectors):
    for i in range(vectors):
        store(target + i * BYTES, 0.0)


@njit
def copy(source, target, vectors):
    for i in range(vectors):
        store(target + i * BYTES, load(source + i * BYTES))


@njit
def scale(target, factor, vectors):
    for i in range(vectors):
        store(target + i * BYTES, load(target + i * BYTES) * factor)
