"""Sequences of any length as tokens that are read by pieces, in memory that does not grow with them.

The files are read once, checked as they are read, and put one byte a base into a temporary file without a name.
From there any piece of any record can be had, on either strand: a gzip file or stdin serves as well as an indexed one.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambagen.data.dna_tokens import DnaTokenizer, reverse_complement
from mambagen.data.fasta_stream import stream_pieces
from mambagen.errors import InputError, ResourceError, UsageError

IN_MEMORY = 8 << 20  # bases up to which there is no temporary file


@dataclass(frozen=True)
class StoredRecord:
    """A record of the store: where its tokens begin there, and where it came from."""

    id: str  # unique in the store
    length: int
    path: str
    line: int  # of its header, from 1
    offset: int

    def __len__(self) -> int:
        return self.length


class SequenceStore:
    """The records of some files as tokens, (length,) uint8 each, read by pieces.

    ``failures`` holds an error for each file that could not be used; the records of the other files are here.
    """

    def __init__(self, tokenizer: DnaTokenizer) -> None:
        self.tokenizer = tokenizer
        self.records: list[StoredRecord] = []
        self.failures: list[InputError] = []
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 (closed by close)
        self._index: dict[str, int] = {}

    @classmethod
    def from_files(
        cls,
        paths: Iterable[str | Path],
        tokenizer: DnaTokenizer | None = None,
        keep: Callable[[str], bool] | None = None,
        warn_of_rna: bool = False,
    ) -> "SequenceStore":
        """Read FASTA or GenBank files (``-``: stdin); of records that ``keep`` refuses, nothing is stored.

        A name that occurs in several files is told apart as ``FILE:NAME``. A file with a fault is left out whole, and
        the fault is put into ``failures``. ``warn_of_rna``: as `stream_pieces`.

        Raises UsageError where a file is given twice, ResourceError where the temporary file has no room.
        """
        store = cls(tokenizer or DnaTokenizer())
        seen: set[str] = set()
        for path in paths:
            resolved = str(path) if str(path) == "-" else str(Path(path).resolve())
            if resolved in seen:
                raise UsageError(f"{path} is given twice; name each file once")
            seen.add(resolved)
            store._add(path, keep, warn_of_rna)
        store._name_apart()
        return store

    def __enter__(self) -> "SequenceStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Number of records."""
        return len(self.records)

    @property
    def bases(self) -> int:
        """Length of all records together."""
        return sum(record.length for record in self.records)

    def close(self) -> None:
        """Give the temporary file back."""
        self._file.close()

    def find(self, name: str) -> StoredRecord | None:
        """The record of this name."""
        at = self._index.get(name)
        return None if at is None else self.records[at]

    def read(
        self, record: StoredRecord, start: int = 0, end: int | None = None, minus: bool = False
    ) -> NDArray[np.uint8]:
        """Tokens [start, end) of a record; with ``minus`` in the coordinates of its reverse complement, and of it.

        Raises ValueError where the record has no such piece.
        """
        end = record.length if end is None else end
        if not 0 <= start <= end <= record.length:
            raise ValueError(f"{start} to {end} is no piece of a record of {record.length}")
        if minus:
            return reverse_complement(self.read(record, record.length - end, record.length - start))
        self._file.seek(record.offset + start)
        return np.frombuffer(self._file.read(end - start), dtype=np.uint8)

    def put(self, name: str, tokens: NDArray[np.uint8]) -> StoredRecord:
        """Add a record of tokens that are in memory already.

        Raises ValueError where there is one of this name.
        """
        if name in self._index:
            raise ValueError(f"there is a record '{name}' already")
        offset = self._file.seek(0, 2)
        self._write(np.ascontiguousarray(tokens, dtype=np.uint8))
        record = StoredRecord(name, len(tokens), "memory", 0, offset)
        self._index[name] = len(self.records)
        self.records.append(record)
        return record

    def raise_failures(self) -> None:
        """InputError with all failures, where there are any: the last thing that a job over several files does."""
        if self.failures:
            raise InputError("; ".join(str(failure) for failure in self.failures))

    def _add(self, path: str | Path, keep: Callable[[str], bool] | None, warn_of_rna: bool) -> None:
        begun = self._file.seek(0, 2)
        records: list[StoredRecord] = []
        offset = at = begun
        try:
            for piece in stream_pieces(path, warn_of_rna=warn_of_rna):
                if keep is None or keep(piece.id):
                    at += self._write(self.tokenizer.encode(piece.letters))
                if piece.last:
                    if keep is None or keep(piece.id):
                        records.append(StoredRecord(piece.id, at - offset, piece.path, piece.line, offset))
                    offset = at
        except InputError as error:
            self.failures.append(error)
            self._file.seek(begun)
            self._file.truncate()
            return
        self.records += records

    def _write(self, tokens: NDArray[np.uint8]) -> int:
        try:
            return self._file.write(tokens.data)
        except OSError as error:
            raise ResourceError(
                f"{tempfile.gettempdir()}: no room for the sequences, one byte a base ({error.strerror or error}); "
                "set TMPDIR to a folder with more"
            ) from None

    def _name_apart(self) -> None:
        paths_of: dict[str, set[str]] = {}
        for record in self.records:
            paths_of.setdefault(record.id, set()).add(record.path)
        self.records = [
            replace(r, id=f"{Path(r.path).name.split('.')[0]}:{r.id}") if len(paths_of[r.id]) > 1 else r
            for r in self.records
        ]
        for at, record in enumerate(self.records):
            if record.id in self._index:
                first = self.records[self._index[record.id]]
                raise InputError.at(
                    record.path, record.line, f"record '{record.id}' is in {first.path}:{first.line} too; rename one"
                )
            self._index[record.id] = at
