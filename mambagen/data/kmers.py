"""Sequences as frequencies of k-mers: what the baselines of the classifiers see."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mambagen.data.dna_tokens import A, T

_ROWS, _BASES = 4096, 1 << 20  # counted at once: some ten times the bases in memory, whatever the sequences' length


def kmer_frequencies(sequences: Sequence[NDArray[np.uint8]], k: int) -> NDArray[np.float32]:
    """(sequences, 4^k) shares of each k-mer among those without N, in the order AA..A, AA..C, ...; zeros where none."""
    if not 1 <= k <= 8:
        raise ValueError(f"k is {k}; it must be 1 to 8")
    table = np.zeros((len(sequences), 4**k), dtype=np.float32)
    gap = np.zeros(k, dtype=np.uint8)  # no base: keeps neighbours apart
    for first, end in _portions([len(row) for row in sequences]):
        rows = sequences[first:end]
        tokens = np.concatenate([part for row in rows for part in (row, gap)])
        owner = np.repeat(np.arange(len(rows)), [len(row) + k for row in rows])[: len(tokens) - k + 1]
        code = np.zeros(len(tokens) - k + 1, dtype=np.int64)
        known = np.ones(len(code), dtype=bool)
        for offset in range(k):
            base = tokens[offset : offset + len(code)].astype(np.int64) - A
            known &= (base >= 0) & (base <= T - A)
            code = code * 4 + base
        counts = np.bincount(owner[known] * 4**k + code[known], minlength=len(rows) * 4**k)
        table[first:end] = counts.reshape(len(rows), 4**k)
    total = table.sum(1, keepdims=True)
    return table / np.maximum(total, 1)


def _portions(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, end) of sequences to be counted at once: at most _ROWS, and _BASES bases where that is more than one."""
    first, bases = 0, 0
    for row, length in enumerate(lengths):
        if row > first and (row - first == _ROWS or bases + length > _BASES):
            yield first, row
            first, bases = row, 0
        bases += length
    if lengths:
        yield first, len(lengths)
