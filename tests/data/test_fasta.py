"""Reading FASTA and GenBank: equal to Biopython on good files, one clear line on bad ones."""

import gzip
import io
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from Bio import SeqIO, bgzf
from Bio.Seq import Seq
from Bio.SeqRecord import SeqRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from mambagen.data.byte_blocks import text_blocks
from mambagen.data.fasta import Record, read_records
from mambagen.errors import InputError, UsageError

IUPAC = "ACGTNacgtnRYSWKMBDHVryswkmbdhvUu"


def as_biopython_reads(text: bytes) -> list[tuple[str, str]]:
    # With universal line ends, as an opened file has; Biopython takes no blank lines before the first record.
    handle = io.StringIO(io.StringIO(text.decode(), newline=None).read().lstrip("\n"))
    parsed = [(record.id, str(record.seq)) for record in SeqIO.parse(handle, "fasta")]
    return [(name, sequence) for name, sequence in parsed if sequence]  # empty records are left out by policy


def found(records: object) -> list[tuple[str, str]]:
    return [(r.id, r.sequence.tobytes().decode()) for r in records]  # type: ignore[attr-defined]


@st.composite
def fasta_texts(draw: st.DrawFn) -> bytes:
    """Real-looking files: several records, any wrapping, line ends, case, blank lines, blanks at line ends."""
    end = draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
    lines: list[bytes] = [b""] * draw(st.integers(0, 2))
    core = st.text(alphabet="ACGTacgtN", max_size=300)
    for i in range(draw(st.integers(1, 5))):
        lines.append(f">rec{i}{draw(st.sampled_from(['', ' a > b', chr(9) + 'x  y', ' Größe']))}".encode())
        sequence = draw(core) + draw(st.text(alphabet=IUPAC, max_size=4)) + ("ACGT" * draw(st.integers(1, 3)))
        sequence = draw(st.sampled_from([sequence, sequence, ""]))
        width = draw(st.sampled_from([1, 7, 60, 10_000]))
        blanks = draw(st.sampled_from([b"", b"", b" ", b"\t  "]))
        lines += [sequence[at : at + width].encode() + blanks for at in range(0, len(sequence), width)]
        lines += [b""] * draw(st.integers(0, 1))
    return end.join(lines) + draw(st.sampled_from([b"", end]))


@settings(max_examples=150, deadline=None)
@given(text=fasta_texts(), block=st.sampled_from([1, 2, 3, 17, 64, 1 << 20]), pack=st.sampled_from(["", "gz", "bgz"]))
def test_any_fasta_reads_as_biopython_reads_it(
    tmp_path_factory: pytest.TempPathFactory, text: bytes, block: int, pack: str
) -> None:
    # Biopython keeps tabs inside sequences; these stand at line ends only, where no reader means them.
    expected = [(name, sequence.replace("\t", "")) for name, sequence in as_biopython_reads(text)]
    path = tmp_path_factory.mktemp("fasta") / "some.fa"
    if pack == "bgz":
        with bgzf.BgzfWriter(str(path)) as writer:
            writer.write(text)
    else:
        path.write_bytes(gzip.compress(text) if pack else text)
    if not expected:
        with pytest.raises(InputError, match="no sequence"):
            list(read_records(path, block))
        return
    assert found(read_records(path, block)) == expected


def test_ids_descriptions_and_header_lines_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.fa"
    path.write_bytes(b"\n\n>chr1  the first one \nACGT\nAC\n>chr2\nTT\n")
    first, second = read_records(path)
    assert (first.id, first.description, first.line, first.path) == ("chr1", "the first one", 3, str(path))
    assert (second.id, second.description, second.line, len(second)) == ("chr2", "", 6, 2)


def test_a_chromosome_on_one_line_and_blocks_read_alike(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    sequence = np.frombuffer(b"ACGTacgtN", dtype=np.uint8)[rng.integers(0, 9, 5_000_000)].tobytes()
    wrapped = b"\n".join(sequence[i : i + 60] for i in range(0, len(sequence), 60))
    for name, body in (("one.fa", sequence), ("wrapped.fa", wrapped)):
        (tmp_path / name).write_bytes(b">x\n" + body + b"\n>y\nACGT")
        x, y = read_records(tmp_path / name, 100_003)
        assert x.sequence.tobytes() == sequence
        assert y.sequence.tobytes() == b"ACGT"


def test_bgzip_files_of_many_blocks_and_files_of_many_gzip_members_are_whole(tmp_path: Path) -> None:
    sequence = bytes(np.frombuffer(b"ACGT", dtype=np.uint8)[np.random.default_rng(0).integers(0, 4, 300_000)])
    with bgzf.BgzfWriter(str(tmp_path / "a.fa.bgz")) as writer:
        writer.write(b">x\n" + sequence)
    (tmp_path / "b.fa.gz").write_bytes(gzip.compress(b">x\n" + sequence[:1000]) + gzip.compress(sequence[1000:]))
    for path in tmp_path.iterdir():
        (record,) = read_records(path)
        assert record.sequence.tobytes() == sequence


class _FakeStdin:
    def __init__(self, content: bytes, terminal: bool = False) -> None:
        self.buffer = io.BytesIO(content)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_stdin_is_read_where_the_path_is_a_dash(monkeypatch: pytest.MonkeyPatch, pack: object) -> None:
    monkeypatch.setattr(sys, "stdin", _FakeStdin(pack(b">x\nACGT\n")))  # type: ignore[operator]
    (record,) = read_records("-")
    assert record.sequence.tobytes() == b"ACGT"
    assert record.path == "stdin"


def test_a_terminal_as_stdin_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", _FakeStdin(b"", terminal=True))
    with pytest.raises(UsageError, match="terminal"):
        list(read_records("-"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_can_be_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    content = gzip.compress(b">x\n" + b"ACGT" * 50_000)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    (record,) = read_records(pipe)
    writer.join()
    assert len(record) == 200_000


# ---- bad input ------------------------------------------------------------------------------------------------------

GOOD = b">good\nACGTACGT\nACGT\n"
BAD_TEXTS = {
    "empty": (b"", None, "file is empty"),
    "gzip of gzip": (gzip.compress(gzip.compress(GOOD)), None, "packed twice"),
    "blank": (b"\n \n\n", None, "nothing but blanks"),
    "no header": (b"ACGTACGT\nACGT\n", 1, "no header.*'ACGTACGT'"),
    "no header after blanks": (b"\n\nhello world\n", 3, "no header"),
    "protein": (GOOD + b">sp|P1\nACGT\nMKWVTFISLLFLFSSAYS\n", 6, r"record 'sp\|P1'.*'F'.*protein \('MKWVTFISLL"),
    "protein that is spelt in IUPAC codes": (b">short\nMKRHSDVKSMKRHVDYWKK\n", 1, "'short'.*looks like protein"),
    "stop codon": (b">x\nACGTACGT*\n", 2, r"'\*'.*protein"),
    "masked by X": (b">x\nACGTXXXX\n", 2, "'X'.*as N"),
    "gap": (b">x\nACGT\nAC--GT\n", 3, "'x'.*gap '-'"),
    "blank inside": (b">x\nACGT\nACG TAC \n", 3, "'x'.*blank inside.*column 4"),
    "blank before": (b">x\n ACGT\n", 2, "blank inside"),
    "NUL": (b">x\nACGT\nAC\0GT\n", 3, "'x'.*NUL"),
    "NUL in the header": (b">x\0y\nACGT\n", 1, "NUL byte in the header"),
    "non-ASCII": (">x\nACGT\nACÄGT\n".encode(), 3, "0xc3.*not ASCII"),
    "digits": (b">x\n1 ACGT\n", 2, "'1'"),
    "header inside a line": (b">x\nACGT>y\nACGT\n", 2, "'>' inside a line"),
    "FASTQ": (b"@read1\nACGT\n+\nIIII\n", 1, "FASTQ"),
    "FASTQ after FASTA": (GOOD + b"@read1\nACGT\n+\nIIII\n", 4, "FASTQ"),
    "EMBL": (b"ID   X56734; SV 1;\n", 1, "EMBL"),
    "web page": (b"<!DOCTYPE html>\n<html>404</html>", 1, "web page"),
    "UTF-16 with mark": (GOOD.decode().encode("utf-16"), None, "UTF-16"),
    "UTF-16 without mark": (GOOD.decode().encode("utf-16-le"), None, "UTF-16"),
    "binary": (bytes(4000) + b"\1\2\3", None, "binary|UTF-16"),
    "bzip2": (b"BZh91AY&SY", None, "bzip2"),
    "xz": (b"\xfd7zXZ\0\0", None, "xz"),
    "zip": (b"PK\x03\x04\x14\0", None, "zip"),
    "2bit": (bytes.fromhex("4327411a00000000"), None, "2bit file is cut off|give it as a file"),
    "duplicate ids": (GOOD + b">other\nAC\n>good twice\nAC\n", 6, r"'good' occurs twice \(line 1"),
    "no name": (b">\nACGT\n", 1, "without a name"),
    "blank for a name": (b"> chr1\nACGT\n", 1, "without a name"),
    "nothing but empty records": (b">a\n>b\n\n", None, "no sequence.*2 records"),
    "cut-off GenBank": (
        b"LOCUS       X  12 bp DNA linear UNK 1-JAN-2000\nORIGIN\n        1 acgt",
        1,
        "GenBank.*cut off",
    ),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("block", [64, 1 << 20])
@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_text_is_one_line_with_file_and_line(tmp_path: Path, case: str, block: int, packed: bool) -> None:
    text, line, message = BAD_TEXTS[case]
    path = tmp_path / "bad.fa"
    path.write_bytes(gzip.compress(text) if packed else text)
    with pytest.raises(InputError, match=message) as caught:
        list(read_records(path, block))
    said = str(caught.value)
    assert said.startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert said.isprintable()  # on one line, too
    assert len(said) < 300 + len(str(path))
    assert caught.value.exit_code == 3


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.fa: no such file"):
        list(read_records(tmp_path / "nowhere.fa"))
    with pytest.raises(InputError, match="folder; name the files in it"):
        list(read_records(tmp_path))


@pytest.mark.parametrize("cut", [5, 20, 5_000, -1, -9])
def test_cut_off_gzip_is_told(tmp_path: Path, cut: int) -> None:
    rng = np.random.default_rng(0)
    text = b">x\n" + np.frombuffer(b"ACGT", dtype=np.uint8)[rng.integers(0, 4, 100_000)].tobytes()
    path = tmp_path / "cut.fa.gz"
    path.write_bytes(gzip.compress(text)[:cut])
    with pytest.raises(InputError, match="cut off"):
        list(read_records(path))


def test_bgzip_without_its_end_marker_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cut.fa.bgz"
    with bgzf.BgzfWriter(str(path)) as writer:
        writer.write(b">x\n" + b"ACGT" * 100_000)
    whole = path.read_bytes()
    assert [len(record) for record in read_records(path)] == [400_000]
    assert not caplog.text
    path.write_bytes(whole[:-28])  # all the data, but no end marker
    assert [len(record) for record in read_records(path)] == [400_000]
    assert f"{path}: the bgzip file has no end marker" in caplog.text
    path.write_bytes(whole[:-40])  # cut inside a block
    with pytest.raises(InputError, match="cut off"):
        list(read_records(path))


def test_a_flipped_bit_in_gzip_is_told(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(b">x\n" + b"ACGTTGCA" * 10_000))
    packed[len(packed) // 2] ^= 1
    path = tmp_path / "damaged.fa.gz"
    path.write_bytes(packed)
    with pytest.raises(InputError, match=r"damaged|cut off"):
        list(read_records(path))


def test_trailing_rubbish_after_gzip_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rubbish.fa.gz"
    path.write_bytes(gzip.compress(GOOD) + b"rubbish")
    with pytest.raises(InputError, match="damaged"):
        list(read_records(path))


def test_an_empty_record_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.fa"
    path.write_bytes(b">a\nAC\n>b\n>c\nGT\n")
    assert found(read_records(path)) == [("a", "AC"), ("c", "GT")]
    assert f"{path}:3: record 'b' is empty" in caplog.text


def test_jobs_that_answer_every_record_can_have_the_empty_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.fa"
    path.write_bytes(b">a\nAC\n>b\n\n>c\nGT\n")
    assert found(read_records(path, keep_empty=True)) == [("a", "AC"), ("b", ""), ("c", "GT")]
    assert caplog.messages == [f"{path}:3: record 'b' is empty"]
    path.write_bytes(b">a\n>b\n")
    with pytest.raises(InputError, match="no sequence"):
        list(read_records(path, keep_empty=True))


def test_rna_becomes_dna_where_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.fa"
    path.write_bytes(b">r\nACGUuN\n>d\nACGTt\n")
    assert found(read_records(path)) == [("r", "ACGUuN"), ("d", "ACGTt")]
    assert found(read_records(path, rna=True)) == [("r", "ACGTtN"), ("d", "ACGTt")]


def test_names_may_be_no_ascii_in_utf_8_or_an_older_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.fa"
    path.write_bytes(">Größe_1 naïve\nAC\n>染色体\nGT\n".encode())
    assert [(r.id, r.description) for r in read_records(path)] == [("Größe_1", "naïve"), ("染色体", "")]
    path.write_bytes(">ä\nAC\n>ö\nGT\n".encode("latin-1"))  # both would be one sign if they were replaced
    assert [r.id for r in read_records(path)] == ["ä", "ö"]


def test_a_hundred_megabases_on_one_line_are_read(tmp_path: Path) -> None:
    path = tmp_path / "one.fa"
    pattern = b"GATTACAN" * (1 << 17)
    with open(path, "wb") as file:
        file.write(b">x\n")
        for _ in range(96):
            file.write(pattern)
    (record,) = read_records(path)
    assert len(record) == 96 << 20
    assert record.sequence[-8:].tobytes() == b"GATTACAN"
    assert not (record.sequence[1 << 20 :: 1 << 20] != ord("G")).any()


def test_an_index_beside_the_file_plays_no_part(tmp_path: Path) -> None:
    """Nothing reads or writes a .fai: a stale one, or a folder that cannot be written, changes nothing."""
    path = tmp_path / "a.fa"
    path.write_bytes(b">x\nACGT\n")
    (tmp_path / "a.fa.fai").write_text("other\t999\t3\t60\t61\n")
    before = sorted(tmp_path.iterdir())
    assert found(read_records(path)) == [("x", "ACGT")]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_numbers_count_all_kinds_of_line_ends(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.fa"
    path.write_bytes(end.join([">a", "ACGT", "AC!T"]).encode())
    for block in (64, 65, 66, 1 << 20):
        with pytest.raises(InputError, match=":3: "):
            list(read_records(path, block))


def test_text_blocks_never_cut_a_run_of_blanks_or_a_line_end(tmp_path: Path) -> None:
    text = b"A" * 62 + b" \t \r\n" + b"C" * 50 + b"  \r"
    path = tmp_path / "a.txt"
    path.write_bytes(text)
    for size in range(1, 80):
        blocks = list(text_blocks(path, size))
        assert b"".join(blocks) == text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        assert not any(block.endswith((b" ", b"\t")) for block in blocks)


# ---- GenBank --------------------------------------------------------------------------------------------------------


def genbank(*records: Record | SeqRecord) -> str:
    handle = io.StringIO()
    SeqIO.write(records, handle, "genbank")
    return handle.getvalue()


def a_genbank_record(name: str, length: int, seed: int) -> SeqRecord:
    sequence = np.frombuffer(b"ACGTN", dtype=np.uint8)[np.random.default_rng(seed).integers(0, 5, length)]
    return SeqRecord(Seq(sequence.tobytes()), id=name, description="a test", annotations={"molecule_type": "DNA"})


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_genbank_reads_as_biopython_wrote_it(tmp_path: Path, packed: bool) -> None:
    records = [a_genbank_record("XX_1.1", 1234, 0), a_genbank_record("XX_2.1", 61, 1)]
    text = genbank(*records).encode()
    path = tmp_path / "a.gb"
    path.write_bytes(gzip.compress(text) if packed else text)
    read = list(read_records(path))
    assert found(read) == [(r.id, str(r.seq)) for r in records]
    assert read[0].line == 1
    assert text.split(b"\n")[read[1].line - 1].startswith(b"LOCUS")


def test_genbank_that_lost_bases_is_refused(tmp_path: Path) -> None:
    text = genbank(a_genbank_record("XX_1.1", 600, 0)).splitlines(keepends=True)
    path = tmp_path / "a.gb"
    path.write_text("".join(text[:-3] + text[-2:]))  # a line of 60 bases less
    with pytest.raises(InputError, match=r"'XX_1\.1' says 600 bases and holds 5[0-9]0"):
        list(read_records(path))


def test_genbank_without_sequence_or_with_protein_is_refused(tmp_path: Path) -> None:
    protein = SeqRecord(Seq("MKWVTFISLLFLFSSAYS"), id="P1", annotations={"molecule_type": "protein"})
    path = tmp_path / "a.gb"
    path.write_text(genbank(protein))
    with pytest.raises(InputError, match=r"'P1'.*protein"):
        list(read_records(path))
    text = genbank(a_genbank_record("XX_1.1", 600, 0))
    path.write_text(text[: text.index("ORIGIN")] + "CONTIG      join(YY_1.1:1..600)\n//\n")
    with pytest.raises(InputError, match=r"XX_1\.1.*no sequence"):
        list(read_records(path))
