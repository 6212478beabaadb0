"""The attention encoder that the others are measured against: BERT with today's habits.

Pre-norm layers, rotary positions (RoFormer, arXiv 2104.09864) instead of learned ones, so that any length can follow
any other, a GELU feed-forward of 4 d_model, and PyTorch's scaled_dot_product_attention: its flash kernels where no
position is padding, its memory-efficient ones under a padding mask.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from mambagen.models.config import Count, Positive


class BertConfig(BaseModel):
    """What determines the weights of a `BertEncoder`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    d_model: Count  # channels of the residual stream
    n_layer: Count
    vocab_size: Count = 12
    pad_vocab_size_multiple: Count = 8  # embedding rows are rounded up to a multiple of this
    n_head: Count | Literal["auto"] = "auto"  # "auto" is the nearest number of heads of 64 channels that divides
    d_ff: Count | Literal["auto"] = "auto"  # inner channels of the feed-forward; "auto" is 4 d_model
    rotary_base: Positive = 10_000.0  # the slowest rotation turns once in about 2 pi times this many positions
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    norm_epsilon: Positive = 1e-5

    @model_validator(mode="after")
    def _heads_divide(self) -> "BertConfig":
        if self.d_model % (2 * self.heads):
            raise ValueError(f"d_model {self.d_model} does not divide into {self.heads} heads of an even width")
        return self

    @property
    def heads(self) -> int:
        """`n_head` as a number."""
        if self.n_head != "auto":
            return self.n_head
        fits = [n for n in range(1, self.d_model // 2 + 1) if self.d_model % (2 * n) == 0] or [1]
        return min(fits, key=lambda n: abs(math.log(self.d_model / n / 64)))

    @property
    def feed_forward(self) -> int:
        """`d_ff` as a number."""
        return 4 * self.d_model if self.d_ff == "auto" else self.d_ff

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return math.ceil(self.vocab_size / self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple


class BertLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); the residual stream is float32."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        d = config.d_model
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm = nn.LayerNorm(d, config.norm_epsilon)
        self.qkv = nn.Linear(d, 3 * d)
        self.attention_out = nn.Linear(d, d)
        self.feed_norm = nn.LayerNorm(d, config.norm_epsilon)
        self.feed_in = nn.Linear(d, config.feed_forward)
        self.feed_out = nn.Linear(config.feed_forward, d)
        for linear in (self.qkv, self.attention_out, self.feed_in, self.feed_out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():  # as GPT-2: the residual stream's sum keeps its size
            for linear in (self.attention_out, self.feed_out):
                linear.weight.mul_((2 * config.n_layer) ** -0.5)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], keys: Tensor | None) -> Tensor:
        """x (batch, length, d_model); `rotation` as `rotary` gives it; `keys` (batch, 1, 1, length) bool, or None."""
        batch, length, d = x.shape
        qkv = self.qkv(_norm(self.attention_norm, x)).view(batch, length, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (batch, head, length, channel) each
        q, k = rotate(q, rotation), rotate(k, rotation)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=dropout)
        x = x + self._drop(self.attention_out(mixed.transpose(1, 2).reshape(batch, length, d)))
        return x + self._drop(self.feed_out(F.gelu(self.feed_in(_norm(self.feed_norm, x)))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class BertEncoder(nn.Module):
    """Tokens to hidden vectors by attention; an encoder (see mambagen.models.encoders)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.n_layer))
        self.norm_f = nn.LayerNorm(config.d_model, config.norm_epsilon)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(batch, length) ids -> (batch, length, d_model); `mask` is true at real positions, None where all are."""
        x = self.embedding(tokens.int())
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        width = self.config.d_model // self.config.heads
        rotation = rotary(tokens.shape[1], width, self.config.rotary_base, x.device)
        keys = None if mask is None else mask[:, None, None, :]
        for layer in self.layers:
            x = layer(x, rotation, keys)
        return _norm(self.norm_f, x)


def rotary(length: int, width: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, (length, width / 2) float32, frequencies base^(-2i / width)."""
    frequency = base ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channels i and i + width / 2 of x (..., length, width) by the position's angle; computed in float32."""
    cos, sin = rotation
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """The norm with statistics in float32; the result has the weight's dtype, as a model cast as a whole needs it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if norm.bias is None else norm.bias.to(wide)
    return F.layer_norm(x.to(wide), norm.normalized_shape, norm.weight.to(wide), bias, norm.eps).to(norm.weight.dtype)
