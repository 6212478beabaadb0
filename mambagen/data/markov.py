"""Markov chains of fixed order: the baselines that a DNA language model has to beat.

The chance of a base given the k before it is estimated with additive smoothing towards the chain one order lower,

    p_k(b | c) = (count(c, b) + s_k p_{k-1}(b | c')) / (count(c) + s_k),      p_0(b) = (count(b) + 1) / (total + q),

where c' is the context c without its oldest base, q the number of letters and s_k a pseudo-count a order, chosen among
STRENGTHS by the likelihood of a tenth of the training part, ten pieces of each stretch, under counts of the rest
(MacKay and Peto, A hierarchical Dirichlet language model, 1995, with the pseudo-counts set by validation). Held-out
data plays no part.

Only what stands in front of a base inside the same window is used, as for the language model: where fewer than k bases
do, or an N lies among them, the longest run of bases directly in front is the context.
"""

from collections.abc import Iterable, Iterator
from math import exp

import numpy as np
from numpy.typing import NDArray

from mambagen.data.dna_tokens import DnaTokenizer, reverse_complement
from mambagen.data.genome import Stretches
from mambagen.data.windows import WindowBatch
from mambagen.errors import InputError, UsageError

HIGHEST_ORDER = 12
STRENGTHS = tuple(4.0**i for i in range(-2, 8))
_CHUNK = 1 << 20


class MarkovModel:
    """A Markov chain of one order, holding those of all lower orders too: one fit serves several baselines."""

    def __init__(self, order: int, both_strands: bool = False) -> None:
        """``both_strands`` counts the reverse complement of the training part as well."""
        if not 0 <= order <= HIGHEST_ORDER:
            raise UsageError(f"the order of a Markov chain must be from 0 to {HIGHEST_ORDER}, not {order}")
        self.order = order
        self.both_strands = both_strands
        self.strengths: list[float] = []  # s_1 to s_order
        self._nats: NDArray[np.float64] | None = None  # -log p of every slot
        self._layout: _Layout | None = None

    def fit(self, stretches: Stretches) -> "MarkovModel":
        """Count contexts in the training part; returns the model itself. Raises InputError where there is no base."""
        layout = self._layout = _Layout(self.order, stretches.tokenizer)
        rest, tenth = _Counter(layout), _Counter(layout)
        for symbols, shares in _pieces(layout, _with_shares(stretches, self.both_strands)):
            slots = layout.slots(symbols, self.order)
            rest.add(slots[shares == _REST])
            tenth.add(slots[shares == _TUNING])
        fitted, tuning = layout.by_order(rest.counts()), layout.by_order(tenth.counts())
        if not fitted[0].any():
            raise InputError("the training part holds no known base; there is nothing to fit a Markov chain on")
        self.strengths = _best_strengths(fitted, tuning)
        counts = [a + b for a, b in zip(fitted, tuning, strict=True)]
        chances = _chances(counts, self.strengths)
        self._nats = -np.log(np.concatenate([chance.ravel() for chance in chances]))
        return self

    def loss(self, data: Stretches | Iterable[WindowBatch], order: int | None = None) -> tuple[float, int]:
        """Sum of the loss in nats and number of targets, over windows or over whole stretches.

        On windows the targets are those of the language model, position by position, and no context reaches beyond a
        window. On stretches the first base of each is no target. ``order`` takes a lower order than the model's.
        """
        if self._nats is None or self._layout is None:
            raise ValueError("fit the model first")
        order = self.order if order is None else order
        if not 0 <= order <= self.order:
            raise UsageError(f"this Markov chain holds orders 0 to {self.order}, not {order}")
        total, count = 0.0, 0
        layout = self._layout
        pieces = _pieces(layout, _but_the_first(data)) if isinstance(data, Stretches) else _rows(layout, data)
        for symbols, shares in pieces:
            slots = layout.slots(symbols, order)[shares != _NONE]
            total += float(self._nats[slots].sum())
            count += len(slots)
        return total, count

    def perplexity(self, data: Stretches | Iterable[WindowBatch], order: int | None = None) -> float:
        """exp of the mean loss; nan where there is no target."""
        total, count = self.loss(data, order)
        return exp(total / count) if count else float("nan")


class _Layout:
    """One flat table for all orders: the slot of (context of j letters, letter) is offset_j + q * code + letter.

    The code of a context has its newest letter as the lowest digit in base q, so that code mod q^j is the context of
    its newest j letters, and summing an order's table over the highest digit gives the table one order lower.
    """

    def __init__(self, order: int, tokenizer: DnaTokenizer) -> None:
        self.order = order
        self.q = len(tokenizer.letters)
        self.powers = np.array([self.q**j for j in range(order + 2)], dtype=np.int64)
        self.offsets = np.concatenate(([0], np.cumsum(self.powers[1:])))
        self.size = int(self.offsets[-1])
        self._symbol_of = np.full(256, self.q, dtype=np.uint8)  # q: no letter
        self._symbol_of[list(tokenizer.letters)] = np.arange(self.q)

    def symbols(self, tokens: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Letters as 0 to q - 1, everything else as q."""
        translated = np.ascontiguousarray(tokens).tobytes().translate(self._symbol_of.tobytes())
        return np.frombuffer(translated, dtype=np.uint8).reshape(tokens.shape)

    def slots(self, symbols: NDArray[np.uint8], order: int) -> NDArray[np.int64]:
        """(rows, length) slots of each position with its longest context of at most ``order`` letters in its row.

        Slots of positions that hold no letter mean nothing.
        """
        no_letter = symbols == self.q
        digits = np.where(no_letter, 0, symbols).astype(np.int32)
        code = np.zeros(symbols.shape, dtype=np.int32 if self.size < 2**31 else np.int64)
        for back in range(1, min(order, symbols.shape[1] - 1) + 1):
            code[:, back:] += digits[:, :-back] * np.int32(self.q ** (back - 1))
        slots = code * self.q
        slots += symbols
        slots += self.offsets[order].astype(slots.dtype)

        # Positions with less than `order` letters directly in front of them use a lower order.
        position = np.arange(symbols.shape[1])
        if no_letter.any():
            last = np.maximum.accumulate(np.where(no_letter, position, -1), axis=1)
            before = np.concatenate((np.full((len(symbols), 1), -1), last[:, :-1]), axis=1)
            depth = position - before - 1
        else:
            depth = np.broadcast_to(position, symbols.shape)
        row, column = np.nonzero(depth < order)
        j = depth[row, column]
        short = code[row, column] % self.powers[j]
        slots[row, column] = self.offsets[j] + short * self.q + symbols[row, column]
        return slots

    def by_order(self, counts: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """(q^j, q) counts for each order j: a position with a context of j letters counts for all orders up to j."""
        tables = [counts[self.offsets[j] : self.offsets[j + 1]].copy() for j in range(self.order + 1)]
        for j in range(self.order, 0, -1):
            tables[j - 1] += tables[j].reshape(self.q, -1).sum(axis=0)
        return [table.reshape(-1, self.q) for table in tables]


class _Counter:
    """Counts slots, many at a time: a pass over the whole table for each small contig would cost the most."""

    def __init__(self, layout: _Layout) -> None:
        self._size = layout.size
        self._counts = np.zeros(layout.size, dtype=np.int64)
        self._pending: list[NDArray[np.integer]] = []
        self._waiting = 0

    def add(self, slots: NDArray[np.integer]) -> None:
        """Take in the slots of some positions."""
        self._pending.append(slots)
        self._waiting += len(slots)
        if self._waiting >= max(_CHUNK, self._size):
            self.counts()

    def counts(self) -> NDArray[np.int64]:
        """(slots,) how often each occurred."""
        if self._pending:
            self._counts += np.bincount(np.concatenate(self._pending), minlength=self._size)
            self._pending, self._waiting = [], 0
        return self._counts


# What a position counts for: an array of these goes beside each array of tokens.
_NONE, _REST, _TUNING = 0, 1, 2
_Shared = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def _with_shares(stretches: Stretches, both_strands: bool) -> Iterator[_Shared]:
    """The stretches, a tenth of each set aside for tuning in ten pieces, so that no single repeat decides."""
    for tokens in stretches.tokens():
        shares = np.full(len(tokens), _REST, dtype=np.uint8)
        for piece in range(10):
            shares[len(tokens) * (20 * piece + 9) // 200 : len(tokens) * (20 * piece + 11) // 200] = _TUNING
        yield tokens, shares
        if both_strands:
            yield reverse_complement(tokens), shares[::-1]


def _but_the_first(stretches: Stretches) -> Iterator[_Shared]:
    """The stretches, all bases counted but the first of each, which nothing stands before."""
    for tokens in stretches.tokens():
        shares = np.full(len(tokens), _REST, dtype=np.uint8)
        shares[:1] = _NONE
        yield tokens, shares


def _pieces(layout: _Layout, sequences: Iterable[_Shared]) -> Iterator[_Shared]:
    """(1, length) symbols and what they count for, in pieces of about a chunk.

    Short sequences are joined, with a symbol that is no letter between them, so that no context crosses; long ones are
    cut, each piece beginning with the letters before it that its first contexts need.
    """
    symbols_of: list[NDArray[np.uint8]] = []
    shares_of: list[NDArray[np.uint8]] = []
    waiting = 0
    between = np.array([layout.q], dtype=np.uint8), np.array([_NONE], dtype=np.uint8)
    for tokens, shares in sequences:
        symbols = layout.symbols(tokens)
        shares = np.where(symbols < layout.q, shares, np.uint8(_NONE))
        for first in range(0, len(tokens), _CHUNK):
            look = max(0, first - layout.order)
            end = min(first + _CHUNK, len(tokens))
            symbols_of += [symbols[look:end], between[0]]
            shares_of += [np.zeros(first - look, dtype=np.uint8), shares[first:end], between[1]]
            waiting += end - look
            if waiting >= _CHUNK:
                yield np.concatenate(symbols_of)[None], np.concatenate(shares_of)[None]
                symbols_of, shares_of, waiting = [], [], 0
    if symbols_of:
        yield np.concatenate(symbols_of)[None], np.concatenate(shares_of)[None]


def _rows(layout: _Layout, windows: Iterable[WindowBatch]) -> Iterator[_Shared]:
    """(batch, context + 1) symbols of windows: the targets count, and no context reaches beyond a row."""
    for batch in windows:
        last = batch.targets[:, -1:]
        tokens = np.concatenate((batch.inputs, np.where(last < 0, 0, last).astype(np.uint8)), axis=1)
        shares = np.zeros(tokens.shape, dtype=np.uint8)
        shares[:, 1:][batch.targets >= 0] = _REST
        yield layout.symbols(tokens), shares


def _chances(counts: list[NDArray[np.int64]], strengths: list[float]) -> list[NDArray[np.float64]]:
    """(q^j, q) probabilities for each order that has a strength, and order 0."""
    q = counts[0].shape[1]
    chances = [(counts[0] + 1) / (counts[0].sum() + q)]
    for table, strength in zip(counts[1:], strengths, strict=False):
        chances.append(_smoothed(table, chances[-1], strength))
    return chances


def _smoothed(counts: NDArray[np.int64], lower: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    prior = np.tile(lower, (counts.shape[0] // lower.shape[0], 1))  # the oldest letter is the highest digit
    return (counts + strength * prior) / (counts.sum(axis=1, keepdims=True) + strength)


def _best_strengths(fitted: list[NDArray[np.int64]], tuning: list[NDArray[np.int64]]) -> list[float]:
    """The pseudo-count of each order, lowest first, that makes the tuning counts likeliest."""
    strengths: list[float] = []
    lower = _chances(fitted, [])[-1]
    for counts, seen in zip(fitted[1:], tuning[1:], strict=True):
        losses = [-float((seen * np.log(_smoothed(counts, lower, s))).sum()) for s in STRENGTHS]
        strengths.append(STRENGTHS[int(np.argmin(losses))] if seen.any() else float(counts.shape[1]))
        lower = _smoothed(counts, lower, strengths[-1])
    return strengths
