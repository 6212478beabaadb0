"""Stepping an audio U-Net on any GPU: the reference's operations as CUDA graphs, the drawing of samples inside.

One graph for every depth of a step (how many levels run), and one for a whole cycle of steps where that is short: then
the host launches once in `cycle` samples.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambagen.kernels.unet_decode import LayerWeights, LevelWeights, Sampling, UNetWeights
from mambagen.kernels.unet_decode.reference import InPlaceUNet, ReferenceDecoder, draw_numbers, pick_tokens

LONGEST = 64  # steps of a graph
WARM_UPS = 3  # runs before a capture, in which libraries choose and set themselves up


class _Way(NamedTuple):
    """How samples are drawn; part of a graph."""

    sampling: Sampling
    guidance: float | None


class Graphed(InPlaceUNet):
    """To stand before an `InPlaceUNet` among a class's bases: its steps are then run as CUDA graphs."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._cycle, device = self.weights.cycle, self.logits.device
        self._tokens = torch.zeros(min(self._cycle, LONGEST), self.batch, dtype=torch.int64, device=device)
        self._seeds = torch.zeros(self.batch, dtype=torch.int64, device=device)
        self._ahead = torch.arange(len(self._tokens), device=device)[:, None]
        self._readers: dict[int, Callable[[], None]] = {}  # by depth
        self._drawers: dict[int, Callable[[], None]] = {}  # by depth; 0 is a whole cycle
        self._phase: int | None = None  # of the position at which the whole cycle begins
        self._way: _Way | None = None

    def _step(self, token: Tensor) -> None:
        self._tokens[0].copy_(token)
        depth = self._depth()
        if depth not in self._readers:
            self._readers[depth] = self._captured(functools.partial(self._advance, self._tokens[0], depth))
        self._readers[depth]()
        self._position += 1

    @torch.no_grad()
    def draw(self, steps: int, sampling: Sampling, seeds: Tensor, guidance: float | None = None) -> Tensor:
        way = _Way(sampling, guidance)
        if way != self._way:
            self._way, self._drawers, self._phase = way, {}, None  # only the last: graphs hold memory
        self._seeds.copy_(seeds)
        drawn = torch.empty(steps, self.batch, dtype=torch.int64, device=seeds.device)
        done = 0
        while done < steps:
            if self._whole(steps - done):
                places = range(self._position, self._position + self._cycle)
                depths, key = [self._depth(place) for place in places], 0
            else:
                depths = [self._depth()]
                key = depths[0]
            if key not in self._drawers:
                self._drawers[key] = self._captured(functools.partial(self._draw_some, way, depths))
            self._drawers[key]()
            drawn[done : done + len(depths)] = self._tokens[: len(depths)]
            self._position += len(depths)
            done += len(depths)
        return drawn.T.contiguous()

    def _whole(self, steps: int) -> bool:
        """Whether the graph of a whole cycle is for the next steps; it is made where one first begins."""
        if self._cycle > LONGEST or steps < self._cycle:
            return False
        if self._phase is None:
            self._phase = self._position % self._cycle
        return self._position % self._cycle == self._phase

    def _draw_some(self, way: _Way, depths: list[int]) -> None:
        """Draw and hear a token for each of the depths. The random numbers, many small launches, are made at once."""
        ahead = self._ahead[: len(depths)]
        places = (self._place + ahead).expand(-1, self.batch)
        numbers = draw_numbers(self._seeds.expand_as(places), places)
        for row, number, depth in zip(self._tokens, numbers, depths, strict=False):
            row.copy_(pick_tokens(self.logits, way.sampling, number, way.guidance))
            self._advance(row, depth)

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """The steps as one launch; nothing is changed by making it."""
        changed = [*self.held(), *self._slots, self._place, self._tokens, self.logits]
        before = [v.clone() for v in changed]
        captured = capture(run, self.logits.device)
        for v, was in zip(changed, before, strict=True):
            v.copy_(was)
        return captured


class GraphDecoder(Graphed, ReferenceDecoder):
    """`Decoder` on a GPU; matrices in bfloat16 or float32, everything else float32."""

    def __init__(self, weights: UNetWeights, batch: int, precision: str) -> None:
        super().__init__(_with_matrices(weights, torch.bfloat16 if precision == "bfloat16" else torch.float32), batch)


def capture(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A CUDA graph of the function, which is run some times before: what it changes is the caller's to put back."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
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
