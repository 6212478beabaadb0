"""What a stage of the audio U-Net is made of: pre-norm residual blocks around any causal mixer, by name.

| name            | blocks a layer                                           | from                               |
|-----------------|----------------------------------------------------------|------------------------------------|
| "mamba"         | Mamba                                                    | arXiv 2312.00752                   |
| "s4", "s4d"     | S4 or S4D with its gated projection                      | arXiv 2111.00396, 2206.11893       |
| "s4+mlp", ...   | the same, then a block with a feed-forward network        | SaShiMi is "s4+mlp", arXiv 2202.09729 |
| "attention+mlp" | attention over the last `window` positions, then an MLP  | the ablation of arXiv 2312.00752   |

Every block keeps the contract of a mixer (docs/models.md); a network without memory has an empty state.
"""

from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambagen.models.config import MambaConfig
from mambagen.models.mamba_block import MambaBlock, RMSNorm
from mambagen.models.s4_mixer import S4Config, S4Mixer
from mambagen.models.s4d_mixer import S4DConfig, S4DMixer

BLOCK_KINDS = ("mamba", "s4", "s4d", "s4+mlp", "s4d+mlp", "attention+mlp")


class BlockShape(Protocol):
    """The fields of a config from which blocks of any width are made."""

    d_state: int
    d_conv: int
    expand: int
    ssm_state: int
    mlp_expand: int
    head_width: int
    attention_window: int
    norm_epsilon: float


class Block(Protocol):
    """A residual block: (batch, length, d_model) float32 -> the same; states are tuples of tensors."""

    def __call__(self, x: Tensor, state: Any = None, resets: Tensor | None = None) -> tuple[Tensor, Any]: ...

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]: ...

    def allocate_state(self, batch: int, device: Any = None, dtype: torch.dtype | None = None) -> Any: ...


def make_blocks(kind: str, layers: int, d_model: int, depth: int, shape: BlockShape) -> nn.ModuleList:
    """The blocks of `layers` layers in order; `depth` is the number of layers of the whole network."""
    mixer_kind, _, network = kind.partition("+")
    blocks: list[nn.Module] = []
    for _ in range(layers):
        if mixer_kind == "mamba":
            blocks.append(MambaBlock(_mamba_config(d_model, depth, shape)))
        else:
            blocks.append(ResidualBlock(d_model, _make_mixer(mixer_kind, d_model, shape), shape.norm_epsilon))
        if network:
            blocks.append(ResidualBlock(d_model, MLP(d_model, shape.mlp_expand * d_model), shape.norm_epsilon))
    return nn.ModuleList(blocks)


def _mamba_config(d_model: int, depth: int, shape: BlockShape) -> MambaConfig:
    return MambaConfig(
        d_model=d_model,
        n_layer=depth,
        d_state=shape.d_state,
        d_conv=shape.d_conv,
        expand=shape.expand,
        norm_epsilon=shape.norm_epsilon,
    )


def _make_mixer(kind: str, d_model: int, shape: BlockShape) -> nn.Module:
    if kind == "s4":  # as SaShiMi: the state matrix is shared by all channels, the step size and C are each one's own
        return S4Mixer(S4Config(d_model=d_model, d_state=shape.ssm_state, share_system=True))
    if kind == "s4d":
        return S4DMixer(S4DConfig(d_model=d_model, d_state=shape.ssm_state))
    return Attention(d_model, shape.head_width, shape.attention_window)


class ResidualBlock(nn.Module):
    """x + mixer(norm(x)) with the residual stream in float32 at least."""

    def __init__(self, d_model: int, mixer: nn.Module, norm_epsilon: float) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model, norm_epsilon)
        self.mixer = mixer

    def forward(self, x: Tensor, state: Any = None, resets: Tensor | None = None) -> tuple[Tensor, Any]:
        y, state = self.mixer(self.norm(x), state, resets)
        return x + y, state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = cast(Block, self.mixer).step(self.norm(x), state)
        return x + y, state

    def allocate_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        return cast(Block, self.mixer).allocate_state(batch, device, dtype)


class MLP(nn.Module):
    """A feed-forward network at each position: linear, GELU, linear."""

    def __init__(self, d_model: int, d_inner: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, d_inner)
        self.out_proj = nn.Linear(d_inner, d_model)

    def forward(self, x: Tensor, state: Any = None, resets: Tensor | None = None) -> tuple[Tensor, Any]:
        return self.out_proj(F.gelu(self.in_proj(x), approximate="tanh")), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.forward(x, state)

    def allocate_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[()]:
        return ()


class AttentionState(NamedTuple):
    """Keys and values of the positions before, the latest last; fixed in size, so that memory does not grow."""

    keys: Tensor  # (batch, window - 1, heads, head_width), not rotated
    values: Tensor
    usable: Tensor  # (batch, window - 1) bool: of the running document


class Attention(nn.Module):
    """Causal attention with rotary positions (arXiv 2104.09864), each position seeing itself and window - 1 before it.

    Only differences of positions count, so a rolling cache of keys gives the numbers of the whole sequence.
    """

    def __init__(self, d_model: int, head_width: int, window: int) -> None:
        super().__init__()
        self.heads, self.head_width, self.window = d_model // head_width, head_width, window
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, x: Tensor, state: AttentionState | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, AttentionState | None]:
        """Mix a stretch of a sequence: x (batch, length, d_model), the state before, marks of documents' beginnings."""
        batch, length, d_model = x.shape
        q, k, v = self.in_proj(x).view(batch, length, 3, self.heads, self.head_width).unbind(2)
        document = None if resets is None else resets.long().cumsum(1)
        if state is None and document is None and length <= self.window:
            q, k = rotate(q, 0), rotate(k, 0)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            return self.out_proj(y.reshape(batch, length, d_model)), None
        if document is None:
            document = torch.zeros(batch, length, dtype=torch.int64, device=x.device)
        before = self.allocate_state(batch, x.device, x.dtype) if state is None else state
        keys = torch.cat([before.keys.to(k.dtype), k], 1)
        values = torch.cat([before.values.to(v.dtype), v], 1)
        marks = torch.cat([before.usable.long() - 1, document], 1)  # unusable: -1; before the first reset here: 0
        y = self._in_blocks(q, keys, values, document, marks)
        after = None
        if state is not None:
            last = slice(length, None)
            after = AttentionState(keys[:, last].clone(), values[:, last].clone(), marks[:, last] == document[:, -1:])
        return self.out_proj(y.reshape(batch, length, d_model)), after

    def _in_blocks(self, q: Tensor, keys: Tensor, values: Tensor, document: Tensor, marks: Tensor) -> Tensor:
        """Blocks of up to `window` queries, each with the keys that it may see: memory grows with the length only."""
        out = []
        for start in range(0, q.shape[1], self.window):
            stop = min(start + self.window, q.shape[1])
            seen = slice(start, stop + self.window - 1)  # of the keys, which begin window - 1 positions before
            count, offset = stop - start, self.window - 1
            ages = (
                torch.arange(count, device=q.device)[:, None] + offset - torch.arange(count + offset, device=q.device)
            )
            near = (ages >= 0) & (ages < self.window)
            same = document[:, start:stop, None] == marks[:, None, seen]
            block_q, block_k = rotate(q[:, start:stop], offset), rotate(keys[:, seen], 0)
            out.append(
                F.scaled_dot_product_attention(
                    block_q.transpose(1, 2),
                    block_k.transpose(1, 2),
                    values[:, seen].transpose(1, 2),
                    attn_mask=(near & same)[:, None],
                ).transpose(1, 2)
            )
        return torch.cat(out, 1)

    def step(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """One position: x (batch, d_model) -> y (batch, d_model) and the new state."""
        y, after = self.forward(x[:, None], state)
        assert after is not None
        return y[:, 0], after

    def allocate_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState:
        """The state before the first position: nothing to be seen."""
        weight = self.in_proj.weight
        shape = (batch, self.window - 1, self.heads, self.head_width)
        keys = torch.zeros(shape, device=device or weight.device, dtype=dtype or weight.dtype)
        usable = torch.zeros(batch, self.window - 1, device=keys.device, dtype=torch.bool)
        return AttentionState(keys, keys.clone(), usable)


def rotate(v: Tensor, first: int) -> Tensor:
    """Rotary positions first, first + 1, ... for v (batch, length, heads, width); wavelengths 2 pi to 2 pi 10^4."""
    half = v.shape[-1] // 2
    place = torch.arange(first, first + v.shape[1], device=v.device, dtype=torch.float32)
    turns = 10_000.0 ** -(torch.arange(half, device=v.device, dtype=torch.float32) / half)
    angles = (place[:, None] * turns)[:, None]  # (length, 1, half)
    wide = v.to(torch.promote_types(v.dtype, torch.float32))
    a, b = wide[..., :half], wide[..., half:]
    cos, sin = angles.cos().to(wide.dtype), angles.sin().to(wide.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(v.dtype)
