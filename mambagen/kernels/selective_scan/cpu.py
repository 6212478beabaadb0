"""The CPU backend of the scan: tensors taken apart for the kernels, gradients put together."""

from math import ceil

import torch
from torch import Tensor

from mambagen.kernels.cpu_common import KINDS, address, rows
from mambagen.kernels.selective_scan.cpu_backward import add_parts_kernel, backward_kernel, backward_scratch
from mambagen.kernels.selective_scan.cpu_forward import forward_kernel, forward_scratch
from mambagen.kernels.selective_scan.cpu_tiles import STAGE, TILE, P, R

PARTIAL_BYTES = 8 << 20  # of dB and dC for parts of the channels: longer sequences go in several runs


def chunk_length(state: int) -> int:
    """Steps from one saved state to the next: the saved states stay below half a float for each element of x."""
    return min(max(STAGE, 1 << (2 * state - 1).bit_length()), 8 * STAGE)


def saved_shape(batch: int, length: int, channels: int, groups: int, state: int, x: Tensor) -> tuple[int, ...]:
    """(batch, tiles, chunks, state, TILE): the state at the start of each chunk."""
    return batch, groups * ceil(channels / groups / TILE), ceil(length / chunk_length(state)), state, TILE


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
    batch, length, channels = x.shape
    y = x.new_empty(x.shape)
    final = A.new_empty(batch, channels, A.shape[1])
    saved = A.new_empty(saved_shape(batch, length, channels, B.shape[2], A.shape[1], x) if save else (0,))
    parameters = _common(x, dt, A, B, C, D, z, dt_bias, dt_softplus, resets, reverse)
    parameters |= {
        P.INITIAL: address(initial_state),
        P.FINAL: final.data_ptr(),
        P.SAVED: saved.data_ptr() if save else 0,
    }
    parameters |= rows(R.Y, y, reverse)
    forward_kernel.run(parameters, batch * parameters[P.TILES], forward_scratch(A.shape[1]), x.numel() * A.shape[1])
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
) -> tuple[Tensor | None, ...]:
    batch, length, channels = x.shape
    groups, state = B.shape[2:]
    parameters = _common(x, dt, A, B, C, D, z, dt_bias, dt_softplus, resets, reverse)
    tiles, group_tiles = parameters[P.TILES], parameters[P.GROUP_TILES]
    chunk, chunks = parameters[P.CHUNK], parameters[P.CHUNKS]
    # more tiles in a part save work, fewer leave more parts to share; the choice may depend on the shape alone, or the
    # sums of dB and dC would change with the machine
    part_tiles = min(max(batch * tiles // 8, 1), 4, group_tiles)
    group_parts = ceil(group_tiles / part_tiles)
    parts = groups * group_parts
    run_chunks = min(chunks, max(1, PARTIAL_BYTES // (8 * batch * parts * chunk * state)))

    dx, ddt, dB, dC = (v.new_empty(v.shape) for v in (x, dt, B, C))
    dz = None if z is None else z.new_empty(z.shape)
    carried = A.new_empty(batch, tiles, state, TILE)
    dA = A.new_zeros(batch, tiles, state, TILE, dtype=torch.float64)
    dD, ddt_bias = A.new_zeros(2, batch, tiles, TILE, dtype=torch.float64)
    partial = A.new_empty(2, batch, parts, run_chunks * chunk, state)
    outputs = ((R.DY, dy), (R.DX, dx), (R.DDT, ddt), (R.DB, dB), (R.DC, dC), (R.DZ, dz))
    for name, tensor in outputs:
        parameters |= rows(name, tensor, reverse)
    parameters |= {
        P.PART_TILES: part_tiles,
        P.GROUP_PARTS: group_parts,
        P.PARTS: parts,
        P.DFINAL: address(dfinal),
        P.SAVED: saved.data_ptr(),
        P.CARRIED: carried.data_ptr(),
        P.DA: dA.data_ptr(),
        P.DD: dD.data_ptr(),
        P.DBIAS: ddt_bias.data_ptr(),
        P.DB_PARTS: partial[0].data_ptr(),
        P.DC_PARTS: partial[1].data_ptr(),
    }
    scratch = backward_scratch(state, chunk, part_tiles)
    for last in range(chunks, 0, -run_chunks):
        first = max(0, last - run_chunks)
        parameters |= {P.FIRST_CHUNK: first, P.LAST_CHUNK: last}
        steps = min(length, last * chunk) - first * chunk
        backward_kernel.run(parameters, batch * parts, scratch, batch * steps * channels * state)
        add_parts_kernel.run(parameters, batch * ceil(steps / STAGE), 0, batch * steps * parts * state)

    def over_batch(value: Tensor) -> Tensor:
        return torch.from_numpy(value.numpy().sum(0))  # numpy adds in one order whatever the number of threads

    def by_channel(value: Tensor) -> Tensor:
        """(..., tiles, state, TILE) as (..., channels, state), float32, without the channels that pad a group."""
        value = value.unflatten(-3, (groups, group_tiles)).movedim(-2, -1)  # (..., groups, tiles, TILE, state)
        return value.flatten(-3, -2)[..., : channels // groups, :].flatten(-3, -2).float().contiguous()

    return (
        dx,
        ddt,
        by_channel(over_batch(dA)),
        dB,
        dC,
        None if D is None else by_channel(over_batch(dD)[:, None])[:, 0],
        dz,
        None if dt_bias is None else by_channel(over_batch(ddt_bias)[:, None])[:, 0],
        None if initial_state is None else by_channel(carried),
    )


def _common(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    resets: Tensor | None,
    reverse: bool,
) -> dict[int, int]:
    """The parameters that both directions share."""
    batch, length, channels = x.shape
    groups, state = B.shape[2:]
    chunk = chunk_length(state)
    group_tiles = ceil(channels / groups / TILE)
    parameters: dict[int, int] = {
        P.KIND: KINDS[x.dtype],
        P.SIZE: x.element_size(),
        P.BATCH: batch,
        P.LENGTH: length,
        P.STATE: state,
        P.CHUNK: chunk,
        P.CHUNKS: ceil(length / chunk),
        P.TILES: groups * group_tiles,
        P.GROUP_TILES: group_tiles,
        P.CHANNELS: channels,
        P.GROUP_CHANNELS: channels // groups,
        P.SOFTPLUS: int(dt_softplus),
        P.LATE: int(reverse),
        P.A: A.data_ptr(),
        P.D: address(D),
        P.BIAS: address(dt_bias),
    }
    for name, tensor in ((R.X, x), (R.DT, dt), (R.B, B), (R.C, C), (R.Z, z), (R.RESETS, resets)):
        parameters |= rows(name, tensor, reverse)
    return parameters
