"""Training the judge: labelled words as the training loop sees them, and the figures of a judge."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mambagen.data.augmentation import Augmentation
from mambagen.data.mel import LogMel, MelSettings
from mambagen.data.spoken_words import DIGITS, SECOND, SILENCE, SpokenWords
from mambagen.models.digit_classifier import DigitClassifier
from mambagen.models.files import Writer
from mambagen.models.saving import model_writers, save_model
from mambagen.pipelines.sc09_judge import input_policy
from mambagen.pipelines.sequence_classification import Figures, figures_of
from mambagen.training.batches import Batch

STREAM = 4  # of Philox's counter; 0 to 3 are those of windows, masks and labelled sequences
WIDEST_MASK = (6, 5)  # mels and frames that one mask of a picture covers at most
MASKS = 2  # of each kind
MADE_NOISE = 0.5  # share of the clips without a word that are made here
EVALUATION_BATCH = 256


class DigitTask:
    """Batches of changed clips, cross entropy, figures on validation; a `mambagen.training.batches.Task`.

    The clips of a step are a function of (seed, step): drawn with `weights`, changed by `augmentation`, placed within
    a second. The best model (by the loss over validation digits) is kept in the folder `best`, and `done` says that
    `patience` evaluations in a row brought no better one.
    """

    def __init__(
        self,
        train: SpokenWords,
        valid: SpokenWords,
        classes: Sequence[str],
        settings: MelSettings,
        rows: int,
        seed: int,
        augmentation: Augmentation,
        masks: float,
        smoothing: float,
        digit_share: float,
        patience: int,
        card: "JudgeCard",
        best: Path,
        identity: Mapping[str, Any],
        history: Sequence[float] = (),
    ) -> None:
        """`history`: validation losses of the evaluations before, where a run goes on."""
        self.train, self.valid, self.classes = train, valid, tuple(classes)
        self.labels, self.valid_labels = train.indices(classes), valid.indices(classes)
        self.cumulative = np.cumsum(sampling_weights(train, classes, digit_share))
        self.noises = [train.clip(int(row)) for row in train.where(labels=[SILENCE])]
        self.silence = self.classes.index(SILENCE)
        self.log_mel, self.settings = LogMel(settings), settings
        self.rows, self.seed, self.augmentation, self.masks = rows, seed, augmentation, masks
        self.smoothing, self.patience = smoothing, patience
        self.card, self.best, self.identity = card, best, dict(identity)
        self.tokens_per_step = rows * SECOND
        self.quick_tokens = len(valid) * SECOND
        self.last: Figures | None = None
        self._best: float | None = None
        self._without_gain = 0
        for loss in history:
            self._note(loss)

    @property
    def done(self) -> bool:
        """Whether more training is not expected to help."""
        return self._without_gain >= self.patience

    def batch(self, step: int) -> Batch:
        """The clips of a step: {"samples": (rows, 16000), "labels": (rows,), "masks": (rows, mels, frames)}."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, step], counter=[0, 0, 0, STREAM]))
        drawn = np.searchsorted(self.cumulative, random.random(self.rows) * self.cumulative[-1], side="right")
        drawn = np.minimum(drawn, len(self.labels))  # the last one is noise that is made here
        samples = np.stack([self._clip(int(row), random) for row in drawn])
        labels = np.append(self.labels, self.silence)[drawn]
        masks = np.stack([self._mask(random) for _ in drawn])
        tensors = {
            "samples": torch.from_numpy(samples),
            "labels": torch.from_numpy(labels),
            "masks": torch.from_numpy(masks),
        }
        names = (*self.train.names, "made noise")
        return Batch(tensors, self.rows, [(names[int(row)], 0, "+") for row in drawn])

    def loss(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        """Sum of the cross entropy in nats over the clips, labels smoothed."""
        assert isinstance(model, DigitClassifier)
        pictures = self.log_mel(tensors["samples"])
        pictures = torch.where(tensors["masks"], pictures.mean((-2, -1), keepdim=True), pictures)
        scores = model(pictures)
        return F.cross_entropy(scores, tensors["labels"], reduction="sum", label_smoothing=self.smoothing)

    def evaluate(self, model: nn.Module, quick: bool) -> dict[str, float]:
        """Figures on the validation digits; a better model than before is kept in `best`."""
        assert isinstance(model, DigitClassifier)
        self.last = judge_figures(model, self.log_mel, self.valid, self.valid_labels)
        if self._note(self.last.loss):
            card = self.card.text(model, self.last, None)
            save_model(model, self.best, input_policy(self.settings), card, replace=True)
        return self.last.numbers()

    def model_files(self, model: nn.Module) -> dict[str, Writer]:
        """The files of the model folder."""
        assert isinstance(model, DigitClassifier)
        return model_writers(model, input_policy(self.settings), self.card.text(model, self.last, None))

    def _clip(self, row: int, random: np.random.Generator) -> NDArray[np.float32]:
        if row == len(self.labels) or (self.labels[row] == self.silence and random.random() < MADE_NOISE):
            loudness = 10 ** random.uniform(-3, 0)
            return np.asarray(self.augmentation.some_noise(SECOND, random, self.noises) * loudness, dtype=np.float32)
        return self.augmentation.word(self.train.clip(row), SECOND, random, self.noises)

    def _mask(self, random: np.random.Generator) -> NDArray[np.bool_]:
        """Bands of mels and stretches of frames that are covered up (SpecAugment, arXiv 1904.08779)."""
        mask = np.zeros((self.settings.n_mels, self.settings.frames(SECOND)), dtype=bool)
        for axis, widest in enumerate(WIDEST_MASK):
            for _ in range(MASKS):
                width = int(random.integers(0, int(widest * self.masks) + 1))
                start = int(random.integers(0, mask.shape[axis] - width + 1))
                mask[(slice(None),) * axis + (slice(start, start + width),)] = True
        return mask

    def _note(self, loss: float) -> bool:
        better = self._best is None or loss < self._best
        same = loss == self._best  # a model looked at twice
        if better:
            self._best = loss
        self._without_gain = 0 if better else self._without_gain + (not same)
        return better


class JudgeCard:
    """What the README of a judge says beside its figures."""

    def __init__(self, title: str, data: str, licence: str, recipe: str) -> None:
        self.title, self.data, self.licence, self.recipe = title, data, licence, recipe

    def text(self, model: DigitClassifier, valid: Figures | None, others: Mapping[str, Figures] | None) -> str:
        """The whole card; `others` are figures of further parts of the data by name."""
        from mambagen import __version__

        parameters = sum(parameter.numel() for parameter in model.parameters())
        figures = ({"validation": valid} if valid else {}) | dict(others or {})
        quality = [
            f"- {name}, {f.rows:,} clips: accuracy {f.accuracy:.4f}, macro F1 {f.f1:.4f}, loss {f.loss:.4f} nats"
            for name, f in figures.items()
        ]
        tables = [
            f"\n## Confusion, {name}\nRows are what was said, columns what was heard.\n\n"
            + confusion_table(model.digits, f)
            for name, f in figures.items()
        ]
        more = ", ".join(model.classes[len(model.digits) :])
        return (
            f"# {self.title}\n\n"
            f"A classifier of spoken digits ({model.kind}) with {parameters:,} parameters: "
            f"{model.config.description}; written by mambagen {__version__}. It judges generated clips: "
            "`mambagen eval-sc09 --judge THIS_FOLDER --data DATA --samples CLIPS`.\n\n"
            "```python\nfrom mambagen.pipelines.sc09_judge import DigitJudge\n\n"
            'judged = DigitJudge("path/to/this/folder").judge(clips)   # (N, 16000) float32 at 16 kHz\n'
            "judged.log_p, judged.features, judged.is_digit\n```\n\n"
            f"## Data\n{self.data}\n\n## Licence\n{self.licence}\n\n## Recipe\n{self.recipe}\n\n"
            f"## Classes\nJudged by: {', '.join(model.digits)}. "
            f"Further classes, so that what is no digit has a place: {more or 'none'}.\n\n"
            "## Quality\n" + ("\n".join(quality) if quality else "Not measured yet.") + "\n" + "\n".join(tables)
        ).rstrip() + "\n"


def confusion_table(classes: Sequence[str], figures: Figures) -> str:
    """The confusion matrix in Markdown."""
    lines = ["| | " + " | ".join(classes) + " |", "|-|" + "-|" * len(classes)]
    lines += [
        f"| {name} | " + " | ".join(map(str, row)) + " |" for name, row in zip(classes, figures.confusion, strict=True)
    ]
    return "\n".join(lines) + "\n"


def sampling_weights(train: SpokenWords, classes: Sequence[str], digit_share: float) -> NDArray[np.float64]:
    """How likely each clip is drawn, and after them made noise: (clips + 1,), summing to 1.

    Digits share `digit_share` evenly; other words share the rest by the square root of their number of clips, and
    noise that is made has the place of `_silence_`. Within a class a speaker counts by the square root of the clips
    there are of him or her, so that one who said much does not drown the others.
    """
    labels = train.indices(classes)
    pairs = list(zip(train.speakers, train.labels, strict=True))
    said = Counter(pairs)
    weights = np.array([said[pair] ** -0.5 for pair in pairs])
    shares = np.sqrt(np.bincount(labels, minlength=len(classes)).astype(float))
    is_digit = np.array([name in DIGITS for name in classes])
    made = 0.0
    if not train.where(labels=[SILENCE]).size:
        made = 1.0
        shares[list(classes).index(SILENCE)] = max(1.0, float(shares[~is_digit].mean()))
    shares[is_digit] = digit_share / is_digit.sum()
    shares[~is_digit] *= (1 - digit_share) / shares[~is_digit].sum()
    totals = np.bincount(labels, weights, minlength=len(classes))
    weights *= (shares / np.where(totals > 0, totals, 1))[labels]
    weights = np.append(weights, made * shares[list(classes).index(SILENCE)])
    return np.asarray(weights / weights.sum())


@torch.no_grad()
def judge_figures(model: DigitClassifier, log_mel: LogMel, words: SpokenWords, labels: NDArray[np.int64]) -> Figures:
    """The figures of a judge on clips of digits: among the digits alone, clips whole and unchanged."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    found = []
    for at in range(0, len(words), EVALUATION_BATCH):
        samples = torch.from_numpy(words.one_second(np.arange(at, min(at + EVALUATION_BATCH, len(words))))).to(device)
        scores = model(log_mel(samples))[:, : model.config.digits]
        found.append(scores.double().log_softmax(-1).cpu().numpy())
    model.train(training)
    return figures_of(np.concatenate(found), labels)
