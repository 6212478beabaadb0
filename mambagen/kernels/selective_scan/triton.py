"""The selective scan in Triton: any GPU that Triton compiles for, and its interpreter on a CPU.

One program runs a tile of channels with all their states through time, a few steps an iteration: rows of x, dt and z
lie across the lanes, the (state, channels) tile of h in registers, so that sums over states need two shuffles and
sums over channels three. Where batch times tiles do not fill the processors, the length is split: a first kernel runs
every segment from zero, a second passes the states on (the decay of a whole segment is exp(A times the sum of its
dt)), and the scan proper then starts every segment from its true state. Backward does the same with the adjoint.

For backward, forward keeps the state before every CHUNK steps in float32. The sums over channels of dB and dC are kept
one a tile of channels, (batch, tiles, length, state) float32 each, until a last kernel adds them.

What limits it: registers (255 a thread in backward, some spilled), the loads at each iteration's start, which only
other warps hide, and the dependence of w and h along time. On NVIDIA GPUs the CUDA backend, with shared memory in its
own hands, is faster; this one is for every other GPU and for checking that one.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mambagen.kernels.launching import byte_flags, on_device_of, processors
from mambagen.kernels.selective_scan.triton_backward import adjoint_ends_kernel, backward_kernel, sum_tiles_kernel
from mambagen.kernels.selective_scan.triton_forward import pass_on_kernel, scan_kernel, segment_ends_kernel

WRITES_INTO = True  # backward takes `dz_out`


class Tile(NamedTuple):
    """What one program works on: channels, with how many warps, and steps an iteration (in the kernel of ends, too)."""

    channels: int
    warps: int
    rows: int
    rows_of_ends: int


class Tiling(NamedTuple):
    """How a state size is cut: forward's tile, backward's, and the steps between the states kept for backward."""

    forward: Tile
    backward: Tile
    chunk: int


# By the state size padded to a power of two; chosen by counting instructions and spills in what Triton 3.6 compiles for
# sm_90. Backward's rows are few because p of every row is held in registers beside w, A and dA.
TILINGS = {
    1: Tiling(Tile(64, 1, 4, 8), Tile(64, 1, 2, 8), 32),
    2: Tiling(Tile(64, 1, 4, 8), Tile(64, 1, 2, 8), 32),
    4: Tiling(Tile(64, 1, 4, 8), Tile(64, 1, 2, 8), 32),
    8: Tiling(Tile(64, 1, 4, 8), Tile(64, 1, 2, 8), 32),
    16: Tiling(Tile(32, 1, 4, 8), Tile(32, 1, 2, 8), 32),
    32: Tiling(Tile(32, 1, 4, 4), Tile(32, 1, 1, 4), 32),
    64: Tiling(Tile(32, 1, 2, 2), Tile(16, 2, 1, 4), 32),
    128: Tiling(Tile(32, 4, 2, 4), Tile(16, 4, 1, 4), 32),
    256: Tiling(Tile(16, 8, 2, 4), Tile(16, 8, 1, 4), 32),
}


class Fill(NamedTuple):
    """Warps a processor: the length is split where there are fewer than `least`, into as many as give about `most`."""

    least: int
    most: int


# The split costs forward about 0.6 and backward 0.2 of the work again; `most` is what the registers leave room for.
FILL_FORWARD = Fill(3, 12)
FILL_BACKWARD = Fill(6, 8)
SHORTEST_SEGMENT = 64  # steps; a multiple of every chunk


def tiling_for(state: int) -> Tiling:
    return TILINGS[triton.next_power_of_2(state)]


def unsupported(x: Tensor, state: int = 1, **facts: object) -> str | None:
    """Why this call cannot run here, or None."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x is {x.dtype}; float32, bfloat16 and float16 are supported"
    if x.shape[1] >= 2**31 - 4096:
        return f"{x.shape[1]} steps; fewer than 2^31 are supported in one call (pass the state from call to call)"
    if x.shape[2] * state >= 2**31:
        return "channels times state is 2^31 or more"
    return None


def saved_shape(batch: int, length: int, channels: int, groups: int, state: int, x: Tensor) -> tuple[int, ...]:
    """The states that forward leaves for backward: one before every chunk."""
    # sizes may be symbolic under torch.compile: plain arithmetic for the length, a guard on the state
    return (batch, -(-length // tiling_for(int(state)).chunk), channels, state)


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state and the states kept for backward; see the package for shapes."""
    batch, length, channels = x.shape
    tiling = tiling_for(A.shape[1])
    cut = _Cut.of(x, A, B, tiling.forward, FILL_FORWARD)
    flags = byte_flags(resets)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = A.new_empty(batch, channels, A.shape[1])
    saved = A.new_empty(saved_shape(batch, length, channels, B.shape[2], A.shape[1], x) if save else (0,))
    with on_device_of(x):
        entry = initial_state
        if cut.segments > 1:
            entry, step_sums, cut_sums = cut.segment_buffers(A)
            segment_ends_kernel[cut.grid](
                x, dt, A, B, dt_bias, flags, entry, step_sums, cut_sums, *_strides(x, dt, B), *cut.sizes,
                ROWS=cut.tile.rows_of_ends, SOFTPLUS=dt_softplus, REVERSE=reverse, **cut.constants,
            )  # fmt: skip
            cut.pass_on(entry, initial_state, A, step_sums, cut_sums, backwards=False)
        scan_kernel[cut.grid](
            x, dt, A, B, C, D, z, dt_bias, flags, entry, y, saved if save else None, final,
            *_strides(x, dt, B, C, z), *cut.sizes,
            ROWS=cut.tile.rows, CHUNK=tiling.chunk, SOFTPLUS=dt_softplus, REVERSE=reverse, **cut.constants,
        )  # fmt: skip
    if reverse and resets is not None:  # what leaves position 0 would enter the document before it
        final.masked_fill_(resets[:, 0, None, None], 0.0)
    return y, final, saved


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    saved: Tensor,
    dz_out: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients in the order of the package's contract; `dz_out`, rows of any stride, receives dz where given."""
    batch, length, channels = x.shape
    state = A.shape[1]
    tiling = tiling_for(state)
    cut = _Cut.of(x, A, B, tiling.backward, FILL_BACKWARD)
    flags = byte_flags(resets)
    dx, ddt = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    dz = dz_out
    if z is not None and dz is None:
        dz = torch.empty_like(dx)
    dinitial = None if initial_state is None else torch.empty_like(initial_state)
    sum_A = A.new_empty(batch * cut.segments, channels, state)
    sum_D, sum_bias = (A.new_empty(batch * cut.segments, channels) for _ in range(2))
    parts_B, parts_C = (A.new_empty(batch, cut.tiles, length, state) for _ in range(2))
    blocks = tiling.chunk // tiling.backward.rows
    scratch = A.new_empty(cut.programs * blocks * cut.constants["PADDED"] * cut.constants["TILE"])
    if dfinal is not None and reverse and resets is not None:
        dfinal = dfinal.masked_fill(resets[:, 0, None, None], 0.0)
    with on_device_of(x):
        entry = dfinal
        if cut.segments > 1:
            entry, step_sums, cut_sums = cut.segment_buffers(A)
            adjoint_ends_kernel[cut.grid](
                dy, dt, A, C, z, dt_bias, flags, entry, step_sums, cut_sums, *_strides(dy, dt, C, z), *cut.sizes,
                ROWS=cut.tile.rows_of_ends, SOFTPLUS=dt_softplus, REVERSE=reverse, **cut.constants,
            )  # fmt: skip
            cut.pass_on(entry, dfinal, A, step_sums, cut_sums, backwards=True)
        backward_kernel[cut.grid](
            dy, x, dt, A, B, C, D, z, dt_bias, flags, saved, entry, scratch,
            dx, ddt, dz, sum_A, parts_B, parts_C, sum_D, sum_bias, dinitial,
            *_strides(dy, x, dt, B, C, z, dz), *cut.sizes,
            ROWS=cut.tile.rows, CHUNK=tiling.chunk, SOFTPLUS=dt_softplus, REVERSE=reverse, **cut.constants,
        )  # fmt: skip
        dB, dC = cut.sum_tiles(parts_B, B), cut.sum_tiles(parts_C, C)
    dA, dD = sum_A.sum(0), None if D is None else sum_D.sum(0)
    return dx, ddt, dA, dB, dC, dD, dz, None if dt_bias is None else sum_bias.sum(0), dinitial


class _Cut(NamedTuple):
    """How one call is cut into programs: tiles of channels (none across two groups) and segments of the length."""

    tile: Tile
    batch: int
    length: int
    channels: int
    state: int
    groups: int
    group_tiles: int
    segment_length: int
    segments: int

    @classmethod
    def of(cls, x: Tensor, A: Tensor, B: Tensor, tile: Tile, fill: Fill) -> "_Cut":
        batch, length, channels = x.shape
        groups = B.shape[2]
        tile = tile._replace(channels=min(tile.channels, triton.next_power_of_2(channels // groups)))
        group_tiles = triton.cdiv(channels // groups, tile.channels)
        warps = batch * groups * group_tiles * tile.warps
        full = processors(x.device)
        wanted = 1 if warps >= fill.least * full else max(1, fill.most * full // warps)
        segment_length = triton.cdiv(triton.cdiv(length, wanted), SHORTEST_SEGMENT) * SHORTEST_SEGMENT
        segments = triton.cdiv(length, segment_length)
        return cls(tile, batch, length, channels, A.shape[1], groups, group_tiles, segment_length, segments)

    @property
    def tiles(self) -> int:
        return self.groups * self.group_tiles

    @property
    def programs(self) -> int:
        return self.batch * self.tiles * self.segments

    @property
    def grid(self) -> tuple[int]:
        return (self.programs,)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The kernels' counting arguments, in their order."""
        group_channels = self.channels // self.groups
        counts = (self.length, self.segment_length, self.segments, self.channels)
        return (*counts, self.tiles, self.group_tiles, group_channels)

    @property
    def constants(self) -> dict[str, int]:
        padded = triton.next_power_of_2(self.state)
        tile = self.tile
        return {
            "STATE": self.state,
            "PADDED": padded,
            "TILE": tile.channels,
            "num_warps": tile.warps,
        }

    def segment_buffers(self, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Room for each segment's state, its sum of steps and its sum of cuts."""
        states = A.new_empty(self.batch, self.segments, self.channels, self.state)
        return states, A.new_empty(self.batch, self.segments, self.channels), A.new_empty(self.batch, self.segments)

    def pass_on(
        self, states: Tensor, first: Tensor | None, A: Tensor, step_sums: Tensor, cut_sums: Tensor, backwards: bool
    ) -> None:
        grid = (self.batch * triton.cdiv(self.channels * self.state, 128),)
        pass_on_kernel[grid](
            states, first, A, step_sums, cut_sums, self.segments, self.channels,
            STATE=self.state, BLOCK=128, AHEAD=8, BACKWARDS=backwards, num_warps=4,
        )  # fmt: skip

    def sum_tiles(self, parts: Tensor, like: Tensor) -> Tensor:
        total = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        grid = (self.batch * self.groups * triton.cdiv(self.length * self.state, 1024),)
        sum_tiles_kernel[grid](
            parts, total, self.length, self.groups, self.group_tiles, STATE=self.state, BLOCK=1024, num_warps=4
        )
        return total


def _strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Batch and time strides of each tensor; zeros for one that is not there."""
    return tuple(step for v in tensors for step in ((0, 0) if v is None else v.stride()[:2]))
