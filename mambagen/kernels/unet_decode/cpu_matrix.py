"""Matrix times vectors on a CPU, the matrix in float32 or in bfloat16 pairs; rows and addresses as in cpu_steps.py.

A matrix lies in panels of 64 outputs, (outputs / 64, inputs, 64). In bfloat16 two outputs share a 32-bit word, so that
one vector of words becomes two of float32 by a shift and by nothing: the word itself is the float32 of its upper half,
whose last bits are the lower half's. `pack_pairs` rounds the upper half with those bits in mind, so it is as near to
its weight as any bfloat16 is.

Inputs are added up in two sums, those at even and those at odd places: one would wait for its own last addition. The
order is the same however many streams there are, so that a stream's numbers do not depend on its neighbours.
"""

# mypy: disallow-untyped-defs=False

from typing import Any

import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import njit, types
from torch import Tensor

from mambagen.kernels.cpu_memory import BYTES, broadcast, load, pointer
from mambagen.kernels.cpu_simd import FLOATS, INTS, LANES, f32x16, fma, intrinsic, ints, keep_apart, splat
from mambagen.kernels.mamba_decode.cpu_steps import panel_finish, panel_step

PANEL = 4 * LANES  # outputs
PANEL_BYTES = 4 * BYTES  # of a row of outputs in float32
PAIR_BYTES = 2 * BYTES  # of a row of weights in pairs
LEAST = 0x1F80_0000  # 5e-20: an upper half must not be a denormal number made of the lower half's bits


@intrinsic
def lower(typing: Any, address: Any) -> Any:
    """The lower halves of sixteen words, as float32."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        words = builder.load(pointer(builder, args[0], INTS), align=4)
        return builder.bitcast(builder.shl(words, ints(16)), FLOATS)

    return f32x16(types.int64), generate


@njit
def matrix_product(pairs, matrix, panels, inputs, x, x_row, y, y_row, streams, add):
    """y = matrix x for each stream, or y += matrix x with `add`; streams lie x_row and y_row bytes apart.

    `pairs` says how the matrix lies: 1 for bfloat16 pairs, 0 for float32.
    """
    panel = inputs * (PAIR_BYTES if pairs else PANEL_BYTES)
    for p in range(panels):  # a panel stays in the cache while all streams meet it
        w, to, s = matrix + p * panel, y + p * PANEL_BYTES, 0
        while s + 1 < streams:
            if pairs:
                _two_streams_of_pairs(w, inputs, x + s * x_row, x_row, to + s * y_row, y_row, add)
            else:
                _two_streams(w, inputs, x + s * x_row, x_row, to + s * y_row, y_row, add)
            s += 2
        if s < streams:
            if pairs:
                _one_stream_of_pairs(w, inputs, x + s * x_row, to + s * y_row, add)
            else:
                _one_stream(w, inputs, x + s * x_row, to + s * y_row, add)


@njit
def _one_stream(w, inputs, x, y, add):
    keep_apart()
    a, b, c, d = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    e, f, g, h = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    for k in range(0, inputs - 1, 2):
        a, b, c, d = panel_step(w + k * PANEL_BYTES, broadcast(x + 4 * k), a, b, c, d)
        e, f, g, h = panel_step(w + (k + 1) * PANEL_BYTES, broadcast(x + 4 * k + 4), e, f, g, h)
    if inputs % 2:
        a, b, c, d = panel_step(w + (inputs - 1) * PANEL_BYTES, broadcast(x + 4 * inputs - 4), a, b, c, d)
    panel_finish(y, a + e, b + f, c + g, d + h, add)


@njit
def _one_stream_of_pairs(w, inputs, x, y, add):
    keep_apart()
    a, b, c, d = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    e, f, g, h = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    for k in range(0, inputs - 1, 2):
        a, b, c, d = _step_of_pairs(w + k * PAIR_BYTES, broadcast(x + 4 * k), a, b, c, d)
        e, f, g, h = _step_of_pairs(w + (k + 1) * PAIR_BYTES, broadcast(x + 4 * k + 4), e, f, g, h)
    if inputs % 2:
        a, b, c, d = _step_of_pairs(w + (inputs - 1) * PAIR_BYTES, broadcast(x + 4 * inputs - 4), a, b, c, d)
    panel_finish(y, a + e, b + f, c + g, d + h, add)


@njit
def _two_streams(w, inputs, x, x_row, y, y_row, add):
    keep_apart()
    a, b, c, d = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    e, f, g, h = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    i, j, m, n = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    q, r, s, t = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    for k in range(0, inputs - 1, 2):
        even, odd, at = w + k * PANEL_BYTES, w + (k + 1) * PANEL_BYTES, x + 4 * k
        a, b, c, d = panel_step(even, broadcast(at), a, b, c, d)
        i, j, m, n = panel_step(even, broadcast(at + x_row), i, j, m, n)
        e, f, g, h = panel_step(odd, broadcast(at + 4), e, f, g, h)
        q, r, s, t = panel_step(odd, broadcast(at + x_row + 4), q, r, s, t)
    if inputs % 2:
        even, at = w + (inputs - 1) * PANEL_BYTES, x + 4 * (inputs - 1)
        a, b, c, d = panel_step(even, broadcast(at), a, b, c, d)
        i, j, m, n = panel_step(even, broadcast(at + x_row), i, j, m, n)
    panel_finish(y, a + e, b + f, c + g, d + h, add)
    panel_finish(y + y_row, i + q, j + r, m + s, n + t, add)


@njit
def _two_streams_of_pairs(w, inputs, x, x_row, y, y_row, add):
    keep_apart()
    a, b, c, d = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    e, f, g, h = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    i, j, m, n = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    q, r, s, t = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    for k in range(0, inputs - 1, 2):
        even, odd, at = w + k * PAIR_BYTES, w + (k + 1) * PAIR_BYTES, x + 4 * k
        a, b, c, d = _step_of_pairs(even, broadcast(at), a, b, c, d)
        i, j, m, n = _step_of_pairs(even, broadcast(at + x_row), i, j, m, n)
        e, f, g, h = _step_of_pairs(odd, broadcast(at + 4), e, f, g, h)
        q, r, s, t = _step_of_pairs(odd, broadcast(at + x_row + 4), q, r, s, t)
    if inputs % 2:
        even, at = w + (inputs - 1) * PAIR_BYTES, x + 4 * (inputs - 1)
        a, b, c, d = _step_of_pairs(even, broadcast(at), a, b, c, d)
        i, j, m, n = _step_of_pairs(even, broadcast(at + x_row), i, j, m, n)
    panel_finish(y, a + e, b + f, c + g, d + h, add)
    panel_finish(y + y_row, i + q, j + r, m + s, n + t, add)


@njit(forceinline=True)
def _step_of_pairs(w, v, a, b, c, d):
    a = fma(lower(w), v, a)
    b = fma(load(w), v, b)
    c = fma(lower(w + BYTES), v, c)
    d = fma(load(w + BYTES), v, d)
    return a, b, c, d


# ---- packing


def pack_panels(matrix: Tensor) -> Tensor:
    """(outputs, inputs) -> flat float32 panels, padded with zeros to whole ones."""
    outputs, inputs = matrix.shape
    padded = F.pad(matrix.float(), (0, 0, 0, whole(outputs) - outputs))
    return padded.view(-1, PANEL, inputs).transpose(1, 2).reshape(-1)


def pack_pairs(matrix: Tensor) -> Tensor:
    """(outputs, inputs) -> flat pairs, as float32 of the same bits."""
    quarters = pack_panels(matrix).view(-1, 2, 2, LANES)  # (rows, word of a row, half, lane)
    return pair_words(quarters[:, :, 0], quarters[:, :, 1]).flatten().view(torch.float32)


def pair_words(low: Tensor, high: Tensor) -> Tensor:
    """int32 words: the lower half is `low` in bfloat16, the whole word, as a float32, the nearest to `high`."""
    lower_bits = low.float().bfloat16().view(torch.int16).long() & 0xFFFF
    bits = high.float().contiguous().view(torch.int32).long()
    sign, size = bits & 0x8000_0000, bits & 0x7FFF_FFFF
    upper_bits = (size - lower_bits + 0x8000 >> 16).clamp(min=LEAST >> 16)
    return (sign | upper_bits << 16 | lower_bits).to(torch.int32)


def unpack_pairs(words: Tensor, outputs: int, inputs: int) -> Tensor:
    """The (outputs, inputs) matrix that `pack_pairs` stands for."""
    bits = words.view(torch.int32).view(-1, 2, 1, LANES)
    halves = torch.cat([bits << 16, bits], 2).view(torch.float32)
    return halves.reshape(-1, inputs, PANEL).transpose(1, 2).reshape(-1, inputs)[:outputs]


def whole(n: int) -> int:
    """n rounded up to whole panels."""
    return -(-n // PANEL) * PANEL
