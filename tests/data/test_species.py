"""Genomes divided by species, and the windows that are drawn from them."""

import logging
from pathlib import Path

import numpy as np
import pytest

from mambagen.data.dna_tokens import DnaTokenizer, N
from mambagen.data.genome import Genome, Stretches
from mambagen.data.record_windows import RecordWindows
from mambagen.data.species import divide, read_species, species_column, species_files
from mambagen.data.species_windows import SpeciesSampler, draw_evaluation, window_starts, without_unknown
from mambagen.errors import InputError, UsageError
from tests.data.helpers import a_genome, random_dna


def two_species() -> Genome:
    """r0 and r1 of human, r2 of mouse."""
    texts = [random_dna(3000, 1), random_dna(1000, 2), random_dna(2000, 3)]
    return a_genome(*texts, paths=("human.fa", "human.fa", "dir/mouse.v2.fa.gz"))


def spans(parts: tuple[Stretches, ...]) -> list[list[tuple[int, int, int]]]:
    return [list(part) for part in parts]


def test_species_are_files_or_folders_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "cow").mkdir()
    for name in ("human.chr1.fa.gz", "human.chr2.fa", "mouse.FASTA", "cow/a.fna", "cow/b.2bit", "notes.txt", ".x.fa"):
        (tmp_path / name).write_text(">a\nA\n")
    found = species_files(tmp_path)
    assert {name: [path.name for path in paths] for name, paths in found.items()} == {
        "cow": ["a.fna", "b.2bit"],
        "human": ["human.chr1.fa.gz", "human.chr2.fa"],
        "mouse": ["mouse.FASTA"],
    }
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no sequence file in it"):
        species_files(tmp_path / "empty")


def test_intervals_rule_and_what_they_do_not_name_is_said(caplog: pytest.LogCaptureFixture) -> None:
    genome = two_species()
    names = read_species(genome, {}, {})
    assert names == ["human", "human", "mouse"]
    rows = [
        *(("r0", 0, 2000, "train"), ("r0", 1500, 2500, "valid"), ("r0", 2400, 3000, "test")),
        *(("r2", 0, 1000, "train"), ("elsewhere", 0, 9, "train")),
    ]
    with caplog.at_level(logging.WARNING, logger="mambagen"):
        parts = divide(genome, names, rows)
    assert parts.species == ("human", "mouse")
    assert spans(parts.train) == [[(0, 0, 1500)], [(2, 0, 1000)]]
    assert spans(parts.valid) == [[(0, 1500, 2400)], []]
    assert spans(parts.test) == [[(0, 2400, 3000)], []]
    assert "do not name 1 records, which are left out: 'r1' (human.fa:3)" in caplog.text


def test_shares_of_each_species_are_held_out_and_nothing_is_in_two_parts() -> None:
    genome = two_species()
    names = ["human", "human", "mouse"]
    parts = divide(genome, names, fractions=(0.1, 0.2), seed=3)
    for i, total in enumerate((4000, 2000)):
        bases = [part[i].bases for part in (parts.train, parts.valid, parts.test)]
        assert sum(bases) == total
        assert bases[1:] == pytest.approx([0.1 * total, 0.2 * total], abs=2)
    seen = {record: np.zeros(len(genome.records[record]), dtype=int) for record in range(3)}
    for split in ("train", "valid", "test"):
        for part in parts.part(split):
            for record, start, end in part:
                seen[record][start:end] += 1
    assert all((counts == 1).all() for counts in seen.values())
    assert divide(genome, names, fractions=(0.1, 0.2), seed=3).fingerprints("test") == parts.fingerprints("test")
    assert divide(genome, names, fractions=(0.1, 0.2), seed=4).fingerprints("test") != parts.fingerprints("test")


def test_whole_records_are_held_out_whatever_file_they_are_in() -> None:
    texts = [random_dna(500, i) for i in range(4)]
    records = [
        type(r)(f"{stem}:{name}", r.tokens, r.path, r.line)
        for r, (stem, name) in zip(
            a_genome(*texts).records, [("a", "chr1"), ("a", "chr2"), ("b", "chr1"), ("b", "chr2")], strict=True
        )
    ]
    parts = divide(Genome(records, DnaTokenizer()), ["a", "a", "b", "b"], records=((), ("chr1",)))
    assert spans(parts.test) == [[(0, 0, 500)], [(2, 0, 500)]]
    assert spans(parts.train) == [[(1, 0, 500)], [(3, 0, 500)]]
    with pytest.raises(UsageError, match="no record 'chr9' to hold out"):
        divide(Genome(records, DnaTokenizer()), ["a", "a", "b", "b"], records=(("chr9",), ()))
    with pytest.raises(UsageError, match="both validation and test"):
        divide(Genome(records, DnaTokenizer()), ["a", "a", "b", "b"], records=(("chr1",), ("chr1",)))


def test_divisions_that_leave_nothing_to_tell_apart_are_refused() -> None:
    genome = two_species()
    names = ["human", "human", "mouse"]
    with pytest.raises(InputError, match="only human has training sequence"):
        divide(genome, names, [("r0", 0, 100, "train"), ("r2", 0, 100, "test")])
    with pytest.raises(InputError, match="name no record of the data"):
        divide(genome, names, [("x", 0, 100, "train")])
    with pytest.raises(InputError, match="does not fit its record of 3000 bases"):
        divide(genome, names, [("r0", 0, 3001, "train")])
    with pytest.raises(UsageError, match="together below 1"):
        divide(genome, names, fractions=(0.5, 0.5))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("r 0 5 train a\nr 5 9 test b\n", ":2: record 'r' is b here and a in line 1"),
        ("r 0 5 train a\nq 5 9 test\n", ":2: no species in this row"),
    ],
    ids=["two species", "one row without"],
)
def test_a_species_column_is_whole_and_consistent(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "s.bed").write_text(text)
    with pytest.raises(InputError) as caught:
        species_column(tmp_path / "s.bed")
    assert told in str(caught.value)
    (tmp_path / "s.bed").write_text("# x\nr\t0\t5\ttrain\nq\t0\t5\ttrain\n")
    assert species_column(tmp_path / "s.bed") == {}
    with pytest.raises(InputError, match="record 'r1' has no species in the splits"):
        read_species(two_species(), {}, {"r0": "human"})


@pytest.mark.parametrize("piece", [37, 1 << 22], ids=["small pieces", "one piece"])
def test_windows_may_begin_wherever_less_than_half_is_unknown(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambagen.data.species_windows._PIECE", piece)
    generator = np.random.default_rng(0)
    text = np.frombuffer(random_dna(400, 5).encode(), dtype=np.uint8).copy()
    for start in (0, 90, 200):
        text[start : start + 45] = ord("N")
    text[generator.integers(0, 400, 30)] = ord("R")  # an ambiguity code
    genome = a_genome(text.tobytes())
    part = Stretches(genome.records, [(0, 10, 380)], genome.tokenizer)
    length = 40
    expected = [
        s for s in range(10, 380 - length + 1) if (genome.records[0].tokens[s : s + length] == N).sum() <= length // 2
    ]
    record, first, count = window_starts(part, length)
    assert set(record.tolist()) == {0}
    assert [s for f, c in zip(first.tolist(), count.tolist(), strict=True) for s in range(f, f + c)] == expected
    assert 0 < len(expected) < 331


def a_sampler(**settings: object) -> SpeciesSampler:
    texts = [random_dna(5000, 1), random_dna(1000, 2), "N" * 600 + random_dna(400, 3), random_dna(2000, 4)]
    genome = a_genome(*texts)
    parts = [
        Stretches(genome.records, rows, genome.tokenizer)
        for rows in ([(0, 0, 5000), (1, 0, 1000)], [(2, 0, 1000)], [(3, 0, 1500), (3, 1600, 2000)])
    ]
    return SpeciesSampler(parts, ("a", "b", "c"), 7, **settings)  # type: ignore[arg-type]


def test_species_are_drawn_uniformly_then_starts_or_records() -> None:
    sampler = a_sampler()
    drawn = sampler.draw(0, 100, 6000)
    assert np.bincount(drawn.label) == pytest.approx([2000] * 3, abs=4 * np.sqrt(6000 * 2 / 9))
    mine = drawn.record[drawn.label == 0]
    share = 4901 / (4901 + 901)
    assert (mine == 0).mean() == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / len(mine)))
    even = a_sampler(by_record="uniform").draw(0, 100, 6000)
    mine = even.record[even.label == 0]
    assert (mine == 0).mean() == pytest.approx(0.5, abs=4 * np.sqrt(0.25 / len(mine)))
    third = drawn.start[drawn.label == 2]
    assert not ((third > 1400) & (third < 1600)).any()  # no window over the hole
    assert third.max() <= 1900
    assert third.max() > 1800
    assert drawn.minus.mean() == pytest.approx(0.5, abs=0.03)


def test_a_row_is_a_function_of_seed_step_and_row() -> None:
    few, many = a_sampler().draw(5, 128, 8), a_sampler().draw(5, 128, 64)
    assert few.where() == many.where()[:8]
    assert few.where() != a_sampler().draw(6, 128, 8).where()


def test_windows_of_mostly_n_are_never_drawn_and_their_n_is_left_out() -> None:
    drawn = a_sampler().draw(1, 100, 900)
    b = np.flatnonzero(drawn.label == 1)
    assert drawn.start[b].min() >= 550
    assert drawn.start[b].min() < 560
    for row, sequence in zip(range(len(drawn)), drawn.sequences(), strict=True):
        known = int((drawn.tokens(row) < N).sum())
        assert len(sequence) == known >= 50
        assert (sequence < N).all()
    row = next(i for i in b.tolist() if not drawn.minus[i] and drawn.start[i] < 590)
    assert DnaTokenizer().decode(drawn.sequences()[row]) == DnaTokenizer().decode(drawn.tokens(row)).replace("N", "")
    assert np.array_equal(without_unknown(drawn.tokens(row)), drawn.sequences()[row])


def test_a_species_without_a_window_of_the_length_is_named() -> None:
    with pytest.raises(InputError, match=r"species b has no window of 1,001 bases \(its longest stretch has 1,000\)"):
        a_sampler().check([100, 1001])
    with pytest.raises(InputError, match=r"species b has no window of 900 bases .* much of it unknown"):
        a_sampler().check([900])


def test_evaluation_windows_are_fixed_spread_and_hashed() -> None:
    parts = a_sampler().parts
    drawn = draw_evaluation(parts, 100, 20, seed=1)
    assert np.bincount(drawn.label).tolist() == [20, 9, 20]
    again = draw_evaluation(parts, 100, 20, seed=1)
    assert drawn.where() == again.where()
    assert drawn.digest() == again.digest()
    assert drawn.digest() != draw_evaluation(parts, 100, 20, seed=2).digest()
    changed = drawn.records[0].tokens.copy()
    changed[drawn.start[drawn.record == 0][0]] ^= 15  # another base
    records = [type(drawn.records[0])("r0", changed, "x", 1), *drawn.records[1:]]
    other = [Stretches(records, part.spans, part.tokenizer) for part in parts]
    assert draw_evaluation(other, 100, 20, seed=1).digest() != drawn.digest()
    a = np.sort(drawn.start[drawn.label == 0])
    assert np.diff(a).max() < 1200  # evenly over 6,000 bases
    assert set(draw_evaluation(parts, 1500, 20, seed=1).label.tolist()) == {0, 2}  # b has no such window
    assert len(draw_evaluation(parts, 10_000, 20, seed=1)) == 0


def test_windows_that_overlap_count_as_those_that_lie_side_by_side() -> None:
    parts = a_sampler().parts
    for length in (100, 700):
        drawn = draw_evaluation(parts, length, 50, seed=0)
        expected = []
        for label in range(3):
            covered = {
                (record, base)
                for record, start, mine in zip(drawn.record, drawn.start, drawn.label, strict=True)
                if mine == label
                for base in range(start, start + length)
            }
            if covered:
                expected.append(min(int((drawn.label == label).sum()), -(-len(covered) // length)))
        assert drawn.independent().tolist() == expected


@pytest.mark.parametrize("block", [1, 7, 100, 5000], ids=["1 base", "7 bases", "100 bases", "at once"])
@pytest.mark.parametrize("at_most", [None, 1, 4, 1000], ids=["all windows", "1", "4", "more than there are"])
def test_the_windows_of_a_record_do_not_depend_on_the_pieces_it_comes_in(block: int, at_most: int | None) -> None:
    text = random_dna(1234, 9)
    ids = DnaTokenizer().encode((text[:300] + "N" * 150 + text[450:]).encode())
    cut = RecordWindows(50, at_most)
    found = [w for start in range(0, len(ids), block) for w in cut.feed(ids[start : start + block])]
    found += list(cut.finish())
    starts = [s for s in range(0, 1234, 50) if (ids[s : s + 50] == N).sum() <= 25]
    assert len(starts) == 22
    stride = 1
    while at_most is not None and len(starts[::stride]) > at_most:
        stride *= 2
    assert [w.start for w in found] == starts[::stride]
    for w in found:
        assert w.end == min(w.start + 50, 1234)
        assert np.array_equal(w.known, without_unknown(ids[w.start : w.end]))
    assert (cut.length, cut.unknown) == (1234, 150)


def test_a_long_record_keeps_few_windows_on_the_way() -> None:
    cut = RecordWindows(64, at_most=16)
    ids = np.full(1 << 16, 7, dtype=np.uint8)
    for _ in range(40):
        assert not list(cut.feed(ids))
        assert len(cut._kept) <= 16
        assert all(window.known.base is None for window in cut._kept)  # no view of what passed by
    found = [w.start for w in cut.finish()]
    assert 8 <= len(found) <= 16
    assert len(set(np.diff(found).tolist())) == 1
