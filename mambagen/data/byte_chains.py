"""Markov chains over the 256 tokens of sound: what a model of it has to beat, at no cost.

Order 0 knows how often each token is, order 1 the token before, order 2 the two before. Each is smoothed towards the
order below it by pseudo-counts, and all are measured on the very windows of the model.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from mambagen.data.audio_shards import Clips
from mambagen.data.audio_windows import AudioBatch
from mambagen.data.quantise import LEVELS, SILENCE

ORDERS = (0, 1, 2)
PSEUDO = 16.0  # pseudo-counts of the order below; a figure to beat need not be tuned
AT_MOST = 1 << 25  # samples that are counted, from the front of clips spread over all


class ByteChains:
    """Chains of orders 0 to 2, counted once."""

    def __init__(self, clips: Clips) -> None:
        count1 = np.zeros(LEVELS**2, np.int64)
        count2 = np.zeros(LEVELS**3, np.int32)
        total = int(clips.length.sum())
        step = max(1, -(-total // AT_MOST))
        for row in range(0, len(clips), step):
            before1, before2, now = contexts(clips.clip(row)[:AT_MOST])
            count1 += np.bincount(before1 * LEVELS + now, minlength=LEVELS**2)
            np.add.at(count2, (before2 * LEVELS + before1) * LEVELS + now, 1)
        pairs = count1.reshape(LEVELS, LEVELS).astype(np.float64)
        triples = count2.reshape(LEVELS**2, LEVELS)
        alone = pairs.sum(axis=0)
        self._p0 = (alone + 1.0) / (alone.sum() + LEVELS)
        self._p1 = (pairs + PSEUDO * self._p0) / (pairs.sum(axis=1, keepdims=True) + PSEUDO)
        below = np.tile(self._p1, (LEVELS, 1)).astype(np.float32)  # of context (before2, before1): that of before1
        sums = triples.sum(axis=1, keepdims=True, dtype=np.float32)
        self._p2 = (triples + np.float32(PSEUDO) * below) / (sums + np.float32(PSEUDO))

    def losses(self, windows: Iterable[AudioBatch]) -> dict[int, float]:
        """Order -> mean loss in nats a sample over the windows' targets; {} where there are none."""
        total = dict.fromkeys(ORDERS, 0.0)
        count = 0
        for batch in windows:
            for tokens, counted in zip(batch.tokens, batch.counted, strict=True):
                before1, before2, now = contexts(tokens[:counted])
                total[0] -= float(np.log(self._p0[now]).sum())
                total[1] -= float(np.log(self._p1[before1, now]).sum())
                total[2] -= float(np.log(self._p2[before2 * LEVELS + before1, now], dtype=np.float64).sum())
                count += int(counted)
        return {order: total[order] / count for order in ORDERS} if count else {}


def contexts(tokens: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The token before each, the one before that, and each itself; silence is in front."""
    padded = np.concatenate((np.full(2, SILENCE, np.int64), tokens.astype(np.int64)))
    return padded[1:-1], padded[:-2], padded[2:]
