"""Windows around intervals: where they lie, what they reach, and chromosomes by name."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambagen.data.genome import Genome
from mambagen.data.intervals import chromosome_intervals, chromosome_of, held_out, interval_starts, overlap
from mambagen.data.windows import IntervalSampler, WindowSampler
from mambagen.errors import InputError
from tests.data.helpers import a_genome, random_dna

# Two training rows with a validation row between them, a test row, and a row at the record's end.
ROWS = [
    ("r0", 1000, 2000, "train"),
    ("r0", 2000, 2500, "valid"),
    ("r0", 2500, 3500, "train"),
    ("r0", 6000, 6500, "test"),
    ("r0", 9000, 10000, "train"),
    ("elsewhere", 0, 10, "train"),
]


@pytest.fixture
def genome() -> Genome:
    return a_genome(random_dna(10_000, 1), random_dna(3000, 2))


def windows(genome: Genome, length: int, strict: bool) -> list[list[tuple[int, int]]]:
    """By a loop: for each interval all windows that it gives, as (start, end)."""
    starts = interval_starts(genome.records, ROWS, length, strict)
    assert set(starts.record.tolist()) <= {0}
    pairs = zip(starts.first.tolist(), starts.count.tolist(), strict=True)
    return [[(s, s + length) for s in range(first, first + count)] for first, count in pairs]


def test_windows_no_longer_than_an_interval_lie_in_it(genome: Genome) -> None:
    for strict in (False, True):
        found = windows(genome, 800, strict)
        assert [(w[0], w[-1]) for w in found] == [
            ((1000, 1800), (1200, 2000)),
            ((2500, 3300), (2700, 3500)),
            ((9000, 9800), (9200, 10000)),
        ]


def test_longer_windows_have_the_interval_in_their_middle_and_stay_in_the_record(genome: Genome) -> None:
    assert windows(genome, 3000, strict=False) == [[(0, 3000)], [(1500, 4500)], [(7000, 10000)]]
    assert windows(genome, 9000, strict=False) == [[(0, 9000)], [(0, 9000)], [(1000, 10000)]]
    assert windows(genome, 10_001, strict=False) == []


def test_strict_windows_are_moved_away_from_what_is_held_out_or_left_out(genome: Genome) -> None:
    assert windows(genome, 1800, strict=True) == [[(200, 2000)], [(2500, 4300)], [(8200, 10000)]]
    assert windows(genome, 2000, strict=True)[0] == [(0, 2000)]
    assert len(windows(genome, 2001, strict=True)) == 2
    assert interval_starts(genome.records, ROWS, 2001, strict=True).dropped == 1
    assert windows(genome, 3501, strict=True) == []


@pytest.mark.parametrize("length", [100, 1001, 2000, 3000, 8192])
def test_what_windows_reach_of_the_held_out_rows_is_counted_as_a_loop_counts_it(genome: Genome, length: int) -> None:
    train, _ = genome.hold_out(intervals=[*ROWS, ("r1", 0, 3000, "valid")])
    held = held_out(genome.records, ROWS)
    assert held == {0: [(2000, 2500), (6000, 6500)]}
    for strict in (False, True):
        touched: set[int] = set()
        for start, end in (window for row in windows(genome, length, strict) for window in row):
            touched |= {p for a, b in held[0] for p in range(max(a, start), min(b, end))}
        try:
            sampler = IntervalSampler(train, ROWS, length - 1, 4, seed=0, strict=strict)
        except InputError:
            assert not windows(genome, length, strict)
            continue
        assert overlap(sampler.reach(), held) == len(touched)
        if strict:
            assert not touched
    assert length < 2000 or touched or strict
    stretches = WindowSampler(train, min(length, 1000) - 1, 4, seed=0)
    assert overlap(stretches.reach(), held) == 0


@settings(max_examples=150, deadline=None)
@given(
    spans=st.lists(st.tuples(st.integers(0, 390), st.integers(1, 120), st.sampled_from(["train", "valid", "test"])),
                   min_size=1, max_size=12),
    length=st.integers(1, 400),
)  # fmt: skip
def test_strict_windows_never_touch_what_is_held_out_whatever_the_intervals(
    spans: list[tuple[int, int, str]], length: int
) -> None:
    genome = a_genome(random_dna(400, 3))
    rows = [("r0", start, min(start + size, 400), split) for start, size, split in spans]
    held = {p for _, a, b, split in rows if split != "train" for p in range(a, b)}
    starts = interval_starts(genome.records, rows, length, strict=True)
    for first, count in zip(starts.first.tolist(), starts.count.tolist(), strict=True):
        assert 0 <= first <= first + count - 1 + length <= 400
        assert not held & set(range(first, first + count - 1 + length))
    trained = [row for row in rows if row[3] == "train"]
    assert len(starts) + starts.dropped == len(trained)
    # An interval gives no window where no free run of that length has a base of it.
    free = [p not in held for p in range(400)]
    for row in trained:
        own = [p for p in range(row[1], row[2]) if free[p]]
        runs = [
            w for w in range(400 - length + 1) if all(free[w : w + length]) and set(own) & set(range(w, w + length))
        ]
        if not runs:
            assert starts.dropped
            break


def test_intervals_are_drawn_alike_and_windows_are_those_of_the_record(genome: Genome) -> None:
    train, _ = genome.hold_out(intervals=ROWS)
    sampler = IntervalSampler(train, ROWS, 799, batch_size=3000, seed=1, reverse_complement=True)
    batch = sampler.batch(7)
    again = IntervalSampler(train, ROWS, 799, batch_size=3000, seed=1, reverse_complement=True).batch(7, slice(5, 9))
    assert np.array_equal(again.inputs, batch.inputs[5:9])
    rows = np.searchsorted([2400, 8000], batch.start)
    assert np.allclose(np.bincount(rows) / 3000, 1 / 3, atol=0.04)
    for row in range(20):
        tokens = genome.records[0].tokens[batch.start[row] : batch.start[row] + 800]
        if batch.minus[row]:
            tokens = genome.tokenizer.reverse_complement(tokens)
        assert np.array_equal(batch.inputs[row], tokens[:-1])
        assert np.array_equal(batch.targets[row], tokens[1:])
    offsets = batch.start[rows == 0] - 1000
    assert offsets.min() == 0
    assert offsets.max() == 200
    assert abs(batch.minus.mean() - 0.5) < 0.05


def test_intervals_without_room_are_told(genome: Genome, caplog: pytest.LogCaptureFixture) -> None:
    train, _ = genome.hold_out(intervals=ROWS)
    IntervalSampler(train, ROWS, 2500, 4, seed=0)
    assert "1 of 3 train intervals have no room for windows of 2501 bases" in caplog.text
    with pytest.raises(InputError, match="none of the 3 train intervals has room for a window of 5001"):
        IntervalSampler(train, ROWS, 5000, 4, seed=0)
    with pytest.raises(InputError, match="no train intervals"):
        IntervalSampler(train, [("r0", 0, 5, "valid")], 100, 4, seed=0)


@pytest.mark.parametrize(
    ("name", "description", "label"),
    [
        ("chr1", "", "1"),
        ("CHR2a", "", "2A"),
        ("hg38:chrX", "", "X"),
        ("22", "dna:chromosome", "22"),
        ("MT", "", "MT"),
        ("NC_000001.11", "Homo sapiens chromosome 1, GRCh38.p14 Primary Assembly", "1"),
        ("NC_036880.1", "Pan troglodytes isolate Yerkes chromosome 2A, Clint_PTRv2", "2A"),
        ("NW_001.1", "Homo sapiens chromosome 1 unlocalized genomic scaffold, GRCh38", None),
        ("chr1_KI270706v1_random", "", None),
        ("chrUn_KI270302v1", "", None),
        ("scaffold_12", "", None),
    ],
)
def test_chromosomes_are_known_by_the_names_that_archives_give(name: str, description: str, label: str | None) -> None:
    class Named(SimpleNamespace):
        def __len__(self) -> int:
            return 5

    record = Named(id=name, description=description)
    assert chromosome_of(record) == label
    if label == "1":
        assert chromosome_intervals([record, Named(id="chr9_alt", description="")], {"test": ["1"]}) == [
            (name, 0, 5, "test")
        ]
    if label is None:
        with pytest.raises(InputError, match="no record is one of the chromosomes"):
            chromosome_intervals([record], {"train": ["12"]})
