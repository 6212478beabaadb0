"""Windows of several species: drawn uniformly by species for training, drawn once and hashed for evaluation.

Unknown bases (N and other ambiguity codes) are left out of a window before a model sees it, so how much of an assembly
is unknown tells nothing; a window that is unknown for the most part is never drawn.
"""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mambagen.data.dna_tokens import N, reverse_complement
from mambagen.data.genome import EncodedRecord, Stretches, runs_of, union
from mambagen.errors import InputError, UsageError

MOST_UNKNOWN = 0.5  # of a window that is drawn
STREAM = 4  # of Philox's counter; 0 to 3 are those of windows, masks and labelled sequences
_PIECE = 1 << 22

Tokens = NDArray[np.uint8]


@dataclass(frozen=True)
class DrawnWindows:
    """Windows of one length before unknown bases are left out, a row each."""

    length: int
    label: NDArray[np.int64]  # (rows,) index of the species
    record: NDArray[np.int64]  # (rows,) index into records
    start: NDArray[np.int64]  # (rows,) 0-based, on the plus strand
    minus: NDArray[np.bool_]  # (rows,) is the row read from the other strand?
    records: Sequence[EncodedRecord]

    def __len__(self) -> int:
        return len(self.label)

    def tokens(self, row: int) -> Tokens:
        """(length,) ids of the plus strand, unknown bases among them."""
        start = int(self.start[row])
        return self.records[int(self.record[row])].tokens[start : start + self.length]

    def sequences(self) -> list[Tokens]:
        """What a model reads of each row."""
        known = [without_unknown(self.tokens(row)) for row in range(len(self))]
        return [reverse_complement(k) if minus else k for k, minus in zip(known, self.minus.tolist(), strict=True)]

    def where(self) -> list[tuple[str, int, str]]:
        """(record id, start, strand) of each row."""
        rows = zip(self.record.tolist(), self.start.tolist(), self.minus.tolist(), strict=True)
        return [(self.records[record].id, start, "-" if minus else "+") for record, start, minus in rows]

    def digest(self) -> str:
        """16 hexadecimal digits of names, places and sequences: two evaluations with the same are of the same bases."""
        total = hashlib.sha256()
        for row, (name, start, strand) in enumerate(self.where()):
            crc = zlib.crc32(np.ascontiguousarray(self.tokens(row)).data)
            total.update(f"{self.label[row]}\t{name}\t{start}\t{self.length}\t{strand}\t{crc}\n".encode())
        return total.hexdigest()[:16]

    def independent(self) -> NDArray[np.int64]:
        """For each label that occurs, in order: how many windows would lie side by side in the bases that these cover.

        Windows that overlap are no independent trials: intervals of a share are those of this many (or of their
        number, where that is less).
        """
        counts = []
        for label in np.unique(self.label):
            rows = np.flatnonzero(self.label == label)
            covered = 0
            for record in np.unique(self.record[rows]):
                starts = self.start[rows[self.record[rows] == record]].tolist()
                covered += sum(end - start for start, end in union((s, s + self.length) for s in starts))
            counts.append(min(len(rows), -(-covered // self.length)))
        return np.array(counts, dtype=np.int64)


def without_unknown(tokens: Tokens) -> Tokens:
    """The ids that are A, C, G or T."""
    known = tokens < N  # the special tokens never stand in a record
    return tokens if known.all() else tokens[known]


def window_starts(
    stretches: Stretches, length: int, most_unknown: float = MOST_UNKNOWN
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Where windows may begin, as ranges: (record, first start, number of starts), in the order of the stretches."""
    limit = int(most_unknown * length)
    ranges: list[tuple[int, int, int]] = []
    for (record, start, end), tokens in zip(stretches, stretches.tokens(), strict=True):
        starts = end - start - length + 1
        if starts < 1:
            continue
        unknown = tokens >= N
        if np.count_nonzero(unknown) <= limit:
            ranges.append((record, start, starts))
            continue
        for at in range(0, starts, _PIECE):  # sums over a whole chromosome would take eight times its memory
            here = unknown[at : at + _PIECE + length - 1]
            sums = np.concatenate(([0], np.cumsum(here, dtype=np.int64)))
            good = sums[length:] - sums[:-length] <= limit
            for first, last in zip(*runs_of(good), strict=True):
                ranges.append((record, start + at + int(first), int(last - first)))
    columns = np.array(ranges, dtype=np.int64).reshape(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2]


class SpeciesSampler:
    """Draws windows for training: a species uniformly, a record, a start; row r of a step depends on (seed, step, r).

    A record counts by its number of starts (`by_record="bases"`), so every start of a species is equally likely, or as
    much as any other of its species ("uniform").
    """

    def __init__(
        self,
        parts: Sequence[Stretches],
        names: Sequence[str],
        seed: int,
        reverse_complement: bool = True,
        most_unknown: float = MOST_UNKNOWN,
        by_record: str = "bases",
    ) -> None:
        """`parts`: one a species; `reverse_complement` reads each window from the other strand with chance 1/2."""
        if by_record not in ("bases", "uniform"):
            raise UsageError(f"records count by 'bases' or are 'uniform', not '{by_record}'")
        self.parts, self.names, self.seed = parts, names, seed
        self.reverse_complement, self.most_unknown, self.by_record = reverse_complement, most_unknown, by_record

    def draw(self, step: int, length: int, rows: int) -> DrawnWindows:
        """The windows of a step; InputError where a species has none of this length."""
        # Raw Philox output, which numpy promises to keep; the modulo's bias is below 2^-30 for any genome.
        words = np.random.Philox(key=[self.seed, step], counter=[0, 0, 0, STREAM]).random_raw(4 * rows).reshape(-1, 4)
        label = (words[:, 0] % np.uint64(len(self.parts))).astype(np.int64)
        record, start = np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.int64)
        for species in np.unique(label).tolist():
            mine = np.flatnonzero(label == species)
            record[mine], start[mine] = self._place(species, length, words[mine, 1], words[mine, 2])
        minus = (words[:, 3] >> np.uint64(63)).astype(bool) & self.reverse_complement
        return DrawnWindows(length, label, record, start, minus, self.parts[0].records)

    def check(self, lengths: Sequence[int]) -> None:
        """InputError where a species has no window of one of these lengths."""
        for length in lengths:
            for species in range(len(self.parts)):
                self._ranges(species, length)

    def _place(
        self, species: int, length: int, which: NDArray[np.uint64], offset: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        record, first, before = self._ranges(species, length)
        if self.by_record == "bases":
            drawn = (offset % np.uint64(before[-1])).astype(np.int64)
        else:
            begins = np.flatnonzero(np.concatenate(([True], record[1:] != record[:-1])))
            ends = np.append(begins[1:], len(record))
            chosen = (which % np.uint64(len(begins))).astype(np.int64)
            low, high = before[begins[chosen]], before[ends[chosen]]
            drawn = low + (offset % (high - low).astype(np.uint64)).astype(np.int64)
        source = np.searchsorted(before, drawn, side="right") - 1
        return record[source], first[source] + drawn - before[source]

    @lru_cache(maxsize=4096)  # noqa: B019 (a sampler lives as long as its job)
    def _ranges(self, species: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        record, first, count = window_starts(self.parts[species], length, self.most_unknown)
        if not len(record):
            longest = max((end - start for _, start, end in self.parts[species]), default=0)
            raise InputError(
                f"species {self.names[species]} has no window of {length:,} bases (its longest stretch has {longest:,}"
                f"{', much of it unknown' if longest >= length else ''}); take a smaller --context or leave it out"
            )
        return record, first, np.concatenate(([0], np.cumsum(count)))


def draw_evaluation(
    parts: Sequence[Stretches],
    length: int,
    per_species: int,
    seed: int,
    most_unknown: float = MOST_UNKNOWN,
) -> DrawnWindows:
    """Windows for evaluation, as many of each species where it has them: species, then record, then start.

    The starts of a species are cut into as many equal parts as windows are wanted, and one is drawn in each, so that
    the windows spread over all there is. A species gets no more than twice the windows that lie side by side in it, and
    one that has none of this length is not among the labels. A function of the arguments alone.
    """
    labels, records, starts = [], [], []
    for species, stretches in enumerate(parts):
        record, first, count = window_starts(stretches, length, most_unknown)
        if not len(record):
            continue
        before = np.concatenate(([0], np.cumsum(count)))
        bases = int(before[-1]) + len(record) * (length - 1)
        wanted = int(min(per_species, before[-1], max(1, 2 * bases // length)))
        words = np.random.Philox(key=[seed, length], counter=[species, 0, 1, STREAM]).random_raw(wanted)
        share = (np.arange(wanted) + (words >> np.uint64(11)) / 2.0**53) / wanted
        drawn = np.minimum((share * before[-1]).astype(np.int64), before[-1] - 1)
        source = np.searchsorted(before, drawn, side="right") - 1
        labels.append(np.full(wanted, species, dtype=np.int64))
        records.append(record[source])
        starts.append(first[source] + drawn - before[source])
    if not labels:
        none = np.empty(0, dtype=np.int64)
        return DrawnWindows(length, none, none, none, none.astype(bool), ())
    label = np.concatenate(labels)
    minus = np.zeros(len(label), dtype=bool)
    return DrawnWindows(length, label, np.concatenate(records), np.concatenate(starts), minus, parts[0].records)
