"""Classes of the records of FASTA and GenBank files, a row a record in their order.

From Python:

    from mambagen.pipelines.classify import classify
    for row in classify("runs/my-run/model", ["new.fa"]):
        print(row.record, row.predicted, row.probabilities)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.fasta import Record, read_records
from mambagen.errors import InputError, MambagenError, ModelError
from mambagen.models import load_model
from mambagen.models.files import first_fault
from mambagen.models.heads import SequenceClassifier
from mambagen.pipelines.sequence_classification import predict
from mambagen.training.loop import choose_device

Row = TypeVar("Row")

UNKNOWN = "unknown"
AT_A_TIME = 64  # batches of bases that are read before they are sorted by length


@dataclass(frozen=True)
class Classified:
    """A record and the probability of each class."""

    path: str
    record: str
    length: int
    predicted: str  # "unknown" for a record without bases
    probabilities: tuple[float, ...] | None  # None for a record without bases


class Classifier:
    """A model of `train-classifier`, ready to be asked."""

    def __init__(
        self,
        folder: Path | str,
        device: str = "auto",
        batch_tokens: int = 1 << 16,
        average_strands: bool = False,
        rna: bool = False,
    ) -> None:
        """
        Args:
            average_strands: the answer is that of a record and of its reverse complement together.
            rna: U is expected; without it a file that holds U is warned of (and read as if U were T).
        """
        self.model, fields = load_model(folder, choose_device(device), kinds=[SequenceClassifier.kind])
        self.classes: tuple[str, ...] = self.model.classes
        self.batch_tokens, self.average_strands, self.rna = batch_tokens, average_strands, rna
        try:
            self.tokenizer = DnaTokenizer.model_validate(fields["tokenizer"])
        except ValidationError as error:
            raise ModelError(f"{folder}: tokenizer: {first_fault(error)}") from None

    def rows(self, records: Sequence[Record]) -> Iterator[Classified]:
        """The records' classes."""
        sequences = [self.tokenizer.encode(record.sequence) for record in records if len(record)]
        chances: Iterator[NDArray[np.float64]] = iter(())
        if sequences:
            chances = iter(np.exp(predict(self.model, sequences, self.batch_tokens, self.average_strands)))
        for record in records:
            if len(record):
                row = next(chances)
                predicted = self.classes[int(row.argmax())]
                yield Classified(record.path, record.id, len(record), predicted, tuple(row.tolist()))
            else:
                yield Classified(record.path, record.id, 0, UNKNOWN, None)

    def file(self, path: Path | str) -> Iterator[Classified]:
        """The records of one file, some at a time; those before a fault come before its InputError."""
        held: list[Record] = []
        bases = 0
        try:
            for record in read_records(path, keep_empty=True, warn_of_rna=not self.rna):  # every record gets its row
                held.append(record)
                bases += len(record)
                if bases >= AT_A_TIME * self.batch_tokens:
                    yield from self.rows(held)
                    held, bases = [], 0
        except InputError:
            yield from self.rows(held)
            raise
        yield from self.rows(held)


def classify(
    folder: Path | str,
    paths: Sequence[Path | str],
    device: str = "auto",
    batch_tokens: int = 1 << 16,
    average_strands: bool = False,
) -> Iterator[Classified]:
    """The records of all files. A fault in one file ends that file there; the others are done all the same.

    Raises:
        ModelError: the folder holds no classifier. At the end, InputError: says what could not be read, and how many
        records of that file were.
    """
    classifier = Classifier(folder, device, batch_tokens, average_strands)
    yield from each_file(classifier.file, paths)


def each_file(read: Callable[[Path | str], Iterator[Row]], paths: Sequence[Path | str]) -> Iterator[Row]:
    """The rows that `read` has of all files. A fault in one file ends that file there; the others are done anyway.

    Raises:
        InputError: at the end; says what could not be read, and how many records of that file were.
    """
    failures: list[MambagenError] = []
    for path in paths:
        done = 0
        try:
            for row in read(path):
                done += 1
                yield row
        except InputError as error:
            those = "record before it has its row" if done == 1 else f"{done:,} records before it have their rows"
            before = f" (the {those}; what follows it was not read)"
            failures.append(InputError(f"{error}{before if done else ''}"))
    if failures:
        raise InputError("; ".join(str(failure) for failure in failures))
