"""Masked language modelling: which bases are hidden or changed, and what is to be guessed.

As BERT does it (arXiv 1810.04805, section 3.1), with the alphabet of DNA: a share of the bases is chosen; of these 80 %
become MASK, 10 % a base drawn from A, C, G and T, and 10 % stay. N and the special tokens are never chosen.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mambagen.data.dna_tokens import IGNORED, MASK, PAD, A, T
from mambagen.data.windows import FixedWindows

SHARE = 0.15
HIDDEN, CHANGED = 0.8, 0.1  # of the chosen; the rest stay as they are

# The highest word of Philox's counter tells streams of one key apart; that of WindowSampler is 0.
TRAINING, EVALUATION = 1, 2


def mask_bases(
    tokens: NDArray[np.uint8], seed: int, step: int, first_row: int = 0, stream: int = TRAINING, share: float = SHARE
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Corrupt windows: (inputs, targets) for ids (rows, length), which are left alone.

    What happens to row r is a function of (seed, step, first_row + r) and the length alone, so workers, devices and the
    number of rows at once change nothing.

    Returns:
        inputs (rows, length) uint8, and targets (rows, length) int64: the id at chosen positions, IGNORED elsewhere.
    """
    rows, length = tokens.shape
    words = _words(seed, step, first_row, rows, length, stream)
    # Of each 64-bit word the upper half chooses, 30 bits say what happens, the last two are the other base.
    chosen = (words >> np.uint64(32) < np.uint64(round(share * 2**32))) & (tokens >= A) & (tokens <= T)
    fate = (words >> np.uint64(2)) & np.uint64(2**30 - 1)
    hidden = chosen & (fate < np.uint64(round(HIDDEN * 2**30)))
    changed = chosen & ~hidden & (fate < np.uint64(round((HIDDEN + CHANGED) * 2**30)))
    inputs = tokens.copy()
    inputs[hidden] = MASK
    inputs[changed] = (A + (words[changed] & np.uint64(3))).astype(np.uint8)
    targets = np.full(tokens.shape, IGNORED, dtype=np.int64)
    targets[chosen] = tokens[chosen]
    return inputs, targets


def _words(seed: int, step: int, first_row: int, rows: int, length: int, stream: int) -> NDArray[np.uint64]:
    """(rows, length) random 64-bit words of Philox; each row owns a range of the counter."""
    blocks = -(-length // 4)  # a value of the counter gives four words
    generator = np.random.Philox(key=[seed, step], counter=[first_row * blocks, 0, 0, stream])
    return generator.random_raw(rows * blocks * 4).reshape(rows, blocks * 4)[:, :length]


class MaskedWindows:
    """Held-out windows with masks that never change: iterate over it for (inputs, targets, real) arrays.

    `real` is (rows, length) bool, false at the padding that ends a stretch's last window, or None where there is none.
    """

    def __init__(self, windows: FixedWindows, seed: int) -> None:
        self.windows = windows
        self.seed = seed
        self.targets = sum(int((targets != IGNORED).sum()) for _, targets, _ in self)

    def __iter__(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_] | None]]:
        row = 0
        for batch in self.windows:
            inputs, targets = mask_bases(batch.inputs, self.seed, 0, row, EVALUATION)
            real = inputs != PAD
            yield inputs, targets, None if real.all() else real
            row += len(batch)
