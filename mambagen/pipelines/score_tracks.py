"""Per-base scores as files: bedGraph, bigWig, TSV. A track takes the pieces of all records, in order."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mambagen.data.dna_tokens import VOCABULARY
from mambagen.data.row_text import characters, constant, decimals, integers, join
from mambagen.data.sequence_store import StoredRecord
from mambagen.errors import InputError, ResourceError, UsageError

PLACES = 5  # digits after the point
ROWS = 1 << 16  # of text at a time

_LETTERS = np.array([ord(name) if len(name) == 1 else ord("?") for name in VOCABULARY], dtype=np.uint8)


class Piece(NamedTuple):
    """Scores of the bases of a record from ``start`` on."""

    record: StoredRecord
    start: int
    scores: NDArray[np.float32]  # (length,), NaN where a base has none
    tokens: NDArray[np.uint8]  # (length,)


class Track(Protocol):
    """Writes pieces, as they come, to where it was opened."""

    def write(self, pieces: Iterable[Piece]) -> None: ...


class TsvTrack:
    """record, position (from 1), base, score; NA where a base has none."""

    def __init__(self, stream: BinaryIO, column: str) -> None:
        self._stream = stream
        stream.write(f"record\tposition\tbase\t{column}\n".encode())

    def write(self, pieces: Iterable[Piece]) -> None:
        for record, start, scores, tokens in _of(ROWS, pieces):
            position = np.arange(len(scores), dtype=np.int64) + (start + 1)
            name = constant(record.id.encode(), len(scores))
            base = characters(_LETTERS[tokens])
            self._stream.write(join([name, integers(position), base, decimals(scores, PLACES)]))


class BedGraphTrack:
    """record, start, end (0-based, half-open), score; a row a base, none where a base has no score."""

    def __init__(self, stream: BinaryIO, description: str) -> None:
        self._stream = stream
        stream.write(f"#bedGraph {description}\n".encode())

    def write(self, pieces: Iterable[Piece]) -> None:
        for record, start, scores, _ in _of(ROWS, pieces):
            there = np.flatnonzero(~np.isnan(scores))
            position = there + start
            name = constant(record.id.encode(), len(there))
            columns = [name, integers(position), integers(position + 1), decimals(scores[there], PLACES)]
            self._stream.write(join(columns))


class BigWigTrack:
    """A bigWig by pybigtools, which keeps memory flat: float32 values, nothing where a base has no score."""

    def __init__(self, path: Path, records: Iterable[StoredRecord]) -> None:
        """``records``: all that can come, in their order. Raises UsageError where pybigtools is not installed."""
        self._path = path
        self._lengths = {record.id: record.length for record in records if record.length}
        self._tools = _pybigtools()

    def write(self, pieces: Iterable[Piece]) -> None:
        """Raises InputError where no base has a score, ResourceError where the file cannot be written."""
        failure: list[BaseException] = []
        written = 0

        def rows() -> Iterator[tuple[str, int, int, float]]:
            nonlocal written
            try:
                for record, start, scores, _ in pieces:
                    there = np.flatnonzero(~np.isnan(scores))
                    first = (there + start).tolist()
                    written += len(first)
                    yield from zip(
                        [record.id] * len(first),
                        first,
                        (there + (start + 1)).tolist(),
                        scores[there].tolist(),
                        strict=True,
                    )
            except BaseException as error:  # pybigtools would print it and end the file there
                failure.append(error)

        chained = rows()
        head = next(chained, None)
        if failure:
            raise failure[0]
        if head is None:
            raise InputError("no base has a likelihood, so there is nothing to write into a bigWig")
        scratch = self._path.with_name(f"{self._path.name}.bw")  # it goes by the suffix
        try:
            self._tools.open(str(scratch), "w").write(self._lengths, _begun(head, chained))
            if failure:
                raise failure[0]
            covered = self._tools.open(str(scratch)).info()["summary"]["basesCovered"]
            if covered != written:
                raise ResourceError(f"{self._path}: {covered} of {written} values were written; is the disk full?")
            os.replace(scratch, self._path)
        except BaseException as error:
            if failure:
                raise failure[0] from None
            if type(error).__name__ in ("PanicException", "BBIReadError", "OSError", "ValueError", "RuntimeError"):
                what = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ResourceError(
                    f"{self._path}: the bigWig cannot be written ({what}); free space or choose another place"
                ) from None
            raise
        finally:
            scratch.unlink(missing_ok=True)


def check_bigwig() -> None:
    """UsageError where bigWig cannot be written here; to be said before the work."""
    _pybigtools()


def _pybigtools() -> Any:
    try:
        import pybigtools
    except ImportError:
        raise UsageError("bigWig is written by pybigtools, which is not installed: pip install pybigtools") from None
    return pybigtools


def _begun(head: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield head
    yield from rest


def _of(rows: int, pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces, those of more rows in several."""
    for record, start, scores, tokens in pieces:
        for at in range(0, len(scores), rows):
            end = at + rows
            yield Piece(record, start + at, scores[at:end], tokens[at:end])
