"""`mambagen data prepare`, `audit` and `simulate-species`, and numbers of bases as people write them."""

import json
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest

from mambagen import cli
from mambagen.commands.options import BASES
from mambagen.data.prepared import list_prepared
from mambagen.pipelines import genomes
from mambagen.pipelines.genomes import open_genome, split_rows

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`data("audit", "demo")` -> (exit code, stdout, stderr), with a cache of its own."""
    monkeypatch.setenv("MAMBAGEN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.run(["data", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def rows(text: str) -> list[dict[str, str]]:
    header, *lines = [line.split("\t") for line in text.splitlines()]
    return [dict(zip(header, line, strict=True)) for line in lines]


def write(path: Path, **records: int) -> Path:
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)
    rng = np.random.default_rng(len(records))
    path.write_text("".join(f">{k}\n{letters[rng.integers(0, 4, n)].tobytes().decode()}\n" for k, n in records.items()))
    return path


def test_files_and_data_sets_are_prepared_once(data: Run, tmp_path: Path) -> None:
    fasta = write(tmp_path / "a.fa", x=5000, y=300)
    code, out, _ = data("prepare", fasta, "demo")
    assert code == 0
    found = rows(out)
    assert [(row["records"], row["bases"], row["state"]) for row in found] == [
        ("2", "5300", "made"), ("2", "61674", "made"), ("1", "71700", "made"), ("1", "154478", "made")
    ]  # fmt: skip
    assert sorted(Path(row["path"]) for row in found) == list(list_prepared(tmp_path / "home" / "prepared"))
    assert {row["state"] for row in rows(data("prepare", fasta, "demo")[1])} == {"was there"}


def test_one_bad_file_is_named_at_the_end_and_the_others_are_prepared(data: Run, tmp_path: Path) -> None:
    good = write(tmp_path / "good.fa", x=500)
    (tmp_path / "bad.fa").write_text(">x\nMKWVTFISLL\n")
    code, out, err = data("prepare", tmp_path / "bad.fa", good, "--json")
    assert code == 3
    assert [row["bases"] for row in json.loads(out)] == [500]
    assert err.count("\n") == 1
    assert f"{tmp_path}/bad.fa:2: record 'x'" in err
    assert data("prepare", "-")[0] == 2
    assert data("prepare", "hg38")[0] == 3


def test_large_genomes_are_mapped_and_small_ones_held(data: Run, tmp_path: Path) -> None:
    fasta = write(tmp_path / "a.fa", x=5000)
    held, mapped = open_genome([fasta]), open_genome([fasta], prepare_from=1000)
    assert held.records[0].tokens.flags.owndata
    assert not mapped.records[0].tokens.flags.owndata
    assert np.array_equal(held.records[0].tokens, mapped.records[0].tokens)
    assert held.whole().fingerprint() == mapped.whole().fingerprint()


def test_a_cache_that_cannot_be_written_is_warned_of(
    data: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAMBAGEN_HOME", str(tmp_path / "file"))
    genome = open_genome([write(tmp_path / "a.fa", x=5000)], prepare_from=1000)
    assert genome.bases == 5000
    assert "reading into memory instead" in caplog.text


def test_the_audit_counts_what_windows_reach_and_nothing_under_strict(data: Run, tmp_path: Path) -> None:
    fasta = write(tmp_path / "a.fa", x=10_000)
    bed = tmp_path / "splits.bed"
    bed.write_text("x\t1000\t2000\ttrain\nx\t2000\t2300\tvalid\nx\t2300\t3300\ttrain\nx\t5000\t5100\ttest\n")
    code, out, _ = data("audit", fasta, "--splits", bed, "--length", 512, "--length", "2048", "--length", "8Ki")
    assert code == 0
    found = {(int(row["length"]), row["windows"]): row for row in rows(out)}
    for length, row in found.items():
        expected = {512: ("0", "0"), 2048: ("300", "0"), 8192: ("300", "100")}[length[0]]
        if length[1] != "intervals":
            expected = ("0", "0")
        assert (row["overlap_valid"], row["overlap_test"]) == expected, length
    assert found[8192, "intervals"]["share_of_held_out"] == "1.0"
    # Between the record's start and the validation row are 2,000 bases, between it and the test row 2,700.
    assert found[2048, "intervals --strict-split"]["starts"] == "1"
    assert found[8192, "intervals --strict-split"]["starts"] == "0"
    assert found[512, "stretches"]["starts"] == found[512, "intervals"]["starts"] == str(2 * (1000 - 512 + 1))


def test_the_audit_of_the_demo_is_clean(data: Run) -> None:
    code, out, _ = data("audit", "demo", "--json", "--length", "4Ki")
    assert code == 0
    (row,) = json.loads(out)
    assert (row["windows"], row["overlap_valid"], row["overlap_test"]) == ("stretches", 0, 0)
    assert row["starts"] > 200_000


def test_chromosomes_of_a_manifest_become_intervals(data: Run, tmp_path: Path) -> None:
    home = tmp_path / "home" / "data" / "apes"
    home.mkdir(parents=True)
    for name in ("one", "two"):
        write(home / f"{name}.fa", chr1=3000, chr2A=4000, chr5=500, chrUn_x=700)
    files = "".join(
        f'[[files]]\nname="{n}.fa"\nurls=["https://example.org/{n}"]\nsha256="unknown: pin at first fetch"\n'
        f'role="sequence"\n'
        for n in ("one", "two")
    )
    manifest = tmp_path / "apes.toml"
    manifest.write_text(
        f'name="apes"\ntitle="t"\nkind="dna"\nlicence="none"\nprovenance="here"\n{files}'
        '[splits.chromosomes]\ntrain=["2","2A"]\nvalid=["5"]\ntest=["1"]\n'
    )
    genome = open_genome([str(manifest)])
    found = split_rows([str(manifest)], genome)
    assert found == [
        (f"{f}:{c}", 0, n, split)
        for f in ("one", "two")
        for c, n, split in (("chr1", 3000, "test"), ("chr2A", 4000, "train"), ("chr5", 500, "valid"))
    ]
    train, valid = genome.hold_out(intervals=found)
    assert [genome.records[record].id for record, _, _ in train] == ["one:chr2A", "two:chr2A"]
    assert valid.bases == 1000


def test_species_are_simulated_into_a_folder(data: Run, tmp_path: Path) -> None:
    code, out, _ = data("simulate-species", "--species", 3, "--length", "60k", "--seed", 4, "--out", "sim", "--json")
    assert code == 0
    found = json.loads(out)
    assert [row["species"] for row in found] == ["sp1", "sp2", "sp3"]
    assert all(50_000 < row["bases"] < 70_000 for row in found)
    assert all(0 < row["divergence_to_nearest"] <= 0.01 for row in found)
    genome = genomes.open_genome([row["path"] for row in found])
    train, valid = genome.hold_out(intervals=split_rows([], genome, tmp_path / "sim" / "splits.bed"))
    assert train.bases / genome.bases == pytest.approx(0.6, abs=0.05)
    assert valid.bases / genome.bases == pytest.approx(0.2, abs=0.05)
    for arguments, message in (
        (("--out", "sim"), "exists already"),
        (("--out", "x", "--species", 1), "species is 1"),
        (("--out", "x", "--tree", "a,b"), "Newick"),
        (("--out", "x", "--length", "2.5"), "no whole number"),
    ):
        code, _, err = data("simulate-species", *arguments)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("131072", 131072),
        ("10_000", 10_000),
        ("2M", 2_000_000),
        ("2.3m", 2_300_000),
        ("1Mi", 1 << 20),
        ("1.5G", 15 * 10**8),
        ("330B", 330 * 10**9),
        ("500bp", 500),
    ],
)
def test_numbers_of_bases_are_read_as_people_write_them(text: str, number: int) -> None:
    assert BASES.convert(text, None, None) == number


@pytest.mark.parametrize("text", ["", "x", "1.5", "2Q", "inf", "nan", "-"])
def test_what_is_no_number_of_bases_is_told(text: str) -> None:
    with pytest.raises(click.BadParameter, match="number of bases"):
        BASES.convert(text, None, None)
