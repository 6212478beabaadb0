"""Telling species apart: the job as the training loop sees it, and records of any length put to a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.record_windows import RecordWindow, RecordWindows
from mambagen.data.species_windows import MOST_UNKNOWN, STREAM, DrawnWindows, SpeciesSampler
from mambagen.models.files import Writer
from mambagen.models.saving import model_writers, save_model
from mambagen.models.species_classifier import SpeciesClassifier
from mambagen.pipelines.length_warmup import Stage
from mambagen.pipelines.sequence_classification import Best, classification_loss, figures_of, padded, predict
from mambagen.training.batches import Batch


@dataclass(frozen=True)
class LengthPlan:
    """How long the windows of a step are, as a function of (seed, step).

    The longest of a step is `longest`, or that of its stage (see `length_stages`). With `shortest` a step's windows are
    the longest, half of it, a quarter ... down to `shortest`, each as likely.
    """

    longest: int
    shortest: int | None = None
    stages: tuple[Stage, ...] = ()

    def at(self, step: int, seed: int) -> int:
        """Bases in a window of this step."""
        choices = self.choices(self.limit(step))
        if len(choices) == 1:
            return choices[0]
        word = int(np.random.Philox(key=[seed, step], counter=[0, 0, 2, STREAM]).random_raw())
        return choices[word % len(choices)]

    def limit(self, step: int) -> int:
        """The longest of this step."""
        return next((stage.context for stage in self.stages if step < stage.end), self.longest)

    def choices(self, limit: int) -> list[int]:
        """The lengths that a step may have."""
        lengths = [limit]
        while self.shortest is not None and lengths[-1] // 2 >= self.shortest:
            lengths.append(lengths[-1] // 2)
        return lengths

    def all(self) -> list[int]:
        """Every length that a run may meet, from the shortest."""
        limits = {self.longest, *(stage.context for stage in self.stages)}
        return sorted({length for limit in limits for length in self.choices(limit)})


class SpeciesTask:
    """Batches of windows, cross entropy, figures on fixed windows; a `mambagen.training.batches.Task`.

    A step has about `batch_tokens` bases: fewer windows where they are longer. The model with the best mean accuracy
    over the validation lengths (then the lowest loss) is kept in the folder `best`.
    """

    def __init__(
        self,
        sampler: SpeciesSampler,
        plan: LengthPlan,
        batch_tokens: int,
        valid: Sequence[DrawnWindows],
        tokenizer: DnaTokenizer,
        patience: int,
        identity: Mapping[str, Any],
        card: Callable[[SpeciesClassifier, str], str],
        best: Path,
        tokens_at_once: int,
        shuffled: bool = False,
        history: Sequence[tuple[float, float]] = (),
    ) -> None:
        """`card(model, quality)` is the text of the model's README. `shuffled` trains on labels that mean nothing."""
        self.sampler, self.plan, self.batch_tokens = sampler, plan, batch_tokens
        self.valid, self.tokenizer, self.identity = valid, tokenizer, dict(identity)
        self.card, self.best, self.tokens_at_once, self.shuffled = card, best, tokens_at_once, shuffled
        self.tokens_per_step = batch_tokens
        self.quick_tokens = sum(len(windows) * windows.length for windows in valid)
        self.quality = "not measured yet"
        self._best = Best(patience, history)
        self._sequences = [windows.sequences() for windows in valid]

    @property
    def done(self) -> bool:
        """Whether more training is not expected to help."""
        return self._best.done

    def batch(self, step: int) -> Batch:
        """The windows of a step; those that hold unknown bases are shorter, and padded.

        Every batch has a mask, for a graph that was recorded with one must not be used without.
        """
        length = self.plan.at(step, self.sampler.seed)
        drawn = self.sampler.draw(step, length, max(1, self.batch_tokens // length))
        labels = drawn.label
        if self.shuffled:
            words = np.random.Philox(key=[self.sampler.seed, step], counter=[0, 0, 3, STREAM]).random_raw(len(labels))
            labels = (words % np.uint64(len(self.sampler.names))).astype(np.int64)
        tensors = padded(drawn.sequences(), always_mask=True) | {"labels": torch.from_numpy(labels)}
        return Batch(tensors, len(drawn), drawn.where())

    def stage(self, step: int) -> int:
        """Which length warmup has come to."""
        return self.plan.limit(step)

    def loss(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        """Sum of the cross entropy in nats over the windows."""
        return classification_loss(model, tensors)

    def evaluate(self, model: nn.Module, quick: bool) -> dict[str, float]:
        """Means over the lengths, and the accuracy at each; a model better than those before is written to `best`."""
        assert isinstance(model, SpeciesClassifier)
        found: dict[str, float] = {}
        figures = []
        for windows, sequences in zip(self.valid, self._sequences, strict=True):
            if len(windows):
                one = figures_of(predict(model, sequences, self.tokens_at_once), windows.label)
                figures.append(one)
                found[f"accuracy_{windows.length}"] = one.accuracy
        if not figures:
            return {}
        mean = {
            name: float(np.mean([one.numbers()[name] for one in figures])) for name in ("loss", "accuracy", "f1", "mcc")
        }
        self.quality = f"Accuracy {mean['accuracy']:.4f} on validation windows, the mean over their lengths."
        if self._best.note(mean["accuracy"], mean["loss"]):
            tokenizer = self.tokenizer.model_dump(mode="json")
            save_model(model, self.best, tokenizer, self.card(model, self.quality), replace=True)
        return mean | found

    def model_files(self, model: nn.Module) -> dict[str, Writer]:
        """The files of the model folder."""
        assert isinstance(model, SpeciesClassifier)
        tokenizer = self.tokenizer.model_dump(mode="json")
        return dict(model_writers(model, tokenizer, self.card(model, self.quality)))


@dataclass(frozen=True)
class Answers:
    """What a model says of records, before calibration: means of its windows' log-probabilities."""

    mean: NDArray[np.float64]  # (records, classes), weighted by known bases
    bases: NDArray[np.float64]  # (records,) known bases that were read
    label: NDArray[np.int64]  # (records,)

    @staticmethod
    def joined(parts: Sequence["Answers"]) -> "Answers":
        """Several as one."""
        columns = [np.concatenate([getattr(part, name) for part in parts]) for name in ("mean", "bases", "label")]
        return Answers(*columns)


def ask(model: SpeciesClassifier, records: DrawnWindows, tokens_at_once: int, at_most: int | None = None) -> Answers:
    """Put each row to the model as `classify-species` does a record: in windows, of which `at_most` are read."""
    count = len(records)
    total = np.zeros((count, len(model.classes)))
    bases = np.zeros(count)
    waiting: list[tuple[int, RecordWindow]] = []
    held = 0

    def run() -> None:
        chances = predict(model, [window.known for _, window in waiting], tokens_at_once)
        for (row, window), values in zip(waiting, chances, strict=True):
            total[row] += values * len(window.known)
            bases[row] += len(window.known)
        waiting.clear()

    for row in range(count):
        cut = RecordWindows(model.config.window, at_most, MOST_UNKNOWN)
        for window in (*cut.feed(records.tokens(row)), *cut.finish()):
            waiting.append((row, window))
            held += len(window.known)
        if held >= 1 << 24:
            run()
            held = 0
    if waiting:
        run()
    return Answers(total / np.maximum(bases, 1)[:, None], bases, records.label)
