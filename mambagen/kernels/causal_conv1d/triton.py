"""The causal depthwise convolution in Triton: any GPU that Triton compiles for, and its interpreter on a CPU.

A program runs a tile of channels through a segment of the sequence with the last width - 1 rows at hand in registers,
so that every input is read once (segments overlap by width - 1 rows). Backward recomputes the convolution, and its
program goes width - 1 steps on into the next segment, so that dx needs no second kernel; the sums over time that make
dweight and dbias are kept one a segment and added in a fixed order. Both are bound by memory bandwidth.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from mambagen.kernels.launching import byte_flags, on_device_of, processors
from mambagen.kernels.triton_rows import begins, load_rows, logistic, oriented, silu

WRITES_INTO = True  # backward takes `dx_out`


class Tile(NamedTuple):
    """What one program, a single warp, works on: channels, and steps an iteration, whose rows are loaded together.

    `programs` is how many a processor holds at once: the length is cut so that all of them run in one wave.
    """

    channels: int
    rows: int
    programs: int


# Forward loads 16 bytes a lane (bfloat16); backward has more to hold in registers.
FORWARD = Tile(256, 4, 14)
BACKWARD = Tile(128, 4, 14)
SHORTEST_SEGMENT = 64  # steps, a multiple of every tile's rows


def unsupported(x: Tensor, **facts: object) -> str | None:
    """Why this call cannot run here, or None."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x is {x.dtype}; float32, bfloat16 and float16 are supported"
    if x.shape[1] >= 2**31 - 4096:
        return f"{x.shape[1]} steps; fewer than 2^31 are supported in one call (pass the state from call to call)"
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """y and the last width - 1 inputs; see the package for shapes."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    cut = _Cut.of(x, FORWARD)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty(batch, width - 1, channels, dtype=x.dtype, device=x.device)
    with on_device_of(x):
        conv_kernel[cut.grid](
            x, weight, bias, initial_state, byte_flags(resets), y, final, x.stride(0), x.stride(1),
            length, channels, cut.segment_length, cut.segments,
            WIDTH=width, TILE=cut.tile.channels, ROWS=cut.tile.rows, SILU=silu, REVERSE=reverse, num_warps=1,
        )  # fmt: skip
    return y, final


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    dx_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dx, dweight, dbias and dinitial_state; see the package for shapes. `dx_out`, rows of any stride, receives dx."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    cut = _Cut.of(x, BACKWARD)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx_out is None else dx_out
    dinitial = None if initial_state is None else torch.empty_like(initial_state)
    sum_weight = weight.new_empty(batch * cut.segments, width, channels)
    sum_bias = weight.new_empty(batch * cut.segments, channels)
    if dfinal is not None and resets is not None:
        dfinal = dfinal * _leaving(resets, reverse, width)[..., None]
    with on_device_of(x):
        conv_backward_kernel[cut.grid](
            dy, dfinal, x, weight, bias, initial_state, byte_flags(resets), dx, sum_weight, sum_bias, dinitial,
            dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), dx.stride(0), dx.stride(1),
            length, channels, cut.segment_length, cut.segments,
            WIDTH=width, TILE=cut.tile.channels, ROWS=cut.tile.rows, SILU=silu, REVERSE=reverse, num_warps=1,
        )  # fmt: skip
    return dx, sum_weight.sum(0).T.contiguous(), None if bias is None else sum_bias.sum(0), dinitial


@triton.jit
def located(segments, segment_length, length, channels, TILE: tl.constexpr):
    """This program's batch row, segment with its first step and end, channels, and which of those exist."""
    program = tl.program_id(0)
    tiles = tl.cdiv(channels, TILE)
    c = (program % tiles) * TILE + tl.arange(0, TILE)
    segment = (program // tiles) % segments
    batch = tl.cast(program // tiles // segments, tl.int64)
    first = segment * segment_length
    return batch, segment, first, tl.minimum(first + segment_length, length), c, c < channels


@triton.jit
def load_history(x, x_time, initial, start, channels, c, has_c, WIDTH: tl.constexpr):
    """The WIDTH - 1 inputs that run before step `start`, oldest first; from `initial` before step 0."""
    history = ()
    for i in tl.static_range(WIDTH - 1):
        step = start - (WIDTH - 1) + i
        row = tl.load(x + tl.cast(step, tl.int64) * x_time + c, mask=has_c & (step >= 0), other=0.0)
        if initial is not None:
            past = tl.load(initial + (step + WIDTH - 1) * channels + c, mask=has_c & (step < 0), other=0.0)
            row = tl.where(step < 0, past, row)
        history += (row,)
    return history


@triton.jit
def load_begins(resets, start, length, COUNT: tl.constexpr, REVERSE: tl.constexpr):
    """`begins` of COUNT steps from `start` on."""
    flags = ()
    for i in tl.static_range(COUNT):
        flags += (begins(resets, start + i, length, REVERSE),)
    return flags


@triton.jit
def load_taps(weight, c, has_c, WIDTH: tl.constexpr):
    """The weight's columns, the one that meets the present step first."""
    taps = ()
    for k in tl.static_range(WIDTH):
        taps += (tl.load(weight + c * WIDTH + (WIDTH - 1 - k), mask=has_c, other=0.0),)
    return taps


@triton.jit
def last_of(rows, COUNT: tl.constexpr, FROM: tl.constexpr):
    """COUNT rows from number FROM on."""
    kept = ()
    for i in tl.static_range(COUNT):
        kept += (rows[FROM + i],)
    return kept


@triton.jit
def inputs_seen(seen, borders, i: tl.constexpr, WIDTH: tl.constexpr):
    """What taps 0 to WIDTH - 1 of the step at seen[i + WIDTH - 1] meet, in float32; zero behind a border."""
    met = (seen[i + WIDTH - 1].to(tl.float32),)
    for k in tl.static_range(1, WIDTH):
        value = seen[i + WIDTH - 1 - k].to(tl.float32)
        if borders is not None:
            if k == 1:
                apart = borders[i + WIDTH - 1]
            else:
                apart = apart | borders[i + WIDTH - k]
            value = tl.where(apart, 0.0, value)
        met += (value,)
    return met


@triton.jit(do_not_specialize=["length", "segment_length", "segments"])
def conv_kernel(
    x,
    weight,
    bias,
    initial,
    resets,
    y,
    final,
    x_batch,
    x_time,
    length,
    channels,
    segment_length,
    segments,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """y of one segment; the last segment of a sequence also writes its final state."""
    PAST: tl.constexpr = WIDTH - 1
    batch, _, first, end, c, has_c = located(segments, segment_length, length, channels, TILE)
    x, x_time = oriented(x + batch * x_batch, x_time, length, REVERSE)
    y, y_time = oriented(y + batch * length * channels, channels, length, REVERSE)
    if initial is not None:
        initial += batch * PAST * channels
    if resets is not None:
        resets += batch * length
    taps = load_taps(weight, c, has_c, WIDTH)
    shift = 0.0 if bias is None else tl.load(bias + c, mask=has_c, other=0.0)

    history = load_history(x, x_time, initial, first, channels, c, has_c, WIDTH)
    rows = load_rows(x, x_time, first, end, c, has_c, ROWS)
    for start in range(first, end, ROWS):
        rows_next = load_rows(x, x_time, start + ROWS, end, c, has_c, ROWS)
        seen = history + rows
        borders = None if resets is None else load_begins(resets, start - PAST, length, ROWS + PAST, REVERSE)
        for i in tl.static_range(ROWS):
            met = inputs_seen(seen, borders, i, WIDTH)
            v = tl.zeros([TILE], tl.float32) + shift
            for k in tl.static_range(WIDTH):
                v += taps[k] * met[k]
            if SILU:
                v = silu(v)
            row = y + tl.cast(start + i, tl.int64) * y_time
            tl.store(row + c, v.to(y.dtype.element_ty), mask=has_c & (start + i < end))
        history = last_of(seen, PAST, ROWS)
        rows = rows_next

    if end == length:
        final += batch * PAST * channels
        last = load_history(x, x_time, initial, length, channels, c, has_c, WIDTH)
        if resets is not None:
            leaves = True  # what position 0 begins in reverse ends with it
            if REVERSE:
                leaves = tl.load(resets) == 0
        for i in tl.static_range(PAST - 1, -1, -1):
            kept = last[i]
            if resets is not None:
                kept = tl.where(leaves, kept, 0.0)
                leaves = leaves & (begins(resets, length - PAST + i, length, REVERSE) == 0)
            tl.store(final + i * channels + c, kept.to(final.dtype.element_ty), mask=has_c)


@triton.jit(do_not_specialize=["length", "segment_length", "segments"])
def conv_backward_kernel(
    dy,
    dfinal,
    x,
    weight,
    bias,
    initial,
    resets,
    dx,
    dweight,
    dbias,
    dinitial,
    dy_batch,
    dy_time,
    x_batch,
    x_time,
    dx_batch,
    dx_time,
    length,
    channels,
    segment_length,
    segments,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """dx of one segment, and its parts of dweight (batch, segments, width, channels) and dbias.

    With v the convolution before its activation, dx_j = sum_k weight_k dv_{j+k}: a row of dx is complete WIDTH - 1
    steps after its own, so the loop runs that much further than the segment.
    """
    PAST: tl.constexpr = WIDTH - 1
    batch, segment, first, end, c, has_c = located(segments, segment_length, length, channels, TILE)
    dy, dy_time = oriented(dy + batch * dy_batch, dy_time, length, REVERSE)
    x, x_time = oriented(x + batch * x_batch, x_time, length, REVERSE)
    dx, dx_time = oriented(dx + batch * dx_batch, dx_time, length, REVERSE)
    if initial is not None:
        initial += batch * PAST * channels
        dinitial += batch * PAST * channels
    if dfinal is not None:
        dfinal += batch * PAST * channels
    if resets is not None:
        resets += batch * length
    taps = load_taps(weight, c, has_c, WIDTH)
    shift = 0.0 if bias is None else tl.load(bias + c, mask=has_c, other=0.0)

    sums = ()
    for _ in tl.static_range(WIDTH):
        sums += (tl.zeros([TILE], tl.float32),)
    sum_bias = tl.zeros([TILE], tl.float32)
    dvs = ()
    for _ in tl.static_range(PAST):
        dvs += (tl.zeros([TILE], tl.float32),)
    history = load_history(x, x_time, initial, first, channels, c, has_c, WIDTH)
    stop = tl.minimum(end + PAST, length)  # what lies beyond is not needed, or not there
    rows = load_rows(x, x_time, first, stop, c, has_c, ROWS)
    dys = load_rows(dy, dy_time, first, stop, c, has_c, ROWS)
    for start in range(first, end + PAST, ROWS):
        rows_next = load_rows(x, x_time, start + ROWS, stop, c, has_c, ROWS)
        dys_next = load_rows(dy, dy_time, start + ROWS, stop, c, has_c, ROWS)
        seen = history + rows
        borders = None if resets is None else load_begins(resets, start - PAST, length, ROWS + PAST, REVERSE)
        for i in tl.static_range(ROWS):
            met = inputs_seen(seen, borders, i, WIDTH)
            dv = dys[i].to(tl.float32)
            if SILU:
                v = tl.zeros([TILE], tl.float32) + shift
                for k in tl.static_range(WIDTH):
                    v += taps[k] * met[k]
                open_ = logistic(v)
                dv *= open_ * (1.0 + v * (1.0 - open_))
            own = tl.where(start + i < end, dv, 0.0)
            added = ()
            for k in tl.static_range(WIDTH):
                added += (sums[k] + own * met[k],)
            sums = added
            sum_bias += own
            dvs += (dv,)
        for i in tl.static_range(ROWS):
            step = start - PAST + i
            row = taps[0] * dvs[i]
            for k in tl.static_range(1, WIDTH):
                part = taps[k] * dvs[i + k]
                if resets is not None:
                    if k == 1:
                        apart = borders[i + 1]
                    else:
                        apart = apart | borders[i + k]
                    part = tl.where(apart, 0.0, part)
                row += part
            if dfinal is not None:
                place = step - (length - PAST)
                last = tl.load(dfinal + place * channels + c, mask=has_c & (place >= 0) & (place < PAST), other=0.0)
                row += last.to(tl.float32)
            out = dx + tl.cast(step, tl.int64) * dx_time
            tl.store(out + c, row.to(dx.dtype.element_ty), mask=has_c & (step >= first) & (step < end))
            if initial is not None:
                out = dinitial + (step + PAST) * channels
                tl.store(out + c, row.to(dinitial.dtype.element_ty), mask=has_c & (step < 0))
        history = last_of(seen, PAST, ROWS)
        dvs = last_of(dvs, PAST, ROWS)
        rows, dys = rows_next, dys_next

    place = (batch * segments + segment) * channels
    for k in tl.static_range(WIDTH):
        tl.store(dweight + place * WIDTH + (WIDTH - 1 - k) * channels + c, sums[k], mask=has_c)
    tl.store(dbias + place + c, sum_bias, mask=has_c)


class _Cut(NamedTuple):
    """How one call is cut into programs: tiles of channels and segments of the length."""

    tile: Tile
    segment_length: int
    segments: int
    grid: tuple[int]

    @classmethod
    def of(cls, x: Tensor, tile: Tile) -> "_Cut":
        batch, length, channels = x.shape
        tile = tile._replace(channels=min(tile.channels, triton.next_power_of_2(channels)))
        programs = batch * triton.cdiv(channels, tile.channels)
        wanted = max(1, tile.programs * processors(x.device) // programs)
        segment_length = max(triton.cdiv(length, wanted), SHORTEST_SEGMENT)
        segment_length = triton.cdiv(segment_length, tile.rows) * tile.rows
        segments = triton.cdiv(length, segment_length)
        return cls(tile, segment_length, segments, (programs * segments,))


def _leaving(resets: Tensor, reverse: bool, width: int) -> Tensor:
    """(batch, width - 1): whether an input of the last width - 1, oldest first, belongs to the state that leaves."""
    begin = pad(resets.flip(1), (1, 0)) if reverse else pad(resets, (0, 1))  # by step, and of what follows the last
    borders_so_far = pad(begin.long().cumsum(1), (width - 1, 0))  # none before step 0
    length = resets.shape[1]
    return borders_so_far[:, length : length + width - 1] == borders_so_far[:, -1:]
