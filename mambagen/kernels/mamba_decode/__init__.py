"""Stepping a whole Mamba language model token by token: all layers, and the drawing of tokens, in one compiled loop.

    decoder = make_decoder(weights, batch=4)              # packs the weights once
    decoder.load_state(conv, ssm)                         # or begin with zeros
    decoder.read(tokens)                                  # (batch, steps) given tokens -> logits after each
    decoder.draw(1000, Sampling(temperature=0.8), ...)    # -> (batch, 1000) tokens

Backends: "cuda" (one launch on thread-block clusters, NVIDIA compute capability 9.0 and newer), "graph" (a CUDA graph
of plain torch operations, any GPU), "cpu" (numba), "reference" (plain torch, any device and dtype). README.md derives
them. Nothing here knows of models: weights are plain tensors.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "BACKENDS",
    "Decoder",
    "LayerWeights",
    "Sampling",
    "StackWeights",
    "choose_backend",
    "make_decoder",
    "why_not",
]

BACKENDS = ("auto", "cuda", "graph", "cpu", "reference")


class LayerWeights(NamedTuple):
    """One layer, in the order of its use; D, E, N, R: d_model, d_inner, d_state, rank of dt."""

    norm: Tensor  # (D,)
    in_proj: Tensor  # (2E, D)
    conv_weight: Tensor  # (E, d_conv)
    conv_bias: Tensor  # (E,)
    x_proj: Tensor  # (R + 2N, E)
    dt_proj: Tensor  # (E, R)
    dt_bias: Tensor  # (E,)
    A_log: Tensor  # (E, N)
    D: Tensor  # (E,)
    out_proj: Tensor  # (D, E)


class StackWeights(NamedTuple):
    """A language model: embedding, layers, last norm, head."""

    embedding: Tensor  # (vocabulary, D)
    layers: Sequence[LayerWeights]
    norm_f: Tensor  # (D,)
    head: Tensor  # (vocabulary, D)
    epsilon: float  # of all norms


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    The random number of a token is a function of (seed, stream, position) alone: Philox4x32-10, its key the seed.
    So a stream's tokens do not depend on its neighbours in the batch or on how a run is cut into calls.
    """

    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int | None = None  # draw from the k likeliest
    top_p: float = 1.0  # draw from the fewest that together have this probability, after temperature and top_k
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} is no number of 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} is less than 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is outside (0, 1]")

    @property
    def inverse_temperature(self) -> float:
        """1 / temperature within float32; 0 stands for the likeliest token."""
        return 0.0 if self.temperature == 0 else min(1 / max(self.temperature, 1e-38), 3e38)


class Decoder(Protocol):
    """What every backend offers; it holds the state of `batch` streams and the logits of their next tokens."""

    @property
    def logits(self) -> Tensor:
        """(batch, vocabulary) float32, of the next token; may be written to."""
        ...

    def read(self, tokens: Tensor) -> Tensor:
        """Given tokens (batch, steps), the logits after each, (batch, steps, vocabulary) float32."""
        ...

    def draw(self, steps: int, sampling: Sampling, bias: Tensor, position: int, streams: Tensor) -> Tensor:
        """Draw a token from the logits, step on with it, and so on: (batch, steps) int64.

        Args:
            steps: how many, 1 at least.
            sampling: how.
            bias: (vocabulary,) float32: 0, or -inf for ids that may not be drawn.
            position: tokens that the streams have seen: numbers the random draws.
            streams: (batch,) int64 below 2^32: the streams' names, for the same purpose.
        """
        ...

    def load_state(self, conv: Sequence[Tensor], ssm: Sequence[Tensor]) -> None:
        """Per layer the convolution's last inputs (batch, d_conv - 1, E), oldest first, and h (batch, E, N)."""
        ...

    def state(self) -> tuple[list[Tensor], list[Tensor]]:
        """The same, as copies in float32."""
        ...


def make_decoder(weights: StackWeights, batch: int = 1, backend: str = "auto", precision: str = "bfloat16") -> Decoder:
    """A decoder for `batch` streams on the device of the weights, with its state at zero.

    Args:
        weights: float32, bfloat16 or float16 (the reference: any real dtype, and it computes in it).
        batch: how many streams.
        backend: one of `BACKENDS`; "auto" takes the fastest that can run here.
        precision: of the weights in the "cuda" backend: "bfloat16", or "float32" (kept as two bfloat16, about 17
            significant bits; half the speed). Activations, sums and state are in float32 in both.

    Raises:
        ValueError: an unknown name, or the backend cannot run this model here (the message says why).
    """
    if batch < 1:
        raise ValueError(f"batch {batch} is less than 1")
    if precision not in ("bfloat16", "float32"):
        raise ValueError(f"precision {precision!r} is neither 'bfloat16' nor 'float32'")
    backend = choose_backend(weights, backend)
    if backend == "cuda":
        from mambagen.kernels.mamba_decode.cuda import CudaDecoder

        return CudaDecoder(weights, batch, precision)
    if backend == "cpu":
        from mambagen.kernels.mamba_decode.cpu import CpuDecoder

        return CpuDecoder(weights, batch)
    from mambagen.kernels.mamba_decode.reference import GraphDecoder, ReferenceDecoder

    return GraphDecoder(weights, batch) if backend == "graph" else ReferenceDecoder(weights, batch)


def choose_backend(weights: StackWeights, backend: str = "auto") -> str:
    """The backend that runs; ValueError where the one that was asked for cannot."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "auto":
        order = ("cuda", "graph") if weights.embedding.is_cuda else ("cpu",)
        return next((name for name in order if why_not(name, weights) is None), "reference")
    reason = why_not(backend, weights)
    if reason:
        raise ValueError(f"the backend {backend!r} cannot run this: {reason}")
    return backend


def why_not(backend: str, weights: StackWeights) -> str | None:
    """Why a backend cannot run these weights here, or None."""
    if backend == "reference":
        return None
    device = weights.embedding.device
    if backend == "graph":
        return None if device.type == "cuda" else f"the weights are on {device}"
    if device.type != backend:
        return f"the weights are on {device}"
    if weights.embedding.dtype == torch.float64:
        return "float64 runs on the reference only"
    try:
        module = importlib.import_module(f"mambagen.kernels.mamba_decode.{backend}")
    except ImportError as error:
        return f"it cannot be imported here ({error})"
    reason: str | None = module.unsupported(weights)
    return reason
