"""The causal Mamba stack behind the interface of the encoders: for classifiers that read from the last position."""

from torch import Tensor

from mambagen.models.config import MambaConfig
from mambagen.models.mamba_lm import MambaStack

__all__ = ["MambaConfig", "MambaEncoder"]


class MambaEncoder(MambaStack):
    """`MambaStack` as an encoder; parameters are named as under `backbone.` in a language model.

    Every position sees those before it only, so padding on the right changes nothing, and padding on the left is cut
    off as a packed document of its own.
    """

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(batch, length) ids -> (batch, length, d_model); `mask` is true at real positions, None where all are."""
        resets = None
        if mask is not None:
            resets = mask.clone()
            resets[:, 1:] &= ~mask[:, :-1]
        hidden: Tensor = super().forward(tokens, None, resets)[0]
        return hidden
