"""BiGS, the bidirectional gated state-space encoder (arXiv 2212.10544), in its two architectures.

Code name -> the paper's symbol; X is the layer's normalised input, d and f are d_model and d_ff:

    v_proj            W_v, V = gelu(W_v X), (batch, length, f): what the gate lets through
    f_proj, b_proj    W_f and W_b, what enters the forward and the backward system, after a gelu
    uf_proj, ub_proj  W_uf and W_ub, on what the systems give
    u_proj, o_proj    W_u (d -> f) and W_o (f -> d): H + W_o(gelu(W_u(F' * G')) * V)

The backward system runs by the operation's `reverse`: nothing is flipped. Padding is safe because nothing but zeros
enters a system at padded positions: forward, padding on the right comes after all that is real; backward, it comes
first, and a system that has seen only zeros is in its first state. There are no position embeddings and no kernel of a
fixed length: the kernels are computed anew for the length at hand, so any length may follow any other.

A layer's norm is applied where the residual stream that it reads is summed, at the end of the layer before, for there
both are one pass over memory: so a layer takes the stream H with X beside it, and the norm that comes after it.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from mambagen.kernels.gelu import gelu_product, masked_gelu, product
from mambagen.kernels.layer_norm import add_layer_norm
from mambagen.models.config import Count, Positive
from mambagen.models.optimiser_groups import parameter_groups
from mambagen.models.s4d_mixer import S4D, S4DConfig, S4DMixer

PUBLISHED_WIDTH, PUBLISHED_DEVIATION = 1024, 0.02  # of the first weights


class BigsConfig(BaseModel):
    """What determines the weights of a `BigsEncoder`; impossible values raise pydantic.ValidationError."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    d_model: Count  # channels of the residual stream
    n_layer: Count
    d_ff: Count | Literal["auto"] = (
        "auto"  # of the gate (gated: "auto" is 3 d_model) or feed-forward (stack: 4 d_model)
    )
    architecture: Literal["gated", "stack"] = "gated"
    vocab_size: Count = 12
    pad_vocab_size_multiple: Count = 8  # embedding rows are rounded up to a multiple of this
    d_state: Annotated[int, Field(ge=1, le=1024)] = 64  # complex states a system
    n_ssm: Count | Literal["channels"] = 1  # systems a direction and layer; one serves all channels in the published
    init: Literal["lin", "inv", "legs", "real"] = "legs"
    discretisation: Literal["zoh", "bilinear"] = "zoh"
    dt_min: Positive = 1e-2  # step sizes begin log-uniform in [dt_min, dt_max]
    dt_max: Positive = 1.0
    lr_scale: Positive = 0.1  # the learning rate of dt and A, as a share of the others'
    norm_epsilon: Positive = 1e-5

    @model_validator(mode="after")
    def _systems_fit(self) -> Self:
        _ = self.ssm
        return self

    @property
    def feed_forward(self) -> int:
        """`d_ff` as a number."""
        return (3 if self.architecture == "gated" else 4) * self.d_model if self.d_ff == "auto" else self.d_ff

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return math.ceil(self.vocab_size / self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    @property
    def ssm(self) -> S4DConfig:
        """The systems of one direction of one layer."""
        shared = self.model_dump(
            include={"d_model", "d_state", "n_ssm", "init", "discretisation", "dt_min", "dt_max", "lr_scale"}
        )
        return S4DConfig(**shared)


# The two architectures at about one number of parameters each; counts with the 12 DNA tokens are in docs/bigs.md.
BIGS_SIZES: dict[str, BigsConfig] = {
    "tiny": BigsConfig(d_model=128, n_layer=6),
    "base": BigsConfig(d_model=768, n_layer=11),
    "large": BigsConfig(d_model=1024, n_layer=23),
}
BIGS_STACK_SIZES: dict[str, BigsConfig] = {
    "tiny": BigsConfig(d_model=128, n_layer=6, architecture="stack"),
    "base": BigsConfig(d_model=768, n_layer=12, architecture="stack"),
    "large": BigsConfig(d_model=1024, n_layer=24, architecture="stack"),
}


class AddNorm(nn.LayerNorm):
    """LayerNorm of a residual stream after what a layer adds to it.

    Args:
        wide: y stays in the stream's dtype; else it has that of autocast, or of the weights.
    """

    def __init__(self, d_model: int, epsilon: float, wide: bool = False) -> None:
        super().__init__(d_model, epsilon)
        self.wide = wide

    def forward(  # type: ignore[override]
        self, h: Tensor, branch: Tensor | None = None, branch_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """h (batch, length, d_model) float32, branch like h in any dtype -> h + branch, and its norm.

        `branch_bias` is what the branch's `Projection` gave beside it.
        """
        weight, device = self.weight, h.device.type
        if self.wide:
            dtype = h.dtype
        else:
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return add_layer_norm(h, branch, weight, self.bias, self.eps, dtype, branch_bias)


class Projection(nn.Linear):
    """W x + bias for a pass that can sum the bias's gradient itself, which saves one that reads all of it again."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """W x + bias, and the bias where what comes next has to give it its gradient (on a GPU, in training)."""
        if not _sums_later(x):
            return super().forward(x), None
        return F.linear(x, self.weight, self.bias.detach()), self.bias


class GatedLayer(nn.Module):
    """H + W_o(gelu(W_u(F' * G')) * V): two systems side by side, their product through a gate."""

    def __init__(self, config: BigsConfig) -> None:
        super().__init__()
        d, f = config.d_model, config.feed_forward
        self.norm = AddNorm(d, config.norm_epsilon)
        self.v_proj = Projection(d, f)
        self.f_proj = Projection(d, d)
        self.b_proj = Projection(d, d)
        self.forwards = S4D(config.ssm)
        self.backwards = S4D(config.ssm)
        self.uf_proj = Projection(d, d)
        self.ub_proj = Projection(d, d)
        self.u_proj = Projection(d, f)
        self.o_proj = Projection(f, d)

    def forward(self, h: Tensor, x: Tensor, padding: Tensor | None, after: AddNorm) -> tuple[Tensor, Tensor]:
        """Add the layer to the residual stream and normalise it for what comes next.

        Args:
            h: (batch, length, d_model) float32.
            x: like h, its norm by this layer's own `norm`.
            padding: (batch, length, 1) bool, or None.
            after: the norm of the next layer, or the last.

        Returns:
            h with what the layer adds, and the norm of that by `after`.
        """
        forwards, _ = self.forwards(_entering(self.f_proj(x), padding))
        backwards, _ = self.backwards(_entering(self.b_proj(x), padding), reverse=True)
        both = _gated(product, self.uf_proj(forwards), self.ub_proj(backwards))
        del forwards, backwards  # before what is wider than they are
        branch = self.o_proj(_gated(gelu_product, self.u_proj(both), self.v_proj(x)))
        summed: tuple[Tensor, Tensor] = after(h, *branch)
        return summed


class StackLayer(nn.Module):
    """A BERT layer whose attention is two S4D layers in sequence, one in each direction; the feed-forward is kept."""

    def __init__(self, config: BigsConfig) -> None:
        super().__init__()
        d, f = config.d_model, config.feed_forward
        self.norm = AddNorm(d, config.norm_epsilon)
        self.forwards = S4DMixer(config.ssm)
        self.backwards = S4DMixer(config.ssm)
        self.norm_ff = AddNorm(d, config.norm_epsilon)
        self.up_proj = Projection(d, f)
        self.down_proj = Projection(f, d)

    def forward(self, h: Tensor, x: Tensor, padding: Tensor | None, after: AddNorm) -> tuple[Tensor, Tensor]:
        """See `GatedLayer.forward`."""
        x, _ = self.forwards(_silence(x, padding))
        x, _ = self.backwards(_silence(x, padding), reverse=True)
        h, x = self.norm_ff(h, x)
        branch = self.down_proj(masked_gelu(*self.up_proj(x)))
        summed: tuple[Tensor, Tensor] = after(h, *branch)
        return summed


class BigsEncoder(nn.Module):
    """Tokens to hidden vectors that know both sides of each position; an encoder (see mambagen.models.encoders)."""

    def __init__(self, config: BigsConfig) -> None:
        super().__init__()
        self.config = config
        layer = GatedLayer if config.architecture == "gated" else StackLayer
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(layer(config) for _ in range(config.n_layer))
        self.norm_f = AddNorm(config.d_model, config.norm_epsilon, wide=True)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights anew from torch's global generator, on the CPU.

        | parameter            | drawn from                                                                          |
        |----------------------|-------------------------------------------------------------------------------------|
        | projections          | normal of deviation 0.02 (1024 / d_model)^1/2: as published at its width, and inner |
        |                      | values of the same size at every other; biases 0                                    |
        | embedding            | normal of deviation 0.02                                                            |
        | norms                | 1 and 0                                                                             |
        | systems              | see `S4D`                                                                           |
        """
        if self.embedding.weight.is_meta:
            return  # there is nothing to draw into; parameters are being counted
        deviation = PUBLISHED_DEVIATION * math.sqrt(PUBLISHED_WIDTH / self.config.d_model)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(torch.randn(module.weight.shape, device="cpu") * deviation)
                module.bias.zero_()
            elif isinstance(module, S4D):
                module.init_weights()
        self.embedding.weight.copy_(torch.randn(self.embedding.weight.shape, device="cpu") * PUBLISHED_DEVIATION)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden vectors of every position.

        Args:
            tokens: (batch, length) ids of any integer type.
            mask: (batch, length) bool, true at real positions; None where all are real. A row's real positions stand
                in one run; what its padding holds changes nothing at them.

        Returns:
            (batch, length, d_model), float32 at least; what stands at padded positions means nothing.
        """
        h = self.embedding(tokens.int())
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        padding = None if mask is None else ~mask[..., None]
        norms = [*(cast(AddNorm, layer.norm) for layer in self.layers), self.norm_f]
        h, x = norms[0](h)
        for layer, after in zip(self.layers, norms[1:], strict=True):
            h, x = layer(h, x, padding, after)
        out: Tensor = x
        return out

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimiser; see `mambagen.models.optimiser_groups`."""
        return parameter_groups(self, weight_decay)


def _entering(projected: tuple[Tensor, Tensor | None], padding: Tensor | None) -> Tensor:
    """What enters a system: a projection's gelu, zero at padded positions."""
    return masked_gelu(*projected, padding)


def _gated(gate: Callable[..., Tensor], a: tuple[Tensor, Tensor | None], b: tuple[Tensor, Tensor | None]) -> Tensor:
    """The product, of either kind, of what two projections gave."""
    return gate(a[0], b[0], a[1], b[1])


def _sums_later(x: Tensor) -> bool:
    return x.is_cuda and torch.is_grad_enabled()


def _silence(x: Tensor, padding: Tensor | None) -> Tensor:
    """x with zeros at padded positions, also where there is a NaN."""
    return x if padding is None else x.masked_fill(padding, 0.0)
