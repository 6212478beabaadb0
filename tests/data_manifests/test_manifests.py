"""Manifests: strict, and what a user gives as data finds its files."""

from pathlib import Path

import pytest

from mambagen.data_manifests import (
    Manifest,
    chromosomes_of,
    default_splits,
    folder_of,
    list_manifests,
    load_manifest,
    manifest_names,
    read_bed,
    resolve_dna,
)
from mambagen.data_manifests.manifest import FileEntry
from mambagen.errors import InputError, UsageError

GOOD = """
name = "toy"
title = "a toy"
kind = "dna"
licence = "none"
provenance = "made here"
[[files]]
name = "toy.fa"
urls = ["https://example.org/toy.fa"]
sha256 = "unknown: pin at first fetch"
role = "sequence"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "toy.toml"
    path.write_text(text)
    return path


def test_every_shipped_manifest_is_valid_and_named_as_its_file() -> None:
    names = manifest_names()
    assert {"demo", "hg38", "great-apes", "five-species", "t2t"} <= set(names)
    assert [manifest.name for manifest in list_manifests()] == names


def test_hg38_says_what_is_not_known_of_it() -> None:
    manifest = load_manifest("hg38")
    assert all(file.known_sha256 is None for file in manifest.files)
    assert "major allele" in manifest.notes
    assert manifest.splits is not None
    assert manifest.splits.bed == "sequences_human.bed"


def test_a_manifest_of_the_user_is_read(tmp_path: Path) -> None:
    manifest = load_manifest(written(tmp_path, GOOD))
    assert (manifest.name, manifest.files[0].unpack) == ("toy", "none")
    assert not manifest.packaged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("title", "titel"), "titel"),  # unknown keys are errors
        (('role = "sequence"', 'role = "sequence"\nmd5 = "1"'), r"files\.0\.md5"),
        (('kind = "dna"', 'kind = "protein"'), "kind"),
        (('name = "toy"', 'name = "../toy"'), "name"),
        (('name = "toy.fa"', 'name = "../toy.fa"'), r"files\.0\.name"),
        (('name = "toy.fa"', 'name = ".hidden"'), r"files\.0\.name"),
        (("unknown: pin at first fetch", "unknown"), r"files\.0\.sha256"),
        (("https://", "ftp://"), "no http or https"),
        (('urls = ["https://example.org/toy.fa"]\n', ""), "either urls or packaged"),
        (('role = "sequence"', 'role = "sequence"\npackaged = "x"'), "either urls or packaged"),
        (('licence = "none"\n', ""), "licence"),
        (('name = "toy"', 'name = "demo"'), "taken"),
        (("[[files]]", "[splits]\nbed = 'x.bed'\n[[files]]"), "x.bed"),
        (("[[files]]", "[splits]\n[[files]]"), "either as intervals or as bed or as chromosomes"),
        (("[[files]]", "[splits.chromosomes]\ntrain=['2','X']\ntest=['2']\n[[files]]"), "chromosome 2 is named twice"),
        (("[[files]]", "[splits.chromosomes]\ntrain=['chr2']\n[[files]]"), "chromosomes.train"),
        (("[[files]]", "[splits]\nintervals=[{record='r', start=5, end=5, split='valid'}]\n[[files]]"), "not before"),
        (("[[files]]", "[splits]\nintervals=[{record='r', start=1, end=5, split='dev'}]\n[[files]]"), "split"),
        (('title = "a toy"', "title = "), "no TOML"),
    ],
)
def test_a_wrong_manifest_is_one_line_with_the_file_and_the_key(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    assert change[0] in GOOD
    path = written(tmp_path, GOOD.replace(*change, 1))
    with pytest.raises(InputError, match=message) as caught:
        load_manifest(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    files = GOOD[GOOD.index("[[files]]") :]
    with pytest.raises(InputError, match="two files share a name"):
        load_manifest(written(tmp_path, GOOD + files))


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'demmo'; did you mean demo\?"):
        load_manifest("demmo")
    with pytest.raises(UsageError, match=r"'zzz'; there are .*demo.*hg38"):
        load_manifest("zzz")
    with pytest.raises(InputError, match=r"none\.toml: the manifest cannot be read"):
        load_manifest("none.toml")


# ---- what a user gives as data --------------------------------------------------------------------------------------


def test_names_files_and_stdin_are_resolved_in_order(tmp_path: Path) -> None:
    mine = tmp_path / "mine.fa"
    mine.write_text(">x\nACGT\n")
    demo = resolve_dna(["demo"])
    assert [Path(path).name for path in demo] == ["hg38.fa.gz", "panTro5.fa.gz", "NC_000932.fa.gz"]
    assert all(Path(path).is_file() for path in demo)
    assert resolve_dna([str(mine), "demo", "-"]) == [mine, *demo, "-"]
    assert resolve_dna([mine]) == [mine]


def test_a_file_called_like_a_data_set_needs_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text(">x\nACGT\n")
    assert len(resolve_dna(["demo"])) == 3
    assert resolve_dna(["./demo"]) == [Path("./demo")]


def test_what_is_neither_file_nor_data_set_is_told() -> None:
    with pytest.raises(InputError, match=r"hg19: no such file, and no data set of this name \(there are .*demo"):
        resolve_dna(["hg19"])
    with pytest.raises(UsageError, match="twice"):
        resolve_dna(["-", "-"])
    with pytest.raises(UsageError, match="no data"):
        resolve_dna([])
    assert resolve_dna(["nowhere.fa"]) == [Path("nowhere.fa")]  # the reader says what is wrong with it


def test_a_data_set_that_is_not_fetched_or_not_dna_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'hg38' is not here yet; run: mambagen data fetch hg38"):
        resolve_dna(["hg38"])
    path = written(tmp_path, GOOD.replace('kind = "dna"', 'kind = "audio"'))
    with pytest.raises(InputError, match="'toy' is audio, not DNA"):
        resolve_dna([str(path)])


def test_a_manifest_given_by_its_path_is_asked_to_be_fetched_by_its_path(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    with pytest.raises(InputError) as caught:
        resolve_dna([str(path)])
    assert str(caught.value).endswith(f"run: mambagen data fetch {path}")


def test_data_sets_may_be_divided_by_whole_chromosomes(tmp_path: Path) -> None:
    apes = load_manifest("great-apes").splits
    assert apes is not None
    assert apes.chromosomes is not None
    assert apes.chromosomes.test == ("1", "3", "12", "13")
    assert {"2A", "2B", "22", "X"} <= set(apes.chromosomes.train)
    path = written(tmp_path, GOOD + "[splits.chromosomes]\ntrain = ['2', 'X']\nvalid = ['1']\n")
    folder = folder_of(load_manifest(path))
    folder.mkdir(parents=True)
    (folder / "toy.fa").write_text(">chr1\nACGT\n")
    assert default_splits([str(path), "demo"]) == default_splits(["demo"])
    assert chromosomes_of([str(path), "demo"]) == [
        ([folder / "toy.fa"], {"train": ("2", "X"), "valid": ("1",), "test": ()})
    ]


def test_splits_come_from_the_manifest_or_its_bed_file(tmp_path: Path) -> None:
    assert default_splits([str(tmp_path / "mine.fa"), "-"]) == []
    assert {row.split for row in default_splits(["demo"])} == {"valid"}
    bed = '[[files]]\nname = "toy.bed"\nurls = ["https://example.org/b"]\nsha256 = "unknown: pin at first fetch"\n'
    path = written(tmp_path, GOOD + bed + 'role = "splits"\n[splits]\nbed = "toy.bed"\n')
    folder = folder_of(load_manifest(path))
    folder.mkdir(parents=True)
    (folder / "toy.fa").write_text(">chr1\nACGT\n")
    with pytest.raises(InputError, match="not here yet"):
        resolve_dna([str(path)])
    (folder / "toy.bed").write_text("# a remark\ntrack name=x\nchr1\t0\t2\ttrain\textra\n\nchr1 2 4 valid\n")
    assert resolve_dna([str(path)]) == [folder / "toy.fa"]
    assert default_splits([str(path)]) == [("chr1", 0, 2, "train"), ("chr1", 2, 4, "valid")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("chr1\t0\t2", "record, start, end, split"),
        ("chr1\t-1\t2\ttrain", "record, start, end, split"),
        ("chr1\tx\t2\ttrain", "record, start, end, split"),
        ("chr1\t2\t2\ttrain", "start 2 is not before end 2"),
        ("chr1\t0\t2\tdev", "not 'dev'"),
    ],
)
def test_a_wrong_bed_row_is_told_with_its_line(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "a.bed"
    path.write_text(f"chr1\t0\t2\ttrain\n{row}\n")
    with pytest.raises(InputError, match=message) as caught:
        read_bed(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_bed_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_bed(tmp_path / "none.bed")
    (tmp_path / "binary.bed").write_bytes(b"\x1f\x8b\x08\xff\xfe")
    with pytest.raises(InputError, match="no text"):
        read_bed(tmp_path / "binary.bed")


def test_a_manifest_has_no_way_to_run_or_place_anything_elsewhere() -> None:
    fields = set(Manifest.model_fields) | set(FileEntry.model_fields)
    assert fields == {
        *("name", "title", "kind", "licence", "provenance", "citations", "notes", "files", "splits", "audio"),
        *("urls", "packaged", "sha256", "bytes", "unpack", "unpacked_bytes_at_most", "role"),
    }
