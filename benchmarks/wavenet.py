"""WaveNet (arXiv 1609.03499) as a baseline for the audio U-Nets, of the size in the published SC09 table: 4.2M.

Gated dilated convolutions of width 2 in stacks of ten, residual and skip connections, two layers on the sum of the
skips. It has the forward of `AudioUNet`, so the same task trains it, and steps with queues to make clips.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambagen.models.optimiser_groups import parameter_groups


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
        """(count, steps) uint8: samples drawn at temperature 1, with a ring of past inputs a layer."""
        device = self.embedding.weight.device
        random = torch.Generator(device).manual_seed(seed)
        channels = self.embedding.embedding_dim
        rings = [torch.zeros(count, channels, d, device=device) for d in self.dilations]
        weights = [(g.weight[..., 0].T, g.weight[..., 1].T, g.bias) for g in self.gates]  # type: ignore[index]
        token = torch.full((count,), 128, device=device)
        made = torch.empty(count, steps, dtype=torch.uint8, device=device)
        for step in range(steps):
            x = self.embedding(token)
            total = torch.zeros((), device=device)
            for layer, (ring, (before, now, bias)) in enumerate(zip(rings, weights, strict=True)):
                at = step % ring.shape[2]
                a, b = (ring[..., at] @ before + x @ now + bias).chunk(2, 1)
                ring[..., at] = x
                y = torch.tanh(a) * torch.sigmoid(b)
                total = total + _pointwise(self.skips[layer], y)
                x = x + _pointwise(self.residuals[layer], y)
            logits = _pointwise(self.lm_head, F.relu(_pointwise(self.hidden, F.relu(total))))
            token = torch.multinomial(logits.float().softmax(-1), 1, generator=random)[:, 0]
            made[:, step] = token
        return made


def _pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(conv, nn.Conv1d)
    return F.linear(x, conv.weight[..., 0], conv.bias)
