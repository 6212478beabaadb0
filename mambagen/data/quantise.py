"""Sound as 256 tokens and back: mu-law as torchaudio has it, linear, and SaShiMi's min-max.

    quantiser = MuLaw(256)
    tokens = quantiser.encode(samples)       # float in [-1, 1] -> uint8
    samples = quantiser.decode(tokens)       # uint8 -> float32

Token 128 stands for silence, and is the input in front of a clip's first sample.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from torch import Tensor

SILENCE = 128
LEVELS = 256


class Quantiser(BaseModel, ABC):
    """What sound becomes before a model sees it; `model_dump()` is what a model's config.json keeps, as "quantiser"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    levels: Annotated[int, Field(ge=LEVELS, le=LEVELS)] = LEVELS
    rate: Annotated[int, Field(ge=1)] = 16_000  # samples a second of the sound that a model was trained on
    classes: tuple[str, ...] = ()  # names of a conditional model's classes, in the order of its embedding

    def __init__(self, levels: int = LEVELS, **fields: Any) -> None:
        super().__init__(levels=levels, **fields)

    @abstractmethod
    def encode(self, samples: ArrayLike) -> NDArray[np.uint8]:
        """Tokens (n,) of samples (n,); what is outside [-1, 1] is taken for the nearest end, NaN is the caller's."""

    @cached_property
    @abstractmethod
    def table(self) -> NDArray[np.float32]:
        """(256,) the sample that each token stands for."""

    def decode(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """Samples, float32 in [-1, 1], of tokens of any shape."""
        return self.table[np.asarray(tokens, dtype=np.uint8)]

    @cached_property
    def edges(self) -> NDArray[np.float32]:
        """(257,) where each token's share of [-1, 1] begins and ends: token k is that of edges[k] <= x < edges[k+1]."""
        low, high = np.full(LEVELS - 1, -1.0), np.full(LEVELS - 1, 1.0)
        for _ in range(40):  # the smallest sample that a token k or more is given to, by halving
            middle = (low + high) / 2
            reached = self.encode(middle) >= np.arange(1, LEVELS)
            low, high = np.where(reached, low, middle), np.where(reached, middle, high)
        return np.concatenate(([-1.0], high, [1.0])).astype(np.float32)


class MuLaw(Quantiser):
    """Mu-law with mu = 255, as `torchaudio.functional.mu_law_encoding` and `mu_law_decoding`, bit for bit.

    Round trips keep all 256 tokens. About 38 dB of signal to noise whatever the loudness.
    """

    kind: Literal["mu-law"] = "mu-law"

    def encode(self, samples: ArrayLike) -> NDArray[np.uint8]:
        x = _float32(samples).clamp(-1.0, 1.0)
        mu = torch.tensor(self.levels - 1.0)
        companded = torch.sign(x) * torch.log1p(mu * torch.abs(x)) / torch.log1p(mu)
        return ((companded + 1) / 2 * mu + 0.5).to(torch.uint8).numpy()

    @cached_property
    def table(self) -> NDArray[np.float32]:
        mu = torch.tensor(self.levels - 1.0)
        x = torch.arange(self.levels).float() / mu * 2 - 1.0
        return (torch.sign(x) * (torch.exp(torch.abs(x) * torch.log1p(mu)) - 1.0) / mu).numpy()


class Linear(Quantiser):
    """Steps of equal size, 2 / 255; quiet sound keeps fewer of them than with mu-law."""

    kind: Literal["linear"] = "linear"

    def encode(self, samples: ArrayLike) -> NDArray[np.uint8]:
        x = _float32(samples).clamp(-1.0, 1.0)
        return ((x + 1) / 2 * (self.levels - 1) + 0.5).to(torch.uint8).numpy()

    @cached_property
    def table(self) -> NDArray[np.float32]:
        return (np.arange(self.levels, dtype=np.float32) / (self.levels - 1) * 2 - 1).astype(np.float32)


class MinMax(Quantiser):
    """SaShiMi's quantiser, for figures that are to be compared with its own: each clip is stretched to [-1, 1] first.

    The formulas are those of its published code, mu-law by default and linear on request, in which the encoder and the
    decoder do not quite belong together: 256 - 0.01 levels go in, and token q comes out at q / 128 - 1. The loudness
    and the offset of a clip are lost, and so a prompt does not come back as loud as it was: not for new models.
    """

    kind: Literal["min-max"] = "min-max"
    companding: Literal["mu-law", "linear"] = "mu-law"

    def encode(self, samples: ArrayLike) -> NDArray[np.uint8]:
        x = _float32(samples)
        if not x.numel():
            return np.zeros(0, np.uint8)
        low, high = x.amin(), x.amax()
        if self.companding == "linear":
            share = (x - low) / (high - low + 1e-6)
        else:
            mu = torch.tensor(self.levels - 1)
            x = -1 + 2 * (x - low) / (high - low + 1e-6)
            companded = torch.sign(x) * (torch.log1p(mu * torch.abs(x + 1e-8)) / torch.log1p(mu))
            share = (companded + 1) / 2
        return (share * (self.levels - 0.01) + 0.005).to(torch.uint8).numpy()

    @cached_property
    def table(self) -> NDArray[np.float32]:
        x = torch.arange(self.levels).float() / (self.levels / 2) - 1
        if self.companding == "mu-law":
            mu = self.levels - 1
            x = torch.sign(x) * ((1 + mu) ** torch.abs(x) - 1) / mu
        return x.numpy()

    @cached_property
    def edges(self) -> NDArray[np.float32]:
        return np.concatenate(([-1.0], (self.table[1:] + self.table[:-1]) / 2, [1.0])).astype(np.float32)


AnyQuantiser = Annotated[MuLaw | Linear | MinMax, Field(discriminator="kind")]
QUANTISERS: dict[str, type[Quantiser]] = {"mu-law": MuLaw, "linear": Linear, "min-max": MinMax}


def load_quantiser(fields: dict[str, Any]) -> Quantiser:
    """The quantiser of what `model_dump()` gave; pydantic's ValidationError where it is none."""
    quantiser: Quantiser = TypeAdapter(AnyQuantiser).validate_python(fields)
    return quantiser


def _float32(samples: ArrayLike) -> Tensor:
    return torch.from_numpy(np.array(samples, dtype=np.float32))  # a copy: arrays from maps may be read only
