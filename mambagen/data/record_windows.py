"""A record cut into windows as its letters come, in memory that does not grow with it.

Windows lie side by side from the record's first base; the last may be shorter. Those that are unknown for the most part
are passed over. With `at_most` the windows that are left are spread evenly: whenever they are more, every second one is
dropped and from then on every second one taken, so between half and all of `at_most` are left, and which ones is a
function of the record alone, not of the pieces in which it came.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mambagen.data.dna_tokens import N
from mambagen.data.species_windows import MOST_UNKNOWN, without_unknown

Tokens = NDArray[np.uint8]


@dataclass(frozen=True)
class RecordWindow:
    """A piece of a record: [start, end), 0-based, and the ids of its known bases."""

    start: int
    end: int
    known: Tokens


class RecordWindows:
    """Takes in a record's ids and gives its windows."""

    def __init__(self, window: int, at_most: int | None = None, most_unknown: float = MOST_UNKNOWN) -> None:
        """`at_most` None: all windows, given as soon as they are whole; else some of them, given at the end."""
        self.window, self.at_most, self.most_unknown = window, at_most, most_unknown
        self.length = 0  # bases that came
        self.unknown = 0  # of these, N and other ambiguity codes
        self._partial: list[Tokens] = []
        self._filled = 0
        self._usable = 0
        self._stride = 1
        self._kept: list[RecordWindow] = []

    def feed(self, ids: Tokens) -> Iterator[RecordWindow]:
        """Take in the next ids; gives windows only where all of them are wanted."""
        self.unknown += int(np.count_nonzero(ids >= N))
        at = 0
        while at < len(ids):
            piece = ids[at : at + self.window - self._filled]
            self._partial.append(piece)
            self._filled += len(piece)
            self.length += len(piece)
            at += len(piece)
            if self._filled == self.window:
                yield from self._complete()

    def finish(self) -> Iterator[RecordWindow]:
        """The record ended: its last window, and all that were kept."""
        if self._filled:
            yield from self._complete()
        yield from self._kept
        self._kept = []

    def _complete(self) -> Iterator[RecordWindow]:
        ids = self._partial[0] if len(self._partial) == 1 else np.concatenate(self._partial)
        end, size = self.length, self._filled
        self._partial, self._filled = [], 0
        known = without_unknown(ids)
        if not len(known) or size - len(known) > self.most_unknown * size:
            return
        index, self._usable = self._usable, self._usable + 1
        if self.at_most is None:
            yield RecordWindow(end - size, end, known)
        elif index % self._stride == 0:
            self._kept.append(RecordWindow(end - size, end, known.copy()))  # not a view: the block it is in may go
            if len(self._kept) > self.at_most:
                self._kept = self._kept[::2]
                self._stride *= 2
