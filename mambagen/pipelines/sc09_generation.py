"""Clips of one second by a model, how likely it finds each, and its negative log-likelihood of real ones."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mambagen.data.audio_files import resample
from mambagen.data.spoken_words import DIGITS, RATE, SpokenWords
from mambagen.errors import UsageError
from mambagen.models.audio_stepper import Stepper
from mambagen.pipelines.audio_language_model import shifted
from mambagen.pipelines.sc09_metrics import BOOTSTRAP_DRAWS, Interval, bootstrap
from mambagen.pipelines.sound_models import open_sound_model

BITS = 1 / np.log(2)
AT_ONCE = {"cpu": 8, "cuda": 512}  # streams of generation
SCORED_AT_ONCE = {"cpu": 2, "cuda": 32}  # clips that go through the model whole


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    guidance: float = 1.0


@dataclass(frozen=True)
class Made:
    """Clips that a model made."""

    samples: NDArray[np.float32]  # (N, 16000) at 16 kHz
    asked: NDArray[np.int64]  # (N,) the digit that was asked for, -1 where the model cannot be asked
    log_likelihood: NDArray[np.float64]  # (N,) nats a sample, at temperature 1 and without guidance
    seconds: float  # that generating took


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of real clips, their own samples only."""

    nats: float  # a sample
    low: float  # 95 % of what clips drawn anew give
    high: float
    clips: int
    samples: int

    @classmethod
    def of(cls, nats: NDArray[np.float64], lengths: NDArray[np.int64]) -> "Likelihood":
        """Of sums in nats and samples, one a clip: their quotient, with the interval of drawing clips anew."""
        found = bootstrap(lambda rows: float(nats[rows].sum() / lengths[rows].sum()), len(nats), BOOTSTRAP_DRAWS, 0)
        return cls(found.value, found.low, found.high, len(nats), int(lengths.sum()))

    @property
    def bits(self) -> float:
        """Bits a sample."""
        return float(self.nats * BITS)

    @property
    def interval(self) -> Interval:
        """As the other figures have it."""
        return Interval(self.nats, self.low, self.high)


class Generator:
    """An audio model of a folder, ready to make clips and to judge how likely clips are."""

    def __init__(self, folder: Path | str, device: torch.device) -> None:
        """Raises ModelError where the folder is no audio model."""
        self.model, self.quantiser, guidance = open_sound_model(folder, device)
        self.device = device
        names = self.quantiser.classes
        self.digits = [names.index(digit) for digit in DIGITS if digit in names]  # the model's class of each digit
        self.conditional = len(self.digits) == len(DIGITS)
        self.guidance = guidance if self.conditional else 1.0
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def make(self, count: int, seed: int, sampling: Sampling, done: Callable[[int], None] | None = None) -> Made:
        """Clips, each a function of its number and the seed; a conditional model is asked for all digits in turn."""
        if sampling.guidance != 1 and not self.conditional:
            raise UsageError("--guidance needs a model that was trained on the digits' names")
        rate = self.quantiser.rate
        asked = np.arange(count) % len(DIGITS) if self.conditional else np.full(count, -1)
        began = time.monotonic()
        drawn: list[Tensor] = []
        for at in range(0, count, AT_ONCE[self.device.type]):
            rows = range(at, min(at + AT_ONCE[self.device.type], count))
            stepper = Stepper(self.model, batch=len(rows))
            if self.conditional:
                stepper.prefill(classes=[self.digits[asked[row]] for row in rows])
            drawn.append(
                stepper.generate(
                    rate,
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                    seeds=[seed * 1_000_003 + row for row in rows],
                    guidance=sampling.guidance,
                ).cpu()
            )
            if done is not None:
                done(rows.stop)
        seconds = time.monotonic() - began
        tokens = torch.cat(drawn).numpy()
        samples = np.stack([resample(self.quantiser.decode(row), rate, RATE) for row in tokens])
        classes = np.array([self.digits[digit] for digit in asked]) if self.conditional else None
        lengths = np.full(count, tokens.shape[1])
        return Made(samples, asked, self.log_likelihoods(tokens, lengths, classes) / tokens.shape[1], seconds)

    def likelihood(
        self, clips: SpokenWords, limit: int | None = None, done: Callable[[int], None] | None = None
    ) -> Likelihood:
        """NLL of the clips' first seconds; what is silence put after a short clip does not count.

        Args:
            limit: use so many, evenly spread.
        """
        rows = np.arange(len(clips)) if limit is None else np.unique(np.linspace(0, len(clips) - 1, limit).astype(int))
        rate = self.quantiser.rate
        nats: list[NDArray[np.float64]] = []
        samples: list[NDArray[np.int64]] = []
        step = SCORED_AT_ONCE[self.device.type]
        for at in range(0, len(rows), step):
            chosen = rows[at : at + step]
            sounds = [resample(clips.clip(int(row)), RATE, rate)[:rate] for row in chosen]
            lengths = np.array([len(sound) for sound in sounds])
            tokens = np.full((len(sounds), int(lengths.max())), 128, np.uint8)
            for i, sound in enumerate(sounds):
                tokens[i, : len(sound)] = self.quantiser.encode(sound)
            classes = None
            if self.conditional:
                classes = np.array([self.digits[DIGITS.index(clips.labels[int(row)])] for row in chosen])
            nats.append(-self.log_likelihoods(tokens, lengths, classes))
            samples.append(lengths)
            if done is not None:
                done(at + len(chosen))
        return Likelihood.of(np.concatenate(nats), np.concatenate(samples))

    @torch.no_grad()
    def log_likelihoods(
        self, tokens: NDArray[np.uint8], lengths: NDArray[np.int64], classes: NDArray[np.int64] | None
    ) -> NDArray[np.float64]:
        """(N,) sums of the log-probabilities in nats of each row's first `lengths` tokens, of tokens (N, length)."""
        step = SCORED_AT_ONCE[self.device.type]
        found = []
        for at in range(0, len(tokens), step):
            part = torch.from_numpy(tokens[at : at + step]).to(self.device)
            asked = None if classes is None else torch.from_numpy(classes[at : at + step]).to(self.device)
            logits, _ = self.model(shifted(part), classes=asked)
            nats = F.cross_entropy(logits.flatten(0, 1).float(), part.long().flatten(), reduction="none")
            counted = torch.arange(part.shape[1]) < torch.from_numpy(lengths[at : at + step])[:, None]
            found.append(-(nats.view(part.shape).double().cpu() * counted).sum(1))
        return torch.cat(found).numpy()
