"""A genome as tokens, in memory or mapped from a file, and its division into stretches for training and validation.

What is held out is held out by whole stretches: no window of the training part can share a base with the validation
part, whatever its length.
"""

import hashlib
import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambagen.data.byte_blocks import STDIN
from mambagen.data.dna_tokens import DnaTokenizer, N
from mambagen.data.fasta import Record, read_records
from mambagen.data.prepared import prepare
from mambagen.errors import InputError, UsageError

log = logging.getLogger("mambagen")

_PIECE = 1 << 22

Span = tuple[int, int]  # [start, end), 0-based


@dataclass(frozen=True)
class EncodedRecord:
    """A record as tokens: ``tokens`` is (length,) uint8."""

    id: str  # unique in its genome
    tokens: NDArray[np.uint8]
    path: str
    line: int
    description: str = ""  # the header's text after the name

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Stretches:
    """Parts of records that do not overlap: ``spans`` holds (record index, start, end), 0-based and half-open."""

    records: Sequence[EncodedRecord]
    spans: Sequence[tuple[int, int, int]]
    tokenizer: DnaTokenizer

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return iter(self.spans)

    @property
    def bases(self) -> int:
        """Length of all stretches together."""
        return sum(end - start for _, start, end in self.spans)

    def tokens(self) -> Iterator[NDArray[np.uint8]]:
        """The tokens of each stretch in turn (views, not copies)."""
        for record, start, end in self.spans:
            yield self.records[record].tokens[start:end]

    def some(self, bases: int, piece: int = 1 << 20) -> "Stretches":
        """About so many bases, in pieces evenly spread over all of them; all where there are no more."""
        if self.bases <= bases:
            return self
        every = self.bases / max(1, bases // piece)
        spans: list[tuple[int, int, int]] = []
        before, wanted = 0, 0.0  # bases of the stretches passed, and where the next piece begins among all bases
        for record, start, end in self.spans:
            while wanted < before + end - start:
                first = max(start, start + int(wanted) - before)
                spans.append((record, first, min(first + piece, end)))
                wanted += every
            before += end - start
        return Stretches(self.records, spans, self.tokenizer)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when a stretch's name, place or sequence does."""
        digest = hashlib.sha256()
        for (record, start, end), tokens in zip(self.spans, self.tokens(), strict=True):
            digest.update(f"{self.records[record].id}\t{start}\t{end}\t{zlib.crc32(tokens.data)}\n".encode())
        return digest.hexdigest()[:16]


class Genome:
    """Records as tokens, under the policy of one tokenizer."""

    def __init__(self, records: Sequence[EncodedRecord], tokenizer: DnaTokenizer) -> None:
        self.records = list(records)
        self.tokenizer = tokenizer

    @classmethod
    def from_files(
        cls, paths: Iterable[str | Path], tokenizer: DnaTokenizer | None = None, prepared: Path | None = None
    ) -> "Genome":
        """Read FASTA, GenBank or 2bit files (``-``: stdin) into one genome.

        With a folder ``prepared``, files are read from their prepared genomes in it, which are made where they are not
        there yet: the tokens are then mapped from the disk. A name that occurs in several files is told apart as
        ``FILE:NAME``. Raises InputError for bad input, ResourceError where that folder cannot be written.
        """
        tokenizer = tokenizer or DnaTokenizer()
        paths = list(paths)
        resolved = [str(path) if str(path) == "-" else str(Path(path).resolve()) for path in paths]
        for i, path in enumerate(resolved):
            if path in resolved[:i]:
                raise UsageError(f"{paths[i]} is given twice; name each file once")
        return cls(_distinctly_named(_encoded(paths, tokenizer, prepared)), tokenizer)

    @classmethod
    def from_records(cls, records: Iterable[Record], tokenizer: DnaTokenizer | None = None) -> "Genome":
        """A genome of records that are already in memory."""
        tokenizer = tokenizer or DnaTokenizer()
        encoded = [EncodedRecord(r.id, tokenizer.encode(r.sequence), r.path, r.line, r.description) for r in records]
        return cls(_distinctly_named(encoded), tokenizer)

    @property
    def bases(self) -> int:
        """Length of all records together."""
        return sum(len(record) for record in self.records)

    def whole(self) -> Stretches:
        """Every record from end to end."""
        return self._stretches({i: [(0, len(record))] for i, record in enumerate(self.records)})

    def hold_out(
        self,
        fraction: float = 0.1,
        records: Sequence[str] = (),
        seed: int = 0,
        shortest: int = 2048,
        intervals: Sequence[tuple[str, int, int, str]] = (),
    ) -> tuple[Stretches, Stretches]:
        """Divide the genome into a training and a validation part that share no base.

        records: names of records to hold out whole; ``fraction`` then plays no part.
        intervals: (record, start, end, split), 0-based and half-open, split one of train, valid, test. They govern
            every file that they name a record of: there, validation is the valid intervals, and training is the train
            intervals less the valid and test ones, or, where a file has none, all that is neither valid nor test.
            Other files fall under ``fraction``.
        fraction: of each record, one contiguous stretch with this share of its bases that are not N, placed by
            ``seed`` and the record's name. Where that would be shorter than ``shortest`` and there are many such
            records, some of these are held out whole instead.

        Raises UsageError for unknown names and impossible fractions, InputError for intervals that do not fit.
        """
        if not 0 <= fraction < 1:
            raise UsageError(f"the held-out fraction must be at least 0 and less than 1, not {fraction}")
        if not 0 <= seed < 2**64:
            raise UsageError(f"the seed must be from 0 to 2^64 - 1, not {seed}")
        if records:
            valid = self._whole_records(records)
            train = {i: [(0, len(r))] for i, r in enumerate(self.records) if i not in valid}
        else:
            train, valid, governed = self._by_intervals(intervals)
            rest = [i for i, record in enumerate(self.records) if record.path not in governed]
            valid |= self._by_fraction(rest, fraction, seed, shortest)
            train |= {i: subtract([(0, len(self.records[i]))], valid.get(i, [])) for i in rest}
        if not any(train.values()):
            raise UsageError("the hold-out leaves nothing to train on; hold out less")
        return self._stretches(train), self._stretches(valid)

    def _stretches(self, spans: dict[int, list[Span]]) -> Stretches:
        return Stretches(
            self.records, [(i, start, end) for i in sorted(spans) for start, end in spans[i]], self.tokenizer
        )

    def _whole_records(self, names: Sequence[str]) -> dict[int, list[Span]]:
        index = {record.id: i for i, record in enumerate(self.records)}
        for name in names:
            if name not in index:
                some = ", ".join(list(index)[:5]) + (", ..." if len(index) > 5 else "")
                raise UsageError(f"no record '{name}' to hold out; the data has {some}")
        return {index[name]: [(0, len(self.records[index[name]]))] for name in names}

    def _by_intervals(
        self, intervals: Sequence[tuple[str, int, int, str]]
    ) -> tuple[dict[int, list[Span]], dict[int, list[Span]], set[str]]:
        """Training and validation spans by record, and the files that the intervals govern."""
        index = {record.id: i for i, record in enumerate(self.records)}
        named: dict[str, dict[int, list[Span]]] = {"train": {}, "valid": {}, "test": {}}
        for name, start, end, split in intervals:
            if split not in named:
                raise InputError(
                    f"interval {name}:{start}-{end}: the split must be train, valid or test, not '{split}'"
                )
            if name not in index:
                continue  # the intervals of a data set may name more than the user loaded
            record = self.records[index[name]]
            if not 0 <= start < end <= len(record):
                raise InputError(
                    f"interval {name}:{start}-{end} does not fit its record of {len(record)} bases"
                    f" ({record.path}:{record.line}); are the intervals of this assembly?"
                )
            named[split].setdefault(index[name], []).append((start, end))
        touched = {i for spans in named.values() for i in spans}
        if intervals and not touched:
            raise InputError(f"the split names no record of the data (it names '{intervals[0][0]}' first)")

        governed = {self.records[i].path for i in touched}
        with_train = {self.records[i].path for i in named["train"]}
        train, valid = {}, {}
        for i, record in enumerate(self.records):
            if record.path in governed:
                kept_away = named["valid"].get(i, []) + named["test"].get(i, [])
                mine = named["train"].get(i, []) if record.path in with_train else [(0, len(record))]
                train[i] = subtract(union(mine), union(kept_away))
                valid[i] = subtract(union(named["valid"].get(i, [])), union(named["test"].get(i, [])))
        return train, valid, governed

    def _by_fraction(self, candidates: list[int], fraction: float, seed: int, shortest: int) -> dict[int, list[Span]]:
        """One stretch of each record, or whole records where stretches would be too short."""
        if fraction == 0:
            return {}
        short = [i for i in candidates if len(self.records[i]) * fraction < shortest]
        if len(short) * fraction < 2:
            short = []  # too few to choose among: take stretches of them all the same
        valid = {}
        for i in sorted(set(candidates) - set(short)):
            if span := _stretch(self.records[i], fraction, seed):
                valid[i] = [span]
        wanted = fraction * sum(len(self.records[i]) for i in short)
        for i in sorted(short, key=lambda i: _draw(seed, self.records[i].id)):
            length = len(self.records[i])
            if length / 2 <= wanted:
                valid[i] = [(0, length)]
                wanted -= length
        return valid


def union(spans: Iterable[Span]) -> list[Span]:
    """The spans in order, those that touch or overlap made one."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def subtract(spans: Sequence[Span], holes: Sequence[Span]) -> list[Span]:
    """What is left of ``spans`` without ``holes``; both in order and without overlap, as from ``union``."""
    left: list[Span] = []
    first = 0
    for start, end in spans:
        while first < len(holes) and holes[first][1] <= start:
            first += 1
        k = first
        while k < len(holes) and holes[k][0] < end:
            if start < holes[k][0]:
                left.append((start, holes[k][0]))
            start = max(start, holes[k][1])
            k += 1
        if start < end:
            left.append((start, end))
    return left


def runs_of(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and ends of the runs of True in a (length,) mask."""
    # By pieces: a temporary as long as a chromosome costs more in fresh memory than in work.
    edges = np.concatenate(
        [np.empty(0, dtype=np.int64)]
        + [
            at + 1 + np.flatnonzero(mask[at + 1 : at + _PIECE + 1] != mask[at : at + _PIECE][: len(mask) - at - 1])
            for at in range(0, len(mask), _PIECE)
        ]
    )
    if len(mask) and mask[0]:
        edges = np.concatenate(([0], edges))
    if len(mask) and mask[-1]:
        edges = np.concatenate((edges, [len(mask)]))
    return edges[0::2], edges[1::2]


def _draw(seed: int, name: str) -> int:
    """A random 64-bit number of a seed and a record's name: files given in another order change nothing."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\t{name}".encode(), digest_size=8).digest(), "little")


def _stretch(record: EncodedRecord, fraction: float, seed: int) -> Span | None:
    """A stretch that holds ``fraction`` of the record's bases, N not counted, so that it is never a mere gap."""
    starts, ends = runs_of(record.tokens != N)
    ranks = np.concatenate(([0], np.cumsum(ends - starts)))  # bases before each run
    bases = int(ranks[-1])
    wanted = round(fraction * bases)
    if wanted == 0 or wanted == bases:
        return None
    first = _draw(seed, record.id) % (bases - wanted + 1)

    def position(rank: int) -> int:
        run = int(np.searchsorted(ranks, rank, side="right")) - 1
        return int(starts[run]) + rank - int(ranks[run])

    return position(first), position(first + wanted - 1) + 1


def _stem(path: str) -> str:
    return Path(path).name.split(".")[0]


def _encoded(paths: Sequence[str | Path], tokenizer: DnaTokenizer, prepared: Path | None) -> list[EncodedRecord]:
    records: list[EncodedRecord] = []
    for path in paths:
        if prepared is not None and str(path) != STDIN:
            records += [
                EncodedRecord(r.id, r.tokens, str(path), r.line, r.description)
                for r in prepare(path, tokenizer, prepared).records
                if len(r)
            ]
        else:
            records += [
                EncodedRecord(r.id, tokenizer.encode(r.sequence), r.path, r.line, r.description)
                for r in read_records(path)
            ]
    return records


def _distinctly_named(records: list[EncodedRecord]) -> list[EncodedRecord]:
    """The records, with the file put before a name that several files share; a sequence that occurs twice is noted."""
    paths_of: dict[str, set[str]] = {}
    for record in records:
        paths_of.setdefault(record.id, set()).add(record.path)
    named = [replace(r, id=f"{_stem(r.path)}:{r.id}") if len(paths_of[r.id]) > 1 else r for r in records]
    seen: dict[str, EncodedRecord] = {}
    alike: dict[tuple[int, int], EncodedRecord] = {}
    for record in named:
        if record.id in seen:
            first = seen[record.id]
            raise InputError.at(
                record.path, record.line, f"record '{record.id}' is in {first.path}:{first.line} too; rename one"
            )
        seen[record.id] = record
        other = alike.setdefault((len(record), zlib.crc32(record.tokens[:65536].data)), record)
        if other is not record and np.array_equal(other.tokens, record.tokens):
            log.warning(
                "%s:%d: record '%s' has the same sequence as '%s' (%s:%d); held-out figures may flatter",
                *(record.path, record.line, record.id, other.id, other.path, other.line),
            )
    return named
