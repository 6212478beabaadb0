"""Mamba backbone (embedding, blocks, last norm) and the language model on it.

Parameters are named as in the published language-model weights, so those load as they are:

    backbone.embedding.weight
    backbone.layers.{i}.norm.weight
    backbone.layers.{i}.mixer.{in_proj,conv1d,x_proj,dt_proj,out_proj}.*
    backbone.layers.{i}.mixer.A_log
    backbone.layers.{i}.mixer.D
    backbone.norm_f.weight
    lm_head.weight                    (the embedding's tensor where the two are tied)
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambagen.models.config import MambaConfig
from mambagen.models.initialisation import init_weights
from mambagen.models.mamba_block import MambaBlock, RMSNorm
from mambagen.models.mamba_mixer import MambaState
from mambagen.models.optimiser_groups import parameter_groups

State = tuple[MambaState, ...]  # one a layer


class MambaStack(nn.Module):
    """Tokens to hidden vectors: embedding, `n_layer` residual blocks, last norm; the backbone under every head."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(MambaBlock(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_epsilon)
        init_weights(self, config)

    def forward(
        self, tokens: Tensor, state: Sequence[MambaState] | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """(batch, length) token ids of any integer type -> hidden vectors (batch, length, d_model), and the state.

        `state` and `resets` are as in `MambaMixer.forward`, the state one a layer.
        """
        x = self._embed(tokens)
        if state is None:
            for layer in self.layers:
                x, _ = layer(x, None, resets)
            return self.norm_f(x), None
        after = []
        for layer, before in zip(self.layers, state, strict=True):
            x, layer_state = layer(x, before, resets)
            after.append(layer_state)
        return self.norm_f(x), tuple(after)

    def step(self, token: Tensor, state: Sequence[MambaState]) -> tuple[Tensor, State]:
        """One position: token ids (batch,) -> hidden vectors (batch, d_model), and the state."""
        x = self._embed(token)
        after = []
        for layer, before in zip(self.layers, state, strict=True):
            assert isinstance(layer, MambaBlock)
            x, layer_state = layer.step(x, before)
            after.append(layer_state)
        return self.norm_f(x), tuple(after)

    def allocate_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first position; `dtype` is that of the convolutions' part (default: the weights')."""
        blocks = [layer for layer in self.layers if isinstance(layer, MambaBlock)]
        return tuple(block.allocate_state(batch, device, dtype) for block in blocks)

    def _embed(self, tokens: Tensor) -> Tensor:
        """The residual stream's first value, in float32 at least."""
        if tokens.dtype not in (torch.int64, torch.int32):  # bytes travel to a GPU at an eighth of the cost
            tokens = tokens.long()
        x = self.embedding(tokens)
        return x.to(torch.promote_types(x.dtype, torch.float32))


class MambaLM(nn.Module):
    """A Mamba language model: the stack and a linear head, tied to the embedding unless the config says otherwise.

    With a `seed` the weights are a function of it and the config alone; without, torch's global generator is used.
    """

    kind = "mamba-lm"  # what a model folder's config.json calls it

    def __init__(self, config: MambaConfig, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.backbone = MambaStack(config)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        self.init_weights(seed)

    def init_weights(self, seed: int | None = None) -> None:
        """Draw all weights anew (table in mambagen.models.initialisation)."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        init_weights(self, self.config, generator)

    def forward(
        self, tokens: Tensor, state: Sequence[MambaState] | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """Predict each next token.

        Args:
            tokens: (batch, length) ids of any integer type.
            state: what the stretch before left, or `allocate_state`; None (as in training) carries nothing.
            resets: (batch, length) bool, True where a packed document begins: nothing flows across.

        Returns:
            logits (batch, length, padded_vocab_size) in float32, the last ids being no tokens, and the new state
            (None where none was given).
        """
        x, after = self.backbone(tokens, state, resets)
        return self.head(x), after

    def step(self, token: Tensor, state: Sequence[MambaState]) -> tuple[Tensor, State]:
        """One position: ids (batch,) -> logits (batch, padded_vocab_size) and the new state."""
        x, after = self.backbone.step(token, state)
        return self.head(x), after

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden vectors (..., d_model) -> logits (..., padded_vocab_size), float32 at least."""
        logits = F.linear(hidden, self.lm_head.weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def allocate_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token; see `MambaStack.allocate_state`."""
        return self.backbone.allocate_state(batch, device, dtype)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimiser; see `mambagen.models.optimiser_groups`."""
        return parameter_groups(self, weight_decay)
