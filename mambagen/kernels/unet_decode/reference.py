"""Stepping an audio U-Net in plain torch operations, written as its definition.

`InPlaceUNet` is the steps over any layers that keep their own state; `ReferenceDecoder` has Mamba layers.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mambagen.kernels.mamba_decode.reference import mixer_step, pick, read_by_steps, rms_norm, uniform
from mambagen.kernels.unet_decode import DecoderState, LayerWeights, Sampling, UNetWeights


class Layer(Protocol):
    """One frame x (batch, H) -> (batch, H), norm and residual included; the state changes in place."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def held(self) -> Sequence[Tensor]:
        """The state's tensors themselves."""
        ...


class Stage(NamedTuple):
    """A level's layers; of the centre and of the layout of three stages all are `up`."""

    down: Sequence[Layer]
    up: Sequence[Layer]


class StepByStep:
    """The part of `Decoder` that reads and draws a token at a time, by `_step`."""

    logits: Tensor
    _position: int

    def _step(self, token: Tensor) -> None:
        """Read a token, (batch,) ids: `logits` are those of the next one, and `_position` goes on."""
        raise NotImplementedError

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        return read_by_steps(self._step, self.logits, tokens)

    @torch.no_grad()
    def draw(self, steps: int, sampling: Sampling, seeds: Tensor, guidance: float | None = None) -> Tensor:
        drawn = []
        for _ in range(steps):
            token = draw_tokens(self.logits, sampling, seeds, torch.full_like(seeds, self._position), guidance)
            self._step(token)
            drawn.append(token)
        return torch.stack(drawn, 1)


class InPlaceUNet(StepByStep):
    """`Decoder` but for loading and giving a state, float32 at least where it matters (norms, residual, logits).

    Where a step is in its cycle stands in tensors, and every tensor stays where it is, so that a CUDA graph can be made
    of steps (graph.py). Of the weights' layers nothing is used: they are given as `stages`, the centre the last.
    """

    def __init__(self, weights: UNetWeights, stages: Sequence[Stage], batch: int) -> None:
        self.weights, self.stages, self.batch = weights, stages, batch
        self.wide = torch.promote_types(weights.embedding.dtype, torch.float32)
        zero = torch.zeros((), device=weights.embedding.device, dtype=self.wide)
        sizes = [(batch, level.pool, width) for level, width in zip(weights.levels, weights.widths, strict=False)]
        self._buffers = [zero.new_zeros(size) for size in sizes]
        self._queues = [zero.new_zeros(size) for size in sizes]
        self._slots = [torch.zeros(1, dtype=torch.int64, device=zero.device) for _ in sizes]  # of the next frame
        self._place = torch.zeros(1, dtype=torch.int64, device=zero.device)  # `_position` on the device
        self._condition = zero.new_zeros(batch, sum(weights.condition_sizes))
        vectors = self._condition.split(weights.condition_sizes, 1)
        self._entering, self._rising = vectors[: len(weights.widths)], vectors[len(weights.widths) :]
        self._position = 0
        self.logits = zero.new_zeros(batch, weights.head.shape[0])

    def condition(self, vectors: Tensor) -> None:
        self._condition.copy_(vectors)

    def held(self) -> list[Tensor]:
        """All that steps change but the place: the layers' states, the levels' buffers, then their queues."""
        states = (layer.held() for stage in self.stages for layer in (*stage.down, *stage.up))
        return [*chain.from_iterable(states), *self._buffers, *self._queues]

    def _go_to(self, position: int) -> None:
        """So many tokens were read."""
        self._position = position
        self._place.fill_(position)
        for slot, level in zip(self._slots, self.weights.levels, strict=True):
            slot.fill_(position % level.pool)
            position //= level.pool

    def _depth(self, position: int | None = None) -> int:
        """How many levels run at a step (default: the next): level i + 1 does where level i's frame is the last."""
        place, depth = self._position if position is None else position, 1
        for level in self.weights.levels:
            if place % level.pool < level.pool - 1:
                break
            place //= level.pool
            depth += 1
        return depth

    def _step(self, token: Tensor) -> None:
        self._advance(token, self._depth())
        self._position += 1

    def _advance(self, token: Tensor, depth: int) -> None:
        """Read a token, (batch,) ids; nothing here depends on a value of a tensor."""
        x = self.weights.embedding[token].to(self.wide)
        for level in range(depth):
            if level:
                w = self.weights.levels[level - 1]
                x = self._linear(self._buffers[level - 1].flatten(1), w.down_weight, w.down_bias)
            x = self._frame(level, x + self._entering[level])
            self._give(level, x)
        self._place.add_(1)

    def _frame(self, level: int, x: Tensor) -> Tensor:
        """A level's layers for one frame x (batch, H)."""
        skips: list[Tensor] = []
        if level < len(self._buffers):
            above, slot = self.weights.levels[level], self._slots[level]
            for layer in self.stages[level].down:
                skips.append(x)
                x = layer(x)
            self._buffers[level].index_copy_(1, slot, x[:, None])
            x = x + self._queues[level].index_select(1, slot)[:, 0] + self._rising[level]
            slot.add_(1).remainder_(above.pool)
        if not skips:  # one around all of them
            start = x
            for layer in self.stages[level].up:
                x = layer(x)
            return x + start
        for layer in self.stages[level].up:
            x = layer(x) + skips.pop()
        return x

    def _give(self, level: int, x: Tensor) -> None:
        """A level's result goes to the queue of the one above it, the outermost's to the head."""
        weights = self.weights
        if level == 0:
            x = rms_norm(x, weights.norm_f, weights.epsilon)
            self.logits.copy_(self._linear(x, weights.head, weights.head_bias))
            return
        w = weights.levels[level - 1]
        self._queues[level - 1].copy_(self._linear(x, w.up_weight, w.up_bias).view_as(self._queues[level - 1]))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x.to(weight.dtype), weight, bias.to(weight.dtype)).to(self.wide)


class ReferenceDecoder(InPlaceUNet):
    """`Decoder` in the dtype of the weights, float32 at least where it matters (state, norms, residual, logits)."""

    def __init__(self, weights: UNetWeights, batch: int) -> None:
        def layers(some: Sequence[LayerWeights]) -> list[_MambaLayer]:
            return [_MambaLayer(w, batch, weights.epsilon) for w in some]

        levels = [Stage(layers(level.down), layers(level.up)) for level in weights.levels]
        super().__init__(weights, [*levels, Stage([], layers(weights.centre))], batch)

    def load_state(self, state: DecoderState) -> None:
        layers = chain.from_iterable(zip(state.conv, state.ssm, strict=True))
        for to, value in zip(self.held(), [*layers, *state.buffers, *state.queues], strict=True):
            to.copy_(value)
        self._go_to(state.position)

    def state(self) -> DecoderState:
        layers = [v.clone() for v in self.held()[: -2 * len(self._buffers)]]
        frames = ([v.clone() for v in part] for part in (self._buffers, self._queues))
        return DecoderState(self._position, layers[0::2], layers[1::2], *frames)


class _MambaLayer:
    def __init__(self, weights: LayerWeights, batch: int, epsilon: float) -> None:
        self._weights, self._epsilon = weights, epsilon
        wide = torch.promote_types(weights.A_log.dtype, torch.float32)
        zero = torch.zeros((), device=weights.A_log.device, dtype=wide)
        self._conv = zero.new_zeros(batch, weights.conv_weight.shape[1] - 1, len(weights.D))
        self._ssm = zero.new_zeros(batch, *weights.A_log.shape)

    def __call__(self, x: Tensor) -> Tensor:
        w = self._weights
        return x + mixer_step(rms_norm(x, w.norm, self._epsilon), w, self._conv, self._ssm)

    def held(self) -> Sequence[Tensor]:
        return self._conv, self._ssm


def draw_tokens(
    logits: Tensor, sampling: Sampling, seeds: Tensor, position: Tensor, guidance: float | None = None
) -> Tensor:
    """A token of each row of logits (batch, vocabulary), see `Decoder.draw`; seeds and position (batch,) int64."""
    return pick_tokens(logits, sampling, draw_numbers(seeds, position), guidance)


def draw_numbers(seeds: Tensor, position: Tensor) -> Tensor:
    """The random numbers in [0, 1) of streams and positions, tensors of any one shape."""
    return uniform(seeds, position, torch.zeros_like(seeds))


def pick_tokens(logits: Tensor, sampling: Sampling, numbers: Tensor, guidance: float | None = None) -> Tensor:
    """`draw_tokens` with the random numbers given, (batch,)."""
    if guidance is None:
        return pick(logits, sampling, numbers)
    asked, free = logits[0::2], logits[1::2]
    return pick(free + guidance * (asked - free), sampling, numbers[0::2]).repeat_interleave(2)
