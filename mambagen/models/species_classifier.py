"""A classifier of species: an encoder over bases or over patches of k-mers, calibrated by length.

Bases of one genome are not independent: the sum of the log-probabilities of a record's windows is far too sure, their
mean not sure enough. What a record is said to be is

    log p  =  log_softmax( scale * mean )        mean: of the windows' log-probabilities, by their known bases
    scale  =  (1 / temperature) * (bases / window) ** e        e: `across` where bases > window, else `within`

with the known bases that were read. Temperature and exponents are fitted on validation sequence of many lengths: an
exponent `across` of 1 would be independent windows, 0 copies of one window.
"""

import math
from typing import Annotated, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from mambagen.models.bimamba import BimambaEncoder, borders
from mambagen.models.heads import ClassifierConfig, SequenceClassifier, pool, seeded

FIRST_BASE = 7  # the ids of A, C, G and T are 7 to 10, as HyenaDNA has them

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Calibration(BaseModel):
    """How log-probabilities of windows become those of a record; see the formula above."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    within: Finite = 0.0
    across: Finite = 0.5

    def scale(self, bases: NDArray[np.float64], window: int) -> NDArray[np.float64]:
        """(records,) factors for so many known bases, at least one."""
        share = np.asarray(bases, dtype=np.float64) / window
        return np.power(share, np.where(share > 1, self.across, self.within)) / self.temperature

    def log_probabilities(
        self, mean: NDArray[np.float64], bases: NDArray[np.float64], window: int
    ) -> NDArray[np.float64]:
        """(records, classes) of mean window log-probabilities (records, classes) and known bases (records,)."""
        scaled = mean * self.scale(bases, window)[:, None]
        scaled = scaled - scaled.max(1, keepdims=True)
        result: NDArray[np.float64] = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
        return result


class SpeciesConfig(ClassifierConfig):
    """A `ClassifierConfig` with the length of its windows and its calibration.

    With `patch` above 1 the encoder, a bimamba, reads one position a patch: the mean of the vectors that a table has
    for the k-mers in it. A k-mer and its reverse complement share one. A model that did nothing more would be a
    logistic regression on k-mer frequencies, so training begins with what those tell; and a patch costs what a base
    would.
    """

    window: Annotated[int, Field(ge=16)] = 4096  # bases; longer records are cut into windows
    calibration: Calibration = Calibration()
    patch: Annotated[int, Field(ge=1)] = 1
    k: Annotated[int, Field(ge=1, le=8)] = 6  # of the k-mers that a patch is made of

    @model_validator(mode="after")
    def _patches_fit(self) -> Self:
        if self.patch > 1 and self.encoder != "bimamba":
            raise ValueError(f"patches are read by a bimamba, not by {self.encoder}")
        return self

    @property
    def description(self) -> str:
        """For a model card."""
        stem = f"{self.k}-mers over patches of {self.patch}; "
        return (stem if self.patch > 1 else "") + f"{super().description}; windows of {self.window:,} bases"


class PatchStem(nn.Module):
    """Bases to one vector a patch: the mean of a table's rows, one for each k-mer and its reverse complement."""

    def __init__(self, config: SpeciesConfig) -> None:
        super().__init__()
        self.patch, self.k = config.patch, config.k
        rows, count = canonical_kmers(config.k)
        self.rows: Tensor
        self.register_buffer("rows", rows, persistent=False)
        self.none = count  # the row of no k-mer, which is in no mean
        self.table = nn.Embedding(count + 1, config.shape.d_model, padding_idx=count)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(batch, length) ids, real positions first -> (batch, patches, d_model) float32, and which patches are real.

        A k-mer belongs to the patch of its first base; one that would reach over the end is none.
        """
        batch, length = tokens.shape
        patches = -(-length // self.patch)
        places = patches * self.patch  # where k-mers begin
        base = F.pad((tokens.int() - FIRST_BASE).clamp(0, 3), (0, places + self.k - 1 - length))
        code = torch.zeros((batch, places), dtype=torch.int32, device=tokens.device)
        for offset in range(self.k):
            code = code * 4 + base[:, offset : offset + places]
        last = length if mask is None else mask.sum(1, keepdim=True)
        whole = torch.arange(self.k - 1, self.k - 1 + places, device=tokens.device).expand(batch, -1) < last
        rows = torch.where(whole, self.rows[code], self.none).view(batch * patches, self.patch)
        mean = F.embedding_bag(rows, self.table.weight, mode="mean", padding_idx=self.none)
        real = None
        if mask is not None:
            real = torch.arange(0, places, self.patch, device=tokens.device) < last
        return mean.view(batch, patches, -1).float() * math.sqrt(self.patch), real


def canonical_kmers(k: int) -> tuple[Tensor, int]:
    """(4^k,) int64 row of each k-mer, AA..A first, and how many: a k-mer and its reverse complement share one."""
    code = torch.arange(4**k)
    other = torch.zeros_like(code)
    for place in range(k):
        other = other * 4 + 3 - (code >> (2 * place)) % 4
    lower = torch.minimum(code, other)
    kept, rows = torch.unique(lower, return_inverse=True)
    return rows, len(kept)


class SpeciesClassifier(SequenceClassifier):
    """Species of windows of DNA; `config.calibration` says how those of a record are joined."""

    kind = "species-classifier"
    config: SpeciesConfig

    def __init__(self, config: SpeciesConfig, seed: int | None = None) -> None:
        with seeded(seed):
            super().__init__(config)
            self.stem = PatchStem(config) if config.patch > 1 else None
        if self.stem is not None:
            self.trunk.embedding.weight.requires_grad_(False)  # nothing reads it

    def pooled(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The vector (batch, d_model) of each window on this strand; real positions stand first."""
        if self.stem is None:
            return super().pooled(tokens, mask)
        assert isinstance(self.encoder, BimambaEncoder)
        x, real = self.stem(tokens, mask)
        resets = None if real is None else borders(real)
        for layer in self.encoder.layers:
            x = layer(x, resets)
        return pool(self.encoder.norm_f(x), real, self.pooling)

    def calibrated(self, calibration: Calibration) -> None:
        """Take over another calibration."""
        self.config = self.config.model_copy(update={"calibration": calibration})
