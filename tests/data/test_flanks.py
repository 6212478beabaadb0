"""Bases guessed from their flanks, held to counting by hand."""

import math
from collections import Counter

import numpy as np
import pytest

from mambagen.data.dna_tokens import IGNORED
from mambagen.data.flanks import FlankModel, fit_flanks
from mambagen.data.masking import MaskedWindows
from mambagen.data.windows import fixed_windows
from tests.data.helpers import a_genome, random_dna


@pytest.mark.parametrize("k", [0, 1, 2])
def test_losses_are_those_of_counting_strings(k: int) -> None:
    train = a_genome(random_dna(3000, 1, b"AACGTN"), random_dna(500, 2, b"ACGG")).whole()
    held = a_genome(random_dna(700, 3, b"AACGT")).whole()
    masked = MaskedWindows(fixed_windows(held, 50), seed=1)
    counts: Counter[str] = Counter()
    for tokens in train.tokens():
        text = train.tokenizer.decode(tokens)
        counts.update(text[i - k : i + k + 1] for i in range(k, len(text) - k))
    counts = Counter({word: n for word, n in counts.items() if set(word) <= set("ACGT")})

    def chance(word: str, base: str) -> float:
        if len(word) < 2 * k + 1:
            ours = sum(n for w, n in counts.items() if w[k] == base) + 4 ** (2 * k)
            return ours / (sum(counts.values()) + 4 ** (2 * k + 1))
        return (counts[word] + 1) / (sum(counts[word[:k] + b + word[k + 1 :]] for b in "ACGT") + 4)

    total, count = 0.0, 0
    for window, (_, targets, _) in zip(masked.windows, masked, strict=True):
        for tokens, row in zip(window.inputs, targets, strict=True):
            text = held.tokenizer.decode(tokens).replace("[PAD]", "-")
            for i in np.flatnonzero(row != IGNORED).tolist():
                word = text[i - k : i + k + 1] if i >= k else ""
                total -= math.log(chance(word if "-" not in word else "", text[i]))
                count += 1
    assert FlankModel(k).fit(train).loss(masked) == (pytest.approx(total, rel=1e-9), count)


def test_pieces_are_joined_and_strands_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    train = a_genome(random_dna(1000, 1)).whole()
    whole = FlankModel(2).fit(train).counts
    monkeypatch.setattr("mambagen.data.flanks._PIECE", 64)
    assert np.array_equal(FlankModel(2).fit(train).counts, whole)
    both = FlankModel(2).fit(train, both_strands=True).counts
    assert both.sum() - 4**5 == 2 * (whole.sum() - 4**5)


def test_a_repeat_is_known_from_its_flanks() -> None:
    stretches = a_genome("ACGTTGCA" * 200).whole()
    losses = fit_flanks(stretches, MaskedWindows(fixed_windows(stretches, 64), seed=0), (0, 2))
    assert losses[0] > 1.2
    assert losses[2] < 0.2
