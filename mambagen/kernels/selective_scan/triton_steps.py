"""What the Triton kernels of the selective scan share: where a program works, step sizes, decays.

A program owns one tile of channels, all states, and one segment of the sequence.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from mambagen.kernels.triton_rows import LOG2E, begins, divided

# Kernel arguments that only count: they differ from call to call and gain nothing from a kernel of their own.
SIZES = ["length", "segment_length", "segments", "channels", "tiles", "group_tiles", "group_channels"]


@triton.jit
def located(tiles, group_tiles, group_channels, segments, TILE: tl.constexpr):
    """This program's batch row, segment, tile, group of B and C, channels, and which of those exist."""
    program = tl.program_id(0)
    tile = program % tiles
    segment = (program // tiles) % segments
    batch = tl.cast(program // tiles // segments, tl.int64)
    group = tile // group_tiles
    within = (tile - group * group_tiles) * TILE + tl.arange(0, TILE)
    return batch, segment, tile, group, group * group_channels + within, within < group_channels


@triton.jit
def load_cuts(resets, start, length, REVERSE: tl.constexpr, ROWS: tl.constexpr):
    """What to add to each step's log2 decay: minus infinity where a document begins, otherwise zero."""
    cuts = ()
    for k in tl.static_range(ROWS):
        if resets is None:
            cuts += (0.0,)
        else:
            cut = begins(resets, start + k, length, REVERSE)
            cuts += (tl.where(cut, float("-inf"), 0.0),)
    return cuts


@triton.jit
def exponent_of(v):
    """exp(-|v|): what softplus and its slope share; never overflows."""
    return tl.exp2(tl.abs(v) * -LOG2E)


@triton.jit
def softplus(v, e):
    """log(1 + exp(v)) from e = exp(-|v|): max(v, 0) + 2 atanh(e / (2 + e)), which keeps its digits where small."""
    s = divided(e, 2.0 + e)
    q = s * s
    series = 1.0 + q * (0.33333333 + q * (0.2 + q * (0.14285714 + q * (0.11111111 + q * 0.1))))
    return tl.maximum(v, 0.0) + 2.0 * s * series


@triton.jit
def softplus_slope(v, e):
    """The logistic function of v from e = exp(-|v|)."""
    return divided(tl.where(v > 0.0, 1.0, e), 1.0 + e)


@triton.jit
def step_size(row, bias, exists, SOFTPLUS: tl.constexpr):
    """dt of one step in float32; zero past the end, so that the state passes unchanged."""
    v = row.to(tl.float32) + bias
    if SOFTPLUS:
        v = softplus(v, exponent_of(v))
    return tl.where(exists, v, 0.0)


@triton.jit
def decay(d, a2, cut):
    """exp(dt A) for a row of steps d and a tile a2 = A log2(e)."""
    return tl.exp2(d[None, :] * a2 + cut)
