"""Classifying whole sequences: the job as the training loop sees it, its figures, and prediction in any order."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mambagen.data.dna_tokens import PAD, DnaTokenizer, reverse_complement
from mambagen.data.labelled import Labelled
from mambagen.models.files import Writer
from mambagen.models.heads import SequenceClassifier
from mambagen.models.reverse_complement import rc_average
from mambagen.models.saving import model_writers, save_model
from mambagen.pipelines.model_cards import ModelCard
from mambagen.training.batches import Batch

GROUP = 32  # batches whose sequences are sorted by length together
STREAM = 3  # of Philox's counter; 0 to 2 are those of windows and masks

Tokens = NDArray[np.uint8]


@dataclass(frozen=True)
class Figures:
    """How well classes are told: macro-averaged F1 and the Matthews correlation coefficient, both of scikit-learn."""

    rows: int
    loss: float  # nats a sequence
    accuracy: float
    f1: float
    mcc: float
    confusion: tuple[tuple[int, ...], ...]  # [true class][predicted class]

    def numbers(self) -> dict[str, float]:
        """For metrics.jsonl."""
        return {"loss": self.loss, "accuracy": self.accuracy, "f1": self.f1, "mcc": self.mcc}


class Best:
    """The best evaluation of a run so far, by a score and then by loss; and whether a better one is to be expected."""

    def __init__(self, patience: int, history: Sequence[tuple[float, float]] = ()) -> None:
        """`history`: (score, loss) of the evaluations that were made before, where a run goes on."""
        self._patience = patience
        self._best: tuple[float, float] | None = None
        self._without_gain = 0
        for score, loss in history:
            self.note(score, loss)

    @property
    def done(self) -> bool:
        """Whether `patience` evaluations in a row brought no better one."""
        return self._without_gain >= self._patience

    def note(self, score: float, loss: float) -> bool:
        """Take in an evaluation; whether it is the best so far."""
        better = self._best is None or (score, -loss) > (self._best[0], -self._best[1])
        if better:
            self._best = score, loss
        same = not better and self._best == (score, loss)  # a model looked at twice
        self._without_gain = 0 if better else self._without_gain + (not same)
        return better


class ClassificationTask:
    """Batches of labelled sequences, cross entropy, figures on validation; a `mambagen.training.batches.Task`.

    Each epoch is a permutation of the sequences by (seed, epoch), in which batches of like length are formed; the
    strand of a row is drawn by (seed, step). The best model on validation (by MCC, then by loss) is kept in the folder
    `best`, and `done` says that `patience` evaluations in a row brought no better one.
    """

    def __init__(
        self,
        train: Labelled,
        valid: Labelled,
        classes: Sequence[str],
        tokenizer: DnaTokenizer,
        rows: int,
        seed: int,
        reverse_complement: bool,
        patience: int,
        identity: Mapping[str, Any],
        card: ModelCard,
        best: Path,
        batch_tokens: int,
        history: Sequence[tuple[float, float]] = (),
    ) -> None:
        """`history`: (MCC, loss) of the evaluations that were made before, where a run goes on."""
        self.train, self.valid, self.tokenizer = train, valid, tokenizer
        self.labels, self.valid_labels = train.indices(classes), valid.indices(classes)
        self.rows, self.seed, self.reverse_complement = min(rows, len(train)), seed, reverse_complement
        self.identity, self.card, self.best = dict(identity), card, best
        self.batch_tokens = batch_tokens
        self.lengths = np.array([len(sequence) for sequence in train.sequences])
        self.padded = bool((self.lengths != self.lengths[0]).any())  # then every batch has a mask, for one graph fits
        self.steps_per_epoch = -(-len(train) // self.rows)
        self.tokens_per_step = round(float(self.lengths.mean()) * self.rows)
        self.quick_tokens = sum(len(sequence) for sequence in valid.sequences)
        self.last: Figures | None = None
        self._best = Best(patience, history)

    @property
    def done(self) -> bool:
        """Whether more training is not expected to help."""
        return self._best.done

    def batch(self, step: int) -> Batch:
        """The sequences of a step, padded to the longest."""
        rows = self._epoch(step // self.steps_per_epoch)[step % self.steps_per_epoch]
        sequences = [self.train.sequences[i] for i in rows.tolist()]
        minus = np.zeros(len(rows), dtype=bool)
        if self.reverse_complement:
            words = np.random.Philox(key=[self.seed, step], counter=[0, 0, 0, STREAM]).random_raw(len(rows))
            minus = words >> np.uint64(63) != 0
            sequences = [reverse_complement(s) if m else s for s, m in zip(sequences, minus, strict=True)]
        tensors = padded(sequences, always_mask=self.padded) | {"labels": torch.from_numpy(self.labels[rows])}
        where = [(self.train.names[i], 0, "-" if m else "+") for i, m in zip(rows.tolist(), minus, strict=True)]
        return Batch(tensors, len(rows), where)

    def loss(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        """Sum of the cross entropy in nats over the sequences."""
        return classification_loss(model, tensors)

    def evaluate(self, model: nn.Module, quick: bool) -> dict[str, float]:
        """Figures on the whole of the validation data; a model better than those before is written to `best`."""
        assert isinstance(model, SequenceClassifier)
        if not len(self.valid):
            return {}
        self.last = measure(model, self.valid.sequences, self.valid_labels, self.batch_tokens)
        if self._best.note(self.last.mcc, self.last.loss):
            save_model(model, self.best, self.tokenizer.model_dump(mode="json"), self._text(model), replace=True)
        return self.last.numbers()

    def model_files(self, model: nn.Module) -> dict[str, Writer]:
        """The files of the model folder."""
        assert isinstance(model, SequenceClassifier)
        return dict(model_writers(model, self.tokenizer.model_dump(mode="json"), self._text(model)))

    def _text(self, model: SequenceClassifier) -> str:
        quality = "not measured yet"
        if self.last is not None:
            quality = f"On {self.last.rows:,} validation sequences: {sentence(self.last)}."
        return self.card.text(model, quality, f"\n## Classes\n{', '.join(model.classes)}\n")

    @lru_cache(maxsize=2)  # noqa: B019 (a task lives as long as the process)
    def _epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        count = len(self.train)
        generator = np.random.Philox(key=[self.seed, epoch], counter=[0, 0, 1, STREAM])
        order = np.argsort(generator.random_raw(count), kind="stable")
        if self.padded:
            size = GROUP * self.rows
            groups = [order[at : at + size] for at in range(0, count, size)]
            order = np.concatenate([group[np.argsort(self.lengths[group], kind="stable")] for group in groups])
        batches = [order[at : at + self.rows] for at in range(0, count, self.rows)]
        shuffled = np.argsort(generator.random_raw(len(batches)), kind="stable")
        return [batches[i] for i in shuffled.tolist()]


def classification_loss(model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
    """Sum of the cross entropy in nats over sequences as `padded` gives them, with their "labels"."""
    return F.cross_entropy(model(tensors["tokens"], tensors.get("real")), tensors["labels"], reduction="sum")


def padded(sequences: Sequence[Tokens], always_mask: bool = False) -> dict[str, Tensor]:
    """{"tokens": (rows, longest) uint8} and, where there is padding (or always), {"real": (rows, longest) bool}."""
    lengths = np.array([len(sequence) for sequence in sequences])
    tokens = np.full((len(sequences), int(lengths.max())), PAD, dtype=np.uint8)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
    tensors = {"tokens": torch.from_numpy(tokens)}
    if always_mask or lengths.min() < lengths.max():
        tensors["real"] = torch.from_numpy(np.arange(tokens.shape[1]) < lengths[:, None])
    return tensors


@torch.no_grad()
def predict(
    model: SequenceClassifier, sequences: Sequence[Tokens], batch_tokens: int, average_strands: bool = False
) -> NDArray[np.float64]:
    """(sequences, classes) log-probabilities, in the order given; batches of like length hold `batch_tokens` at most.

    Args:
        average_strands: over those of a sequence and of its reverse complement (their mean, normalised again).
    """
    device = next(model.parameters()).device
    model.eval()
    out = np.empty((len(sequences), len(model.classes)))
    for rows in batches_of_like_length([len(sequence) for sequence in sequences], batch_tokens):
        tensors = {name: v.to(device) for name, v in padded([sequences[i] for i in rows]).items()}
        tokens, mask = tensors["tokens"], tensors.get("real")
        if average_strands:
            chances = rc_average(
                lambda t, m: model(t, m).double().log_softmax(-1), tokens, mask, model.complement, per_position=False
            ).log_softmax(-1)
        else:
            chances = model(tokens, mask).double().log_softmax(-1)
        out[rows] = chances.cpu().numpy()
    return out


def batches_of_like_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Rows by length, in batches whose padded size is at most `batch_tokens` (one row may be more)."""
    batch: list[int] = []
    for row in np.argsort(lengths, kind="stable")[::-1].tolist():
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def measure(
    model: SequenceClassifier, sequences: Sequence[Tokens], labels: NDArray[np.int64], batch_tokens: int
) -> Figures:
    """The figures of a model on labelled sequences."""
    return figures_of(predict(model, sequences, batch_tokens), labels)


def figures_of(log_probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> Figures:
    """The figures of predictions (rows, classes) against labels (rows,)."""
    from sklearn.metrics import (
        accuracy_score,
        confusion_matrix,
        f1_score,
        matthews_corrcoef,
    )

    said = log_probabilities.argmax(1)
    classes = np.arange(log_probabilities.shape[1])
    return Figures(
        rows=len(labels),
        loss=float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        accuracy=float(accuracy_score(labels, said)),
        f1=float(f1_score(labels, said, labels=classes, average="macro", zero_division=0)),
        mcc=float(matthews_corrcoef(labels, said)),
        confusion=tuple(tuple(map(int, row)) for row in confusion_matrix(labels, said, labels=classes)),
    )


def sentence(figures: Figures) -> str:
    """The figures in words."""
    return f"accuracy {figures.accuracy:.4f}, F1 {figures.f1:.4f} (macro), MCC {figures.mcc:.4f}"


def kmer_baseline(
    train: Labelled, valid: Labelled, test: Labelled, classes: Sequence[str], k: int = 5
) -> tuple[Figures, Figures]:
    """(validation, test) figures of a logistic regression on k-mer frequencies, its strength chosen on validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from mambagen.data.kmers import kmer_frequencies

    scale = StandardScaler()
    features = scale.fit_transform(kmer_frequencies(train.sequences, k))
    best: tuple[Figures, LogisticRegression] | None = None
    for strength in (1e-3, 1e-2, 1e-1):
        model = LogisticRegression(C=strength, max_iter=500).fit(features, train.indices(classes))
        found = _baseline_figures(model, scale.transform(kmer_frequencies(valid.sequences, k)), valid, classes)
        if best is None or found.mcc > best[0].mcc:
            best = found, model
    assert best is not None
    on_test = _baseline_figures(best[1], scale.transform(kmer_frequencies(test.sequences, k)), test, classes)
    return best[0], on_test


def _baseline_figures(model: Any, features: NDArray[np.float32], data: Labelled, classes: Sequence[str]) -> Figures:
    chances = np.full((len(data), len(classes)), -np.inf)
    with np.errstate(divide="ignore"):  # it may be sure; the log of 0 is cut off below
        chances[:, model.classes_] = model.predict_log_proba(features)
    return figures_of(np.maximum(chances, -50), data.indices(classes))
