"""Corruption for masked language modelling: shares, what is never touched, and of what it is a function."""

import numpy as np
import pytest
from scipy import stats

from mambagen.data.dna_tokens import IGNORED, MASK, PAD, A, N, T
from mambagen.data.masking import EVALUATION, MaskedWindows, mask_bases
from mambagen.data.windows import fixed_windows
from tests.data.helpers import a_genome, random_dna


def windows(rows: int, length: int, low: int = A, high: int = T, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high + 1, (rows, length)).astype(np.uint8)


def test_shares_are_15_percent_and_80_10_10() -> None:
    tokens = windows(400, 1000)
    inputs, targets = mask_bases(tokens, seed=3, step=5)
    chosen = targets != IGNORED
    assert np.array_equal(targets[chosen], tokens[chosen])
    assert np.array_equal(inputs[~chosen], tokens[~chosen])
    n = int(chosen.sum())
    assert stats.binomtest(n, tokens.size, 0.15).pvalue > 1e-3
    hidden = int((inputs[chosen] == MASK).sum())
    assert stats.binomtest(hidden, n, 0.8).pvalue > 1e-3
    other = int(((inputs != tokens) & chosen & (inputs != MASK)).sum())
    assert stats.binomtest(other, n, 0.1 * 3 / 4).pvalue > 1e-3  # one drawn base in four is the one that stood there


def test_drawn_bases_are_uniform_over_the_four_and_independent_of_the_base() -> None:
    tokens = np.full((400, 1000), A, dtype=np.uint8)
    inputs, targets = mask_bases(tokens, seed=1, step=0)
    drawn = np.bincount(inputs[(targets != IGNORED) & (inputs != MASK)], minlength=12)
    assert drawn[[i for i in range(12) if not A <= i <= T]].sum() == 0
    assert stats.chisquare(drawn[A + 1 : T + 1]).pvalue > 1e-3


def test_n_and_special_tokens_are_never_chosen_or_drawn() -> None:
    tokens = windows(200, 500, 0, N)
    inputs, targets = mask_bases(tokens, seed=2, step=7)
    special = (tokens < A) | (tokens == N)
    assert (targets[special] == IGNORED).all()
    assert np.array_equal(inputs[special], tokens[special])
    assert set(np.unique(inputs[~special])) <= {MASK, *range(A, T + 1)}


@pytest.mark.parametrize("length", [1, 3, 4, 130])
def test_a_row_is_a_function_of_seed_step_and_row_alone(length: int) -> None:
    tokens = windows(12, length)
    inputs, targets = mask_bases(tokens, seed=9, step=4)
    for first, last in ((0, 5), (5, 12), (11, 12)):
        part = mask_bases(tokens[first:last], seed=9, step=4, first_row=first)
        assert np.array_equal(part[0], inputs[first:last])
        assert np.array_equal(part[1], targets[first:last])


def test_other_seeds_steps_rows_and_streams_give_other_masks() -> None:
    tokens = windows(2, 2000)
    tokens[1] = tokens[0]
    masks = [
        mask_bases(tokens, seed, step, stream=stream)[1][row] != IGNORED
        for seed, step, stream, row in [(0, 0, 1, 0), (1, 0, 1, 0), (0, 1, 1, 0), (0, 0, EVALUATION, 0), (0, 0, 1, 1)]
    ]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            both = (one & other).mean()
            assert 0.01 < both < 0.04  # 0.15 squared: independent


def test_held_out_masks_are_fixed_and_do_not_depend_on_the_batch() -> None:
    genome = a_genome(random_dna(1000, 1), random_dna(333, 2))
    found = []
    for rows in (1, 3, 16):
        masked = MaskedWindows(fixed_windows(genome.whole(), 64, rows), seed=5)
        batches = list(masked)
        inputs = np.concatenate([inputs for inputs, _, _ in batches])
        targets = np.concatenate([targets for _, targets, _ in batches])
        found.append((inputs, targets))
        assert masked.targets == (targets != IGNORED).sum() > 100
        for ids, _, real in batches:
            assert (real is None) == (PAD not in ids)
            if real is not None:
                assert np.array_equal(real, ids != PAD)
    for inputs, targets in found[1:]:
        assert np.array_equal(inputs, found[0][0])
        assert np.array_equal(targets, found[0][1])
