"""The embedded sequences are what their manifest says, and their hold-out is honest."""

import gzip

import numpy as np
import pytest
from Bio import SeqIO
from Bio.Seq import Seq

from mambagen.data.genome import Genome, Stretches
from mambagen.data.markov import MarkovModel
from mambagen.data.windows import WindowSampler, fixed_windows
from mambagen.data_manifests import default_splits, load_manifest, resolve_dna, verify


@pytest.fixture(scope="module")
def genome() -> Genome:
    return Genome.from_files(resolve_dna(["demo"]))


@pytest.fixture(scope="module")
def parts(genome: Genome) -> tuple[Stretches, Stretches]:
    return genome.hold_out(intervals=default_splits(["demo"]))


def test_the_files_are_those_of_the_manifest() -> None:
    assert [report.state for report in verify(load_manifest("demo"))] == ["ok"] * 3


def test_lengths_follow_from_the_coordinates_in_the_names(genome: Genome) -> None:
    for record in genome.records[:3]:
        start, end = map(int, record.id.split("_")[1:])
        assert len(record) == end - start
    assert genome.bases == 287_852


def test_the_chloroplast_is_the_published_one(genome: Genome) -> None:
    """154,478 bases, 36.3 % GC, inverted repeats of 26,264 (Sato et al. 1999)."""
    record = next(record for record in genome.records if record.id == "NC_000932.1")
    text = genome.tokenizer.decode(record.tokens)
    assert len(text) == 154_478
    assert (text.count("G") + text.count("C")) / len(text) == pytest.approx(0.363, abs=0.0005)
    assert str(Seq(text[84_170:110_434]).reverse_complement()) == text[128_214:154_478]
    # the large subunit of Rubisco (rbcL, bases 54,958 to 56,397, plus strand) ends as the protein does
    protein = str(Seq(text[54_957:56_397]).translate(table=11))
    assert protein.startswith("MSPQTETKASVGFKAGVKEYKLTYYTPEYETKDTDILAAFRVTPQPGVPPEEAGAAVAAESSTGTWTTVWTDG")
    assert protein.endswith("*")
    assert protein.count("*") == 1


def test_the_human_pieces_hold_the_genes_that_they_were_cut_out_for(genome: Genome) -> None:
    """The proteins UCHL3 and UCHL1 on the plus strand: the pieces end where their alignments did."""
    text, other = (genome.tokenizer.decode(record.tokens) for record in genome.records[:2])
    assert str(Seq(text[:45]).translate()) == "MEGQRWLPLEANPEV"
    assert str(Seq(text[-81:]).translate()) == "DAIEVCKKFMERDPDELRFNAIALSAA"
    assert str(Seq(other[-60:]).translate()) == "DKVNFHFILFNNVDGHLYEL"


def test_our_reader_and_biopython_read_the_same(genome: Genome) -> None:
    texts = {}
    for path in resolve_dna(["demo"]):
        with gzip.open(path, "rt") as file:
            texts |= {record.id: str(record.seq).upper() for record in SeqIO.parse(file, "fasta")}
    assert {record.id: genome.tokenizer.decode(record.tokens) for record in genome.records} == texts


def kmers(tokens: np.ndarray, k: int) -> set[int]:
    """Codes of all windows of k bases without N."""
    digits = tokens.astype(np.int64) - 7
    code = sum(digits[i : len(digits) - k + 1 + i] << (2 * i) for i in range(k))
    known = np.convolve(digits == 4, np.ones(k, dtype=int))[k - 1 : len(digits)] == 0
    return set(code[known].tolist())


def test_no_24_mer_of_the_held_out_part_occurs_in_the_training_part_on_either_strand(
    genome: Genome, parts: tuple[Stretches, Stretches]
) -> None:
    train, valid = parts
    seen: set[int] = set()
    for tokens in train.tokens():
        seen |= kmers(tokens, 24) | kmers(genome.tokenizer.reverse_complement(tokens), 24)
    held_out: set[int] = set().union(*[kmers(tokens, 24) for tokens in valid.tokens()])
    assert len(held_out) > 28_000
    assert not held_out & seen
    assert valid.bases / genome.bases == pytest.approx(0.1, abs=0.002)
    assert train.bases + valid.bases == genome.bases


def test_the_baselines_have_something_to_say(parts: tuple[Stretches, Stretches]) -> None:
    """Figures that a model is held against: between the uniform 4.0 and what order 0 leaves."""
    train, valid = parts
    model = MarkovModel(8).fit(train)
    perplexity = {order: model.perplexity(fixed_windows(valid, 1024), order) for order in (0, 3, 8)}
    assert perplexity[0] == pytest.approx(3.829, abs=0.002)
    assert perplexity[3] == pytest.approx(3.758, abs=0.002)
    assert perplexity[8] == pytest.approx(3.810, abs=0.002)


def test_windows_of_training_never_touch_the_held_out_part(genome: Genome, parts: tuple[Stretches, Stretches]) -> None:
    train, valid = parts
    sampler = WindowSampler(train, 1024, 256, seed=0, reverse_complement=True)
    for step in range(20):
        batch = sampler.batch(step)
        for record, start in zip(batch.record.tolist(), batch.start.tolist(), strict=True):
            assert not any(r == record and s < start + 1025 and start < e for r, s, e in valid)
