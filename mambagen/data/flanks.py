"""What a masked language model has to beat: a base guessed from the k bases on either side of it, by counts.

The counts see their flanks as they are, without masks, which a model does not: that is in their favour.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mambagen.data.dna_tokens import IGNORED, A, T
from mambagen.data.genome import Stretches
from mambagen.data.masking import MaskedWindows

_PIECE = 1 << 22


class FlankModel:
    """P(base | k bases before, k bases after) from counts with one added to each; k = 0 is the bases' frequency."""

    def __init__(self, k: int) -> None:
        if not 0 <= k <= 5:
            raise ValueError(f"k is {k}; it must be 0 to 5, as there are 4^(2k) flanks")
        self.k = k
        self.counts = np.ones((4 ** (2 * k), 4), dtype=np.int64)

    def fit(self, stretches: Stretches, both_strands: bool = False) -> "FlankModel":
        """Count in the stretches (`both_strands`: and in their reverse complements)."""
        total = np.zeros(self.counts.size, dtype=np.int64)
        for tokens in stretches.tokens():
            for at in range(0, len(tokens), _PIECE):
                piece = tokens[max(0, at - self.k) : at + _PIECE + self.k]
                for strand in (piece, stretches.tokenizer.reverse_complement(piece))[: 1 + both_strands]:
                    flanks, bases = self._read(strand[None])
                    known = flanks >= 0
                    total += np.bincount(flanks[known] * 4 + bases[known], minlength=total.size)
        self.counts += total.reshape(self.counts.shape)
        return self

    def loss(self, masked: MaskedWindows) -> tuple[float, int]:
        """(sum of nats, targets) over the masked bases; by frequency alone where a flank is cut short or has an N."""
        chances = np.log(self.counts / self.counts.sum(1, keepdims=True))
        plain = self.counts.sum(0)
        frequencies = np.log(plain / plain.sum())
        total, count = 0.0, 0
        for window, (_, targets, _) in zip(masked.windows, masked, strict=True):
            flanks = self._read(window.inputs)[0]
            wide = np.pad(flanks, ((0, 0), (self.k, targets.shape[1] - flanks.shape[1] - self.k)), constant_values=-1)
            chosen = targets != IGNORED
            base, flank = targets[chosen] - A, wide[chosen]
            total -= np.where(flank >= 0, chances[flank, base], frequencies[base]).sum()
            count += len(base)
        return total, count

    def _read(self, tokens: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(rows, length - 2k) flanks as numbers, -1 where they or the base are not all known, and the bases."""
        k = self.k
        inside = max(0, tokens.shape[1] - 2 * k)
        code = tokens.astype(np.int64) - A
        known = np.ones((len(tokens), inside), dtype=bool)
        flanks = np.zeros((len(tokens), inside), dtype=np.int64)
        for offset in range(2 * k + 1):
            column = code[:, offset : offset + inside]
            known &= (column >= 0) & (column <= T - A)
            if offset != k:
                flanks = flanks * 4 + column
        return np.where(known, flanks, -1), code[:, k : k + inside]


def fit_flanks(
    train: Stretches, masked: MaskedWindows, ks: Sequence[int], both_strands: bool = False
) -> dict[int, float]:
    """k -> mean loss in nats on the masked bases of the held-out windows."""
    losses = {}
    for k in ks:
        total, count = FlankModel(k).fit(train, both_strands).loss(masked)
        if count:
            losses[k] = total / count
    return losses
