"""Per-base scores as files: bedGraph, bigWig, TSV. A track gets pieces of records in order and is closed at the end."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from mambagen.data.dna_tokens import VOCABULARY
from mambagen.data.genome import runs_of
from mambagen.data.row_text import characters, constant, decimals, integers, join
from mambagen.data.sequence_store import StoredRecord
from mambagen.errors import ResourceError, UsageError

PLACES = 5  # digits after the point
ROWS = 1 << 16  # of text at a time

_LETTERS = np.array([ord(name) if len(name) == 1 else ord("?") for name in VOCABULARY], dtype=np.uint8)


class Track(Protocol):
    """Takes scores (NaN where there is none) of bases from ``start`` on, with their tokens."""

    def write(
        self, record: StoredRecord, start: int, scores: NDArray[np.float32], tokens: NDArray[np.uint8]
    ) -> None: ...


class TsvTrack:
    """record, position (from 1), base, score; NA where a base has none."""

    def __init__(self, stream: BinaryIO, column: str) -> None:
        self._stream = stream
        stream.write(f"record\tposition\tbase\t{column}\n".encode())

    def write(self, record: StoredRecord, start: int, scores: NDArray[np.float32], tokens: NDArray[np.uint8]) -> None:
        for at in _by(ROWS, len(scores)):
            values = scores[at]
            position = np.arange(len(values), dtype=np.int64) + (start + at.start + 1)
            name = constant(record.id.encode(), len(values))
            base = characters(_LETTERS[tokens[at]])
            self._stream.write(join([name, integers(position), base, decimals(values, PLACES)]))


class BedGraphTrack:
    """record, start, end (0-based, half-open), score; a row a base, none where a base has no score."""

    def __init__(self, stream: BinaryIO, description: str) -> None:
        self._stream = stream
        stream.write(f"#bedGraph {description}\n".encode())

    def write(self, record: StoredRecord, start: int, scores: NDArray[np.float32], tokens: NDArray[np.uint8]) -> None:
        for at in _by(ROWS, len(scores)):
            there = np.flatnonzero(~np.isnan(scores[at]))
            position = there + (start + at.start)
            name = constant(record.id.encode(), len(there))
            columns = [name, integers(position), integers(position + 1), decimals(scores[at][there], PLACES)]
            self._stream.write(join(columns))


class BigWigTrack:
    """A bigWig by pyBigWig: float32 values, nothing where a base has no score. Use as a context manager."""

    def __init__(self, path: Path, records: Sequence[StoredRecord]) -> None:
        """``records``: all that can come, in their order.

        Raises UsageError where pyBigWig is not installed.
        """
        self._file: Any = _pybigwig().open(str(path), "w")
        self._path = path
        try:
            self._file.addHeader([(record.id, record.length) for record in records if record.length])
        except RuntimeError as error:
            raise ResourceError(f"{path}: cannot be written: {error}") from None

    def write(self, record: StoredRecord, start: int, scores: NDArray[np.float32], tokens: NDArray[np.uint8]) -> None:
        firsts, ends = runs_of(~np.isnan(scores))
        try:
            for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
                values = scores[first:end].astype(np.float64)
                self._file.addEntries(record.id, start + first, values=values, span=1, step=1)
        except RuntimeError as error:
            raise ResourceError(
                f"{self._path}: cannot be written: {error}; free space or choose another place"
            ) from None

    def __enter__(self) -> "BigWigTrack":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def check_bigwig() -> None:
    """UsageError where bigWig cannot be written here; to be said before the work."""
    _pybigwig()


def _pybigwig() -> Any:
    try:
        import pyBigWig
    except ImportError:
        raise UsageError("bigWig is written by pyBigWig, which is not installed: pip install pyBigWig") from None
    return pyBigWig


def _by(rows: int, length: int) -> Iterator[slice]:
    for start in range(0, length, rows):
        yield slice(start, min(start + rows, length))
