"""Windows: a pure function of seed and step, inside stretches, each base once in evaluation."""

import time

import numpy as np
import pytest
from Bio.Seq import Seq
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from mambagen.data.dna_tokens import IGNORED, PAD, DnaTokenizer, N
from mambagen.data.genome import Stretches
from mambagen.data.windows import WindowBatch, WindowSampler, fixed_windows
from mambagen.errors import InputError, UsageError
from tests.data.helpers import a_genome, random_dna


def check_rows_against_the_text(batch: WindowBatch, sequences: dict[str, str], context: int) -> None:
    """Each row is its piece of the text, read by plain slicing and Biopython."""
    tokenizer = DnaTokenizer()
    for row, (name, start, strand) in enumerate(batch.where):
        piece = sequences[name][start : start + context + 1]
        assert len(piece) == context + 1
        if strand == "-":
            piece = str(Seq(piece).reverse_complement())
        assert tokenizer.decode(batch.inputs[row]) == piece[:-1]
        expected = [IGNORED if letter == "N" else 7 + "ACGT".index(letter) for letter in piece[1:]]
        assert batch.targets[row].tolist() == expected


@pytest.mark.parametrize("both", [False, True])
def test_rows_are_what_stands_where_they_say(both: bool) -> None:
    texts = {f"r{i}": random_dna(500 * (i + 1), i, b"ACGTN") for i in range(4)}
    genome = a_genome(*texts.values())
    train, valid = genome.hold_out(0.2, seed=1, shortest=1)
    sampler = WindowSampler(train, 50, 64, seed=3, reverse_complement=both)
    strands = set()
    for step in range(20):
        batch = sampler.batch(step)
        assert batch.inputs.shape == batch.targets.shape == (64, 50)
        check_rows_against_the_text(batch, texts, 50)
        for name, start, strand in batch.where:
            strands.add(strand)
            record = int(name[1:])
            assert any(r == record and s <= start and start + 51 <= e for r, s, e in train)
            assert not any(r == record and s < start + 51 and start < e for r, s, e in valid)
    assert strands == ({"+", "-"} if both else {"+"})


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    genome = a_genome(random_dna(5_000), random_dna(9_000, 1))
    first = WindowSampler(genome.whole(), 100, 32, seed=1, reverse_complement=True)
    again = WindowSampler(genome.whole(), 100, 32, seed=1, reverse_complement=True)
    later = [again.batch(step) for step in (7, 3, 7)]
    np.testing.assert_array_equal(first.batch(7).inputs, later[0].inputs)
    np.testing.assert_array_equal(first.batch(7).inputs, later[2].inputs)
    assert first.batch(7).where != first.batch(8).where
    assert first.batch(7).where != WindowSampler(genome.whole(), 100, 32, seed=2).batch(7).where


def test_rows_do_not_depend_on_how_many_others_there_are() -> None:
    genome = a_genome(random_dna(5_000), random_dna(9_000, 1))
    whole = WindowSampler(genome.whole(), 100, 32, seed=1, reverse_complement=True).batch(5)
    parts = [WindowSampler(genome.whole(), 100, 32, 1, True).batch(5, slice(i, i + 8)) for i in range(0, 32, 8)]
    np.testing.assert_array_equal(np.concatenate([part.inputs for part in parts]), whole.inputs)
    assert [w for part in parts for w in part.where] == whole.where
    assert WindowSampler(genome.whole(), 100, 8, 1, True).batch(5).where == whole.where[:8]


def test_draws_are_the_same_on_every_machine_and_version() -> None:
    """Golden values: a change of the drawing would break every resumed run."""
    genome = a_genome(random_dna(5_000), random_dna(9_000, 1))
    where = WindowSampler(genome.whole(), 100, 4, seed=42, reverse_complement=True).batch(1234).where
    assert where == [("r1", 5911, "+"), ("r1", 4177, "-"), ("r1", 3322, "+"), ("r1", 7378, "-")]


def test_every_valid_start_is_equally_likely() -> None:
    genome = a_genome(random_dna(30), random_dna(14, 1), random_dna(11, 2), random_dna(10, 3))
    sampler = WindowSampler(genome.whole(), 10, 500, seed=0, reverse_complement=True)
    assert sampler.starts == 20 + 4 + 1  # the last record is too short for 11 bases
    seen: dict[tuple[str, int], int] = {}
    minus = 0
    for step in range(100):
        for name, start, strand in sampler.batch(step).where:
            seen[name, start] = seen.get((name, start), 0) + 1
            minus += strand == "-"
    assert len(seen) == 25
    assert chisquare(list(seen.values())).pvalue > 0.001
    assert abs(minus - 25_000) < 4 * (50_000 * 0.25) ** 0.5


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), min_size=1, max_size=6),
    context=st.integers(1, 12),
)
def test_valid_starts_are_exactly_those_with_a_target(pieces: list[tuple[int, int]], context: int) -> None:
    text = "".join("A" * bases + "N" * gap for bases, gap in pieces)
    expected = {s for s in range(len(text) - context) if set(text[s + 1 : s + 1 + context]) != {"N"}}
    genome = a_genome(text) if text else None
    if genome is None or not expected:
        if genome is not None:
            with pytest.raises(InputError):
                WindowSampler(genome.whole(), context, 4, seed=0)
        return
    sampler = WindowSampler(genome.whole(), context, 256, seed=0)
    assert sampler.starts == len(expected)
    drawn = {start for step in range(4) for _, start, _ in sampler.batch(step).where}
    assert drawn <= expected
    batch = sampler.batch(0)
    assert (batch.targets != IGNORED).any(axis=1).all()


def test_starts_in_the_middle_of_a_record_count_from_the_record_s_begin() -> None:
    text = random_dna(1_000) + "N" * 500 + random_dna(1_000, 1)
    genome = a_genome(text)
    train = Stretches(genome.records, [(0, 300, 800), (0, 900, 1_700)], genome.tokenizer)
    sampler = WindowSampler(train, 40, 512, seed=0)
    starts = np.array([start for step in range(40) for _, start, _ in sampler.batch(step).where])
    expected = list(range(300, 760)) + [s for s in range(900, 1_660) if not 999 <= s <= 1_459]
    assert sampler.starts == len(expected)
    assert set(starts.tolist()) == set(expected)


def test_no_window_at_all_is_explained() -> None:
    genome = a_genome(random_dna(100), random_dna(300, 1))
    with pytest.raises(InputError, match=r"some\.fa:3: record 'r1': a context of 300 needs 301.*has 300.*299 or less"):
        WindowSampler(genome.whole(), 300, 4, seed=0)
    assert WindowSampler(genome.whole(), 299, 4, seed=0).starts == 1
    with pytest.raises(InputError, match="nothing but N"):
        WindowSampler(a_genome("N" * 500).whole(), 100, 4, seed=0)
    with pytest.raises(InputError, match="no sequence"):
        WindowSampler(genome.hold_out(0)[1], 100, 4, seed=0)


@pytest.mark.parametrize("arguments", [(0, 1, 0), (10, 0, 0), (10, 1, -1), (10, 1, 2**64)])
def test_impossible_settings_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError):
        WindowSampler(a_genome(random_dna(100)).whole(), *arguments)


# ---- evaluation -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    context=st.integers(1, 120),
    batch_size=st.integers(1, 9),
    n=st.sampled_from(["ignore", "predict"]),
)
def test_fixed_windows_have_each_base_but_the_first_as_target_once(
    lengths: list[int], context: int, batch_size: int, n: str
) -> None:
    texts = [random_dna(length, i, b"ACGTN" + b"N" * 10 * (i % 2)) for i, length in enumerate(lengths)]
    genome = a_genome(*texts, tokenizer=DnaTokenizer(n=n))
    windows = fixed_windows(genome.whole(), context, batch_size)
    times = [np.zeros(length, dtype=int) for length in lengths]
    total = rows = 0
    for batch in windows:
        assert len(batch) <= batch_size
        assert batch.inputs.shape == batch.targets.shape == (len(batch), context)
        rows += len(batch)
        for row in range(len(batch)):
            record, start = int(batch.record[row]), int(batch.start[row])
            tokens = genome.records[record].tokens
            for column in np.flatnonzero(batch.targets[row] != IGNORED):
                times[record][start + column + 1] += 1
                assert batch.targets[row, column] == tokens[start + column + 1]
                assert batch.inputs[row, column] == tokens[start + column]
                total += 1
            assert (batch.targets[row] != IGNORED).any()
            assert set(batch.inputs[row, lengths[record] - start :].tolist()) <= {PAD}
    for times_of, text in zip(times, texts, strict=True):
        expected = [0] + [int(n == "predict" or letter != "N") for letter in text[1:]]
        assert times_of.tolist() == expected
    assert total == windows.targets
    assert rows == len(windows)


def test_at_most_some_windows_are_spread_over_all() -> None:
    genome = a_genome(random_dna(10_001), random_dna(10_001, 1))
    windows = fixed_windows(genome.whole(), 100, 16, at_most=20)
    assert len(windows) == 20
    assert windows.targets == 2_000
    names = [name for batch in windows for name, _, _ in batch.where]
    assert names.count("r0") == names.count("r1") == 10
    assert len(fixed_windows(genome.whole(), 100, 16, at_most=10_000)) == 200


def test_windows_of_nothing_but_n_are_left_out_of_evaluation() -> None:
    genome = a_genome(random_dna(100) + "N" * 300 + random_dna(100, 1))
    windows = fixed_windows(genome.whole(), 50)
    assert all((batch.targets != IGNORED).any(axis=1).all() for batch in windows)
    assert windows.targets == 199
    assert len(windows) == 5  # two before the gap, one that its last base reaches into, two after


def test_a_batch_of_a_million_tokens_takes_some_milliseconds() -> None:
    genome = a_genome(*[random_dna(1_000_000, i) for i in range(3)])
    sampler = WindowSampler(genome.whole(), 1024, 1024, seed=0, reverse_complement=True)
    seconds = []
    for step in range(10):
        start = time.perf_counter()
        sampler.batch(step)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02


def test_n_is_kept_in_the_inputs_and_left_out_of_the_targets() -> None:
    genome = a_genome("ACNNGTACGT")
    (batch,) = fixed_windows(genome.whole(), 9)
    assert batch.inputs[0].tolist() == [7, 8, N, N, 9, 10, 7, 8, 9]
    assert batch.targets[0].tolist() == [8, IGNORED, IGNORED, 9, 10, 7, 8, 9, 10]


def test_windows_of_about_so_many_bases_are_taken_where_stretches_are_shorter_than_the_context() -> None:
    genome = a_genome(*(random_dna(100, seed) for seed in range(40)), random_dna(5000, 41))
    all_of_it = fixed_windows(genome.whole(), 1000)
    assert len(all_of_it) == 45
    half = fixed_windows(genome.whole(), 1000, bases=4500)
    assert len(half) == 22  # by bases alone 4 windows would do
    assert fixed_windows(genome.whole(), 1000, bases=10**9).targets == all_of_it.targets
    full = fixed_windows(a_genome(random_dna(10_001)).whole(), 1000, bases=3500)
    assert (len(full), full.targets) == (3, 3000)


def test_trimmed_batches_are_the_same_without_their_padding() -> None:
    genome = a_genome(*(random_dna(n, n) for n in (90, 300, 120, 2300, 40)))
    for plain, trimmed in zip(
        fixed_windows(genome.whole(), 1000, 2), fixed_windows(genome.whole(), 1000, 2, trim=True), strict=True
    ):
        width = trimmed.inputs.shape[1]
        assert np.array_equal(plain.inputs[:, :width], trimmed.inputs)
        assert np.array_equal(plain.targets[:, :width], trimmed.targets)
        assert (plain.targets[:, width:] < 0).all()
        assert (trimmed.targets[:, -1] >= 0).any()
