"""Markov baselines against plain counting with dictionaries, and against known chains."""

from collections import defaultdict
from math import exp, log

import numpy as np
import pytest

from mambagen.data.dna_tokens import IGNORED, DnaTokenizer
from mambagen.data.markov import STRENGTHS, MarkovModel
from mambagen.data.windows import fixed_windows
from mambagen.errors import InputError, UsageError
from tests.data.helpers import a_genome, random_dna

LETTERS = "ACGT"


def complement(text: str) -> str:
    return text[::-1].translate(str.maketrans("ACGT", "TGCA"))


def context_at(text: str, at: int, order: int, letters: str) -> str:
    """The longest run of letters directly before a position, of at most `order`."""
    start = at
    while start > 0 and at - start < order and text[start - 1] in letters:
        start -= 1
    return text[start:at]


class PlainMarkov:
    """The formulas of the module's docstring, a base at a time."""

    def __init__(self, texts: list[str], order: int, strengths: list[float], letters: str = LETTERS) -> None:
        self.order, self.strengths, self.letters = order, strengths, letters
        self.counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for text in texts:
            for at, letter in enumerate(text):
                if letter in letters:
                    context = context_at(text, at, order, letters)
                    for length in range(len(context) + 1):
                        self.counts[context[len(context) - length :]][letter] += 1

    def chance(self, context: str, letter: str) -> float:
        seen = self.counts[context]
        if not context:
            return (seen[letter] + 1) / (sum(seen.values()) + len(self.letters))
        strength = self.strengths[len(context) - 1]
        return (seen[letter] + strength * self.chance(context[1:], letter)) / (sum(seen.values()) + strength)

    def loss(self, windows: list[str], order: int) -> tuple[float, int]:
        """Over texts of which the first letter is no target."""
        terms = [
            -log(self.chance(context_at(text, at, order, self.letters), text[at]))
            for text in windows
            for at in range(1, len(text))
            if text[at] in self.letters
        ]
        return sum(terms), len(terms)


TRAIN = [random_dna(700, 1, b"AACGT"), random_dna(90, 2, b"ACGTN"), "ACGT" * 30 + "NNN" + "AC" * 40, "A", "NN"]
VALID = [random_dna(333, 3, b"AACGTN"), "ACGTACGTNNACAC" * 5]


@pytest.mark.parametrize("order", [0, 1, 3, 8])
@pytest.mark.parametrize("both", [False, True], ids=["one strand", "both strands"])
def test_losses_equal_those_of_plain_counting(order: int, both: bool) -> None:
    train, valid = a_genome(*TRAIN).whole(), a_genome(*VALID).whole()
    model = MarkovModel(order, both_strands=both).fit(train)
    texts = TRAIN + ([complement(text) for text in TRAIN] if both else [])
    plain = PlainMarkov(texts, order, model.strengths)
    for context in (5, 64, 1000):
        windows = [text[at : at + context + 1] for text in VALID for at in range(0, len(text) - 1, context)]
        for lower in {0, order // 2, order}:
            nats, count = model.loss(fixed_windows(valid, context, 7), lower)
            expected, expected_count = plain.loss(windows, lower)
            assert count == expected_count
            assert nats == pytest.approx(expected, rel=1e-12)
    assert model.loss(valid) == pytest.approx(plain.loss(VALID, order), rel=1e-12)


def test_predicted_n_is_a_fifth_letter() -> None:
    tokenizer = DnaTokenizer(n="predict")
    train, valid = a_genome(*TRAIN, tokenizer=tokenizer).whole(), a_genome(*VALID, tokenizer=tokenizer).whole()
    model = MarkovModel(2).fit(train)
    plain = PlainMarkov(TRAIN, 2, model.strengths, "ACGTN")
    assert model.loss(valid) == pytest.approx(plain.loss(VALID, 2), rel=1e-12)
    assert model.loss(valid)[1] == sum(map(len, VALID)) - len(VALID)


def test_targets_are_those_of_the_language_model() -> None:
    genome = a_genome(random_dna(5_000, 0, b"ACGTN"), random_dna(70, 1))
    windows = fixed_windows(genome.whole(), 128, 8)
    _, count = MarkovModel(3).fit(genome.whole()).loss(windows)
    assert count == windows.targets == sum(int((batch.targets != IGNORED).sum()) for batch in windows)


def test_a_known_chain_is_recovered() -> None:
    """A chain of order 2 with known entropy: order 2 finds it, lower ones cannot, higher ones do not lose it."""
    rng = np.random.default_rng(0)
    chances = rng.dirichlet([0.4] * 4, size=16)
    draws = rng.random(400_000)
    states = [0, 1]
    cumulative = chances.cumsum(axis=1)
    for draw in draws:
        states.append(int((draw > cumulative[states[-2] * 4 + states[-1]]).sum()))
    text = "".join(LETTERS[state] for state in states)
    train, valid = a_genome(text).hold_out(0.1, seed=1)
    model = MarkovModel(8).fit(train)
    pairs = np.array(states[:-2]) * 4 + np.array(states[1:-1])
    entropy = float(-np.log(chances[pairs, states[2:]]).mean())
    perplexity = {order: model.perplexity(fixed_windows(valid, 1024), order) for order in (0, 1, 2, 8)}
    assert perplexity[2] == pytest.approx(exp(entropy), rel=0.005)
    assert perplexity[8] == pytest.approx(perplexity[2], rel=0.002)
    assert perplexity[1] > perplexity[2] * 1.05
    assert perplexity[0] > perplexity[1]


def test_the_pseudo_counts_see_the_training_part_only_and_fit_its_size() -> None:
    """Random DNA: whatever order 8 has counted is noise, and the pseudo-counts must all but silence it."""
    train = a_genome(random_dna(50_000)).whole()
    model = MarkovModel(8).fit(train)
    assert set(model.strengths) <= set(STRENGTHS)
    assert model.strengths[-1] >= 256
    assert model.perplexity(a_genome(random_dna(50_000, 9)).whole()) == pytest.approx(4.0, abs=0.02)


def test_probabilities_of_each_context_sum_to_one() -> None:
    model = MarkovModel(4).fit(a_genome(*TRAIN).whole())
    assert model._nats is not None
    chances = np.exp(-model._nats).reshape(-1, 4)
    np.testing.assert_allclose(chances.sum(axis=1), 1, rtol=1e-12)
    assert len(chances) == 1 + 4 + 16 + 64 + 256


def test_long_sequences_count_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    train, valid = a_genome(random_dna(20_000, 0, b"AACGTN")).whole(), a_genome(random_dna(3_000, 1)).whole()
    whole = MarkovModel(5, both_strands=True).fit(train)
    monkeypatch.setattr("mambagen.data.markov._CHUNK", 97)
    pieces = MarkovModel(5, both_strands=True).fit(train)
    assert pieces.strengths == whole.strengths
    assert pieces.loss(valid) == pytest.approx(whole.loss(valid), rel=1e-12)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(InputError, match="no known base"):
        MarkovModel(3).fit(a_genome("NNNNNNNN").whole())
    for order in (-1, 13):
        with pytest.raises(UsageError, match="0 to 12"):
            MarkovModel(order)
    with pytest.raises(UsageError, match="orders 0 to 2"):
        MarkovModel(2).fit(a_genome("ACGT").whole()).loss([], 3)
    with pytest.raises(ValueError, match="fit"):
        MarkovModel(2).loss([])
    assert np.isnan(MarkovModel(2).fit(a_genome("ACGT").whole()).perplexity([]))
