"""Stepping an audio U-Net on any GPU: the reference's operations as CUDA graphs, the drawing of samples inside.

One graph for every depth of a step (how many levels run), and one for a whole cycle of steps where that is short: then
the host launches once in `cycle` samples.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mambagen.kernels.unet_decode import LayerWeights, LevelWeights, Sampling, UNetWeights
from mambagen.kernels.unet_decode.reference import ReferenceDecoder, draw_tokens

LONGEST = 64  # steps of a graph


class _Way(NamedTuple):
    """How samples are drawn; part of a graph."""

    sampling: Sampling
    guidance: float | None


class GraphDecoder(ReferenceDecoder):
    """`Decoder` on a GPU; matrices in bfloat16 or float32, everything else float32."""

    def __init__(self, weights: UNetWeights, batch: int, precision: str) -> None:
        super().__init__(_with_matrices(weights, torch.bfloat16 if precision == "bfloat16" else torch.float32), batch)
        device = weights.embedding.device
        self._tokens = torch.zeros(min(weights.cycle, LONGEST), batch, dtype=torch.int64, device=device)
        self._seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        self._readers: dict[int, Callable[[], None]] = {}  # by depth
        self._drawers: dict[int, Callable[[], None]] = {}  # by depth; 0 is a whole cycle
        self._way: _Way | None = None

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        after = []
        for token in tokens.unbind(1):
            self._tokens[0].copy_(token)
            depth = self._depth()
            if depth not in self._readers:
                self._readers[depth] = self._captured(functools.partial(self._advance, self._tokens[0], depth))
            self._readers[depth]()
            self._position += 1
            after.append(self.logits.clone())
        return torch.stack(after, 1)

    @torch.no_grad()
    def draw(self, steps: int, sampling: Sampling, seeds: Tensor, guidance: float | None = None) -> Tensor:
        way = _Way(sampling, guidance)
        if way != self._way:
            self._way, self._drawers = way, {}  # only the last: graphs hold memory
        self._seeds.copy_(seeds)
        cycle = self.weights.cycle
        drawn = torch.empty(steps, self.batch, dtype=torch.int64, device=seeds.device)
        done = 0
        while done < steps:
            if cycle <= LONGEST and self._position % cycle == 0 and steps - done >= cycle:
                depths = [self._depth(place) for place in range(cycle)]
                self._drawer(0, way, depths)()
            else:
                depths = [self._depth()]
                self._drawer(depths[0], way, depths)()
            drawn[done : done + len(depths)] = self._tokens[: len(depths)]
            self._position += len(depths)
            done += len(depths)
        return drawn.T.contiguous()

    def _drawer(self, key: int, way: _Way, depths: list[int]) -> Callable[[], None]:
        if key not in self._drawers:

            def run() -> None:
                for row, depth in zip(self._tokens, depths, strict=False):
                    place = self._place.expand_as(self._seeds)
                    row.copy_(draw_tokens(self.logits, way.sampling, self._seeds, place, way.guidance))
                    self._advance(row, depth)

            self._drawers[key] = self._captured(run)
        return self._drawers[key]

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """The steps as one launch; nothing is changed by making it."""
        held = [*self._held(), *self._slots, self._place, self._tokens, self.logits]
        before = [v.clone() for v in held]
        captured = capture(run, self.logits.device)
        for v, was in zip(held, before, strict=True):
            v.copy_(was)
        return captured


def capture(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A CUDA graph of the function; it runs once more, before, so that libraries set themselves up outside."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # thread_local: in training, a thread that prepares batches may pin memory meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def _with_matrices(weights: UNetWeights, dtype: torch.dtype) -> UNetWeights:
    """Matrices in the dtype, all else in float32; copies, so that training afterwards is not seen."""

    def layer(w: LayerWeights) -> LayerWeights:
        names = ("in_proj", "x_proj", "dt_proj", "out_proj")
        return LayerWeights(
            *(v.to(dtype if name in names else torch.float32, copy=True) for name, v in w._asdict().items())
        )

    levels = [
        LevelWeights(
            [layer(w) for w in level.down],
            [layer(w) for w in level.up],
            level.pool,
            *(v.to(dtype, copy=True) for v in level[3:]),
        )
        for level in weights.levels
    ]
    embedding, norm_f = (v.to(torch.float32, copy=True) for v in (weights.embedding, weights.norm_f))
    head, head_bias = (v.to(dtype, copy=True) for v in (weights.head, weights.head_bias))
    return UNetWeights(embedding, levels, [layer(w) for w in weights.centre], norm_f, head, head_bias, weights.epsilon)
