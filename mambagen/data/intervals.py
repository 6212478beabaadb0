"""Windows of any length around the intervals of a data set, chromosomes by their names, and what windows can reach.

Published DNA models are trained on windows around the rows of a BED file, lengthened on both sides where the context is
longer than a row: nothing keeps such a window away from a validation or test row next to it. Here ``strict`` does, and
``overlap`` counts the bases that a sampler's windows reach of what is held out.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mambagen.data.genome import EncodedRecord, Span, subtract, union
from mambagen.errors import InputError

Interval = tuple[str, int, int, str]  # record, start, end, split; 0-based and half-open

_CHROMOSOME = re.compile(r"(?:.*:)?(?:chr(?:omosome)?_?)?([0-9]{1,2}[AB]?|[XYWZM]|MT)", re.IGNORECASE)
_DESCRIBED = re.compile(r"\bchromosome:? ?([0-9]{1,2}[AB]?|[XYWZ])\b(?! unlocalized)", re.IGNORECASE)


class NamedRecord(Protocol):
    """What is looked at of a record."""

    @property
    def id(self) -> str: ...

    @property
    def description(self) -> str: ...

    def __len__(self) -> int: ...


def chromosome_of(record: NamedRecord) -> str | None:
    """The chromosome that a record is, as "1", "2A" or "X"; None for a piece, a patch or a scaffold.

    By the record's name (chr1, FILE:chr1, 1), or by what an archive's header says (NC_000001.11 Homo sapiens
    chromosome 1, ...).
    """
    found = _CHROMOSOME.fullmatch(record.id)
    if not found and "scaffold" not in record.description and "unlocalized" not in record.description:
        found = _DESCRIBED.search(record.description)
    return found[1].upper() if found else None


def chromosome_intervals(records: Iterable[NamedRecord], chromosomes: Mapping[str, Sequence[str]]) -> list[Interval]:
    """Whole chromosomes as intervals: ``chromosomes`` holds for train, valid and test their labels.

    Records that are none of these chromosomes have no interval. Raises InputError where no record is one.
    """
    split_of = {label.upper(): split for split, labels in chromosomes.items() for label in labels}
    rows: list[Interval] = []
    for record in records:
        label = chromosome_of(record)
        if label in split_of and len(record):
            rows.append((record.id, 0, len(record), split_of[label]))
    if not rows:
        raise InputError(f"no record is one of the chromosomes that the data set is divided by ({', '.join(split_of)})")
    return rows


@dataclass(frozen=True)
class IntervalStarts:
    """For each interval that gives windows, its record, the first start and the number of starts."""

    record: NDArray[np.int64]
    first: NDArray[np.int64]
    count: NDArray[np.int64]
    dropped: int  # intervals that give none: no room in the record, or none that is not held out

    def __len__(self) -> int:
        return len(self.record)


def interval_starts(
    records: Sequence[EncodedRecord], intervals: Sequence[Interval], length: int, strict: bool
) -> IntervalStarts:
    """Where windows of ``length`` bases may begin, for each train interval.

    A window no longer than its interval lies inside of it. A longer one has the interval in its middle, moved as far as
    the record's ends ask for; with ``strict`` also as far as the held-out rows ask for, and an interval without room
    between these gives no window.
    """
    index = {record.id: i for i, record in enumerate(records)}
    held = held_out(records, intervals)
    rows: list[tuple[int, int, int]] = []
    dropped = 0
    for name, start, end, split in intervals:
        if split != "train" or name not in index:
            continue
        i = index[name]
        whole = (0, len(records[i]))
        place = _room(start, end, whole, held.get(i, [])) if strict else (start, end, *whole)
        if place is None or place[3] - place[2] < length:
            dropped += 1
            continue
        start, end, low, high = place
        if length <= end - start:
            rows.append((i, start, end - start - length + 1))
        else:
            middle = (start + end) // 2 - length // 2
            rows.append((i, min(max(middle, low), high - length), 1))
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return IntervalStarts(columns[:, 0], columns[:, 1], columns[:, 2], dropped)


def _room(start: int, end: int, whole: Span, held: list[Span]) -> tuple[int, int, int, int] | None:
    """The longest part of an interval that is not held out, and the free room that it lies in."""
    near = held[max(0, bisect_left(held, (start,)) - 1) : bisect_left(held, (end,))]
    own = subtract([(start, end)], near)
    if not own:
        return None
    first, last = max(own, key=lambda span: span[1] - span[0])
    before = bisect_left(held, (last,))  # of the held-out spans, which are in order, those that end before the part
    low = held[before - 1][1] if before else whole[0]
    high = held[before][0] if before < len(held) else whole[1]
    return first, last, low, high


def held_out(records: Sequence[EncodedRecord], intervals: Sequence[Interval]) -> dict[int, list[Span]]:
    """Record index -> the spans of its validation and test rows."""
    index = {record.id: i for i, record in enumerate(records)}
    spans: dict[int, list[Span]] = {}
    for name, start, end, split in intervals:
        if split != "train" and name in index:
            spans.setdefault(index[name], []).append((start, end))
    return {i: union(found) for i, found in spans.items()}


def overlap(reach: Mapping[int, Sequence[Span]], held: Mapping[int, Sequence[Span]]) -> int:
    """Number of bases that are in both: each counts once."""
    shared = 0
    for i, spans in reach.items():
        mine = union(spans)
        rest = subtract(mine, union(held.get(i, [])))
        shared += sum(b - a for a, b in mine) - sum(b - a for a, b in rest)
    return shared
