"""Decoding on NVIDIA GPUs with thread-block clusters (compute capability 9.0 and newer): one launch, many tokens.

decode.cu is the kernel, cluster.cuh its instructions, sampling.cuh the draw; README.md derives them. This file packs
the weights in the order in which the tensor cores read them and keeps the state.
"""

import functools
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mambagen.kernels.mamba_decode import LayerWeights, Sampling, StackWeights
from mambagen.kernels.nvrtc import Kernel, why_unavailable

STATE, WIDTH = 16, 4  # states a channel, taps of the convolution
WARPS, MARKS = 8, 12  # warps that compute
THREADS = 32 * (WARPS + 4)  # of a block: the feeder is in a group of four
MAX_VOCABULARY = 1024
MAX_STREAMS = 20  # of one cluster
SIXTEEN_STREAMS = 4  # up to which a cluster of 16 blocks is faster than one of 8: one column tile
SMALLEST_SLOT = 16384  # bytes of one copy of weights
EARLY_OUT = 32  # registers in which weights of out_proj wait for their activations
LAUNCH_STEPS = 4096  # tokens of one launch: an interrupt is answered, a display's GPU stays usable


def unsupported(weights: StackWeights) -> str | None:
    """Why these weights cannot be decoded here, or None."""
    if torch.cuda.get_device_capability(weights.embedding.device) < (9, 0):
        return "the GPU is older than Hopper"
    limit, _ = chip(weights.embedding.device)
    return unsupported_shape(weights, limit) or why_unavailable()


def unsupported_shape(weights: StackWeights, shared_bytes: int) -> str | None:
    first = weights.layers[0]
    if first.A_log.shape[1] != STATE:
        return f"{first.A_log.shape[1]} states a channel (the kernel is for {STATE})"
    if first.conv_weight.shape[1] > WIDTH:
        return f"a convolution of width {first.conv_weight.shape[1]} (the kernel is for {WIDTH} or less)"
    if weights.head.shape[0] > MAX_VOCABULARY:
        return f"a vocabulary of {weights.head.shape[0]} (the kernel is for {MAX_VOCABULARY} or less)"
    if first.dt_proj.shape[1] > 64:
        return f"a rank of dt of {first.dt_proj.shape[1]} (the kernel is for 64 or less)"
    if not Layout.of(weights, 1, 2, shared_bytes).fits:
        return f"a layer of d_model {first.norm.shape[0]} needs more than the {shared_bytes} bytes of shared memory"
    return None


@dataclass(frozen=True)
class Layout:
    """The sizes that decode.cu is compiled for, and how its shared memory is used; names as there."""

    cluster: int
    streams: int  # of one cluster
    layers: int
    width: int  # d_model, padded to whole tiles of 16 in every block
    channels: int  # of one block
    rank: int  # of dt, padded to 16
    vocabulary: int  # padded
    terms: int  # bfloat16 numbers that a weight is kept in
    head_split: bool
    shared_bytes: int  # what a block may use

    @staticmethod
    def of(weights: StackWeights, streams: int, terms: int, shared_bytes: int, cluster: int | None = None) -> "Layout":
        first = weights.layers[0]
        channels, width = first.out_proj.shape[1], first.out_proj.shape[0]
        if cluster is None:
            cluster = next(size for size in (8, 4, 2, 1) if Layout.divides(weights, size))
        tile = 16 * cluster
        vocabulary = weights.head.shape[0]
        split = vocabulary > 64
        return Layout(
            cluster, streams, len(weights.layers), _up(width, tile), _up(channels, tile) // cluster,
            _up(first.dt_proj.shape[1], 16), _up(vocabulary, tile if split else 16), terms, split, shared_bytes,
        )  # fmt: skip

    @staticmethod
    def divides(weights: StackWeights, cluster: int) -> bool:
        """Whether so many blocks have equal shares of the channels and of the residual, in tiles of 16."""
        width, channels = weights.layers[0].out_proj.shape
        return math.gcd(_up(channels, 16) // 16, _up(width, 16) // 16) % cluster == 0

    @property
    def step_bytes(self) -> tuple[int, int, int, int]:
        """Of one step of 16 channels: in_proj, x_proj, out_proj, head."""
        fragment = 512 * self.terms
        head = self.vocabulary // 16 // (self.cluster if self.head_split else 1)
        return (
            2 * self.channels // 16 * fragment,
            (self.rank + 32) // 16 * fragment,
            self.width // 16 * fragment,
            head * fragment,
        )

    @property
    def parameter_bytes(self) -> int:
        return 4 * self.channels * (WIDTH + 3 + STATE + self.rank)

    @property
    def layer_bytes(self) -> int:
        """Of one layer in one block."""
        into, mixed, out, _ = self.step_bytes
        return into * (self.width // 16) + (mixed + out) * (self.channels // 16) + self.parameter_bytes

    @property
    def block_bytes(self) -> int:
        """Of all weights of one block."""
        return self.layers * self.layer_bytes + self.step_bytes[3] * (self.width // 16)

    @property
    def slot_bytes(self) -> int:
        out = self.step_bytes[2]
        return _up(_up(max(SMALLEST_SLOT, self.parameter_bytes, *self.step_bytes), out), 128)

    @property
    def chunks(self) -> tuple[int, int]:
        """Copies for a layer and for the head."""
        steps = (self.width // 16, self.channels // 16, self.channels // 16, self.width // 16)
        counts = [
            math.ceil(count / min(count, self.slot_bytes // size))
            for count, size in zip(steps, self.step_bytes, strict=True)
        ]
        return sum(counts[:3]) + 1, counts[3]

    @property
    def slots(self) -> int:
        """Slots of the ring; as many as there are chunks where all weights fit."""
        layer, head = self.chunks
        everything = self.layers * layer + head
        if self._fixed(everything) + self.block_bytes <= self.shared_bytes:
            return everything
        slots = 64
        while slots and self._fixed(slots) + slots * self.slot_bytes > self.shared_bytes:
            slots -= 1
        return slots

    @property
    def resident(self) -> bool:
        """Whether all weights fit the ring, so that they are copied once a launch."""
        layer, head = self.chunks
        everything = self.layers * layer + head
        return self.slots == everything and self._fixed(everything) + self.block_bytes <= self.shared_bytes

    @property
    def fits(self) -> bool:
        """Whether the ring can hold what is held at one time: a layer's table, x_proj and the first of out_proj."""
        _, mixed, out, _ = self.step_bytes
        steps = self.channels // 16
        mixed_chunks = math.ceil(steps / min(steps, self.slot_bytes // mixed))
        early = min(steps, EARLY_OUT // (4 * math.ceil(self.width // 16 / WARPS) * self.terms))
        out_chunks = math.ceil(early / min(steps, self.slot_bytes // out))
        return self.resident or self.slots >= 2 + mixed_chunks + out_chunks

    @property
    def fixed_bytes(self) -> int:
        return self._fixed(self.slots)

    def _fixed(self, slots: int) -> int:
        """At least the bytes of `Shared` in decode.cu."""
        streams, cluster, quads = self.streams, self.cluster, self.width // 4 // self.cluster
        head = self.vocabulary // 16 // (cluster if self.head_split else 1)
        head_parts = 1 if head >= WARPS else 8
        floats = (
            streams * (self.width + 16) + 2 * streams * (self.channels + 16)  # split activations
            + (cluster + 1) * streams * (self.rank + 32)  # mixed
            + cluster * streams * quads * 4  # partial
            + streams * _up(cluster * quads, 4)  # squares
            + 2 * streams * (self.channels + 16)
            + (head_parts + 1) * streams * self.vocabulary
            + streams
        )  # fmt: skip
        return _up(4 * floats + 16 * slots + 15 * 16 + 256, 128)

    @property
    def launch_bytes(self) -> int:
        ring = self.block_bytes if self.resident else self.slots * self.slot_bytes
        return self.fixed_bytes + ring

    def defines(self, debug: Mapping[str, int] | None = None) -> dict[str, object]:
        """Macros of decode.cu; `debug` sets some of DUMP, PROFILE and WATCHDOG, which the kernel explains."""
        return {
            "DTYPE": 1, "CLUSTER": self.cluster, "STREAMS": self.streams, "LAYERS": self.layers, "D": self.width,
            "EC": self.channels, "RP": self.rank, "VOCAB": self.vocabulary, "TERMS": self.terms,
            "HEAD_SPLIT": self.head_split, "SLOTS": self.slots, "SLOT_BYTES": self.slot_bytes,
            "RESIDENT": self.resident, "FIXED_BYTES": self.fixed_bytes, "EARLY_OUT": EARLY_OUT,
            "DUMP": 0, "PROFILE": 0, "WATCHDOG": 0, **(debug or {}),
        }  # fmt: skip

    @property
    def dump_row(self) -> int:
        """Floats of one stream, layer and step of a dump; see `CudaDecoder.stages`."""
        return self.width + 5 * self.channels * self.cluster + self.rank + 32


class CudaDecoder:
    """`Decoder` by decode.cu; `cluster`, `streams` (of one cluster) and `debug` are for tuning and finding faults."""

    @torch.no_grad()
    def __init__(
        self,
        weights: StackWeights,
        batch: int,
        precision: str = "bfloat16",
        cluster: int | None = None,
        streams: int | None = None,
        debug: Mapping[str, int] | None = None,
    ) -> None:
        self.device = weights.embedding.device
        self.batch, self.debug = batch, dict(debug or {})
        first = weights.layers[0]
        self._vocabulary, self._width = weights.head.shape
        self._inner, self._taps = first.conv_weight.shape
        self._epsilon = weights.epsilon
        terms = 1 if precision == "bfloat16" else 2
        self.layout = self._choose(weights, terms, cluster, streams)
        layout = self.layout
        self.clusters = math.ceil(batch / layout.streams)
        self.rows = self.clusters * layout.streams
        embedding = F.pad(
            weights.embedding.float(), (0, layout.width - self._width, 0, layout.vocabulary - self._vocabulary)
        ).contiguous()
        self._embedding, self._squares = embedding, embedding.square().sum(1)
        self._weights = pack(weights, layout)
        inner = layout.channels * layout.cluster
        self._ssm = torch.zeros(layout.layers, self.rows, inner, STATE, device=self.device)
        self._conv = torch.zeros(layout.layers, self.rows, inner, WIDTH, device=self.device)
        self._logits = torch.zeros(self.rows, layout.vocabulary, device=self.device)
        self._bias = torch.full((layout.vocabulary,), -math.inf, device=self.device)
        self._streams = torch.zeros(self.rows, dtype=torch.int32, device=self.device)
        self._dump: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        return self._logits[: self.batch, : self._vocabulary]

    def read(self, tokens: Tensor) -> Tensor:
        steps = tokens.shape[1]
        forced = torch.zeros(steps, self.rows, dtype=torch.int32, device=self.device)
        forced[:, : self.batch] = tokens.T
        after = torch.empty(steps, self.rows, self.layout.vocabulary, device=self.device)
        for begin in range(0, steps, LAUNCH_STEPS):
            some = slice(begin, min(steps, begin + LAUNCH_STEPS))
            self._launch(Sampling(), 0, forced=forced[some], after=after[some])
        return after[:, : self.batch, : self._vocabulary].transpose(0, 1)

    def draw(self, steps: int, sampling: Sampling, bias: Tensor, position: int, streams: Tensor) -> Tensor:
        self._bias[: self._vocabulary] = bias
        self._streams[: self.batch] = streams.to(torch.int32)  # the low 32 bits
        drawn = torch.empty(steps, self.rows, dtype=torch.int32, device=self.device)
        for begin in range(0, steps, LAUNCH_STEPS):
            some = slice(begin, min(steps, begin + LAUNCH_STEPS))
            self._launch(sampling, position + begin, drawn=drawn[some])
        return drawn[:, : self.batch].T.long()

    def load_state(self, conv: Sequence[Tensor], ssm: Sequence[Tensor]) -> None:
        taps = self._taps
        for layer, (window, h) in enumerate(zip(conv, ssm, strict=True)):
            # narrower convolutions are padded with taps before the oldest
            self._conv[layer, : self.batch, : self._inner, WIDTH - taps : WIDTH - 1] = window.transpose(1, 2)
            self._ssm[layer, : self.batch, : self._inner] = h

    def state(self) -> tuple[list[Tensor], list[Tensor]]:
        conv = self._conv[:, : self.batch, : self._inner, WIDTH - self._taps : WIDTH - 1].transpose(2, 3)
        return [v.clone() for v in conv], [v.clone() for v in self._ssm[:, : self.batch, : self._inner]]

    def stages(self) -> dict[str, Tensor]:
        """With debug DUMP: what the last call computed at every stage, each (steps, layers, batch, ...)."""
        assert self._dump is not None
        layout, inner = self.layout, self.layout.channels * self.layout.cluster
        parts = self._dump[:, :, : self.batch].split(
            [layout.width, inner, inner, inner, inner, layout.rank + 32, inner], dim=-1
        )
        names = ("residual", "x", "convolved", "gate", "y", "mixed", "dt")
        found = dict(zip(names, parts, strict=True))
        for name in ("x", "convolved", "gate", "y", "dt"):
            found[name] = found[name][..., : self._inner]
        return found | {"residual": found["residual"][..., : self._width]}

    def profile(self) -> Tensor:
        """With debug PROFILE: clock cycles that each warp of the first block spent in each MARK of decode.cu."""
        assert self._dump is not None
        return self._dump.flatten()[: WARPS * MARKS].view(WARPS, MARKS)

    def _choose(self, weights: StackWeights, terms: int, cluster: int | None, streams: int | None) -> Layout:
        limit = self._shared_limit()
        if cluster is None:
            cluster = Layout.of(weights, 1, terms, limit).cluster
            twice = 2 * cluster
            if cluster == 8 and not Layout.of(weights, 1, terms, limit).resident and Layout.divides(weights, twice):
                at_once = self._side_by_side(Layout.of(weights, 1, terms, limit, twice))
                if at_once and math.ceil(self.batch / at_once) <= SIXTEEN_STREAMS:
                    cluster = twice
        if streams is None:
            # as few a cluster as let all clusters run at the same time: a second wave takes as long as the first
            at_once = self._side_by_side(Layout.of(weights, 1, terms, limit, cluster))
            streams = min(MAX_STREAMS, math.ceil(self.batch / max(1, at_once)))
        while True:
            layout = Layout.of(weights, streams, terms, limit, cluster)
            if layout.fits:
                return layout
            if streams == 1:
                raise ValueError(f"mamba_decode: {unsupported_shape(weights, limit)}")
            streams = (streams + 1) // 2

    def _shared_limit(self) -> int:
        return chip(self.device)[0]

    def _side_by_side(self, layout: Layout) -> int:
        """How many clusters run at the same time; 0 where the chip has none of that size."""
        return _active_clusters(self.device.index or 0, layout.cluster, layout.launch_bytes)

    def _launch(
        self,
        sampling: Sampling,
        position: int,
        forced: Tensor | None = None,
        drawn: Tensor | None = None,
        after: Tensor | None = None,
    ) -> None:
        steps = len(drawn if forced is None else forced)  # type: ignore[arg-type]
        layout = self.layout
        if self.debug:
            self._dump = torch.zeros(steps, layout.layers, self.rows, layout.dump_row, device=self.device)
        tensors = (
            self._weights, self._embedding, self._squares, self._bias, self._ssm, self._conv, self._logits,
            self._streams, forced, drawn, after, self._dump,
        )  # fmt: skip
        pointers = [0 if v is None else v.data_ptr() for v in tensors]
        top_k = layout.vocabulary if sampling.top_k is None else min(sampling.top_k, layout.vocabulary)
        parameters = struct.pack(
            "12PQQffi4xiiff", *pointers, position, sampling.seed & (1 << 64) - 1, sampling.inverse_temperature,
            sampling.top_p, top_k, steps, self.rows, self._epsilon, 1 / self._width,
        )  # fmt: skip
        self._run(parameters)

    def _run(self, parameters: bytes) -> None:
        layout = self.layout
        index = self.device.index or 0
        kernel = _kernel(index, tuple(layout.defines(self.debug).items()), layout.launch_bytes)
        kernel((self.clusters * layout.cluster, 1, 1), THREADS, parameters, layout.cluster)


def chip(device: torch.device) -> tuple[int, int]:
    """Bytes of shared memory that a block may use, and multiprocessors."""
    found = torch.cuda.get_device_properties(device)
    return getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block), found.multi_processor_count


@functools.cache
def _active_clusters(device: int, cluster: int, shared_bytes: int) -> int:
    probe = Kernel('extern "C" __global__ void probe(int) {}', "probe", {}, device, shared_bytes)
    if cluster > 8:
        try:
            probe.allow_large_clusters()
            return probe.active_clusters(THREADS, cluster)
        except RuntimeError:  # of more than 8 blocks not every chip has
            return 0
    return probe.active_clusters(THREADS, cluster)


@functools.cache
def source() -> str:
    """The kernel's source, complete."""
    here = Path(__file__).parent
    files = (here.parent / "prelude.cuh", here / "cluster.cuh", here / "sampling.cuh", here / "decode.cu")
    return "".join(file.read_text() for file in files)


@functools.cache
def _kernel(device: int, defines: tuple[tuple[str, object], ...], shared_bytes: int) -> Kernel:
    values = dict(defines)
    kernel = Kernel(source(), "decode", values, device, shared_bytes, exact=True)
    if int(str(values["CLUSTER"])) > 8:
        kernel.allow_large_clusters()
    return kernel


# ---- weights in the order of their use


@torch.no_grad()
def pack(weights: StackWeights, layout: Layout) -> Tensor:
    """(cluster, block_bytes) uint8: for each block its layers in turn, then the head.

    A layer is in_proj, a table of small parameters in float32, x_proj and out_proj; the norms' weights are folded into
    in_proj and the head. Projections are cut into fragments: see `fragments`.
    """
    blocks: list[list[Tensor]] = [[] for _ in range(layout.cluster)]
    for layer in weights.layers:
        for block, pieces in zip(blocks, _pack_layer(layer, layout), strict=True):
            block += pieces
    head = weights.head.float() * weights.norm_f.float()
    head = F.pad(head, (0, layout.width - head.shape[1], 0, layout.vocabulary - head.shape[0]))
    tiles = fragments(head, layout.terms)  # (steps, tiles, ...)
    for rank, block in enumerate(blocks):
        block.append(_bytes(tiles[:, rank :: layout.cluster] if layout.head_split else tiles))
    packed = torch.stack([torch.cat(block) for block in blocks])
    assert packed.shape == (layout.cluster, layout.block_bytes)
    return packed


def _pack_layer(w: LayerWeights, layout: Layout) -> list[list[Tensor]]:
    """The pieces of one layer for each block."""
    inner, width = w.out_proj.shape[1], w.out_proj.shape[0]
    rank, taps = w.dt_proj.shape[1], w.conv_weight.shape[1]
    cluster = layout.cluster
    more, wider, ranks = layout.channels * cluster - inner, layout.width - width, layout.rank - rank

    def by_block(v: Tensor) -> Tensor:
        """(E, n) -> (cluster, channels, n), padded with zeros."""
        return F.pad(v.float(), (0, 0, 0, more)).unflatten(0, (cluster, layout.channels))

    into = w.in_proj.float() * w.norm.float()
    x, z = (by_block(F.pad(half, (0, wider))) for half in into.chunk(2))
    dt, B_C = w.x_proj.float().split([rank, 2 * STATE])
    mixed = by_block(torch.cat([F.pad(dt, (0, 0, 0, ranks)), B_C]).T)  # (cluster, channels, rows)
    out = by_block(F.pad(w.out_proj.float().T, (0, wider)))
    columns = (
        F.pad(w.conv_weight, (WIDTH - taps, 0)),
        w.conv_bias[:, None],
        w.dt_bias[:, None],
        w.D[:, None],
        -torch.exp(w.A_log.float()) * math.log2(math.e),
        F.pad(w.dt_proj, (0, ranks)),
    )
    tables = [by_block(v) for v in columns]
    return [
        [
            _bytes(fragments(torch.cat([x[i], z[i]]), layout.terms)),
            *(_bytes(table[i]) for table in tables),
            _bytes(fragments(mixed[i].T, layout.terms)),
            _bytes(fragments(out[i].T, layout.terms)),
        ]
        for i in range(cluster)
    ]


def fragments(matrix: Tensor, terms: int) -> Tensor:
    """(rows, columns), multiples of 16 -> (columns / 16, rows / 16, terms, 32, 8) bfloat16.

    The last two are the lanes of a warp and what each gives to one product of 16 x 16: lane 4g + q holds rows 2g and
    2g + 1, columns 4q to 4q + 3. `terms` of 2 adds what bfloat16 leaves of each weight.
    """
    rows, columns = matrix.shape
    high = matrix.bfloat16()
    parts = [high] if terms == 1 else [high, (matrix - high.float()).bfloat16()]
    both = torch.stack(parts).view(terms, rows // 16, 8, 2, columns // 16, 4, 2, 2)
    # (term, tile, g, row, step, q, half, column) -> (step, tile, term, g, q, half, row, column)
    return both.permute(4, 1, 0, 2, 5, 6, 3, 7).reshape(columns // 16, rows // 16, terms, 32, 8)


def _bytes(v: Tensor) -> Tensor:
    return v.contiguous().view(torch.uint8).flatten()


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
