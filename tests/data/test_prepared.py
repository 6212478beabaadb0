"""Prepared genomes: the same tokens as from the file itself, made once, whole or not there, shared by processes."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.genome import Genome
from mambagen.data.prepared import find_prepared, list_prepared, prepare, unpacked_size
from mambagen.data.windows import WindowSampler
from mambagen.errors import InputError, ResourceError
from tests.data.helpers import random_dna


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "genome.fa"
    text = f">one first\n{random_dna(5000, 1, b'ACGTacgtNRU')}\n>none\n>two\n{random_dna(70_000, 2)}\n"
    path.write_text(text)
    return path


@pytest.mark.parametrize("lower_case", ["same", "n"])
def test_the_genome_is_that_of_the_file_whatever_the_policy(tmp_path: Path, fasta: Path, lower_case: str) -> None:
    tokenizer = DnaTokenizer(lower_case=lower_case)  # type: ignore[arg-type]
    plain = Genome.from_files([fasta], tokenizer)
    for _ in range(2):  # made, then found
        mapped = Genome.from_files([fasta], tokenizer, prepared=tmp_path / "cache")
        assert [(r.id, r.path, r.line, r.description) for r in mapped.records] == [
            ("one", str(fasta), 1, "first"),
            ("two", str(fasta), 4, ""),
        ]
        for one, other in zip(plain.records, mapped.records, strict=True):
            assert np.array_equal(one.tokens, other.tokens)
        assert mapped.whole().fingerprint() == plain.whole().fingerprint()
        batches = [WindowSampler(g.hold_out(0.1)[0], 512, 8, seed=3).batch(5) for g in (plain, mapped)]
        assert np.array_equal(batches[0].inputs, batches[1].inputs)
        assert np.array_equal(batches[0].targets, batches[1].targets)


def test_it_is_made_once_by_content_and_follows_the_content(
    tmp_path: Path, fasta: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    assert find_prepared(fasta, DnaTokenizer(), cache) is None
    first = prepare(fasta, DnaTokenizer(), cache)
    again = prepare(fasta, DnaTokenizer(), cache)
    assert (first.made, again.made) == (True, False)
    assert first.path == again.path
    assert caplog.text.count("'none' is empty") == 2  # an empty record is never dropped in silence
    elsewhere = tmp_path / "elsewhere" / "genome.fa"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(fasta.read_bytes())
    assert prepare(elsewhere, DnaTokenizer(), cache).path == first.path  # the same content in another place
    renamed = tmp_path / "other.fa"
    renamed.write_bytes(fasta.read_bytes())
    assert prepare(renamed, DnaTokenizer(), cache).path == first.path
    packed = tmp_path / "genome.fa.gz"
    packed.write_bytes(gzip.compress(fasta.read_bytes()))
    assert prepare(packed, DnaTokenizer(), cache).path != first.path
    changed = fasta.read_bytes().replace(b">two\n", b">two\nA")
    fasta.write_bytes(changed)
    os.utime(fasta, ns=(1, 1))  # even with an old date
    newer = prepare(fasta, DnaTokenizer(), cache)
    assert newer.made
    assert newer.bases == first.bases + 1
    assert prepare(fasta, DnaTokenizer(lower_case="n"), cache).path != newer.path
    assert len(list(list_prepared(cache))) == 4


def test_a_stale_index_beside_the_file_and_a_folder_without_rights_play_no_part(tmp_path: Path, fasta: Path) -> None:
    Path(f"{fasta}.fai").write_text("other\t7\t3\t60\t61\n")
    folder = fasta.parent / "readonly"
    folder.mkdir()
    inside = folder / fasta.name
    inside.write_bytes(fasta.read_bytes())
    folder.chmod(0o500)
    try:
        found = prepare(inside, DnaTokenizer(), tmp_path / "cache")
        assert [len(record) for record in found.records] == [5000, 0, 70_000]
        assert [path.name for path in folder.iterdir()] == [fasta.name]
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("damage", ["cut", "tail", "head", "index"])
def test_a_damaged_one_is_made_again(
    tmp_path: Path, fasta: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    path = prepare(fasta, DnaTokenizer(), cache).path
    whole = path.read_bytes()
    content = bytearray(whole)
    if damage == "cut":
        del content[1000:]
    else:
        content[{"tail": -1, "head": 0, "index": -40}[damage]] ^= 0xFF
    path.write_bytes(content)
    again = prepare(fasta, DnaTokenizer(), cache)
    assert again.made
    assert f"{path}: is damaged and made again" in caplog.text
    assert path.read_bytes() == whole


def test_nothing_is_left_of_one_that_cannot_be_made(tmp_path: Path, fasta: Path) -> None:
    cache = tmp_path / "cache"
    bad = tmp_path / "bad.fa"
    bad.write_text(">x\nACGT\nAC-GT\n")
    with pytest.raises(InputError, match=r"bad\.fa:3: record 'x': a gap"):
        prepare(bad, DnaTokenizer(), cache)
    assert [path.name for path in cache.iterdir()] == ["seen.json"]
    with pytest.raises(InputError, match=r"none\.fa: no such file"):
        prepare(tmp_path / "none.fa", DnaTokenizer(), cache)
    with pytest.raises(InputError, match="only a file"):
        prepare(tmp_path, DnaTokenizer(), cache)
    forgotten, fresh = cache / ".a.genome.partial-1", cache / ".b.genome.partial-2"
    for path in (forgotten, fresh):
        path.write_text("a killed process left this")
    os.utime(forgotten, (1, 1))
    prepare(fasta, DnaTokenizer(), cache)
    assert (forgotten.exists(), fresh.exists()) == (False, True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="MAMBAGEN_HOME"):
        prepare(fasta, DnaTokenizer(), tmp_path / "file" / "cache")


PROGRAM = """
import sys
from pathlib import Path
from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.prepared import prepare
print(int(prepare(sys.argv[1], DnaTokenizer(), Path(sys.argv[2])).records[2].tokens.sum(dtype="int64")))
"""


def test_processes_that_make_it_at_one_time_agree(tmp_path: Path, fasta: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(fasta), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [process.communicate(timeout=60)[0] for process in processes]
    expected = int(Genome.from_files([fasta]).records[1].tokens.sum(dtype=np.int64))
    assert answers == [f"{expected}\n"] * 3
    assert len(list(list_prepared(tmp_path / "cache"))) == 1
    assert not [path for path in (tmp_path / "cache").iterdir() if "partial" in path.name]


def test_mapped_tokens_cannot_be_written_to_and_are_views_of_one_file(tmp_path: Path, fasta: Path) -> None:
    records = prepare(fasta, DnaTokenizer(), tmp_path / "cache").records
    with pytest.raises(ValueError, match="read-only"):
        records[0].tokens[0] = 1
    assert not records[2].tokens.flags.owndata


def test_sizes_of_packed_files_are_guessed(tmp_path: Path, fasta: Path) -> None:
    packed = tmp_path / "g.fa.gz"
    packed.write_bytes(gzip.compress(fasta.read_bytes()))
    size = fasta.stat().st_size
    assert unpacked_size([fasta, "-", tmp_path / "none"]) == size
    assert unpacked_size([packed]) == 4 * packed.stat().st_size


def test_some_of_many_stretches_are_spread_evenly(fasta: Path) -> None:
    whole = Genome.from_files([fasta]).whole()
    assert whole.some(75_000) is whole
    part = whole.some(10_000, piece=1000)
    assert part.bases == pytest.approx(10_000, abs=1000)
    starts = [start + (5000 if record else 0) for record, start, _ in part]
    assert np.allclose(np.diff(starts), 7500, atol=1)
    assert {record for record, _, _ in part} == {0, 1}
    assert all(0 <= start < end <= len(whole.records[record]) for record, start, end in part)
