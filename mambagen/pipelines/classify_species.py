"""The species of the records of FASTA and GenBank files, a row a record in their order, in constant memory.

From Python:

    from mambagen.pipelines.classify_species import SpeciesReader
    for row in SpeciesReader("species").files(["contigs.fa.gz"]):
        print(row.record, row.species, row.probability)
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.fasta_stream import Piece, stream_pieces
from mambagen.data.record_windows import RecordWindow, RecordWindows
from mambagen.errors import InputError, ModelError
from mambagen.models.builtin import find_model
from mambagen.models.files import first_fault
from mambagen.models.saving import load_model
from mambagen.models.species_classifier import SpeciesClassifier
from mambagen.pipelines.classify import each_file
from mambagen.pipelines.sequence_classification import predict
from mambagen.training.loop import choose_device

log = logging.getLogger("mambagen")

UNKNOWN = "unknown"
AT_A_TIME = 16  # batches of bases that are gathered, over all records, before they go through the model
MAX_WINDOWS = 256  # of a record, evenly spread


@dataclass(frozen=True)
class SpeciesRow:
    """A record and what it is said to be."""

    path: str
    record: str
    length: int
    species: str  # "unknown" where the best is not sure enough, or no base could be read
    probability: float | None  # of the best; None where nothing could be read
    runner_up: str | None
    runner_up_probability: float | None
    windows: int  # that were read
    share_n: float | None  # of N and other ambiguity codes; None of an empty record
    probabilities: tuple[float, ...] | None  # in the order of the model's classes

    def best(self, classes: Sequence[str]) -> str | None:
        """The likeliest species, however sure."""
        return None if self.probabilities is None else classes[int(np.argmax(self.probabilities))]


@dataclass(frozen=True)
class WindowRow:
    """A window of a record, by itself: its calibrated probabilities are those of a record of that length."""

    record: str
    start: int  # 0-based, half-open
    end: int
    species: str
    probability: float


@dataclass
class _Open:
    """A record that is being read, or whose windows wait for the model."""

    piece: Piece
    windows: RecordWindows
    total: NDArray[np.float64]  # (classes,) sum over windows of log-probabilities, each times its known bases
    bases: int = 0
    read: int = 0
    waiting: int = 0
    ended: bool = False
    rna: bool = False


@dataclass
class SpeciesReader:
    """A model of `train-species`, ready to be asked. `model`: a built-in one by name, or a folder.

    Args:
        batch_tokens: bases that go through the model at once; changes speed and memory, not results.
        max_windows: of a record that are read, evenly spread; None reads all.
        min_confidence: a best probability below it gives "unknown".
        rna: U is expected; without it a record that holds U is warned of (and read as if U were T).
        track: is given each window's own answer, in order.
    """

    model_name: Path | str = "species"
    device: str = "auto"
    batch_tokens: int = 1 << 16
    max_windows: int | None = MAX_WINDOWS
    min_confidence: float = 0.0
    rna: bool = False
    track: Callable[[WindowRow], None] | None = None
    model: SpeciesClassifier = field(init=False)
    tokenizer: DnaTokenizer = field(init=False)

    def __post_init__(self) -> None:
        folder = find_model(self.model_name)
        self.model, fields = load_model(folder, choose_device(self.device), kinds=[SpeciesClassifier.kind])
        try:
            self.tokenizer = DnaTokenizer.model_validate(fields["tokenizer"])
        except ValidationError as error:
            raise ModelError(f"{folder}: tokenizer: {first_fault(error)}") from None
        self._waiting: list[tuple[_Open, RecordWindow]] = []
        self._bases = 0

    @property
    def classes(self) -> tuple[str, ...]:
        """The species that the model knows."""
        return self.model.classes

    def files(self, paths: Sequence[Path | str]) -> Iterator[SpeciesRow]:
        """The records of all files; see `each_file`."""
        return each_file(self.file, paths)

    def file(self, path: Path | str) -> Iterator[SpeciesRow]:
        """The records of one file, gathered into batches over their borders."""
        records: deque[_Open] = deque()
        try:
            for piece in stream_pieces(path, warn_of_rna=not self.rna):
                if not records or records[-1].ended:
                    windows = RecordWindows(self.model.config.window, self.max_windows)
                    records.append(_Open(piece, windows, np.zeros(len(self.classes))))
                record = records[-1]
                for window in record.windows.feed(self.tokenizer.encode(piece.letters)):
                    self._add(record, window)
                if piece.last:
                    for window in record.windows.finish():
                        self._add(record, window)
                    record.ended = True
                    yield from self._ready(records)
        except InputError:
            if records and not records[-1].ended:
                broken = records.pop()
                self._waiting = [(record, window) for record, window in self._waiting if record is not broken]
            self._run()
            yield from self._ready(records)
            raise
        self._run()
        yield from self._ready(records)

    def _add(self, record: _Open, window: RecordWindow) -> None:
        self._waiting.append((record, window))
        record.waiting += 1
        self._bases += len(window.known)
        if self._bases >= AT_A_TIME * self.batch_tokens:
            self._run()

    def _run(self) -> None:
        """Send the windows that wait through the model, batched by length whatever record they are of."""
        waiting, self._waiting, self._bases = self._waiting, [], 0
        if not waiting:
            return
        chances = predict(self.model, [window.known for _, window in waiting], self.batch_tokens)
        for (record, window), row in zip(waiting, chances, strict=True):
            bases = len(window.known)
            record.total += row * bases
            record.bases += bases
            record.read += 1
            record.waiting -= 1
            if self.track:
                own = self._probabilities(row, bases)
                best = int(own.argmax())
                self.track(
                    WindowRow(record.piece.id, window.start, window.end, self._named(own, best), float(own[best]))
                )

    def _ready(self, records: deque[_Open]) -> Iterator[SpeciesRow]:
        while records and records[0].ended and not records[0].waiting:
            yield self._row(records.popleft())

    def _row(self, record: _Open) -> SpeciesRow:
        piece, length = record.piece, record.windows.length
        share = record.windows.unknown / length if length else None
        if not record.bases:
            if length:
                log.warning(
                    "%s:%d: record '%s' is N for the most part; nothing of it was read",
                    *(piece.path, piece.line, piece.id),
                )
            return SpeciesRow(piece.path, piece.id, length, UNKNOWN, None, None, None, 0, share, None)
        chances = self._probabilities(record.total / record.bases, record.bases)
        best, second = np.argsort(-chances, kind="stable")[:2].tolist()
        return SpeciesRow(
            path=piece.path,
            record=piece.id,
            length=length,
            species=self._named(chances, best),
            probability=float(chances[best]),
            runner_up=self.classes[second],
            runner_up_probability=float(chances[second]),
            windows=record.read,
            share_n=share,
            probabilities=tuple(chances.tolist()),
        )

    def _probabilities(self, mean: NDArray[np.float64], bases: int) -> NDArray[np.float64]:
        config = self.model.config
        result: NDArray[np.float64] = np.exp(
            config.calibration.log_probabilities(mean[None], np.array([bases], dtype=np.float64), config.window)
        )[0]
        return result

    def _named(self, chances: NDArray[np.float64], best: int) -> str:
        return self.classes[best] if chances[best] >= self.min_confidence else UNKNOWN
