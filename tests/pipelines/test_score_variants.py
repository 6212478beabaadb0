"""Scores of variants: against whole passes of transformers, whatever the batch; what a VCF may hold; errors."""

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest

from mambagen import cli
from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.sequence_store import SequenceStore
from mambagen.pipelines.likelihood import LanguageModel
from mambagen.pipelines.score_variants import score_variants
from mambagen.pipelines.variant_likelihoods import Site, VariantScorer
from tests.data.helpers import random_dna
from tests.pipelines.dna_models import (
    in_transformers,
    likelihoods_by_transformers,
    other_strand,
    small_folder,
    small_model,
)

pysam = pytest.importorskip("pysam")

DNA = random_dna(230) + "NNN" + random_dna(217, 1)
HEAD = (
    '##fileformat=VCFv4.2\n##contig=<ID=c,length=450>\n##INFO=<ID=AF,Number=A,Type=Float,Description="x, y">\n'
    '##ALT=<ID=DEL,Description="Deletion">\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n'
)


def one_strand(theirs, dna: str, start: int, end: int, alternate: str, context: int, after: int) -> float:
    """The definition, by whole passes: the context begins a cell before the site's."""
    anchor = max(0, (start // context - 1) * context)
    behind = min(len(dna), end + after)
    sums = []
    for allele in (alternate, dna[start:end]):
        text = dna[anchor:start] + allele + dna[end:behind]
        sums.append(np.nansum(likelihoods_by_transformers(theirs, text)[start - anchor :]))
    return sums[0] - sums[1]


def expected(theirs, dna: str, start: int, end: int, alternate: str, context: int, after: int) -> tuple[float, float]:
    length = len(dna)
    other = one_strand(theirs, other_strand(dna), length - end, length - start, other_strand(alternate), context, after)
    return one_strand(theirs, dna, start, end, alternate, context, after), other


@pytest.fixture(scope="module")
def theirs():
    return in_transformers(small_model())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_folder(tmp_path_factory.mktemp("models") / "m")


def a_base_other_than(base: str, k: int = 1) -> str:
    return "ACGT"[("ACGT".index(base) + k) % 4]


# start, end, alternates: SNVs, indels, at both ends, long, near one another, several at a place
PLACES = [
    (0, 1, ["G" if DNA[0] != "G" else "T", DNA[0] + "AC"]),
    (1, 2, [a_base_other_than(DNA[1])]),
    (63, 64, [a_base_other_than(DNA[63]), a_base_other_than(DNA[63], 2)]),
    (64, 65, [a_base_other_than(DNA[64])]),
    (100, 104, [DNA[100]]),
    (100, 101, [DNA[100] + "ACGTACGT"]),
    (128, 129, [random_dna(90, 7)]),
    (129, 215, [DNA[129]]),
    (226, 229, [DNA[226:229]]),  # ALT is REF
    (240, 241, [a_base_other_than(DNA[240])]),
    (445, 446, [a_base_other_than(DNA[445])]),
    (440, 450, [DNA[440]]),
    (449, 450, [a_base_other_than(DNA[449])]),
]


def scored(context: int, after: int, batch_tokens: int, places=PLACES) -> tuple[np.ndarray, np.ndarray]:
    with SequenceStore(DnaTokenizer()) as store:
        other = store.put("first", store.tokenizer.encode(random_dna(50, 9).encode()))
        record = store.put("c", store.tokenizer.encode(DNA.encode()))
        sites = [Site(other, 20, 21, (store.tokenizer.encode(b"A"),))]
        for start, end, alternates in places:
            sites.append(Site(record, start, end, tuple(store.tokenizer.encode(a.encode()) for a in alternates)))
        model = LanguageModel(small_model(), "cpu", batch_tokens)
        forward, reverse = VariantScorer(model, context, after).score(store, sites)
    return forward[1:], reverse[1:]


@pytest.mark.parametrize(("context", "after"), [(100, 40), (16, 0), (1000, 500)])
def test_ratios_are_those_of_whole_passes_of_transformers(theirs, context: int, after: int) -> None:
    wanted = [
        expected(theirs, DNA, start, end, alternate, context, after)
        for start, end, alternates in PLACES
        for alternate in alternates
    ]
    forward, reverse = scored(context, after, 1 << 14)
    np.testing.assert_allclose(np.array([forward, reverse]).T, wanted, rtol=0, atol=5e-4)  # sums of hundreds
    assert np.std(forward) > 1


@pytest.mark.parametrize("batch_tokens", [20, 300])
def test_ratios_do_not_depend_on_the_batch_or_on_other_sites(batch_tokens: int) -> None:
    together = np.array(scored(100, 40, 1 << 14))
    np.testing.assert_allclose(np.array(scored(100, 40, batch_tokens)), together, rtol=0, atol=1e-4)
    backwards = np.concatenate([np.array(scored(100, 40, batch_tokens, [place])) for place in PLACES[::-1]], 1)
    order = np.concatenate([np.full(len(p[2]), -i) * 100 + np.arange(len(p[2])) for i, p in enumerate(PLACES)])
    np.testing.assert_allclose(backwards[:, np.argsort(np.argsort(order))], together, rtol=0, atol=1e-4)


def test_an_alternate_that_is_the_reference_scores_nothing() -> None:
    forward, reverse = scored(100, 40, 1 << 14, [(226, 229, [DNA[226:229]])])
    assert abs(forward[0]) < 1e-4
    assert abs(reverse[0]) < 1e-4


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def genome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lines = "\n".join((DNA[:100].lower() + DNA[100:])[at : at + 60] for at in range(0, len(DNA), 60))
    (tmp_path / "g.fa").write_text(f">unused\n{random_dna(99, 3)}\n>c\n{lines}\n")
    return tmp_path / "g.fa"


def row(position: int, reference: str, alternates: str, info: str = ".", more: str = "") -> str:
    return f"c\t{position}\trs{position}\t{reference}\t{alternates}\t.\tPASS\t{info}{more}\n"


def run(capfdbinary, *arguments: object) -> tuple[int, str, str]:
    code = cli.run(["score-variants", *map(str, arguments)])
    out, err = capfdbinary.readouterr()
    return code, out.decode(), err.decode()


def test_a_vcf_comes_back_with_scores_that_pysam_reads(genome: Path, folder: Path, theirs, capfdbinary) -> None:
    base = {at: DNA[at - 1] for at in range(1, 451)}
    text = (
        HEAD
        + row(70, base[70].lower(), f"{a_base_other_than(base[70])},<DEL>,{base[70]}AC", "AF=0.1,0.2,0.3")
        + row(72, base[72], "*")
        + row(80, base[80], f"{base[80]}]c:90]", "DB;MAMBAGEN_LLR=7;MAMBAGEN_SKIPPED")
        + row(90, base[90], ".", "AF=1e-05")
        + row(232, "N", "A")
        + row(240, "N", "<DEL>,A")
        + row(300, base[300], f"{a_base_other_than(base[300]).lower()}")
    )
    (genome.parent / "v.vcf").write_text(text.replace("\n", "\r\n"))
    arguments = ["--fasta", genome, "--model", folder, "--context", 100, "--after", 40]
    code, out, err = run(capfdbinary, "v.vcf", *arguments)
    assert (code, err) == (0, "")
    (genome.parent / "o.vcf").write_text(out)
    with pysam.VariantFile("o.vcf") as file:
        for name, number in (("MAMBAGEN_LLR", "A"), ("MAMBAGEN_LLR_FWD", "A"), ("MAMBAGEN_SKIPPED", 0)):
            assert file.header.info[name].number == number
        assert "nats" in file.header.info["MAMBAGEN_LLR"].description
        records = list(file)
    assert [r.pos for r in records] == [70, 72, 80, 90, 232, 240, 300]
    assert [("MAMBAGEN_SKIPPED" in r.info) for r in records] == [True, True, True, False, True, True, False]
    assert ["MAMBAGEN_LLR" in r.info for r in records] == [True, False, False, False, False, False, True]
    assert out.splitlines()[-7].split("\t")[7].startswith("AF=0.1,0.2,0.3;MAMBAGEN_LLR=")
    assert out.splitlines()[-5].split("\t")[7] == "DB;MAMBAGEN_SKIPPED"
    assert out.splitlines()[-4].split("\t")[7] == "AF=1e-05"
    for record, allele in ((records[0], 0), (records[0], 2), (records[6], 0)):
        forward, reverse = expected(theirs, DNA, record.pos - 1, record.pos, record.alts[allele].upper(), 100, 40)
        assert record.info["MAMBAGEN_LLR_FWD"][allele] == pytest.approx(forward, abs=4e-4)
        assert record.info["MAMBAGEN_LLR_REV"][allele] == pytest.approx(reverse, abs=4e-4)
        assert record.info["MAMBAGEN_LLR"][allele] == pytest.approx((forward + reverse) / 2, abs=4e-4)
    assert records[0].info["MAMBAGEN_LLR"][1] is None
    again = run(capfdbinary, "o.vcf", *arguments)  # its own fields are replaced
    assert again[1] == out


def test_gzip_bcf_stdin_and_arrays_give_the_same(genome: Path, folder: Path, capfdbinary, monkeypatch) -> None:
    rows = [row(at, DNA[at - 1], a_base_other_than(DNA[at - 1]), "AF=0.25") for at in (3, 50, 60, 200, 401)]
    (genome.parent / "v.vcf").write_text(HEAD + "".join(rows))
    arguments = ["--fasta", genome, "--model", folder, "--context", 64]
    code, plain, _ = run(capfdbinary, "v.vcf", *arguments)
    assert code == 0
    (genome.parent / "v.vcf.gz").write_bytes(gzip.compress((HEAD + "".join(rows)).encode()))
    assert run(capfdbinary, "v.vcf.gz", *arguments, "--out", "o.vcf.gz")[:2] == (0, "")
    assert gzip.decompress(Path("o.vcf.gz").read_bytes()).decode() == plain
    pysam.tabix_index("o.vcf.gz", preset="vcf")
    with pysam.VariantFile("o.vcf.gz") as packed:
        assert [r.pos for r in packed.fetch("c", 40, 100)] == [50, 60]
    with pysam.VariantFile("v.vcf") as source, pysam.VariantFile("v.bcf", "wb", header=source.header) as target:
        for record in source:
            target.write(record)
    bodies = [[line for line in text.splitlines() if line[0] != "#"] for text in
              (plain, run(capfdbinary, "v.bcf", *arguments)[1])]  # fmt: skip
    assert bodies[0] == bodies[1]
    with open("v.vcf") as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        assert run(capfdbinary, "-", *arguments) == (0, plain, "")
    (genome.parent / "w.vcf").write_text(HEAD + row(3, a_base_other_than(DNA[2]), "A"))
    with open("w.vcf") as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        assert run(capfdbinary, "-", *arguments)[2].startswith("mambagen: error: stdin:6: REF is '")
    arrays = score_variants("v.vcf", [genome], LanguageModel(folder, "cpu"), context=64)
    assert arrays.position.tolist() == [3, 50, 60, 200, 401]
    assert arrays.line.tolist() == [6, 7, 8, 9, 10]
    assert "".join(arrays.reference) == "".join(DNA[at - 1] for at in (3, 50, 60, 200, 401))
    scores = [float(line.split("MAMBAGEN_LLR=")[1].split(";")[0]) for line in bodies[0]]
    np.testing.assert_allclose(arrays.llr, scores, atol=1e-4)


FIRST = row(3, DNA[2], "A,C")
WRONG = a_base_other_than(DNA[99])
BAD = {
    "another REF": (HEAD + FIRST + row(100, WRONG, "<DEL>"), f"v.vcf:7: REF is '{WRONG}', but the sequence has '"),
    "past the end": (HEAD + row(450, DNA[449] + "A", "A"), "v.vcf:6: REF ends at base 451 of 'c', which has 450"),
    "no such record": (HEAD + FIRST.replace("c\t", "chr1\t", 1), "v.vcf:6: there is no record 'chr1' in the FASTA"),
    "position no number": (HEAD + FIRST + "c\tx\t.\tA\tC\t.\t.\t.\n", "v.vcf:7: POS is 'x'"),
    "position 0": (HEAD + "c\t0\t.\tA\tC\t.\t.\t.\n", "v.vcf:6: POS is 0"),
    "few columns": (HEAD + "c\t3\t.\tA\n", "v.vcf:6: a line of variants has 8 columns or more"),
    "REF no bases": (HEAD + row(3, "<X>", "A"), "v.vcf:6: REF is '<X>'; it must be bases"),
    "no VCF": (">c\nACGT\n", "v.vcf:1: this is no VCF"),
    "no header line": (HEAD.split("#CHROM")[0] + FIRST, "v.vcf:5: variants begin before the line #CHROM"),
    "header alone": ("##fileformat=VCFv4.2\n", "the header has no line #CHROM"),
    "empty": ("", "the file is empty; give a VCF file"),
}


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
def test_bad_vcfs_are_one_line_and_exit_3_before_anything_is_written(
    case: str, genome: Path, folder: Path, capfdbinary
) -> None:
    (genome.parent / "v.vcf").write_text(BAD[case][0])
    code, out, err = run(capfdbinary, "v.vcf", "--fasta", genome, "--model", folder, "--out", "o.vcf")
    assert (code, out) == (3, "")
    assert BAD[case][1] in err
    assert len(err.splitlines()) == 1
    assert list(genome.parent.glob("*o.vcf*")) == []


def test_bad_files_and_places(genome: Path, folder: Path, capfdbinary) -> None:
    (genome.parent / "v.vcf").write_text(HEAD + FIRST)
    (genome.parent / "cut.vcf.gz").write_bytes(gzip.compress((HEAD + FIRST * 3000).encode())[:-300])
    (genome.parent / "bad.fa").write_text(">c\nACGT-\n")
    model = ["--model", folder]
    assert "v2.vcf: no such file" in run(capfdbinary, "v2.vcf", "--fasta", genome, *model)[2]
    assert "cut off" in run(capfdbinary, "cut.vcf.gz", "--fasta", genome, *model)[2]
    code, _, err = run(capfdbinary, "v.vcf", "--fasta", "bad.fa", *model)
    assert code == 3
    assert "bad.fa:2: record 'c': a gap" in err
    assert run(capfdbinary, "v.vcf", "--fasta", genome, *model, "--out", "o.bcf")[0] == 2
    assert run(capfdbinary, "v.vcf", "--fasta", genome, *model, "--out", "none/o.vcf")[0] == 5
    assert run(capfdbinary, "-", "--fasta", "-", *model)[0] == 2
    assert run(capfdbinary, "v.vcf", *model)[0] == 2  # no --fasta
    assert run(capfdbinary, "v.vcf", "--fasta", genome, "--model", "nowhere")[0] == 4


def test_scores_do_not_depend_on_how_many_lines_are_held(genome: Path, folder: Path, capfdbinary, monkeypatch) -> None:
    from mambagen.pipelines import score_variants as pipeline

    rows = [row(at, DNA[at - 1], a_base_other_than(DNA[at - 1])) for at in range(2, 200, 9)]
    (genome.parent / "v.vcf").write_text(HEAD + "".join(rows))
    arguments = ["v.vcf", "--fasta", genome, "--model", folder, "--context", 64, "--after", 20, "--batch-tokens", 512]
    _, together, _ = run(capfdbinary, *arguments)
    monkeypatch.setattr(pipeline, "LINES_AT_ONCE", 1)
    monkeypatch.setattr(pipeline, "CHARACTERS_AT_ONCE", 1)
    code, apart, _ = run(capfdbinary, *arguments)
    assert code == 0
    values = [
        [float(line.split("MAMBAGEN_LLR=")[1].split(";")[0]) for line in text.splitlines() if line[0] != "#"]
        for text in (together, apart)
    ]
    assert len(values[0]) == len(rows)
    np.testing.assert_allclose(values[0], values[1], atol=2e-4)


def test_a_vcf_without_variants_is_its_header(genome: Path, folder: Path, capfdbinary) -> None:
    (genome.parent / "v.vcf").write_text(HEAD)
    code, out, _ = run(capfdbinary, "v.vcf", "--fasta", genome, "--model", folder)
    assert code == 0
    assert len(out.splitlines()) == len(HEAD.splitlines()) + 4
