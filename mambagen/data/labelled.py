"""Labelled sequences: a table with a column of sequences and one of labels, or a FASTA and a file of labels.

    sequence,label                    >r1                 name    label
    ACGTTGCA,promoter                 ACGTTGCA            r1      promoter
    GGGTACCA,other                    >r2  ...            r2      other

Tables are CSV or TSV (told by the header), files may be gzip. What cannot be used is refused with file and line.
"""

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambagen.data.byte_blocks import shown, text_blocks
from mambagen.data.dna_tokens import UNK, DnaTokenizer
from mambagen.data.fasta import read_records
from mambagen.errors import InputError

TABLE = "a CSV or TSV table, or a FASTA with --labels"  # for an error to ask for


@dataclass(frozen=True)
class Labelled:
    """Sequences as token ids, (length,) uint8 each, with their labels as they were written."""

    sequences: Sequence[NDArray[np.uint8]]
    labels: Sequence[str]
    names: Sequence[str]  # of records, or "row N" of a table
    lines: Sequence[int]
    path: str

    def __len__(self) -> int:
        return len(self.sequences)

    def take(self, rows: NDArray[np.int64]) -> "Labelled":
        """Some of the rows."""
        chosen = rows.tolist()
        columns = (self.sequences, self.labels, self.names, self.lines)
        sequences, labels, names, lines = ([column[i] for i in chosen] for column in columns)
        return Labelled(sequences, labels, names, lines, self.path)

    def classes(self) -> tuple[str, ...]:
        """The distinct labels: by number where all are whole numbers, else by letter."""
        distinct = set(self.labels)
        if all(name.removeprefix("-").isdecimal() for name in distinct):
            return tuple(sorted(distinct, key=int))
        return tuple(sorted(distinct))

    def indices(self, classes: Sequence[str]) -> NDArray[np.int64]:
        """The labels as indices into `classes`; InputError for one that is none of them."""
        index = {name: i for i, name in enumerate(classes)}
        for label, line in zip(self.labels, self.lines, strict=True):
            if label not in index:
                known = ", ".join(list(classes)[:6]) + (", ..." if len(classes) > 6 else "")
                raise InputError.at(self.path, line, f"the label '{label}' is none of the classes ({known})")
        return np.array([index[label] for label in self.labels], dtype=np.int64)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when a sequence or a label does."""
        digest = hashlib.sha256()
        for sequence, label in zip(self.sequences, self.labels, strict=True):
            digest.update(f"{len(sequence)}\t{label}\t".encode() + sequence.tobytes())
        return digest.hexdigest()[:16]

    def hold_out(self, fraction: float, seed: int) -> tuple["Labelled", "Labelled"]:
        """(training, validation): about `fraction` of each class, chosen by the sequences themselves and the seed.

        Identical sequences stay together, and the order of the rows does not matter.
        """
        draws = np.array([_draw(seed, sequence) for sequence in self.sequences], dtype=np.uint64)
        labels = np.array(self.labels, dtype=object)
        valid = np.zeros(len(self), dtype=bool)
        for label in set(self.labels):
            mine = np.flatnonzero(labels == label)
            count = round(fraction * len(mine))
            if 0 < count < len(mine):
                limit = np.sort(draws[mine])[count - 1]
                valid[mine[draws[mine] <= limit]] = True
        valid |= np.isin(draws, draws[valid])  # the same sequence under another label
        return self.take(np.flatnonzero(~valid)), self.take(np.flatnonzero(valid))


@dataclass(frozen=True)
class RecordLabels:
    """A file of labels: a table of record name and label, with or without a header (name, id or record, then label)."""

    path: str
    of: dict[str, str]  # by the record's name

    @classmethod
    def read(cls, path: str | Path) -> "RecordLabels":
        """InputError names the line of what cannot be used."""
        found: dict[str, str] = {}
        for line, row in _rows(path):
            if len(row) != 2:
                raise InputError.at(shown(path), line, f"{len(row)} columns; a file of labels has two, name and label")
            name, label = (cell.strip() for cell in row)
            if line == 1 and label.lower() in ("label", "class"):
                continue
            if not name or not label:
                raise InputError.at(shown(path), line, f"no {'label' if name else 'name'} in this row")
            if name in found:
                raise InputError.at(shown(path), line, f"record '{name}' has a label already")
            found[name] = label
        if not found:
            raise InputError.at(shown(path), None, "it holds no labels")
        return cls(shown(path), found)


def read_labelled(
    data: str | Path,
    labels: RecordLabels | str | Path | None,
    tokenizer: DnaTokenizer,
    sequence_column: str = "sequence",
    label_column: str = "label",
) -> Labelled:
    """A table of sequences and labels, or a FASTA (GenBank) file with `labels`, or the path of such a file.

    Raises:
        InputError: names file and line of what is missing or no DNA.
    """
    if labels is None:
        start = next(iter(text_blocks(data, wanted=TABLE))).lstrip() if str(data) != "-" else b""
        if start.startswith((b">", b"LOCUS")):
            raise InputError.at(
                shown(data), None, "this is a sequence file; give the classes of its records by --labels"
            )
        return read_table(data, tokenizer, sequence_column, label_column)
    if not isinstance(labels, RecordLabels):
        labels = RecordLabels.read(labels)
    sequences, found, names, lines = [], [], [], []
    for record in read_records(data):
        if record.id not in labels.of:
            raise InputError.at(record.path, record.line, f"record '{record.id}' has no label in {labels.path}")
        sequences.append(tokenizer.encode(record.sequence))
        found.append(labels.of[record.id])
        names.append(record.id)
        lines.append(record.line)
    return Labelled(sequences, found, names, lines, shown(data))


def read_table(
    path: str | Path, tokenizer: DnaTokenizer, sequence_column: str = "sequence", label_column: str = "label"
) -> Labelled:
    """The rows of a CSV or TSV file with a header; InputError names the line of what cannot be used."""
    rows = _rows(path)
    line, header = next(rows)
    columns = []
    for name in (sequence_column, label_column):
        if name not in header:
            there = ", ".join(header[:8])
            option = "--sequence-column" if name == sequence_column else "--label-column"
            raise InputError.at(shown(path), line, f"no column '{name}'; the header has {there} (see {option})")
        columns.append(header.index(name))
    sequences, labels, names, lines = [], [], [], []
    for line, row in rows:
        if len(row) != len(header):
            raise InputError.at(shown(path), line, f"{len(row)} columns where the header has {len(header)}")
        text, label = row[columns[0]].strip(), row[columns[1]].strip()
        if not text or not label:
            raise InputError.at(shown(path), line, f"no {'label' if text else 'sequence'} in this row")
        ids = tokenizer.encode(text.encode("utf-8"))
        if (ids == UNK).any():
            wrong = next(letter for letter in text if tokenizer.encode(letter.encode("utf-8"))[0] == UNK)
            raise InputError.at(shown(path), line, f"'{wrong}' is no DNA letter (ACGTN and the IUPAC codes are)")
        sequences.append(ids)
        labels.append(label)
        names.append(f"row {line}")
        lines.append(line)
    if not sequences:
        raise InputError.at(shown(path), None, "the table has a header and no rows")
    return Labelled(sequences, labels, names, lines, shown(path))


def _rows(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row that is not blank."""
    try:
        text = b"".join(text_blocks(path, wanted=TABLE)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError.at(shown(path), None, f"not UTF-8 text (byte {error.start}); is this a table?") from None
    first = text.lstrip("\n").split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text), delimiter="\t" if "\t" in first else ",")
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise InputError.at(shown(path), reader.line_num, f"this row cannot be read: {error}") from None
    if not first.strip():
        raise InputError.at(shown(path), None, f"the file holds nothing but blanks; give {TABLE}")


def _draw(seed: int, sequence: NDArray[np.uint8]) -> int:
    digest = hashlib.blake2b(sequence.tobytes(), digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")
