"""Chains over bytes beside a plain count."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from mambagen.data.audio_shards import prepare_shards
from mambagen.data.audio_sources import find_clips
from mambagen.data.audio_windows import HeldOutWindows
from mambagen.data.byte_chains import PSEUDO, ByteChains


def test_chains_are_the_counts_by_hand(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.choice([-0.02, 0.0, 0.02], 30_000)) % 0.5
    soundfile.write(tmp_path / "a.wav", walk, 16_000)
    shards = prepare_shards(find_clips([tmp_path / "a.wav"]), tmp_path / "shards", valid_fraction=0.1)
    windows = HeldOutWindows(shards["valid"], 1000, 4)
    losses = ByteChains(shards["train"]).losses(windows)

    count: dict[tuple[int, ...], np.ndarray] = {}
    padded = [128, 128, *shards["train"].tokens.tolist()]
    for i in range(2, len(padded)):
        for order in range(3):
            count.setdefault(tuple(padded[i - order : i]), np.zeros(256))[padded[i]] += 1

    def probability(context: tuple[int, ...], token: int) -> float:
        found = count.get(context, np.zeros(256))
        if not context:
            return (found[token] + 1) / (found.sum() + 256)
        return (found[token] + PSEUDO * probability(context[1:], token)) / (found.sum() + PSEUDO)

    total, targets = np.zeros(3), 0
    for batch in windows:
        for tokens, counted in zip(batch.tokens, batch.counted, strict=True):
            row = [128, 128, *tokens[:counted].tolist()]
            for i in range(2, len(row)):
                total += [-np.log(probability(tuple(row[i - order : i]), row[i])) for order in range(3)]
                targets += 1
    assert targets == windows.targets
    assert [losses[order] for order in range(3)] == pytest.approx((total / targets).tolist(), rel=1e-5)
    assert losses[0] > losses[1] > losses[2]
