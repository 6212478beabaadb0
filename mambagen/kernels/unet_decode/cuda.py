"""The audio U-Net on NVIDIA GPUs (compute capability 9.0 and newer): one launch, a block a stream, many samples.

decode.cu is the kernel; this file packs the weights in the order in which it reads them and keeps the state.
"""

import functools
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mambagen.kernels.mamba_decode.cuda import chip
from mambagen.kernels.nvrtc import Kernel, why_unavailable
from mambagen.kernels.unet_decode import DecoderState, LayerWeights, Sampling, UNetWeights

STATE, TAPS, EXPAND = 16, 4, 2
WARPS = 16  # that compute; the feeder is in a group of four more
MAX_LEVELS, MAX_RANK, MAX_VOCABULARY = 8, 64, 1024
MAX_OUTPUTS = 2048  # of a product
SLOT = 16384  # bytes of a copy of weights, at most
LEAST_SLOTS = 4
LAUNCH_STEPS = 8192  # samples of one launch: an interrupt is answered


def unsupported(weights: UNetWeights) -> str | None:
    """Why these weights cannot be decoded here, or None."""
    device = weights.embedding.device
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "the GPU is older than Hopper"
    return unsupported_shape(weights, chip(device)[0]) or why_unavailable()


def unsupported_shape(weights: UNetWeights, shared_bytes: int) -> str | None:
    """Why the kernel is not for these shapes, or None."""
    layers = [layer for group in weights.groups for layer in group]
    if any(w.A_log.shape[1] != STATE or w.A_log.shape[0] != EXPAND * len(w.norm) for w in layers):
        return f"the kernel is for {STATE} states a channel and {EXPAND} inner channels a channel"
    if any(w.conv_weight.shape[1] > TAPS for w in layers):
        return f"the kernel is for convolutions of width {TAPS} or less"
    if any(width % 16 for width in weights.widths):
        return "the kernel is for widths that are multiples of 16"
    if any(w.dt_proj.shape[1] > MAX_RANK for w in layers) or weights.head.shape[0] > MAX_VOCABULARY:
        return f"the kernel is for ranks of dt up to {MAX_RANK} and vocabularies up to {MAX_VOCABULARY}"
    layout = Layout.of(weights, 1, shared_bytes, pairs=True)  # serves every call, with guidance or without
    if layout.widest_product > MAX_OUTPUTS:
        return f"the kernel is for products of up to {MAX_OUTPUTS} outputs"
    if len(weights.groups) > MAX_LEVELS:
        return f"the kernel is for {MAX_LEVELS} levels at most"
    if not layout.fits:
        return f"the widest level needs more than the {shared_bytes} bytes of shared memory"
    return None


@dataclass(frozen=True)
class Layout:
    """The sizes that decode.cu is compiled for; names as there."""

    widths: tuple[int, ...]
    ranks: tuple[int, ...]  # multiples of 4
    layers: tuple[int, ...]
    downs: tuple[int, ...]
    pools: tuple[int, ...]  # 1 at the centre
    vocabulary: int  # padded
    streams: int  # of a block
    shared_bytes: int  # what a block may use
    pairs: bool = False  # blocks of one stream; two are a cluster, which draws together

    @staticmethod
    def of(weights: UNetWeights, streams: int, shared_bytes: int, pairs: bool = False) -> "Layout":
        groups = weights.groups
        ranks = tuple(_up(max(w.dt_proj.shape[1] for w in group), 4) for group in groups)
        return Layout(
            tuple(weights.widths),
            ranks,
            tuple(len(group) for group in groups),
            (*(len(level.down) for level in weights.levels), 0),
            (*(level.pool for level in weights.levels), 1),
            _up(weights.head.shape[0], 32),
            streams,
            shared_bytes,
            pairs,
        )

    @property
    def frame_floats(self) -> int:
        """Of the frames of all levels above the centre."""
        return sum(pool * width for pool, width in zip(self.pools[:-1], self.widths[:-1], strict=True))

    @property
    def fixed_bytes(self) -> int:
        """At least the bytes of `Shared` in decode.cu."""
        D = max(self.widths)
        skips = max(max(down, 1) * width for down, width in zip(self.downs, self.widths, strict=True))
        rising = max(sum(self.widths[:-1]), 1)
        floats = D + skips + 6 * D + 96 + 2 * self.frame_floats + rising + self.vocabulary + 2
        floats = floats * self.streams + (4 if self.pairs else 2) * self.vocabulary
        return _up(4 * floats + 16 * 64 + 256, 128)  # two barriers a slot

    @property
    def widest_product(self) -> int:
        """Outputs of it: an in_proj or an UpPool."""
        return max(4 * max(self.widths), *(p * w for p, w in zip(self.pools, self.widths, strict=True)))

    @property
    def slots(self) -> int:
        return max(0, min(64, (self.shared_bytes - self.fixed_bytes) // SLOT))

    @property
    def fits(self) -> bool:
        """Whether the ring has room enough."""
        return self.slots >= LEAST_SLOTS

    @property
    def launch_bytes(self) -> int:
        return self.fixed_bytes + self.slots * SLOT

    def defines(self, watchdog: int = 0) -> dict[str, object]:
        """Macros of decode.cu; `watchdog`: milliseconds after which a wait is given up with a message (0: never)."""

        def several(values: tuple[int, ...]) -> str:
            return ",".join(map(str, values))

        return {
            "DTYPE": 1, "WATCHDOG": watchdog, "LEVELS": len(self.widths), "WIDTHS": several(self.widths),
            "RANKS": several(self.ranks), "LAYERS_OF": several(self.layers), "DOWNS": several(self.downs),
            "POOLS": several(self.pools), "VOCAB": self.vocabulary, "STREAMS": self.streams, "WARPS": WARPS,
            "PAIRS": int(self.pairs), "SLOTS": self.slots, "SLOT_BYTES": SLOT, "FIXED_BYTES": self.fixed_bytes,
        }  # fmt: skip


class CudaDecoder:
    """`Decoder` by decode.cu, matrices in bfloat16.

    One stream in a block while there are multiprocessors for all, then two, which share the reading of the weights.
    With guidance a stream and its companion have a block each likewise, two blocks that draw together (`pairs`), or one
    for both. `streams` of one block, `pairs` (default: as `streams`) and `watchdog` are for tuning and finding faults.
    """

    @torch.no_grad()
    def __init__(
        self,
        weights: UNetWeights,
        batch: int,
        streams: int | None = None,
        watchdog: int = 0,
        pairs: bool | None = None,
    ) -> None:
        self.device, self.batch = weights.embedding.device, batch
        self._shapes = weights
        limit, processors = self._chip()
        self._rows = _up(batch, 2)
        if streams is None:
            room = self._rows <= processors or not Layout.of(weights, 2, limit).fits
            streams = 1 if room else 2
        self._streams, self._pairs = streams, streams == 1 if pairs is None else pairs
        self._limit, self._watchdog = limit, watchdog
        self._vocabulary = weights.head.shape[0]
        self._epsilon = weights.epsilon
        layout = self._layout(guided=False)
        self._packed = pack(weights, layout)
        more = layout.vocabulary - self._vocabulary
        self._embedding = weights.embedding.float().contiguous()
        self._head_bias = F.pad(weights.head_bias.float(), (0, more))
        self._bias = F.pad(torch.zeros_like(self._head_bias[: self._vocabulary]), (0, more), value=-math.inf)
        self._tables = torch.cat([_table(w, layout.ranks[i]) for i, g in enumerate(weights.groups) for w in g])
        biases = [v.float() for level in weights.levels for v in (level.down_bias, level.up_bias)]
        self._pool_bias = torch.cat(biases)
        zeros = functools.partial(torch.zeros, device=self.device)
        self._ssm = [[zeros(self._rows, *w.A_log.shape) for w in g] for g in weights.groups]
        self._flat_ssm = _together([v for g in self._ssm for v in g])
        self._conv = [zeros(self._rows, w.A_log.shape[0], 4) for g in weights.groups for w in g]
        self._flat_conv = _together(self._conv)
        self._frames = zeros(self._rows, 2, layout.frame_floats)
        self._logits = zeros(self._rows, layout.vocabulary)
        self._condition = zeros(self._rows, sum(weights.condition_sizes))
        self._seeds = zeros(self._rows, dtype=torch.int64)
        self._position = 0

    @property
    def logits(self) -> Tensor:
        return self._logits[: self.batch, : self._vocabulary]

    def condition(self, vectors: Tensor) -> None:
        self._condition[: self.batch] = vectors

    def read(self, tokens: Tensor) -> Tensor:
        steps = tokens.shape[1]
        forced = torch.zeros(steps, self._rows, dtype=torch.int32, device=self.device)
        forced[:, : self.batch] = tokens.T
        after = torch.empty(steps, self._rows, self._logits.shape[1], device=self.device)
        for begin in range(0, steps, LAUNCH_STEPS):
            some = slice(begin, min(steps, begin + LAUNCH_STEPS))
            self._launch(Sampling(), None, forced=forced[some], after=after[some])
        return after[:, : self.batch, : self._vocabulary].transpose(0, 1)

    def draw(self, steps: int, sampling: Sampling, seeds: Tensor, guidance: float | None = None) -> Tensor:
        self._seeds[: self.batch] = seeds
        drawn = torch.empty(steps, self._rows, dtype=torch.int32, device=self.device)
        for begin in range(0, steps, LAUNCH_STEPS):
            self._launch(sampling, guidance, drawn=drawn[begin : min(steps, begin + LAUNCH_STEPS)])
        return drawn[:, : self.batch].T.long()

    def load_state(self, state: DecoderState) -> None:
        layers = [v for group in self._ssm for v in group]
        for ssm, conv, h, window in zip(layers, self._conv, state.ssm, state.conv, strict=True):
            ssm[: self.batch] = h
            taps = window.shape[1] + 1  # narrower convolutions are padded with taps before the oldest
            conv[: self.batch, :, TAPS - taps : TAPS - 1] = window.transpose(1, 2)
        for i, parts in enumerate((state.buffers, state.queues)):
            self._frames[: self.batch, i] = torch.cat([v.flatten(1) for v in parts], 1)
        self._position = state.position

    def state(self) -> DecoderState:
        layers = [w for group in self._shapes.groups for w in group]
        conv = [
            v[: self.batch, :, TAPS - w.conv_weight.shape[1] : TAPS - 1].transpose(1, 2).contiguous()
            for v, w in zip(self._conv, layers, strict=True)
        ]
        ssm = [v[: self.batch].clone() for group in self._ssm for v in group]
        levels, widths = self._shapes.levels, self._shapes.widths
        sizes = [level.pool * width for level, width in zip(levels, widths, strict=False)]
        frames = [
            [v.unflatten(1, (-1, width)).clone() for v, width in zip(part.split(sizes, 1), widths, strict=False)]
            for part in self._frames[: self.batch].unbind(1)
        ]
        return DecoderState(self._position, conv, ssm, *frames)

    def _chip(self) -> tuple[int, int]:
        """Bytes of shared memory that a block may use, and multiprocessors."""
        return chip(self.device)

    def _layout(self, guided: bool) -> Layout:
        """How a launch is laid out; the state in memory is the same for all."""
        pairs = guided and self._pairs
        streams = 1 if pairs else 2 if guided else self._streams
        return Layout.of(self._shapes, streams, self._limit, pairs)

    def _launch(
        self,
        sampling: Sampling,
        guidance: float | None,
        forced: Tensor | None = None,
        drawn: Tensor | None = None,
        after: Tensor | None = None,
    ) -> None:
        steps = len(drawn if forced is None else forced)  # type: ignore[arg-type]
        layout = self._layout(guidance is not None)
        tensors = (
            self._packed, self._tables, self._pool_bias, self._embedding, self._condition,
            self._head_bias, self._bias, self._flat_ssm, self._flat_conv, self._frames, self._logits, self._seeds,
            forced, drawn, after,
        )  # fmt: skip
        pointers = [0 if v is None else v.data_ptr() for v in tensors]
        top_k = layout.vocabulary if sampling.top_k is None else min(sampling.top_k, layout.vocabulary)
        parameters = struct.pack(
            "15PQQffi4xiiiff", *pointers, self._position, 0, sampling.inverse_temperature, sampling.top_p, top_k,
            steps, self._rows, int(guidance is not None), 1.0 if guidance is None else guidance, self._epsilon,
        )  # fmt: skip
        parameters += bytes(-len(parameters) % 8)
        self._run(parameters, layout)
        self._position += steps

    def _run(self, parameters: bytes, layout: Layout) -> None:
        kernel = _kernel(self.device.index or 0, tuple(layout.defines(self._watchdog).items()), layout.launch_bytes)
        kernel((self._rows // layout.streams, 1, 1), 32 * (WARPS + 4), parameters, 2 if layout.pairs else 0)


@functools.cache
def source() -> str:
    """The kernel's source, complete."""
    here = Path(__file__).parent
    decode = here.parent / "mamba_decode"
    files = (here.parent / "prelude.cuh", decode / "cluster.cuh", decode / "sampling.cuh", here / "decode.cu")
    return "".join(file.read_text() for file in files)


@functools.cache
def _kernel(device: int, defines: tuple[tuple[str, object], ...], shared_bytes: int) -> Kernel:
    return Kernel(source(), "decode", dict(defines), device, shared_bytes, exact=True)


# ---- weights in the order of their use


@torch.no_grad()
def pack(weights: UNetWeights, layout: Layout) -> Tensor:
    """All matrices as bytes, in the order of their use; the norms' weights are folded into in_proj and the head."""
    pieces: list[Tensor] = []
    for level, (group, rank) in enumerate(zip(weights.groups, layout.ranks, strict=True)):
        if level:
            pieces.append(pack_rows(weights.levels[level - 1].down_weight))
        for w in group:
            dt, B_C = w.x_proj.float().split([w.dt_proj.shape[1], 2 * STATE])
            mixed = torch.cat([F.pad(dt, (0, 0, 0, rank - len(dt))), B_C])
            pieces += [pack_rows(m) for m in (w.in_proj.float() * w.norm.float(), mixed, w.out_proj)]
        if level:
            pieces.append(pack_rows(weights.levels[level - 1].up_weight))
        else:
            head = weights.head.float() * weights.norm_f.float()
            pieces.append(pack_rows(F.pad(head, (0, 0, 0, layout.vocabulary - len(head)))))
    return torch.cat([piece.flatten() for piece in pieces])


def pack_rows(matrix: Tensor) -> Tensor:
    """(outputs, inputs) -> (units, bytes) uint8: eight inputs of one output for each thread, as `Shape` in decode.cu.

    A word of 32 bits holds two weights, as mambagen.kernels.unet_decode.cpu_matrix.pack_pairs has them.
    """
    from mambagen.kernels.unet_decode.cpu_matrix import pair_words

    outputs, inputs = matrix.shape
    lanes, rows = spread(outputs, inputs)
    padded = F.pad(matrix.float(), (0, 0, 0, _up(outputs, 32 // lanes * rows) - outputs))
    # (warp, row of a lane, lane of other rows, step, half of its inputs, lane of the same rows, word, weight)
    parts = padded.view(-1, rows, 32 // lanes, inputs // (8 * lanes), 2, lanes, 2, 2)
    ordered = parts.permute(3, 1, 0, 5, 2, 4, 6, 7)
    words = pair_words(ordered[..., 0], ordered[..., 1])
    return words.reshape(inputs // (8 * lanes) * rows, -1).view(torch.uint8)


def spread(outputs: int, inputs: int) -> tuple[int, int]:
    """How many lanes of a warp share an output, and how many outputs a lane has: LANES and EACH in decode.cu."""

    def rows_of(lanes: int) -> int:
        return 1 << (-(-outputs * lanes // (32 * WARPS)) - 1).bit_length()

    lanes = min(16, (inputs // 8) & -(inputs // 8))
    while lanes > 1 and rows_of(lanes) > 4:
        lanes //= 2
    return lanes, rows_of(lanes)


def _table(w: LayerWeights, rank: int) -> Tensor:
    """A layer's small parameters, flat float32, as decode.cu has them."""
    taps = F.pad(w.conv_weight.float(), (TAPS - w.conv_weight.shape[1], 0))
    more = torch.stack([w.conv_bias, torch.zeros_like(w.D), w.dt_bias, w.D], 1).float()
    A = -torch.exp(w.A_log.float()) * math.log2(math.e)
    dt_proj = F.pad(w.dt_proj.float(), (0, rank - w.dt_proj.shape[1]))
    return torch.cat([v.flatten() for v in (taps, more, A, dt_proj)])


def _together(tensors: list[Tensor]) -> Tensor:
    """One flat tensor whose parts the given ones become."""
    flat = torch.cat([v.flatten() for v in tensors])
    offset = 0
    for v in tensors:
        v.set_(flat[offset : offset + v.numel()].view_as(v))  # type: ignore[call-overload]
        offset += v.numel()
    return flat


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
