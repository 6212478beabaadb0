"""WaveNet (arXiv 1609.03499) as a baseline for the audio U-Nets, of the size in the published SC09 table: 4.2M.

Gated dilated convolutions of width 2 in stacks of ten, residual and skip connections, two layers on the sum of the
skips. It has the forward of `AudioUNet`, so the same task trains it, and steps with rings to make clips.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambagen.kernels.mamba_decode import Sampling
from mambagen.kernels.mamba_decode.reference import pick, uniform
from mambagen.kernels.unet_decode.graph import capture
from mambagen.models.audio_unet import MIDDLE
from mambagen.models.optimiser_groups import parameter_groups

BLOCK = 16  # steps of a graph
SAMPLING = Sampling()  # from the distribution itself


class WaveNet(nn.Module):
    """Logits of each next sample; tokens are shifted already, as for `AudioUNet`."""

    def __init__(self, channels: int = 118, skips: int = 256, stacks: int = 4, layers: int = 10, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.dilations = [2**i for _ in range(stacks) for i in range(layers)]
            self.embedding = nn.Embedding(256, channels)
            self.gates = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 2, dilation=d) for d in self.dilations)
            self.residuals = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in self.dilations)
            self.skips = nn.ModuleList(nn.Conv1d(channels, skips, 1) for _ in self.dilations)
            self.hidden, self.lm_head = nn.Conv1d(skips, skips, 1), nn.Conv1d(skips, 256, 1)

    def forward(self, tokens: Tensor, state: None = None, classes: None = None) -> tuple[Tensor, None]:
        """(batch, length) -> logits (batch, length, 256) in float32."""
        x = self.embedding(tokens.long()).transpose(1, 2)
        total: Tensor | None = None
        for gate, residual, skip, dilation in zip(self.gates, self.residuals, self.skips, self.dilations, strict=True):
            a, b = gate(F.pad(x, (dilation, 0))).chunk(2, 1)
            y = torch.tanh(a) * torch.sigmoid(b)
            total = skip(y) if total is None else total + skip(y)
            x = x + residual(y)
        assert total is not None
        logits = self.lm_head(F.relu(self.hidden(F.relu(total))))
        return logits.transpose(1, 2).float(), None

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimiser."""
        return parameter_groups(self, weight_decay)

    @torch.no_grad()
    def generate(self, count: int, steps: int, seed: int = 0) -> Tensor:
        """(count, steps) uint8 samples drawn at temperature 1; on a GPU by CUDA graphs of `BLOCK` steps."""
        stepper = WaveNetStepper(self, count, seed)
        device, run = self.embedding.weight.device, stepper.run
        if device.type == "cuda":
            run = capture(run, device)
        stepper.begin()
        made = torch.empty(-(-steps // BLOCK) * BLOCK, count, dtype=torch.uint8, device=device)
        for block in made.split(BLOCK):
            run()
            block.copy_(stepper.drawn)
        return made[:steps].T.contiguous()


class WaveNetStepper:
    """`BLOCK` steps of `count` streams in operations that a CUDA graph can hold: what changes stands in tensors.

    A layer remembers its last `dilation` inputs in a ring. What the gates make of those is known before the step begins
    and is computed for all layers in one product, as are the skips at the end. The residual layers' biases are not
    added to x but counted in the gates' biases, so a ring begins with what is zero then.
    """

    def __init__(self, model: WaveNet, count: int, seed: int = 0) -> None:
        def weights(layers: nn.ModuleList, tap: int = 0) -> Tensor:  # (layers, inputs, outputs)
            return torch.stack([layer.weight[..., tap].T for layer in layers])  # type: ignore[index]

        def biases(layers: nn.ModuleList) -> Tensor:
            return torch.stack([layer.bias for layer in layers])  # type: ignore[misc]

        device = model.embedding.weight.device
        self._embedding = model.embedding.weight
        self._before, self._now = weights(model.gates, 0), weights(model.gates, 1)
        self._residual = weights(model.residuals)
        self._skip, self._skip_bias = weights(model.skips).flatten(0, 1), biases(model.skips).sum(0)
        self._hidden, self._head = model.hidden, model.lm_head
        left_out = biases(model.residuals).cumsum(0).roll(1, 0)[:, None]  # (layers, 1, channels): of the layers before
        left_out[0] = 0
        self._bias = biases(model.gates)[:, None] + left_out @ (self._before + self._now)
        self._dilations = torch.tensor(model.dilations, device=device)
        self._first = self._dilations.cumsum(0) - self._dilations  # of a layer's ring in `_past`
        self._zero = -left_out.repeat_interleave(self._dilations, 0, output_size=sum(model.dilations))
        self._past = self._zero.repeat(1, count, 1)  # (all rings, count, channels)
        self._place = torch.zeros_like(self._dilations)  # in each ring
        self._seeds = torch.arange(count, device=device) + seed * 1_000_003
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._ahead = torch.arange(BLOCK, device=device)[:, None]
        self.logits = torch.zeros(count, len(self._embedding), device=device)
        self.drawn = torch.zeros(BLOCK, count, dtype=torch.int64, device=device)

    def begin(self) -> None:
        """To where silence has been heard and the first sample is to be drawn."""
        self._past.copy_(self._zero.expand_as(self._past))
        self._place.zero_()
        self._position.zero_()
        self.advance(torch.full_like(self._seeds, MIDDLE))

    def run(self) -> None:
        """Draw and hear `BLOCK` samples, which are then in `drawn`."""
        positions = (self._position + self._ahead).expand_as(self.drawn)
        seeds = self._seeds.expand_as(self.drawn)
        numbers = uniform(seeds, positions, torch.zeros_like(seeds))
        for token, number in zip(self.drawn, numbers, strict=True):
            token.copy_(pick(self.logits, SAMPLING, number))
            self.advance(token)
        self._position.add_(BLOCK)

    def advance(self, token: Tensor) -> None:
        """Hear a sample, (count,): `logits` are those of the next one."""
        at = self._first + self._place
        gates = torch.baddbmm(self._bias, self._past.index_select(0, at), self._before)  # (layers, count, 2 channels)
        x = F.embedding(token, self._embedding)
        heard, outputs = [], []
        for gate, now, residual in zip(gates, self._now, self._residual, strict=True):
            heard.append(x)
            gate.addmm_(x, now)
            gate[:, : x.shape[1]].tanh_()
            outputs.append(F.glu(gate, -1))
            x = torch.addmm(x, outputs[-1], residual)
        self._past.index_copy_(0, at, torch.stack(heard))
        self._place.add_(1).remainder_(self._dilations)
        total = torch.addmm(self._skip_bias, torch.cat(outputs, 1), self._skip)
        self.logits.copy_(_pointwise(self._head, F.relu(_pointwise(self._hidden, F.relu(total)))))


def _pointwise(conv: nn.Conv1d, x: Tensor) -> Tensor:
    return F.linear(x, conv.weight[..., 0], conv.bias)
