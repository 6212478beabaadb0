"""The residual block: x + mixer(norm(x)), with the residual stream in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambagen.models.config import MambaConfig
from mambagen.models.fused_block import fused_block, what_to_keep
from mambagen.models.mamba_mixer import MambaMixer, MambaState, MixerWeights, mamba_mixer_forward, mamba_mixer_step


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + epsilon) over the last axis (arXiv 1910.07467), statistics in float32."""

    def __init__(self, d_model: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`RMSNorm` as a function; y has the weight's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), epsilon).to(weight.dtype)


class MambaBlock(nn.Module):
    """One layer of a Mamba stack, (batch, length, d_model) float32 -> the same; follows the contract of a mixer."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.mixer = MambaMixer(config)
        self.keep = "auto"  # for the backward: "all", "input", or what a GPU's memory allows (see fused_block)

    def forward(
        self, x: Tensor, state: MambaState | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, MambaState | None]:
        """See `MambaMixer.forward`; x is the residual stream."""
        norm, mixer = self.norm, self.mixer
        if state is None and x.is_cuda and x.dtype == torch.float32 and not torch.compiler.is_compiling():
            low = torch.is_autocast_enabled("cuda")
            dtype = torch.get_autocast_dtype("cuda") if low else mixer.in_proj.weight.dtype
            keep = what_to_keep(x, self.config.n_layer) if self.keep == "auto" else self.keep
            weights = mixer.weights()
            return fused_block(x, norm.weight, norm.epsilon, weights, resets, keep, dtype, mixer.backend), None
        arguments = (x, norm.weight, norm.epsilon, mixer.weights(), state, resets, mixer.backend)
        if self.keep == "input" and state is None and torch.is_grad_enabled():
            out = checkpoint(mamba_block_forward, *arguments, use_reentrant=False)
            assert isinstance(out, tuple)
            return out
        return mamba_block_forward(*arguments)

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """One position: x (batch, d_model)."""
        y, state = mamba_mixer_step(self.norm(x), self.mixer.weights(), state)
        return x + y, state

    def allocate_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MambaState:
        """The state before the first position; see `MambaMixer.allocate_state`."""
        return self.mixer.allocate_state(batch, device, dtype)


def mamba_block_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_epsilon: float,
    weights: MixerWeights,
    state: MambaState | None = None,
    resets: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MambaState | None]:
    """Norm, mixer and residual as one function of plain tensors: the place for a fused operation.

    x is float32 (or float64) and so is the result, whatever the precision between them.
    """
    y, state = mamba_mixer_forward(rms_norm(x, norm_weight, norm_epsilon), weights, state, resets, backend)
    return x + y, state
