"""Simulated species against closed forms: matrices, differing sites, composition, repeats, the ideal classifier."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import expm
from scipy.stats import gamma

from mambagen.data.fasta import read_records
from mambagen.data.phylogeny import parse_newick, yule_tree
from mambagen.data.simulate import SpeciesModel, _families, _splice, _Strand, simulate_species
from mambagen.data.simulate_ideal import expected_ideal_accuracy, ideal_accuracy
from mambagen.data.substitution import HKY, equilibrium_bases, substitute, substitute_each
from mambagen.errors import ResourceError, UsageError

MODEL = HKY((0.35, 0.15, 0.2, 0.3), kappa=5.0, alpha=0.6)


def rate_matrix(model: HKY) -> NDArray[np.float64]:
    """HKY85 written out from its definition, scaled to one substitution a site and unit of time."""
    pi = np.array(model.frequencies)
    rates = np.tile(pi, (4, 1))
    for i, j in ((0, 2), (2, 0), (1, 3), (3, 1)):
        rates[i, j] *= model.kappa
    np.fill_diagonal(rates, 0)
    np.fill_diagonal(rates, -rates.sum(1))
    return rates / -(pi @ np.diag(rates))


@pytest.mark.parametrize("time", [0.0, 0.01, 0.3, 5.0])
def test_the_chances_are_the_matrix_exponential_of_the_rates(time: float) -> None:
    np.testing.assert_allclose(MODEL.matrix(time), expm(rate_matrix(MODEL) * time), atol=1e-12)
    np.testing.assert_allclose(MODEL.matrix(np.array([time, 1.0]))[0], MODEL.matrix(time), atol=1e-15)


def test_the_chances_averaged_over_rates_are_the_integral_over_the_gamma_distribution() -> None:
    quantiles = gamma(0.6, scale=1 / 0.6).ppf((np.arange(200_000) + 0.5) / 200_000)
    np.testing.assert_allclose(MODEL.mean_matrix(0.4), MODEL.matrix(0.4 * quantiles).mean(0), atol=2e-5)
    rates = MODEL.rates()
    assert rates.mean() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(MODEL.matrix(0.4 * rates).mean(0), MODEL.mean_matrix(0.4), atol=5e-4)
    edges = gamma(0.6, scale=1 / 0.6).ppf([10 / 256, 11 / 256])
    assert edges[0] < rates[10] < edges[1]


def test_jukes_and_cantors_formula_is_a_special_case() -> None:
    plain = HKY((0.25, 0.25, 0.25, 0.25), kappa=1.0, alpha=float("inf"))
    assert plain.expected_difference(0.3) == pytest.approx(0.75 * (1 - np.exp(-4 / 3 * 0.3)), rel=1e-12)


def test_substituted_sites_follow_the_model_and_composition_stays() -> None:
    rng = np.random.default_rng(0)
    before = equilibrium_bases(MODEL, 1_000_000, rng)
    rates = rng.integers(0, 256, len(before), dtype=np.uint8)
    after = before.copy()
    for _ in range(2):  # in two branches: sites keep their rates
        substitute(after, rates, 0.1, MODEL, rng)
    share = np.array([[np.mean(after[before == i] == j) for j in range(4)] for i in range(4)])
    np.testing.assert_allclose(share, MODEL.mean_matrix(0.2), atol=0.004)
    composition = np.bincount(after, minlength=4) / len(after)
    np.testing.assert_allclose(composition, MODEL.frequencies, atol=0.002)  # four standard errors


def test_sites_with_times_of_their_own_follow_the_model() -> None:
    rng = np.random.default_rng(1)
    before = np.full(400_000, 2, dtype=np.uint8)
    after = substitute_each(before, np.repeat([0.05, 0.5], 200_000), MODEL, rng)
    for half, time in ((after[:200_000], 0.05), (after[200_000:], 0.5)):
        seen = np.bincount(half, minlength=4) / len(half)
        np.testing.assert_allclose(seen, expm(rate_matrix(MODEL) * time)[2], atol=0.004)


@pytest.mark.parametrize("divergence", [0.01, 0.3])
def test_two_species_differ_at_the_expected_share_of_sites(divergence: float) -> None:
    still = {"indel_rate": 0.0, "repeat_rate": 0.0, "old_repeats": 0.0}
    made = simulate_species(3, divergence, 1_200_000, seed=3, tree="star", chromosomes=2, **still)
    one, other, third = (np.concatenate(list(records.values())) for records in made.genomes.values())
    expected = made.model.hky().expected_difference(divergence)
    error = np.sqrt(expected * (1 - expected) / len(one))
    for a, b in ((one, other), (one, third), (other, third)):
        assert np.mean(a != b) == pytest.approx(expected, abs=4 * error + 2e-3 * expected)
    gc = np.mean((one == ord("G")) | (one == ord("C")))
    assert gc == pytest.approx(0.41, abs=4 * np.sqrt(0.41 * 0.59 / len(one)))


def test_repeats_come_at_their_rate_and_length_stays() -> None:
    made = simulate_species(2, 0.05, 4_000_000, seed=1, tree="star", chromosomes=4, repeat_rate=0.005)
    model = made.model
    families = _families(model, made.tree)
    assert all(200 <= len(f) <= 2000 for f in families[0])
    mean = 0.75 * np.mean([len(f) for f in families[0]])
    for tip, (species, records) in zip(made.tree.tips(), made.genomes.items(), strict=True):
        bases = sum(int((made.origins[record] == tip + 1).sum()) for record in records)
        expected = model.repeat_rate * 0.025 * model.length * mean
        assert bases == pytest.approx(expected, rel=0.2)
        assert sum(map(len, records.values())) == pytest.approx(model.length, rel=0.04), species
        old = sum(int((made.origins[record] == 1).sum()) for record in records)
        assert old == pytest.approx(0.2 * model.length, rel=0.1)
        other = made.tree.tips()[1 - made.tree.tips().index(tip)]
        assert not any((made.origins[record] == other + 1).any() for record in records)


def test_pieces_are_cut_and_inserted_as_a_plain_loop_does_it() -> None:
    rng = np.random.default_rng(5)
    for _ in range(50):
        size, cuts, pieces = int(rng.integers(1, 40)), int(rng.integers(0, 4)), int(rng.integers(0, 5))
        strand = _Strand(*(np.arange(size).astype(t) for t in (np.uint8, np.uint8, np.int16)))  # type: ignore[arg-type]
        starts, lengths = rng.integers(0, size, cuts), rng.integers(1, 9, cuts)
        at, sizes = rng.integers(0, size + 1, pieces), rng.integers(1, 6, pieces)
        numbers = 100 + np.arange(int(sizes.sum()))
        content = _Strand(*(numbers.astype(t) for t in (np.uint8, np.uint8, np.int16)))  # type: ignore[arg-type]
        made = _splice(strand, starts, lengths, at, sizes, content)
        cut = {i for s, n in zip(starts, lengths, strict=True) for i in range(s, s + n)}
        parts = np.split(numbers, np.cumsum(sizes)[:-1]) if pieces else []
        expected: list[int] = []
        for i in range(size + 1):
            for place, part in zip(at, parts, strict=True):
                expected += part.tolist() if place == i else []
            expected += [i] if i < size and i not in cut else []
        assert made.bases.tolist() == expected
        assert made.origins.tolist() == expected


def test_files_are_what_the_function_returns_and_the_same_each_time(tmp_path: Path) -> None:
    first = simulate_species(3, 0.02, 30_000, seed=7, out=tmp_path / "a", chromosomes=3)
    again = simulate_species(3, 0.02, 30_000, seed=7, out=tmp_path / "b", chromosomes=3)
    other = simulate_species(3, 0.02, 30_000, seed=8, chromosomes=3)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        *("sp1.fa", "sp2.fa", "sp3.fa", "splits.bed", "repeats.bed", "tree.nwk", "parameters.json")
    }
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    for species, path in first.files.items():
        read = {record.id: record.sequence for record in read_records(path)}
        assert list(read) == [f"{species}.chr{i}" for i in (1, 2, 3)]
        for record, letters in first.genomes[species].items():
            assert np.array_equal(read[record], letters)
            assert not np.array_equal(letters, other.genomes[species][record])
    assert again.splits == first.splits
    rows = [line.split("\t") for line in (tmp_path / "a" / "splits.bed").read_text().splitlines()]
    assert [row[3] for row in rows] == ["train", "valid", "test"] * 3
    assert [int(row[2]) for row in rows] == [len(x) for r in first.genomes.values() for x in r.values()]
    tree = parse_newick((tmp_path / "a" / "tree.nwk").read_text())
    assert tree.distance(tree.tips()[0], tree.tips()[-1]) <= 0.02 + 1e-9
    assert SpeciesModel(**{k: v for k, v in json.loads((tmp_path / "a" / "parameters.json").read_text()).items()
                           if k != "numpy"}) == first.model  # fmt: skip
    with pytest.raises(UsageError, match="exists already"):
        simulate_species(3, out=tmp_path / "a")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
def test_nothing_is_left_of_a_write_that_did_not_end(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(simulated: object) -> list[str]:
        raise error

    monkeypatch.setattr("mambagen.data.simulate._repeat_rows", fails)
    with pytest.raises((KeyboardInterrupt, ResourceError)):
        simulate_species(2, length=10_000, chromosomes=3, out=tmp_path / "species")
    assert list(tmp_path.iterdir()) == []


def test_trees_are_drawn_scaled_and_read_back() -> None:
    tree = yule_tree(7, np.random.default_rng(0)).scaled(0.1)
    depths = [tree.depth(tip) for tip in tree.tips()]
    np.testing.assert_allclose(depths, 0.05, rtol=1e-12)
    again = parse_newick(tree.newick())
    assert {again.nodes[i].name for i in again.tips()} == {tree.nodes[i].name for i in tree.tips()}
    place = {node.name: i for i, node in enumerate(again.nodes)}
    for a in tree.tips():
        for b in tree.tips():
            there = again.distance(place[tree.nodes[a].name], place[tree.nodes[b].name])
            assert there == pytest.approx(tree.distance(a, b), abs=1e-9)
    np.testing.assert_allclose([again.depth(i) for i in again.tips()], depths, rtol=1e-8)
    own = parse_newick("((human:1,chimp:1):2,gorilla:4);").scaled(0.07)
    assert own.distance(*own.tips()[:2]) == pytest.approx(0.02)
    assert own.distance(own.tips()[0], own.tips()[2]) == pytest.approx(0.07)
    for bad in ("", "a;", "((a:1,b:1);", "(a:1,b:x);", "(a:1,a:1);", "(a:1,/b:1);", "a:1,b:2);"):
        with pytest.raises(UsageError, match="Newick"):
            parse_newick(bad)
    with pytest.raises(UsageError, match="length"):
        parse_newick("(a:0,b:0);").scaled(0.1)


def test_the_ideal_classifier_on_genomes_is_as_good_as_expected() -> None:
    made = simulate_species(4, 0.02, 8_000_000, seed=2, tree="star", chromosomes=2, repeat_rate=0.004)
    for length in (2_000, 20_000, 100_000):
        found = ideal_accuracy(made, length, windows=1500)
        assert found.accuracy == pytest.approx(expected_ideal_accuracy(made.model, length), abs=0.06)
    model = SpeciesModel(species=4, divergence=0.02, tree="star", repeat_rate=0.004)
    mean = 0.75 * 1800 / np.log(10)
    n = 0.004 * 0.01 * (20_000 + mean - 1)
    assert expected_ideal_accuracy(model, 20_000) == pytest.approx(1 - np.exp(-n) * 3 / 4, rel=1e-12)
    deep = SpeciesModel(species=6, divergence=0.02)
    accuracies = [expected_ideal_accuracy(deep, length) for length in (1, 1 << 14, 1 << 18, 1 << 26)]
    assert accuracies == sorted(accuracies)
    assert accuracies[0] < 0.19
    assert accuracies[-1] == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="no test record"):
        ideal_accuracy(made, 10_000_000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"species": 1}, "species is 1"),
        ({"divergence": 0}, "divergence is 0"),
        ({"length": 10}, "length is 10"),
        ({"chromosomes": 900, "length": 10_000}, "900 chromosomes need"),
        ({"shortest_repeat": 500, "longest_repeat": 100}, "longest_repeat"),
        ({"kapa": 2}, "kapa"),
        ({"tree": "bush"}, "Newick"),
    ],
)
def test_impossible_settings_are_told(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        simulate_species(**settings)  # type: ignore[arg-type]
