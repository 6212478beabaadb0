"""Sequences that are read by pieces: the same as those read whole, the same errors, in flat memory."""

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.fasta import read_records
from mambagen.data.fasta_stream import stream_pieces
from mambagen.data.sequence_store import SequenceStore
from mambagen.errors import InputError, UsageError
from tests.data.helpers import random_dna
from tests.pipelines.dna_models import other_strand


@given(
    st.integers(1, 200), st.lists(st.integers(0, 300), min_size=1, max_size=5), st.sampled_from(["\n", "\r\n", "\r"])
)
@settings(max_examples=40, deadline=None)
def test_pieces_join_to_what_read_records_gives(tmp_path_factory, block, lengths, end) -> None:
    path = tmp_path_factory.mktemp("fasta") / "x.fa"
    lengths = [*lengths, 7]
    text = ""
    for i, length in enumerate(lengths):
        dna = random_dna(length, i, b"ACGTacgtN")
        lines = [dna[at : at + 13] for at in range(0, length, 13)]
        text += end.join([f">r{i} about it", *lines]) + end
    path.write_bytes(text.encode())
    found: dict[str, list[np.ndarray]] = {}
    for piece in stream_pieces(path, block):
        found.setdefault(piece.id, []).append(piece.letters)
    whole = {record.id: record for record in read_records(path)}
    assert [len(np.concatenate(pieces)) for pieces in found.values()] == lengths
    for name, record in whole.items():
        assert np.array_equal(np.concatenate(found[name]), record.sequence)


def test_any_piece_of_either_strand_can_be_read(tmp_path: Path) -> None:
    dna = random_dna(1000, letters=b"ACGTN")
    (tmp_path / "a.fa").write_text(f">first\n{random_dna(70, 1)}\n>x\n{dna}\n")
    with SequenceStore.from_files([tmp_path / "a.fa"]) as store:
        record = store.find("x")
        assert record is not None
        assert (record.length, record.line, store.bases) == (1000, 3, 1070)
        tokenizer = DnaTokenizer()
        assert tokenizer.decode(store.read(record, 13, 977)) == dna[13:977]
        assert tokenizer.decode(store.read(record, 100, 400, minus=True)) == other_strand(dna)[100:400]
        with pytest.raises(ValueError, match="no piece"):
            store.read(record, 0, 1001)


def test_empty_records_are_kept_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.fa").write_text(">a\n>b\nACGT\n>c\n")
    with SequenceStore.from_files([tmp_path / "a.fa"]) as store:
        assert [(r.id, r.length) for r in store.records] == [("a", 0), ("b", 4), ("c", 0)]
    assert [r.getMessage().split(": ", 1)[1] for r in caplog.records] == ["record 'a' is empty", "record 'c' is empty"]


def test_a_bad_file_is_left_out_whole_and_the_others_are_there(tmp_path: Path) -> None:
    (tmp_path / "good.fa").write_text(">a\nACGT\n")
    (tmp_path / "bad.fa").write_text(">x\nACGTACGT\nAC GT\n")
    (tmp_path / "also.fa").write_text(">a\nGGG\n")
    paths = [tmp_path / name for name in ("good.fa", "bad.fa", "also.fa")]
    with SequenceStore.from_files(paths) as store:
        assert [(r.id, store.tokenizer.decode(store.read(r))) for r in store.records] == [
            ("good:a", "ACGT"),
            ("also:a", "GGG"),
        ]
        with pytest.raises(InputError, match=r"bad\.fa:3: record 'x': a blank inside the sequence"):
            store.raise_failures()


BAD = {
    "no header": (b"ACGT\n", "no header"),
    "empty file": (b"", "the file is empty"),
    "protein": (b">a\nMKVLE\n", "looks like protein"),
    "protein in codes": (b">a\nMKVSNDHKMSVR\n", "most letters are ambiguity codes"),
    "fastq": (b"@a\nACGT\n+\nIIII\n", "FASTQ"),
    "utf-16": (">a\nACGT\n".encode("utf-16"), "UTF-16"),
    "nul": (b">a\nAC\0GT\n", "NUL byte"),
    "blank inside": (b">a\nAC GT\n", "a blank inside the sequence"),
    "twice": (b">a\nAC\n>b\nAC\n>a\nGT\n", r"x.fa:5: record 'a' occurs twice \(line 1 too\)"),
    "nothing but empty records": (b">a\n>b\n", "it holds no sequence"),
    "cut-off gzip": (gzip.compress(b">a\n" + random_dna(9999).encode())[:-900], "cut off"),
    "damaged gzip": (gzip.compress(b">a\nACGT\n")[:-8] + b"12345678", "damaged"),
}


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
def test_bad_files_are_refused_as_read_records_refuses_them(case: str, tmp_path: Path) -> None:
    (tmp_path / "x.fa").write_bytes(BAD[case][0])
    with pytest.raises(InputError, match=BAD[case][1]):
        list(stream_pieces(tmp_path / "x.fa"))


def test_a_file_twice_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "x.fa").write_text(">a\nACGT\n")
    with pytest.raises(UsageError, match="given twice"):
        SequenceStore.from_files([tmp_path / "x.fa", tmp_path / "." / "x.fa"])


def test_non_ascii_names_and_a_single_long_line(tmp_path: Path) -> None:
    dna = random_dna(9_000_000)
    (tmp_path / "x.fa").write_text(f">größe 1\n{dna}", encoding="utf-8")
    with SequenceStore.from_files([tmp_path / "x.fa"]) as store:
        (record,) = store.records
        assert (record.id, record.length) == ("größe", 9_000_000)
        assert store.tokenizer.decode(store.read(record, 8_999_000)) == dna[8_999_000:]


def test_memory_does_not_grow_with_the_sequence(tmp_path: Path) -> None:
    program = (
        "import resource, sys\nfrom mambagen.data.sequence_store import SequenceStore\n"
        "store = SequenceStore.from_files([sys.argv[1]])\nstore.read(store.records[0], 5, 1000)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    line = random_dna(1_000_000) + "\n"
    peaks = []
    for millions in (40, 140):  # past what is kept in memory
        with open(tmp_path / "x.fa", "w") as file:
            file.write(">x\n")
            for _ in range(millions):
                file.write(line)
        done = subprocess.run(
            [sys.executable, "-c", program, tmp_path / "x.fa"], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 20_000, peaks  # kilobytes, of 100,000 more
