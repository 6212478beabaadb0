"""Reading .2bit files, as Biopython does."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from Bio import SeqIO

from mambagen.data.fasta import read_records
from mambagen.errors import InputError

SEQUENCES = {
    "chr1": "ACGTNNNNacgtACGGGTTTn",
    "chrUn_x": "t",
    "long": "NNN" + "acgT" * 2000 + "N" * 7 + "GATTACA",
}


def runs(text: str, of: str) -> list[tuple[int, int]]:
    """(start, length) of the runs of letters that are in ``of``."""
    found: list[tuple[int, int]] = []
    for i, letter in enumerate(text):
        if letter in of:
            if found and sum(found[-1]) == i:
                found[-1] = (found[-1][0], found[-1][1] + 1)
            else:
                found.append((i, 1))
    return found


def two_bit(sequences: dict[str, str], order: str = "<", version: int = 0) -> bytes:
    """The file, written from the format's description."""

    def numbers(*values: int) -> bytes:
        return struct.pack(f"{order}{len(values)}I", *values)

    offset_format = f"{order}Q" if version else f"{order}I"
    at = 16 + sum(1 + len(name) + struct.calcsize(offset_format) for name in sequences)
    index, bodies = b"", b""
    for name, text in sequences.items():
        index += bytes([len(name)]) + name.encode() + struct.pack(offset_format, at + len(bodies))
        body = numbers(len(text))
        for blocks in (runs(text, "Nn"), runs(text, "acgtn")):
            body += numbers(len(blocks), *(start for start, _ in blocks), *(size for _, size in blocks))
        codes = ["TCAG".index(letter) if letter in "TCAG" else 0 for letter in text.upper()]
        codes += [0] * (-len(codes) % 4)
        packed = [a << 6 | b << 4 | c << 2 | d for a, b, c, d in zip(*(codes[i::4] for i in range(4)), strict=True)]
        bodies += body + numbers(0) + bytes(packed)
    return numbers(0x1A412743, version, len(sequences), 0) + index + bodies


@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
def test_records_are_those_that_were_written_and_that_biopython_reads(tmp_path: Path, order: str) -> None:
    path = tmp_path / "a.2bit"
    path.write_bytes(two_bit(SEQUENCES, order))
    read = {record.id: record.sequence.tobytes().decode() for record in read_records(path)}
    assert read == SEQUENCES
    with open(path, "rb") as file:
        assert {record.id: str(record.seq) for record in SeqIO.parse(file, "twobit")} == SEQUENCES


def test_offsets_may_have_64_bits_and_blocks_many_bytes(tmp_path: Path) -> None:
    letters = np.frombuffer(b"ACGTacgtN", dtype=np.uint8)
    text = letters[np.random.default_rng(0).integers(0, 9, 50_001)].tobytes().decode()
    path = tmp_path / "a.2bit"
    path.write_bytes(two_bit({"x": text}, version=1))
    (record,) = read_records(path)
    assert record.sequence.tobytes().decode() == text
    assert record.line == 1


@pytest.mark.parametrize("keep", [10, 20, 30, 60, -1])
def test_a_cut_file_is_told(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.2bit"
    path.write_bytes(two_bit(SEQUENCES)[:keep])
    with pytest.raises(InputError, match=r"cut\.2bit: the 2bit file is cut off in (its header|record ')"):
        list(read_records(path))


def test_what_is_damaged_of_another_version_or_packed_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.2bit"
    content = bytearray(two_bit({"x": "ACGTNNACGT"}))
    content[4] = 9
    path.write_bytes(content)
    with pytest.raises(InputError, match="version 9"):
        list(read_records(path))
    content = bytearray(two_bit({"x": "ACGTNNACGT"}))
    content[22 + 8] = 200  # where the block of N begins
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"record 'x' has 10 bases and a block up to 20\d"):
        list(read_records(path))
    path.write_bytes(gzip.compress(two_bit(SEQUENCES)))
    with pytest.raises(InputError, match=r"\.2bit file; give it as a file that is not compressed"):
        list(read_records(path))
    path.write_bytes(two_bit({"x": "", "y": "AC"}))
    assert [record.id for record in read_records(path)] == ["y"]
    path.write_bytes(two_bit({"x": "A", "z": "C"}).replace(b"z", b"x"))
    with pytest.raises(InputError, match="'x' occurs twice"):
        list(read_records(path))


def test_any_damage_is_an_input_error_or_no_error(tmp_path: Path) -> None:
    whole = two_bit(SEQUENCES)
    path = tmp_path / "a.2bit"
    rng = np.random.default_rng(1)
    read, refused = 0, []
    for _ in range(400):
        content = bytearray(whole)
        for place in rng.integers(4, 160, rng.integers(1, 4)):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            read += len(list(read_records(path))) > 0
        except InputError as error:
            refused.append(str(error))
    assert read > 5
    assert len(refused) > 50
    assert all(message.startswith(f"{path}:") for message in refused)
