"""Windows of DNA for a language model: drawn at random for training, laid side by side for evaluation.

A window of context L holds L + 1 bases: the inputs are its first L, the targets its last L.
"""

import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mambagen.data.dna_tokens import PAD, N, reverse_complement
from mambagen.data.genome import EncodedRecord, Span, Stretches, runs_of
from mambagen.data.intervals import Interval, interval_starts
from mambagen.errors import InputError, UsageError

log = logging.getLogger("mambagen")


@dataclass(frozen=True)
class WindowBatch:
    """Windows as arrays, a row each, and where they come from."""

    inputs: NDArray[np.uint8]  # (batch, context) token ids; PAD after a stretch's end
    targets: NDArray[
        Any
    ]  # (batch, context) int64, or as asked for: the next token, IGNORED where the loss does not count it
    record: NDArray[np.int64]  # (batch,) index into records
    start: NDArray[np.int64]  # (batch,) first base on the plus strand, 0-based, whichever strand is read
    minus: NDArray[np.bool_]  # (batch,) is the row the reverse complement?
    records: Sequence[EncodedRecord]

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def where(self) -> list[tuple[str, int, str]]:
        """(record id, start, strand) of each row."""
        return [
            (self.records[record].id, start, "-" if minus else "+")
            for record, start, minus in zip(self.record.tolist(), self.start.tolist(), self.minus.tolist(), strict=True)
        ]


class WindowSampler:
    """Draws batches of windows, each a function of (seed, step) alone.

    Every start whose window lies inside one stretch and has at least one base to predict is equally likely, so a record
    counts by its number of valid starts and windows of nothing but N never come. Row r of a step depends on (seed,
    step, r) only: batch size, workers and devices change nothing.
    """

    def __init__(
        self,
        stretches: Stretches,
        context: int,
        batch_size: int,
        seed: int,
        reverse_complement: bool = False,
        target_type: type[np.signedinteger[Any]] = np.int64,
    ) -> None:
        """``reverse_complement`` reads each window from the other strand with probability 1/2.

        ``target_type`` is that of the batches' targets. Raises InputError where no window fits.
        """
        if context < 1 or batch_size < 1:
            raise UsageError(f"context and batch size must be at least 1, not {context} and {batch_size}")
        if not 0 <= seed < 2**64:
            raise UsageError(f"the seed must be from 0 to 2^64 - 1, not {seed}")
        self.stretches = stretches
        self.context = context
        self.batch_size = batch_size
        self.seed = seed
        self.reverse_complement = reverse_complement
        self.target_type = target_type
        self._record, self._first, counts = self._ranges()
        self._before = np.concatenate(([0], np.cumsum(counts)))  # starts before each range

    def _ranges(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Record, first start and number of starts of each range of windows."""
        return _valid_starts(self.stretches, self.context)

    @property
    def starts(self) -> int:
        """How many different windows there are on one strand."""
        return int(self._before[-1])

    def stage(self, step: int) -> int:
        """0: all batches have one length (see `StagedSampler`)."""
        return 0

    def batch(self, step: int, rows: slice = slice(None)) -> WindowBatch:
        """The windows of a step; ``rows`` takes some of them, as one of several devices does."""
        # Raw Philox output rather than Generator methods: numpy promises that it stays the same between versions.
        # Two words a row; the modulo's bias is below 2^-30 for any genome.
        words = np.random.Philox(key=[self.seed, step]).random_raw(2 * self.batch_size).reshape(-1, 2)[rows]
        record, start = self._place(words)
        minus = (words[:, 1] >> np.uint64(63)).astype(bool) & self.reverse_complement
        window = _gather(self.stretches.records, record, start, self.context + 1)
        if minus.any():
            window[minus] = reverse_complement(window[minus])
        return self._as_batch(window, record, start, minus)

    def _place(self, words: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Record and start for each row of two random words; the highest bit of the second says which strand."""
        drawn = (words[:, 0] % np.uint64(self.starts)).astype(np.int64)
        source = np.searchsorted(self._before, drawn, side="right") - 1
        return self._record[source], self._first[source] + drawn - self._before[source]

    def reach(self) -> dict[int, list[Span]]:
        """Record index -> spans that hold every base that a window may have."""
        spans: dict[int, list[Span]] = {}
        counts = np.diff(self._before)
        for record, first, count in zip(self._record.tolist(), self._first.tolist(), counts.tolist(), strict=True):
            spans.setdefault(record, []).append((first, first + count + self.context))
        return spans

    def _as_batch(
        self,
        window: NDArray[np.uint8],
        record: NDArray[np.int64],
        start: NDArray[np.int64],
        minus: NDArray[np.bool_],
    ) -> WindowBatch:
        targets = self.stretches.tokenizer.targets(window[:, 1:], self.target_type)
        return WindowBatch(window[:, :-1].copy(), targets, record, start, minus, self.stretches.records)


class IntervalSampler(WindowSampler):
    """Draws an interval, each as likely as any other, then a window of it (see ``interval_starts``).

    As with ``WindowSampler`` row r of a step depends on (seed, step, r) only. Windows may leave the stretches: without
    ``strict`` they may touch what is held out.
    """

    def __init__(
        self,
        stretches: Stretches,
        intervals: Sequence[Interval],
        context: int,
        batch_size: int,
        seed: int,
        reverse_complement: bool = False,
        target_type: type[np.signedinteger[Any]] = np.int64,
        strict: bool = True,
    ) -> None:
        """``intervals`` with split "train" give windows. Raises InputError where none has room for one."""
        self._places = interval_starts(stretches.records, intervals, context + 1, strict)
        super().__init__(stretches, context, batch_size, seed, reverse_complement, target_type)

    def _ranges(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        places = self._places
        if not len(places):
            raise InputError(
                f"none of the {places.dropped} train intervals has room for a window of {self.context + 1} bases"
                if places.dropped
                else "there are no train intervals of these records to draw windows around; say --windows stretches"
            )
        if places.dropped:
            log.warning(
                "%d of %d train intervals have no room for windows of %d bases and give none",
                *(places.dropped, places.dropped + len(places), self.context + 1),
            )
        return places.record, places.first, places.count

    def _place(self, words: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        places = self._places
        row = (words[:, 0] % np.uint64(len(places))).astype(np.int64)
        along = (words[:, 1] & np.uint64(2**63 - 1)) % places.count[row].astype(np.uint64)
        return places.record[row], places.first[row] + along.astype(np.int64)


class StagedSampler:
    """One sampler after the other: the steps before ``ends[i]`` are those of ``samplers[i]``, later ones the last's."""

    def __init__(self, samplers: Sequence[WindowSampler], ends: Sequence[int]) -> None:
        if not samplers or len(samplers) != len(ends) or list(ends) != sorted(ends):
            raise ValueError("give as many ends, in order, as samplers")
        self.samplers, self.ends = list(samplers), list(ends)

    def stage(self, step: int) -> int:
        """Index of the sampler that a step is drawn by."""
        return min(bisect_right(self.ends, step), len(self.samplers) - 1)

    def batch(self, step: int, rows: slice = slice(None)) -> WindowBatch:
        """The windows of a step."""
        return self.samplers[self.stage(step)].batch(step, rows)


class FixedWindows:
    """Windows side by side over all of the stretches, for evaluation: iterate over them for batches.

    Every base of a stretch but its first is a target exactly once. The last window of a stretch is filled up with PAD,
    which the loss ignores; windows without any target are left out.
    """

    def __init__(
        self,
        stretches: Stretches,
        context: int,
        batch_size: int = 16,
        at_most: int | None = None,
        bases: int | None = None,
        trim: bool = False,
    ) -> None:
        """``at_most`` windows, or those of about ``bases``, evenly spread over all, make a quicker and rougher figure.

        ``trim`` leaves out the columns of a batch that are PAD in every row.
        """
        if context < 1 or batch_size < 1:
            raise UsageError(f"context and batch size must be at least 1, not {context} and {batch_size}")
        self.stretches = stretches
        self.context = context
        self.batch_size = batch_size
        record, start, end, targets = _side_by_side(stretches, context)
        chosen = np.flatnonzero(targets)
        if bases is not None:
            held = int((end - start - 1)[chosen].sum())
            at_most = max(1, len(chosen) * bases // max(1, held))
        self.trim = trim
        if at_most is not None and len(chosen) > at_most:
            chosen = chosen[np.linspace(0, len(chosen) - 1, at_most).round().astype(np.int64)]
        self.record, self.start, self.end = record[chosen], start[chosen], end[chosen]
        self.targets = int(targets[chosen].sum())

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.record)

    def __iter__(self) -> Iterator[WindowBatch]:
        tokenizer = self.stretches.tokenizer
        for row in range(0, len(self), self.batch_size):
            rows = slice(row, row + self.batch_size)
            record, start, end = self.record[rows], self.start[rows], self.end[rows]
            length = int((end - start).max()) if self.trim else self.context + 1
            window = _gather(self.stretches.records, record, start, length, end)
            minus = np.zeros(len(record), dtype=bool)
            inputs = window[:, :-1].copy()
            yield WindowBatch(inputs, tokenizer.targets(window[:, 1:]), record, start, minus, self.stretches.records)


def fixed_windows(
    stretches: Stretches,
    context: int,
    batch_size: int = 16,
    at_most: int | None = None,
    bases: int | None = None,
    trim: bool = False,
) -> FixedWindows:
    """All of the stretches in windows side by side, as an iterable of batches; see ``FixedWindows``."""
    return FixedWindows(stretches, context, batch_size, at_most, bases, trim)


def _gather(
    records: Sequence[EncodedRecord],
    record: NDArray[np.int64],
    start: NDArray[np.int64],
    length: int,
    end: NDArray[np.int64] | None = None,
) -> NDArray[np.uint8]:
    """(batch, length) tokens from ``start`` on, PAD from ``end`` on."""
    window = (
        np.full((len(record), length), PAD, dtype=np.uint8)
        if end is not None
        else np.empty((len(record), length), dtype=np.uint8)
    )
    ends = (start + length if end is None else end).tolist()
    # A copy a row: less work than an index array of eight bytes a base.
    for row, (i, first, last) in enumerate(zip(record.tolist(), start.tolist(), ends, strict=True)):
        window[row, : last - first] = records[i].tokens[first:last]
    return window


def _valid_starts(stretches: Stretches, context: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Ranges of valid window starts: their record, first start and number of starts."""
    ranges: list[tuple[int, int, int]] = []
    for (record, start, end), tokens in zip(stretches, stretches.tokens(), strict=True):
        stop = end - context  # starts are from start to stop - 1
        if stop <= start:
            continue
        begin = start
        unknown = tokens == N
        gaps = zip(*runs_of(unknown), strict=True) if np.count_nonzero(unknown) >= context else ()
        for gap_start, gap_end in gaps:
            if gap_end - gap_start < context:
                continue
            # All targets of a window fall into the gap for starts from gap_start - 1 to gap_end - 1 - context.
            last = min(start + int(gap_start) - 1, stop)
            if last > begin:
                ranges.append((record, begin, last - begin))
            begin = max(begin, start + int(gap_end) - context)
        if stop > begin:
            ranges.append((record, begin, stop - begin))
    if not ranges:
        _explain_no_window(stretches, context)
    columns = np.array(ranges, dtype=np.int64)
    return columns[:, 0], columns[:, 1], columns[:, 2]


def _explain_no_window(stretches: Stretches, context: int) -> None:
    if not len(stretches):
        raise InputError("there is no sequence to draw windows from")
    record, start, end = max(stretches, key=lambda span: span[2] - span[1])
    longest, place = end - start, stretches.records[record]
    at = f"{place.path}:{place.line}: record '{place.id}'"
    if longest <= context:
        advice = f"choose a context of {longest - 1} or less" if longest > 1 else "give longer sequences"
        raise InputError(
            f"{at}: a context of {context} needs {context + 1} bases in one piece, and the longest piece to train on,"
            f" this one, has {longest}; {advice}"
        )
    raise InputError(f"{at}: every window of {context + 1} bases is nothing but N; give sequence that is known")


def _side_by_side(
    stretches: Stretches, context: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Record, start, end and number of targets of windows side by side; they share the base between them."""
    parts: list[NDArray[np.int64]] = [np.empty((0, 4), dtype=np.int64)]
    letters = np.zeros(256, dtype=bool)
    letters[list(stretches.tokenizer.letters)] = True
    for (record, start, end), tokens in zip(stretches, stretches.tokens(), strict=True):
        if end - start < 2:
            continue
        offsets = np.arange(0, end - start - 1, context)
        counted = tokens[1:] != N if not letters[N] else np.ones(len(tokens) - 1, dtype=bool)
        part = np.empty((len(offsets), 4), dtype=np.int64)
        part[:, 0] = record
        part[:, 1] = start + offsets
        part[:, 2] = np.minimum(start + offsets + context + 1, end)
        part[:, 3] = np.add.reduceat(counted, offsets, dtype=np.int64)
        parts.append(part)
    columns = np.concatenate(parts)
    return columns[:, 0], columns[:, 1], columns[:, 2], columns[:, 3]
