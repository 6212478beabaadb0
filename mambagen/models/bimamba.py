"""The bidirectional Mamba encoder: in every layer one scan runs forward and one in reverse, and their sum is taken.

    u   = u + out_proj(y_forward + y_reverse)        with the projections tied
    u   = u + out_proj([y_forward, y_reverse])       with projections of their own, kept side by side in one matrix

where y is what a Mamba mixer computes between its projections (convolution, selection, scan, gate), each direction with
its own weights. The reverse direction runs by the operations' `reverse`: nothing is flipped or copied.

Padding is safe in both directions because its border is a document's border to the operations (`resets`): neither a
tap of the convolution nor the state crosses it, so padded positions may hold anything.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambagen.models.config import MambaConfig
from mambagen.models.initialisation import init_weights
from mambagen.models.mamba_block import RMSNorm
from mambagen.models.mamba_mixer import MixerWeights, convolve_and_scan


class BimambaConfig(MambaConfig):
    """A `MambaConfig` whose layers have two directions."""

    tie_projections: bool = True  # in_proj and out_proj are the same for both directions


class Direction(nn.Module):
    """What a direction has of its own in any case: the convolution, the selection, A and D."""

    def __init__(self, config: BimambaConfig) -> None:
        super().__init__()
        E, N, R = config.d_inner, config.d_state, config.rank
        self.conv1d = nn.Conv1d(E, E, config.d_conv, groups=E)  # only its weights are used
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, E)
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.D = nn.Parameter(torch.empty(E))

    def weights(self, in_proj: Tensor, out_proj: Tensor) -> MixerWeights:
        """As the functions of a mixer take them."""
        conv_bias = self.conv1d.bias
        assert conv_bias is not None
        return MixerWeights(
            in_proj,
            self.conv1d.weight,
            conv_bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            self.A_log,
            self.D,
            out_proj,
        )


class BimambaMixer(nn.Module):
    """Two selective scans, one in each direction, over (batch, length, d_model)."""

    def __init__(self, config: BimambaConfig) -> None:
        super().__init__()
        self.config = config
        self.backend = "auto"  # of the kernels; benchmarks and tests set another
        own = 1 if config.tie_projections else 2
        self.in_proj = nn.Linear(config.d_model, own * 2 * config.d_inner, bias=False)
        self.forwards = Direction(config)
        self.backwards = Direction(config)
        self.out_proj = nn.Linear(own * config.d_inner, config.d_model, bias=False)
        init_weights(self, config)
        with torch.no_grad():  # two sums of the size of one in the residual stream
            self.out_proj.weight.mul_(math.sqrt(0.5))

    def forward(self, x: Tensor, resets: Tensor | None = None) -> Tensor:
        """(batch, length, d_model) -> the same; nothing flows, in either direction, over a border in `resets`."""
        parts = F.linear(x, self.in_proj.weight).chunk(2 if self.config.tie_projections else 4, dim=-1)
        streams = [(parts[0], parts[1]), (parts[-2], parts[-1])]
        outputs = []
        for direction, (signal, gate), reverse in zip(
            (self.forwards, self.backwards), streams, (False, True), strict=True
        ):
            weights = direction.weights(self.in_proj.weight, self.out_proj.weight)
            outputs.append(convolve_and_scan(signal, gate, weights, None, resets, reverse, self.backend)[0])
        if self.config.tie_projections:
            return F.linear(outputs[0] + outputs[1], self.out_proj.weight)
        halves = self.out_proj.weight.chunk(2, dim=1)  # two products rather than a copy into one tensor
        return F.linear(outputs[0], halves[0]) + F.linear(outputs[1], halves[1])


class BimambaBlock(nn.Module):
    """x + mixer(norm(x)); the residual stream is float32."""

    def __init__(self, config: BimambaConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.mixer = BimambaMixer(config)

    def forward(self, x: Tensor, resets: Tensor | None = None) -> Tensor:
        out: Tensor = x + self.mixer(self.norm(x), resets)
        return out


class BimambaEncoder(nn.Module):
    """Tokens to hidden vectors that know both sides of each position; an encoder (see mambagen.models.encoders)."""

    def __init__(self, config: BimambaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(BimambaBlock(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_epsilon)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(batch, length) ids -> (batch, length, d_model); `mask` is true at real positions, None where all are."""
        x = self.embedding(tokens.int())
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        resets = None if mask is None else borders(mask)
        for layer in self.layers:
            x = layer(x, resets)
        out: Tensor = self.norm_f(x)
        return out


def borders(mask: Tensor) -> Tensor:
    """(batch, length) bool: true where real positions end or begin, so that the operations let nothing pass."""
    return F.pad(mask[:, 1:] != mask[:, :-1], (1, 0))
