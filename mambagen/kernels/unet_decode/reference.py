"""Stepping an audio U-Net in plain torch operations, written as its definition."""

from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from mambagen.kernels.mamba_decode.reference import mixer_step, pick, rms_norm, uniform
from mambagen.kernels.unet_decode import DecoderState, LayerWeights, Sampling, UNetWeights


class ReferenceDecoder:
    """`Decoder` in the dtype of the weights, float32 at least where it matters (state, norms, residual, logits).

    Where a step is in its cycle stands in tensors, so that a CUDA graph can be made of steps (graph.py).
    """

    def __init__(self, weights: UNetWeights, batch: int) -> None:
        self.weights, self.batch = weights, batch
        self.wide = torch.promote_types(weights.embedding.dtype, torch.float32)
        zero = torch.zeros((), device=weights.embedding.device, dtype=self.wide)
        groups = weights.groups
        self._conv = [[zero.new_zeros(batch, w.conv_weight.shape[1] - 1, len(w.D)) for w in g] for g in groups]
        self._ssm = [[zero.new_zeros(batch, *w.A_log.shape) for w in g] for g in groups]
        sizes = [(batch, level.pool, width) for level, width in zip(weights.levels, weights.widths, strict=False)]
        self._buffers = [zero.new_zeros(size) for size in sizes]
        self._queues = [zero.new_zeros(size) for size in sizes]
        self._slots = [torch.zeros(1, dtype=torch.int64, device=zero.device) for _ in sizes]  # of the next frame
        self._place = torch.zeros(1, dtype=torch.int64, device=zero.device)  # `_position` on the device
        self._condition = zero.new_zeros(batch, weights.widths[0])
        self._position = 0
        self.logits = zero.new_zeros(batch, weights.head.shape[0])

    def condition(self, vectors: Tensor) -> None:
        self._condition.copy_(vectors)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        after = []
        for token in tokens.unbind(1):
            self._advance(token, self._depth())
            self._position += 1
            after.append(self.logits.clone())
        return torch.stack(after, 1)

    @torch.no_grad()
    def draw(self, steps: int, sampling: Sampling, seeds: Tensor, guidance: float | None = None) -> Tensor:
        drawn = []
        for _ in range(steps):
            token = draw_tokens(self.logits, sampling, seeds, self._place.expand_as(seeds), guidance)
            self._advance(token, self._depth())
            self._position += 1
            drawn.append(token)
        return torch.stack(drawn, 1)

    def load_state(self, state: DecoderState) -> None:
        given = [*state.conv, *state.ssm, *state.buffers, *state.queues]
        for to, value in zip(self._held(), given, strict=True):
            to.copy_(value)
        self._position = position = state.position
        self._place.fill_(position)
        for slot, level in zip(self._slots, self.weights.levels, strict=True):
            slot.fill_(position % level.pool)
            position //= level.pool

    def state(self) -> DecoderState:
        held = (chain(*self._conv), chain(*self._ssm), self._buffers, self._queues)
        return DecoderState(self._position, *([v.clone() for v in part] for part in held))

    def _held(self) -> list[Tensor]:
        return [*chain(*self._conv, *self._ssm), *self._buffers, *self._queues]

    def _depth(self, position: int | None = None) -> int:
        """How many levels run at a step (default: the next): level i + 1 does where level i's frame is the last."""
        place, depth = self._position if position is None else position, 1
        for level in self.weights.levels:
            if place % level.pool < level.pool - 1:
                break
            place //= level.pool
            depth += 1
        return depth

    def _advance(self, token: Tensor, depth: int) -> None:
        """Read a token, (batch,) ids; nothing here depends on a value of a tensor."""
        x = self.weights.embedding[token].to(self.wide) + self._condition
        for level in range(depth):
            if level:
                w = self.weights.levels[level - 1]
                x = self._linear(self._buffers[level - 1].flatten(1), w.down_weight, w.down_bias)
            x = self._frame(level, x)
            self._give(level, x)
        self._place.add_(1)

    def _frame(self, level: int, x: Tensor) -> Tensor:
        """A level's layers for one frame x (batch, H)."""
        states = zip(self.weights.groups[level], self._conv[level], self._ssm[level], strict=True)
        layers = [(w, conv, ssm) for w, conv, ssm in states]
        skips: list[Tensor] = []
        if level < len(self._buffers):
            above, slot = self.weights.levels[level], self._slots[level]
            for layer in layers[: len(above.down)]:
                skips.append(x)
                x = self._layer(x, *layer)
            layers = layers[len(above.down) :]
            self._buffers[level].index_copy_(1, slot, x[:, None])
            x = x + self._queues[level].index_select(1, slot)[:, 0]
            slot.add_(1).remainder_(above.pool)
        if not skips:  # one around all of them
            start = x
            for layer in layers:
                x = self._layer(x, *layer)
            return x + start
        for layer in layers:
            x = self._layer(x, *layer) + skips.pop()
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

    def _layer(self, x: Tensor, w: LayerWeights, conv: Tensor, ssm: Tensor) -> Tensor:
        return x + mixer_step(rms_norm(x, w.norm, self.weights.epsilon), w, conv, ssm)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x.to(weight.dtype), weight, bias.to(weight.dtype)).to(self.wide)


def draw_tokens(
    logits: Tensor, sampling: Sampling, seeds: Tensor, position: Tensor, guidance: float | None = None
) -> Tensor:
    """A token of each row of logits (batch, vocabulary), see `Decoder.draw`; seeds and position (batch,) int64."""
    if guidance is not None:
        asked, free = logits[0::2], logits[1::2]
        logits, seeds, position = free + guidance * (asked - free), seeds[0::2], position[0::2]
    tokens = pick(logits, sampling, uniform(seeds, position, torch.zeros_like(seeds)))
    return tokens if guidance is None else tokens.repeat_interleave(2)
