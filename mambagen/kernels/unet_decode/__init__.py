"""Stepping a whole audio U-Net of Mamba layers sample by sample, the drawing of samples inside.

    decoder = make_decoder(weights, batch=4)          # packs the weights once
    decoder.load_state(state)                         # or begin before the first token
    decoder.read(tokens)                              # (batch, steps) given tokens -> logits after each
    decoder.draw(16_000, Sampling(temperature=0.9), seeds)

Level 0 runs at every step, level 1 when `pool` frames of level 0 are full, and so on. A level's frame reads what the
level below left in a queue when its own last frame was full, so within a step the levels run one after another from
the outermost inwards, and the logits are there before the deep levels begin.

Backends: "cuda" (one launch, a block a stream, NVIDIA compute capability 9.0 and newer), "graph" (CUDA graphs of plain
torch operations, any GPU), "cpu" (numba: one compiled loop over samples and layers), "reference" (plain torch, any
device and dtype). README.md says how they are made. Nothing here knows of models: weights are plain tensors.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mambagen.kernels.mamba_decode import LayerWeights, Sampling

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "Decoder",
    "DecoderState",
    "LayerWeights",
    "LevelWeights",
    "Sampling",
    "UNetWeights",
    "choose_backend",
    "make_decoder",
    "why_not",
]

BACKENDS = ("auto", "cuda", "graph", "cpu", "reference")
PRECISIONS = ("bfloat16", "float32")


class LevelWeights(NamedTuple):
    """A level above the centre, H channels wide, and the way to the next of H' channels and back."""

    down: Sequence[LayerWeights]  # before the DownPool; may be empty
    up: Sequence[LayerWeights]  # after the UpPool; as many as `down` where there are any
    pool: int
    down_weight: Tensor  # (H', pool * H)
    down_bias: Tensor  # (H',)
    up_weight: Tensor  # (pool * H, H')
    up_bias: Tensor  # (pool * H,)


class UNetWeights(NamedTuple):
    """Embedding, levels from the outermost inwards, centre, last norm, head."""

    embedding: Tensor  # (vocabulary, D)
    levels: Sequence[LevelWeights]
    centre: Sequence[LayerWeights]
    norm_f: Tensor  # (D,)
    head: Tensor  # (vocabulary, D)
    head_bias: Tensor  # (vocabulary,)
    epsilon: float  # of all norms

    @property
    def groups(self) -> list[list[LayerWeights]]:
        """The layers of each level in the order in which they run, the centre's last."""
        return [*([*level.down, *level.up] for level in self.levels), list(self.centre)]

    @property
    def widths(self) -> list[int]:
        """Channels of each level, the centre's last."""
        return [self.embedding.shape[1], *(level.down_weight.shape[0] for level in self.levels)]

    @property
    def condition_sizes(self) -> list[int]:
        """Channels of a condition's vectors: one where each level begins, then one on each way up."""
        return self.widths + self.widths[:-1]

    @property
    def cycle(self) -> int:
        """Steps after which the deepest level has run once."""
        return math.prod(level.pool for level in self.levels)


class DecoderState(NamedTuple):
    """What is carried from step to step, float32; layers in the order of `UNetWeights.groups`, one after another."""

    position: int  # tokens that were read
    conv: list[Tensor]  # a layer: (batch, d_conv - 1, E), oldest first
    ssm: list[Tensor]  # a layer: (batch, E, N)
    buffers: list[Tensor]  # a level: (batch, pool, H), of which the frames that have gone by count
    queues: list[Tensor]  # a level: (batch, pool, H), of which the frames that are to come count


class Decoder(Protocol):
    """What every backend offers; it holds the state of `batch` streams and the logits of their next tokens."""

    @property
    def logits(self) -> Tensor:
        """(batch, vocabulary) float32, of the next token; may be written to."""
        ...

    def condition(self, vectors: Tensor) -> None:
        """(batch, sum(condition_sizes)): what is added to the residual stream from now on (zeros at first).

        The vectors of `UNetWeights.condition_sizes`, one after another: a level's first is added to a token's embedding
        or to what the DownPool gives, its second, on the way up, to the frame and what the UpPool left for it.
        """
        ...

    def read(self, tokens: Tensor) -> Tensor:
        """Given tokens (batch, steps), the logits after each, (batch, steps, vocabulary) float32."""
        ...

    def draw(self, steps: int, sampling: Sampling, seeds: Tensor, guidance: float | None = None) -> Tensor:
        """Draw a token from the logits, step on with it, and so on: (batch, steps) int64.

        Args:
            steps: how many, 1 at least.
            sampling: how; its own seed is not used.
            seeds: (batch,) int64. A token is a function of its stream's logits, seed and position alone.
            guidance: where given, streams 2i and 2i + 1 are a pair that reads the same tokens, drawn from
                logits[2i + 1] + guidance * (logits[2i] - logits[2i + 1]) with the seed of 2i.
        """
        ...

    def load_state(self, state: DecoderState) -> None: ...

    def state(self) -> DecoderState:
        """A copy."""
        ...


def make_decoder(weights: UNetWeights, batch: int = 1, backend: str = "auto", precision: str = "bfloat16") -> Decoder:
    """A decoder for `batch` streams on the device of the weights, before the first token.

    Args:
        weights: float32, bfloat16 or float16 (the reference: any real dtype, and it computes in it).
        batch: how many streams.
        backend: one of `BACKENDS`; "auto" takes the fastest that can run here.
        precision: of the matrices in the "cpu" and "graph" backends ("cuda" has bfloat16 only); activations, sums and
            state are float32.

    Raises:
        ValueError: an unknown name, or the backend cannot run this here.
    """
    if batch < 1:
        raise ValueError(f"batch {batch} is less than 1")
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    backend = choose_backend(weights, backend, precision)
    if backend == "cuda":
        from mambagen.kernels.unet_decode.cuda import CudaDecoder

        return CudaDecoder(weights, batch)
    if backend == "cpu":
        from mambagen.kernels.unet_decode.cpu import CpuDecoder

        return CpuDecoder(weights, batch, precision)
    if backend == "graph":
        from mambagen.kernels.unet_decode.graph import GraphDecoder

        return GraphDecoder(weights, batch, precision)
    from mambagen.kernels.unet_decode.reference import ReferenceDecoder

    return ReferenceDecoder(weights, batch)


def choose_backend(weights: UNetWeights, backend: str = "auto", precision: str = "bfloat16") -> str:
    """The backend that runs; ValueError where the one that was asked for cannot."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "auto":
        order = ("cuda", "graph") if weights.embedding.is_cuda else ("cpu",)
        return next((name for name in order if why_not(name, weights, precision) is None), "reference")
    reason = why_not(backend, weights, precision)
    if reason:
        raise ValueError(f"the backend {backend!r} cannot run this: {reason}")
    return backend


def why_not(backend: str, weights: UNetWeights, precision: str = "bfloat16") -> str | None:
    """Why a backend cannot run these weights here, or None."""
    if backend == "reference":
        return None
    device, needed = weights.embedding.device.type, "cpu" if backend == "cpu" else "cuda"
    if device != needed:
        return f"the weights are on {device}"
    if weights.embedding.dtype == torch.float64:
        return "float64 runs on the reference only"
    if backend == "cuda":
        if precision != "bfloat16":
            return "its matrices are in bfloat16"
        from mambagen.kernels.unet_decode.cuda import unsupported

        return unsupported(weights)
    return None
