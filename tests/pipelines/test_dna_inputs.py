"""What a FASTA may hold, through the commands that ask a model: bad input is one line and exit 3, odd input is read."""

import contextlib
import gzip
import sys
from pathlib import Path

import numpy as np
import pytest

from mambagen import cli
from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.models import save_model
from mambagen.models.heads import ClassifierConfig, SequenceClassifier
from mambagen.pipelines.dna_masked_model import DNA_COMPLEMENT
from tests.data.helpers import random_dna
from tests.pipelines.dna_models import small_folder

DNA = random_dna(200)
COMMANDS = {
    "score": ["score", "--summary", "--model", "m"],
    "embed": ["embed", "--out", "o.npz", "--model", "m"],
    "generate-dna": ["generate-dna", "m", "--length", "5", "--prompt"],
}

BAD = {
    "missing": (None, "no such file"),
    "folder": ("folder", "this is a folder"),
    "empty": (b"", "the file is empty"),
    "no header": (DNA.encode(), "no header"),
    "protein": (b">a\nMKVLEEQF\n", "looks like protein"),
    "FASTQ": (b"@a\nACGT\n+\nIIII\n", "looks like FASTQ"),
    "cut-off gzip": (gzip.compress(b">a\n" + random_dna(9000).encode())[:-800], "cut off"),
    "UTF-16": (">a\nACGT\n".encode("utf-16"), "UTF-16"),
    "duplicate names": (b">a\nAC\n>a\nGT\n", "x.fa:3: record 'a' occurs twice"),
    "blank inside": (b">a\nAC GT\n", "x.fa:2: record 'a': a blank inside"),
    "NUL": (b">a\nAC\0GT\n", "x.fa:2: record 'a': a NUL byte"),
    "no name": (b">\nACGT\n", "x.fa:1: a record without a name"),
    "nothing but empty records": (b">a\n>b\n", "it holds no sequence"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    small_folder(tmp_path / "m")
    return tmp_path


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
@pytest.mark.parametrize("command", COMMANDS)
def test_bad_sequence_files_are_one_line_and_exit_3(command: str, case: str, place: Path, capfd) -> None:
    content, what = BAD[case]
    if content == "folder":
        (place / "x.fa").mkdir()
    elif isinstance(content, bytes):
        (place / "x.fa").write_bytes(content)
    if command == "generate-dna" and case == "missing":
        what = "no such file, and no DNA sequence"
    code = cli.run([*COMMANDS[command], "x.fa"])
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if ": warning: " not in line]
    assert (code, out, len(lines)) == (3, "", 1), err
    assert what in lines[0]
    assert not list(place.glob("*o.npz"))


def bgzip_without_end(path: Path, text: bytes) -> None:
    import pysam

    with pysam.BGZFile(str(path), "wb", None) as file:
        file.write(text)
    path.write_bytes(path.read_bytes()[:-28])


ODD = ["lower case", "CR alone", "CR LF", "blank lines", "RNA", "blanks at line ends", "byte order mark"]


@pytest.mark.parametrize("case", ODD)
def test_odd_files_give_the_same_scores(case: str, place: Path, capfd) -> None:
    text = b">a\n" + DNA.encode() + b"\n>b\n" + DNA[:50].encode() + b"\n"
    (place / "plain.fa").write_bytes(text)
    odd = {
        "lower case": b">a\n" + DNA.lower().encode() + b"\n>b\n" + DNA[:50].lower().encode() + b"\n",
        "CR alone": text.replace(b"\n", b"\r"),
        "CR LF": text.replace(b"\n", b"\r\n"),
        "blank lines": b"\n\n" + text.replace(b"\n", b"\n\n"),
        "RNA": text.replace(b"T", b"U"),
        "blanks at line ends": text.replace(b"\n", b" \t\n"),
        "byte order mark": b"\xef\xbb\xbf" + text,
    }[case]
    (place / "odd.fa").write_bytes(odd)
    outputs = []
    for name in ("plain.fa", "odd.fa"):
        assert cli.run(["score", "--summary", "--model", "m", name]) == 0
        outputs.append(capfd.readouterr().out)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("command", ["score", "embed", "classify"])
def test_rna_is_warned_of_unless_it_is_meant(command: str, place: Path, capfd) -> None:
    if command == "classify":
        config = ClassifierConfig(
            encoder="bimamba",
            encoder_config={"d_model": 16, "n_layer": 1},
            complement=DNA_COMPLEMENT,
            classes=("a", "b"),
        )
        save_model(SequenceClassifier(config, seed=0), place / "c", DnaTokenizer().model_dump(mode="json"), "card")
    arguments = ["classify", "c"] if command == "classify" else COMMANDS[command]
    (place / "dna.fa").write_text(f">a\n{DNA}\n")
    (place / "rna.fa").write_text(f">a\n{DNA.replace('T', 'U')}\n")
    said = []
    for rest in (["dna.fa"], ["rna.fa"], ["rna.fa", "--rna"]):
        assert cli.run([*arguments, *rest]) == 0
        said.append(capfd.readouterr())
    assert said[0].out == said[1].out == said[2].out
    assert (said[0].err, said[2].err) == ("", "")
    assert "warning: rna.fa:1: record 'a' holds U, which is read as T; say --rna" in said[1].err


def test_a_bgzip_file_without_its_end_marker_is_read_with_a_warning(place: Path, capfd) -> None:
    pytest.importorskip("pysam")
    bgzip_without_end(place / "x.fa.gz", b">a\n" + DNA.encode() + b"\n")
    assert cli.run(["score", "--summary", "--model", "m", "x.fa.gz"]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines()[1].split("\t")[:3] == ["a", "0", "200"]
    assert "warning" in err
    assert "end marker" in err


def test_names_that_are_not_ascii_come_out_as_they_went_in(place: Path, capfd) -> None:
    pytest.importorskip("pybigtools")
    reader = pytest.importorskip("pyBigWig")
    (place / "x.fa").write_text(f">größe_1 größer\n{DNA}\n", encoding="utf-8")
    assert cli.run(["score", "--model", "m", "x.fa"]) == 0
    assert capfd.readouterr().out.splitlines()[1].startswith("größe_1\t1\t")
    assert cli.run(["score", "--model", "m", "x.fa", "--out", "x.bw"]) == 0
    with reader.open("x.bw") as track:
        assert track.chroms() == {"größe_1": 200}
    assert cli.run(["embed", "--model", "m", "x.fa", "--out", "x.npz"]) == 0
    assert np.load("x.npz")["record"].tolist() == ["größe_1"]


def test_two_files_with_a_record_of_the_same_name_are_told_apart(place: Path, capfd) -> None:
    (place / "x.fa").write_text(f">a\n{DNA}\n")
    (place / "y.fa").write_text(f">a\n{DNA[:20]}\n")
    assert cli.run(["score", "--summary", "--model", "m", "x.fa", "y.fa"]) == 0
    rows = [line.split("\t") for line in capfd.readouterr().out.splitlines()[1:]]
    assert [(row[0], row[2]) for row in rows] == [("x:a", "200"), ("y:a", "20")]


def test_a_full_disk_is_exit_5(place: Path, capfd, monkeypatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (place / "x.fa").write_text(f">a\n{DNA}\n")
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", full)
    assert cli.run(["score", "--model", "m", "x.fa"]) == 5
    monkeypatch.undo()
    with contextlib.suppress(OSError):
        full.close()
    err = capfd.readouterr().err
    assert "No space left on device" in err
    assert len(err.splitlines()) == 1
