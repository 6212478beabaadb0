"""Labelled sequences out of tables and FASTA files, and what is said of files that cannot be used."""

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.kmers import kmer_frequencies
from mambagen.data.labelled import Labelled, read_labelled
from mambagen.errors import InputError
from tests.data.helpers import random_dna

TOKENIZER = DnaTokenizer()


def write(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def letters(data: Labelled) -> list[str]:
    return [TOKENIZER.decode(sequence) for sequence in data.sequences]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "sequence,label\nACGT,yes\nnnGG,no\n"),
        ("a.csv.gz", "sequence,label\r\nACGT,yes\r\nNNGG,no\r\n"),
        ("a.tsv", "label\tid\tsequence\nyes\t1\tACGT\n\nno\t2\tNNGG\n"),
        ("a.csv", '"sequence","label"\n"acgt","yes"\nKNGG,"no"'),
    ],
)
def test_tables_are_read_whatever_their_dress(name: str, text: str, tmp_path: Path) -> None:
    data = read_labelled(write(tmp_path / name, text), None, TOKENIZER)
    assert letters(data) == ["ACGT", "NNGG"]
    assert data.labels == ["yes", "no"]
    assert data.classes() == ("no", "yes")
    assert data.indices(("no", "yes")).tolist() == [1, 0]


@pytest.mark.parametrize("labels", ["name\tlabel\nr1\tx\nr2\ty\nr3\tz\n", "r2,y\nr1,x\n"])
def test_a_fasta_takes_its_labels_from_a_file(labels: str, tmp_path: Path) -> None:
    fasta = write(tmp_path / "a.fa", ">r1 first\nACGT\nAC\n>r2\nGGG\n")
    data = read_labelled(fasta, write(tmp_path / "labels", labels), TOKENIZER)
    assert letters(data) == ["ACGTAC", "GGG"]
    assert (data.labels, data.names) == (["x", "y"], ["r1", "r2"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "a.csv: the file is empty; give a CSV or TSV table, or a FASTA with --labels"),
        ("\n\n", "a.csv: the file holds nothing but blanks"),
        ("sequence,label\n", "a.csv: the table has a header and no rows"),
        ("seq,label\nACGT,1\n", "a.csv:1: no column 'sequence'; the header has seq, label (see --sequence-column)"),
        ("sequence,y\nACGT,1\n", "a.csv:1: no column 'label'; the header has sequence, y (see --label-column)"),
        ("sequence,label\nACGT,1\nACGE,0\n", "a.csv:3: 'E' is no DNA letter"),
        ("sequence,label\nAC GT,1\n", "a.csv:2: ' ' is no DNA letter"),
        ("sequence,label\nACGT\n", "a.csv:2: 1 columns where the header has 2"),
        ("sequence,label\nACGT,\n", "a.csv:2: no label in this row"),
        ("sequence,label\n,1\n", "a.csv:2: no sequence in this row"),
        (">r1\nACGT\n", "a.csv: this is a sequence file; give the classes of its records by --labels"),
    ],
)
def test_tables_that_cannot_be_used_are_refused_with_their_line(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read_labelled(write(tmp_path / "a.csv", text), None, TOKENIZER)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ("r1,x\n", "a.fa:3: record 'r2' has no label in"),
        ("r1,x\nr1,y\n", "labels:2: record 'r1' has a label already"),
        ("r1,x,3\n", "labels:1: 3 columns; a file of labels has two"),
        ("r1,\n", "labels:1: no label in this row"),
        ("name,label\n", "labels: it holds no labels"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(labels: str, told: str, tmp_path: Path) -> None:
    fasta = write(tmp_path / "a.fa", ">r1\nACGT\n>r2\nGGG\n")
    with pytest.raises(InputError) as error:
        read_labelled(fasta, write(tmp_path / "labels", labels), TOKENIZER)
    assert told in str(error.value)


def test_a_label_of_no_class_is_named_with_its_line(tmp_path: Path) -> None:
    data = read_labelled(write(tmp_path / "a.csv", "sequence,label\nA,1\nC,2\nG,10\n"), None, TOKENIZER)
    assert data.classes() == ("1", "2", "10")
    with pytest.raises(InputError, match=r"a\.csv:4: the label '10' is none of the classes \(1, 2\)"):
        data.indices(("1", "2"))


def test_a_share_of_each_class_is_held_out_and_copies_stay_together() -> None:
    texts = [random_dna(20, i) for i in range(400)]
    texts += texts[:50]
    labels = [str(i % 2) if i % 10 else "rare" for i in range(450)]
    data = Labelled([TOKENIZER.encode(t.encode()) for t in texts], labels, labels, list(range(450)), "x")
    train, valid = data.hold_out(0.2, seed=1)
    assert len(train) + len(valid) == 450
    assert not set(letters(train)) & set(letters(valid))
    share = {name: n / Counter(labels)[name] for name, n in Counter(valid.labels).items()}
    assert all(0.15 < share[name] < 0.3 for name in ("0", "1", "rare"))
    order = np.random.default_rng(0).permutation(450)
    again = data.take(order).hold_out(0.2, seed=1)[1]
    assert sorted(letters(again)) == sorted(letters(valid))
    assert sorted(letters(data.hold_out(0.2, seed=2)[1])) != sorted(letters(valid))


@pytest.mark.parametrize(("k", "rows", "bases"), [(1, 3, 1000), (3, 3, 70), (3, 100, 1)])
def test_kmer_frequencies_are_those_of_counting_strings(
    k: int, rows: int, bases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mambagen.data.kmers._ROWS", rows)  # counted at once
    monkeypatch.setattr("mambagen.data.kmers._BASES", bases)
    texts = [random_dna(30 + i, i, b"ACGTN") for i in range(7)] + ["AC"[: k - 1] or "N"]
    table = kmer_frequencies([TOKENIZER.encode(t.encode()) for t in texts], k)
    for row, text in zip(table, texts, strict=True):
        counts = Counter(text[i : i + k] for i in range(len(text) - k + 1) if "N" not in text[i : i + k])
        total = max(1, sum(counts.values()))
        for index, value in enumerate(row):
            word = "".join("ACGT"[index // 4**j % 4] for j in reversed(range(k)))
            assert value == pytest.approx(counts[word] / total)
