"""Genomes in memory and what is held out of them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambagen.data.dna_tokens import N
from mambagen.data.genome import Genome, Stretches, runs_of, subtract, union
from mambagen.errors import InputError, UsageError
from tests.data.helpers import a_genome, random_dna


def covered(stretches: Stretches, genome: Genome) -> list[np.ndarray]:
    """How many stretches hold each base."""
    times = [np.zeros(len(record), dtype=int) for record in genome.records]
    for record, start, end in stretches:
        assert 0 <= start < end <= len(times[record])
        times[record][start:end] += 1
    return times


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda s: (s[0], s[0] + s[1])), max_size=8)


@given(spans, spans)
def test_union_and_subtraction_are_those_of_sets(some: list, holes: list) -> None:
    def bases(intervals: list) -> set[int]:
        return {i for start, end in intervals for i in range(start, end)}

    left = subtract(union(some), union(holes))
    assert bases(left) == bases(some) - bases(holes)
    assert all(a[1] < b[0] for a, b in zip(union(some), union(some)[1:], strict=False))
    assert sum(end - start for start, end in left) == len(bases(left))


@given(st.lists(st.booleans(), max_size=50))
def test_runs_cover_exactly_the_true_ones(mask: list[bool]) -> None:
    starts, ends = runs_of(np.array(mask, dtype=bool))
    again = np.zeros(len(mask), dtype=bool)
    for start, end in zip(starts, ends, strict=True):
        assert start < end
        again[start:end] = True
    assert again.tolist() == mask


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30_000), min_size=1, max_size=12),
    fraction=st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.5]),
    seed=st.integers(0, 2**64 - 1),
    shortest=st.sampled_from([1, 200, 2048]),
)
def test_training_and_validation_never_share_a_base_and_lose_none(
    lengths: list[int], fraction: float, seed: int, shortest: int
) -> None:
    genome = a_genome(*[random_dna(length, i, b"ACGTNNNN") for i, length in enumerate(lengths)])
    train, valid = genome.hold_out(fraction, seed=seed, shortest=shortest)
    for times in map(np.add, covered(train, genome), covered(valid, genome)):
        assert (times == 1).all()
    assert train.bases + valid.bases == genome.bases


def test_each_long_record_gives_one_stretch_of_the_asked_share() -> None:
    genome = a_genome(random_dna(100_000), random_dna(50_000, 1))
    train, valid = genome.hold_out(0.1, seed=5)
    assert [(r, end - start) for r, start, end in valid] == [(0, 10_000), (1, 5_000)]
    assert train.bases == 135_000


def test_a_held_out_stretch_is_never_a_mere_gap() -> None:
    gap = "N" * 90_000
    genome = a_genome(random_dna(5_000) + gap + random_dna(5_000, 1))
    for seed in range(50):
        _, valid = genome.hold_out(0.1, seed=seed, shortest=1)
        (tokens,) = valid.tokens()
        assert (tokens != N).sum() == 1_000
        assert tokens[0] != N
        assert tokens[-1] != N


def test_the_seed_moves_the_hold_out_and_the_order_of_records_does_not() -> None:
    one, two = random_dna(50_000, 1), random_dna(60_000, 2)
    genome = a_genome(one, two)
    chosen = {seed: list(genome.hold_out(seed=seed)[1]) for seed in range(20)}
    assert chosen[3] == list(genome.hold_out(seed=3)[1])
    assert len({tuple(spans) for spans in chosen.values()}) == 20
    turned = Genome(genome.records[::-1], genome.tokenizer)
    assert sorted((1 - r, s, e) for r, s, e in turned.hold_out(seed=3)[1]) == sorted(chosen[3])


def test_many_short_records_are_held_out_whole() -> None:
    genome = a_genome(*[random_dna(1_000 + i, i) for i in range(200)])
    train, valid = genome.hold_out(0.1, seed=1)
    assert all(end - start == len(genome.records[r]) for r, start, end in [*train, *valid])
    assert valid.bases == pytest.approx(0.1 * genome.bases, rel=0.03)


def test_few_short_records_give_stretches_all_the_same() -> None:
    genome = a_genome(random_dna(500), random_dna(700, 1))
    train, valid = genome.hold_out(0.1)
    assert [(r, end - start) for r, start, end in valid] == [(0, 50), (1, 70)]
    assert train.bases == 1080


def test_named_records_are_held_out_whole() -> None:
    genome = a_genome(random_dna(100), random_dna(200, 1), random_dna(300, 2))
    train, valid = genome.hold_out(records=["r1"])
    assert list(valid) == [(1, 0, 200)]
    assert list(train) == [(0, 0, 100), (2, 0, 300)]
    with pytest.raises(UsageError, match=r"no record 'chr9'.*r0, r1, r2"):
        genome.hold_out(records=["chr9"])
    with pytest.raises(UsageError, match="nothing to train on"):
        genome.hold_out(records=["r0", "r1", "r2"])


def test_intervals_govern_the_files_whose_records_they_name() -> None:
    genome = a_genome(*[random_dna(10_000, i) for i in range(4)], paths=("a.fa", "a.fa", "b.fa", "c.fa"))
    intervals = [
        ("r0", 0, 6_000, "train"),
        ("r0", 4_000, 7_000, "train"),  # training rows may overlap
        ("r0", 5_000, 5_500, "valid"),
        ("r0", 5_400, 5_800, "test"),
        ("r2", 1_000, 2_000, "valid"),
        ("elsewhere", 0, 10, "train"),
    ]
    train, valid = genome.hold_out(0.1, intervals=intervals, shortest=1)
    # a.fa has train rows: only these are for training (r1 has none), less valid and test ones; test wins over valid
    assert [s for s in train if s[0] in (0, 1)] == [(0, 0, 5_000), (0, 5_800, 7_000)]
    assert [s for s in valid if s[0] in (0, 1)] == [(0, 5_000, 5_400)]
    # b.fa has none: the rest is for training
    assert [s for s in train if s[0] == 2] == [(2, 0, 1_000), (2, 2_000, 10_000)]
    assert [s for s in valid if s[0] == 2] == [(2, 1_000, 2_000)]
    # c.fa is not named: the fraction holds
    assert [end - start for r, start, end in valid if r == 3] == [1_000]


def test_intervals_that_do_not_fit_are_refused() -> None:
    genome = a_genome(random_dna(100))
    with pytest.raises(InputError, match=r"r0:90-101.*100 bases.*some\.fa:1"):
        genome.hold_out(intervals=[("r0", 90, 101, "valid")])
    with pytest.raises(InputError, match="names no record of the data"):
        genome.hold_out(intervals=[("chr1", 0, 10, "valid")])
    with pytest.raises(InputError, match="'dev'"):
        genome.hold_out(intervals=[("r0", 0, 10, "dev")])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0, float("nan")])
def test_impossible_fractions_are_refused(fraction: float) -> None:
    with pytest.raises(UsageError, match="fraction"):
        a_genome(random_dna(100)).hold_out(fraction)


def test_files_are_read_in_order_and_shared_names_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "human.fa").write_text(">chr1\nACGT\n>chrM\nAAAA\n")
    (tmp_path / "mouse.fa").write_text(">chr1\nGGGG\n")
    genome = Genome.from_files([tmp_path / "human.fa", tmp_path / "mouse.fa"])
    assert [record.id for record in genome.records] == ["human:chr1", "chrM", "mouse:chr1"]
    assert genome.bases == 12


def test_the_same_file_or_name_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.fa").write_text(">x\nACGT\n")
    with pytest.raises(UsageError, match="given twice"):
        Genome.from_files([tmp_path / "a.fa", tmp_path / "." / "a.fa"])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.fa").write_text(">x\nGG\n")
    with pytest.raises(InputError, match=r"'a:x' is in .*a\.fa:1 too"):
        Genome.from_files([tmp_path / "a.fa", tmp_path / "sub" / "a.fa"])


def test_a_sequence_that_occurs_twice_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.fa").write_text(">x\nACGT\n>y\nACGA\n>z\nacgt\n")
    Genome.from_files([tmp_path / "a.fa"])
    assert "record 'z' has the same sequence as 'x'" in caplog.text
    assert "'y'" not in caplog.text


def test_the_fingerprint_changes_with_sequence_name_and_split() -> None:
    base = a_genome("ACGTACGT", "ACGG")
    prints = {
        base.whole().fingerprint(),
        a_genome("ACGTACGA", "ACGG").whole().fingerprint(),
        a_genome("ACGTACGT").whole().fingerprint(),
        base.hold_out(records=["r1"])[0].fingerprint(),
        base.hold_out(records=["r1"])[1].fingerprint(),
    }
    # training on r0 alone is the same as a genome of r0 alone
    assert len(prints) == 4
    assert a_genome("acgtacgt", "ACGG").whole().fingerprint() == base.whole().fingerprint()


def test_the_hold_out_is_the_same_in_another_process() -> None:
    code = (
        "from tests.data.helpers import *; g = a_genome(random_dna(50000));"
        " print(*g.hold_out(seed=7)[1].spans[0], g.hold_out(seed=7)[0].fingerprint())"
    )
    here = a_genome(random_dna(50_000)).hold_out(seed=7)
    assert list(here[1]) == [(0, 2_900, 7_900)]  # golden: another place would break every resumed run
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "99"}
    )
    assert out.stdout.split() == [*map(str, here[1].spans[0]), here[0].fingerprint()]
