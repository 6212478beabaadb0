"""The selective scan in CUDA C++ for NVIDIA GPUs (Ampere and newer), state size 16, compiled at run time.

The kernels are in cuda_forward.cu, cuda_backward.cu and cuda_boundary.cu beside this file; README.md derives them. One
pass runs where batch x channels fill the chip; otherwise the length is cut into chunks whose border states come first.
"""

import functools
import struct
from pathlib import Path

import torch
from torch import Tensor

from mambagen.kernels.launching import byte_flags, processors
from mambagen.kernels.nvrtc import Kernel, why_unavailable

STATE = 16
WRITES_INTO = True  # backward takes `dz_out`
WARP_CHANNELS = 16
MAX_CHUNK = 1 << 30  # steps inside a chunk are counted in 32 bits
CHUNK_UNIT = 32  # chunks begin at multiples of every tile size
# Measured on an H200. SAVE_EVERY: steps between saved states, which is also the backward's tile. The other keys are
# macros of the .cu files.
SAVE_EVERY = 8
FORWARD = {"PER_LANE": 8, "TILE": 16, "STAGES": 2, "WARPS": 1, "MIN_BLOCKS": 1}
BACKWARD = {"WARPS": 4, "RING": 4, "MIN_BLOCKS": 1}
BOUNDARY = {"TILE": 16, "STAGES": 3, "WARPS": 1}
# The length is cut into chunks where a scheduler would have fewer than WARPS_A_SCHEDULER warps: gladly into long ones,
# whose borders cost little; into shorter ones only below NEED warps a scheduler.
WARPS_A_SCHEDULER = 2
LONG_CHUNK = 7680
NEED = {"forward": 0.75, "backward": 1.2}
MIN_CHUNK = {"forward": 1024, "backward": 512}
MAX_BATCH = 65535  # the launch grid's second axis
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unsupported(x: Tensor, state: int, groups: int, channels: int) -> str | None:
    """Why this call cannot run here, or None."""
    if state != STATE:
        return f"state size {state} (the CUDA kernels are for {STATE})"
    if (channels // groups) % WARP_CHANNELS:
        return f"{channels // groups} channels a group (the CUDA kernels take multiples of {WARP_CHANNELS})"
    if x.dtype not in _DTYPES:
        return f"dtype {x.dtype}"
    if x.shape[0] > MAX_BATCH:
        return f"{x.shape[0]} sequences at once (the CUDA kernels take up to {MAX_BATCH})"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the GPU is older than Ampere"
    return _unavailable()


_unavailable = functools.cache(why_unavailable)


def saved_shape(batch: int, length: int, channels: int, groups: int, state: int, x: Tensor) -> tuple[int, ...]:
    """The states at the start of every tile: (batch, tiles, state, channels)."""
    return (batch, -(-length // SAVE_EVERY), state, channels)


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
    groups = B.shape[2]
    x, dt, z = _aligned(x), _aligned(dt), None if z is None else _aligned(z)
    B, C, vector = _aligned_rows(B, C)
    resets = byte_flags(resets)
    device = x.device
    y = torch.empty((batch, length, channels), dtype=x.dtype, device=device)
    final = torch.empty((batch, channels, STATE), dtype=torch.float32, device=device)
    saved = torch.empty(
        saved_shape(batch, length, channels, groups, STATE, x) if save else (0,), dtype=torch.float32, device=device
    )
    defines = _defines(x, D, z, dt_bias, dt_softplus, resets, reverse)
    chunk, chunks = _chunks("forward", batch, length, channels, device)
    starts = None
    if chunks > 1:
        starts = _border_states(
            0, defines, x, dt, None, None, B, vector, A, dt_bias, resets, initial_state,
            batch, length, channels, groups, chunk, chunks,
        )  # fmt: skip
    options = (*defines, *FORWARD.items(), ("BC_VECTOR", vector), ("SAVE_EVERY", SAVE_EVERY if save else 0))
    kernel = _kernel("cuda_forward.cu", "scan_forward", device.index, options)
    pointers = [x, dt, z, B, C, A, D, dt_bias, initial_state, starts, resets, y, final, saved if save else None]
    parameters = struct.pack(
        "14P10qqiiii", *map(_pointer, pointers), *_strides(x, dt, z, B, C), length, channels, groups, chunk, chunks
    )
    block_channels = 32 * FORWARD["PER_LANE"] // STATE * FORWARD["WARPS"]
    kernel((-(-channels // block_channels), batch, chunks), 32 * FORWARD["WARPS"], parameters)
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
    """As the package describes; `dz_out`, rows of any stride, receives dz where it is given."""
    batch, length, channels = x.shape
    groups = B.shape[2]
    x, dt, dy, z = _aligned(x), _aligned(dt), _aligned(dy), None if z is None else _aligned(z)
    B, C, vector = _aligned_rows(B, C)
    resets = byte_flags(resets)
    device = x.device

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    dx, ddt = (empty(batch, length, channels, dtype=x.dtype) for _ in range(2))
    dz = dz_out
    if z is not None and dz is None:
        dz = empty(batch, length, channels, dtype=x.dtype)
    defines = _defines(x, D, z, dt_bias, dt_softplus, resets, reverse)
    chunk, chunks = _chunks("backward", batch, length, channels, device)
    ends = None
    if chunks > 1:
        ends = _border_states(
            1, defines, None, dt, z, dy, C, vector, A, dt_bias, resets, dfinal,
            batch, length, channels, groups, chunk, chunks,
        )  # fmt: skip
    warps = next(w for w in (8, 4, 2, 1) if w <= BACKWARD["WARPS"] and channels // groups % (WARP_CHANNELS * w) == 0)
    blocks = channels // (WARP_CHANNELS * warps)
    partial = empty(batch, blocks, length, 2 * STATE)
    sums = empty(batch * chunks, STATE + 2, channels)
    dinitial = None if initial_state is None else empty(batch, channels, STATE)
    options = (*defines, *{**BACKWARD, "TILE": SAVE_EVERY, "WARPS": warps}.items())
    kernel = _kernel("cuda_backward.cu", "scan_backward", device.index, options)
    pointers = [x, dt, z, B, C, dy, A, D, dt_bias, saved, dfinal, ends, resets, dx, ddt, dz, partial, sums, dinitial]
    parameters = struct.pack(
        "19P14qqiiii",
        *map(_pointer, pointers),
        *_strides(x, dt, z, B, C, dy, dz),
        length,
        channels,
        groups,
        chunk,
        chunks,
    )
    kernel((blocks, batch, chunks), 32 * warps, parameters)

    dB, dC = (empty(batch, length, groups, STATE, dtype=x.dtype) for _ in range(2))
    total = batch * length * groups * 8
    add = _kernel("cuda_backward.cu", "add_partials", device.index, options)
    parameters = struct.pack("3Pqqii", *map(_pointer, (partial, dB, dC)), length, total, blocks, groups)
    add((-(-total // 256), 1, 1), 256, parameters)

    whole = sums.sum(0)
    dA = whole[:STATE].t().contiguous()
    dD = None if D is None else whole[STATE].clone()
    ddt_bias = None if dt_bias is None else whole[STATE + 1].clone()
    return dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial


def _border_states(
    adjoint: int, defines: tuple, x: Tensor | None, dt: Tensor, z: Tensor | None, dy: Tensor | None, rows: Tensor,
    vector: int, A: Tensor, dt_bias: Tensor | None, resets: Tensor | None, edge: Tensor | None,
    batch: int, length: int, channels: int, groups: int, chunk: int, chunks: int,
) -> Tensor:  # fmt: skip
    """(batch, chunks, state, channels): the state before every chunk, or (adjoint) the one handed back to its end."""
    device = dt.device
    sums = torch.empty((batch, chunks, STATE, channels), dtype=torch.float32, device=device)
    totals = torch.empty((batch, chunks, channels), dtype=torch.float32, device=device)
    options = (*defines, *BOUNDARY.items(), ("ADJOINT", adjoint), ("BC_VECTOR", vector))
    kernel = _kernel("cuda_boundary.cu", "scan_boundary", device.index, options)
    parameters = struct.pack(
        "10P10qqiiii", *map(_pointer, (x, dt, z, dy, rows, A, dt_bias, resets, sums, totals)),
        *_strides(x, dt, z, dy, rows), length, channels, groups, chunk, chunks,
    )  # fmt: skip
    kernel((channels // WARP_CHANNELS, batch, chunks - 1), 32, parameters)
    chain = _kernel("cuda_boundary.cu", "combine", device.index, options)
    count = batch * STATE * channels
    parameters = struct.pack("5Pqqii", *map(_pointer, (A, edge, totals, resets, sums)), length, count, channels, chunks)
    chain((-(-count // 128), 1, 1), 128, parameters)
    return sums


def _chunks(sweep: str, batch: int, length: int, channels: int, device: torch.device) -> tuple[int, int]:
    """How the length is cut: (steps a chunk, chunks); one chunk where batch x channels give every scheduler a warp."""
    schedulers = 4 * processors(device)
    warps = batch * channels // WARP_CHANNELS
    chunks = WARPS_A_SCHEDULER * schedulers // warps
    if length < LONG_CHUNK * chunks:
        chunks = min(chunks, length // MIN_CHUNK[sweep]) if warps < NEED[sweep] * schedulers else 1
    chunks = max(1, chunks, length // MAX_CHUNK)
    chunk = -(-length // chunks)
    chunk = -(-chunk // CHUNK_UNIT) * CHUNK_UNIT
    return chunk, -(-length // chunk)


@functools.cache
def _source(file: str) -> str:
    folder = Path(__file__).parent
    return (folder.parent / "prelude.cuh").read_text() + (folder / file).read_text()


@functools.cache
def _kernel(file: str, name: str, device: int, options: tuple[tuple[str, int], ...]) -> Kernel:
    values = dict(options)
    size = 4 if values["DTYPE"] == 0 else 2
    return Kernel(_source(file), name, values, device, _shared_bytes(name, values, size))


def _shared_bytes(name: str, v: dict[str, int], size: int) -> int:
    """What the kernel's structs in shared memory take (the layouts are in the .cu files)."""
    row = WARP_CHANNELS * size
    if name == "scan_forward":
        row = (32 // (STATE // v["PER_LANE"])) * size
        stage = v["TILE"] * ((2 + v["HAS_Z"]) * row + 2 * STATE * size)
        return v["WARPS"] * (v["STAGES"] * stage + v["TILE"] * (8 * row // size + 2 * STATE * 4))
    if name == "scan_boundary":
        tensors = 2 + v["HAS_Z"] if v["ADJOINT"] else 2
        stage = v["TILE"] * (tensors * row + STATE * size)
        return v["WARPS"] * (v["STAGES"] * stage + v["TILE"] * (8 * WARP_CHANNELS + STATE * 4))
    if name == "scan_backward":
        stage = STATE * WARP_CHANNELS * 4 + (3 + v["HAS_Z"]) * v["TILE"] * row
        warp = 2 * stage + (3 + v["HAS_Z"]) * v["TILE"] * WARP_CHANNELS * 4
        ring = v["TILE"] * 2 * 4 * STATE * 4 + v["WARPS"] * v["TILE"] * 32 * 4 + 2 * 8
        return v["WARPS"] * warp + v["RING"] * ring + 16
    return 0


def _defines(
    x: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    softplus: bool, resets: Tensor | None, reverse: bool,
) -> tuple[tuple[str, int], ...]:  # fmt: skip
    return (
        ("DTYPE", _DTYPES[x.dtype]), ("HAS_Z", int(z is not None)), ("HAS_D", int(D is not None)),
        ("HAS_BIAS", int(dt_bias is not None)), ("SOFTPLUS", int(softplus)),
        ("HAS_RESETS", int(resets is not None)), ("REVERSE", int(reverse)),
    )  # fmt: skip


def _aligned(v: Tensor) -> Tensor:
    """The tensor, copied where its rows do not start at multiples of 16 bytes (as the 16-byte copies need)."""
    size = v.element_size()
    fits = v.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in v.stride()[:-1])
    return v if fits and v.stride(-1) == 1 else v.contiguous()


def _aligned_rows(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, int]:
    """B and C, and the widest copy (16, 8 or 4 bytes) that their rows allow; copied where not even 4 bytes fit."""
    places = [v.data_ptr() for v in (B, C)] + [s * v.element_size() for v in (B, C) for s in v.stride()[:2]]
    for size in (16, 8, 4):
        if all(place % size == 0 for place in places):
            return B, C, size
    return B.contiguous(), C.contiguous(), 16


def _pointer(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def _strides(*tensors: Tensor | None) -> list[int]:
    return [s for v in tensors for s in ((0, 0) if v is None else v.stride()[:2])]
