"""Likelihoods of bases: against transformers, in chunks, in batches, on both strands, in regions; and the tracks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mambagen import cli
from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.sequence_store import SequenceStore
from mambagen.pipelines.likelihood import LanguageModel, Span
from mambagen.pipelines.score import summaries
from tests.data.helpers import random_dna
from tests.pipelines.dna_models import (
    in_transformers,
    likelihoods_by_transformers,
    other_strand,
    small_folder,
    small_model,
)

DNA = random_dna(300) + "NNNNN" + random_dna(400, 1) + "N" + random_dna(94, 2)


@pytest.fixture(scope="module")
def theirs():
    return in_transformers(small_model())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_folder(tmp_path_factory.mktemp("models") / "m")


def asked(batch_tokens: int = 1 << 14) -> LanguageModel:
    return LanguageModel(small_model(), "cpu", batch_tokens)


def close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


def test_likelihoods_are_those_of_transformers(theirs) -> None:
    expected = likelihoods_by_transformers(theirs, DNA)
    assert np.nanstd(expected) > 0.3  # the model says something
    close(asked().score(DNA.encode()), expected)
    close(asked().score(DNA.lower().encode()), expected)


@pytest.mark.parametrize("chunk", [9, 64, 799])
def test_chunks_with_the_carried_state_equal_one_pass(chunk: int) -> None:
    close(asked(chunk).score(DNA.encode()), asked().score(DNA.encode()))
    close(asked(chunk).score(DNA.encode(), both_strands=True), asked().score(DNA.encode(), both_strands=True))


def test_both_strands_are_averaged_and_one_stands_in_for_the_other(theirs) -> None:
    plus = likelihoods_by_transformers(theirs, DNA)
    minus = likelihoods_by_transformers(theirs, other_strand(DNA))[::-1]
    expected = (plus + minus) / 2
    expected[0], expected[-1] = minus[0], plus[-1]
    close(asked().score(DNA.encode(), both_strands=True), expected)


def test_records_of_any_length_side_by_side_get_what_each_gets_alone() -> None:
    lengths = [0, 1, 2, 700, 3, 90, 0, 1500, 40, 41]
    sequences = [random_dna(length, i, b"ACGTN") for i, length in enumerate(lengths)]
    model = asked(256)  # two of them are streamed, the others batched
    with SequenceStore(DnaTokenizer()) as store:
        records = [store.put(f"r{i}", store.tokenizer.encode(s.encode())) for i, s in enumerate(sequences)]
        found: dict[int, list[np.ndarray]] = {}
        order = []
        for at, start, scores in model.spans(store, [Span(r, 0, len(r)) for r in records], both_strands=True):
            assert start == sum(map(len, found.get(at, [])))
            found.setdefault(at, []).append(scores)
            order.append(at)
    assert order == sorted(order)
    assert set(found) == set(range(len(lengths)))
    for at, sequence in enumerate(sequences):
        close(np.concatenate(found[at]), asked().score(sequence.encode(), both_strands=True))


def test_a_region_is_read_with_the_bases_before_it_and_no_others(theirs) -> None:
    start, end, lead = 320, 420, 50
    expected = likelihoods_by_transformers(theirs, DNA[start - lead : end])[lead:]
    other = likelihoods_by_transformers(theirs, other_strand(DNA[start : end + lead]))[lead:][::-1]
    for batch_tokens in (16, 4096):
        with SequenceStore(DnaTokenizer()) as store:
            record = store.put("r", store.tokenizer.encode(DNA.encode()))
            span = [Span(record, start, end, lead)]
            pieces = list(asked(batch_tokens).spans(store, span))
            assert pieces[0][1] == start
            close(np.concatenate([p[2] for p in pieces]), expected)
            pieces = list(asked(batch_tokens).spans(store, span, both_strands=True))
            close(np.concatenate([p[2] for p in pieces]), (expected + other) / 2)


def test_a_model_that_predicts_n_has_a_likelihood_for_it() -> None:
    model = LanguageModel(small_model(), "cpu", tokenizer=DnaTokenizer(n="predict"))
    assert np.isnan(model.score(b"ANNA")).tolist() == [True, False, False, False]
    masked = LanguageModel(small_model(), "cpu", tokenizer=DnaTokenizer(lower_case="n"))
    assert np.isnan(masked.score(b"AcgT")).tolist() == [True, True, True, False]


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def genome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(DNA[at : at + 60] for at in range(0, len(DNA), 60))
    (tmp_path / "g.fa").write_text(f">chr1 about\n{lines}\n>none\n>chr2\n{random_dna(77, 5).lower()}\n")
    return tmp_path / "g.fa"


def run(capfdbinary, *arguments: object) -> tuple[int, str, str]:
    code = cli.run(["score", *map(str, arguments)])
    out, err = capfdbinary.readouterr()
    return code, out.decode(), err.decode()


def test_tsv_has_a_row_a_base(folder: Path, genome: Path, theirs, capfdbinary) -> None:
    code, out, err = run(capfdbinary, genome, "--model", folder, "--batch-tokens", 100)
    assert code == 0
    assert "record 'none' is empty" in err
    rows = [line.split("\t") for line in out.splitlines()]
    assert rows[0] == ["record", "position", "base", "log_likelihood_nats"]
    assert [(r[0], int(r[1])) for r in rows[1:]] == [("chr1", i + 1) for i in range(800)] + [
        ("chr2", i + 1) for i in range(77)
    ]
    assert "".join(r[2] for r in rows[1:801]) == DNA
    values = np.array([math.nan if r[3] == "NA" else float(r[3]) for r in rows[1:801]])
    close(values, likelihoods_by_transformers(theirs, DNA), 3e-5)


def test_bedgraph_and_bigwig_hold_the_same(folder: Path, genome: Path, theirs, capfdbinary) -> None:
    pytest.importorskip("pybigtools")
    reader = pytest.importorskip("pyBigWig")
    expected = likelihoods_by_transformers(theirs, DNA) / math.log(2)
    arguments = [genome, "--model", folder, "--unit", "bits"]
    assert run(capfdbinary, *arguments, "--out", "s.bw", "--batch-tokens", 64)[0] == 0
    with reader.open("s.bw") as track:
        assert track.chroms() == {"chr1": 800, "chr2": 77}
        close(np.array(track.values("chr1", 0, 800)), expected, 3e-5)
    code, out, _ = run(capfdbinary, *arguments, "--format", "bedgraph")
    assert code == 0
    assert "log2" in out.splitlines()[0]
    rows = [line.split("\t") for line in out.splitlines()[1:] if line.startswith("chr1")]
    there = np.flatnonzero(~np.isnan(expected))
    assert [(int(r[1]), int(r[2])) for r in rows] == [(i, i + 1) for i in there.tolist()]
    close(np.array([float(r[3]) for r in rows]), expected[there], 3e-5)


def test_bgzip_output_can_be_indexed(folder: Path, genome: Path, capfdbinary) -> None:
    pysam = pytest.importorskip("pysam")
    code, out, _ = run(capfdbinary, genome, "--model", folder, "--format", "bedgraph")
    assert run(capfdbinary, genome, "--model", folder, "--out", "s.bedgraph.gz")[:2] == (0, "")
    pysam.tabix_index("s.bedgraph.gz", preset="bed")
    with pysam.TabixFile("s.bedgraph.gz") as track:
        rows = [r for r in out.splitlines() if r.split("\t")[:2] in [["chr1", str(at)] for at in (100, 101, 102)]]
        assert list(track.fetch("chr1", 100, 103)) == rows
        assert len(rows) == 3
    assert code == 0


def test_summary_rows(folder: Path, genome: Path, theirs, capfdbinary) -> None:
    expected = likelihoods_by_transformers(theirs, DNA)
    code, out, _ = run(capfdbinary, genome, "--model", folder, "--summary")
    rows = [dict(zip(out.splitlines()[0].split("\t"), r.split("\t"), strict=True)) for r in out.splitlines()[1:]]
    assert code == 0
    assert [r["record"] for r in rows] == ["chr1", "none", "chr2"]
    assert int(rows[0]["scored"]) == np.isfinite(expected).sum()
    assert float(rows[0]["log_likelihood"]) == pytest.approx(np.nansum(expected), abs=1e-3)
    assert float(rows[0]["perplexity"]) == pytest.approx(math.exp(-np.nanmean(expected)), rel=1e-5)
    assert [rows[1][name] for name in ("end", "scored", "log_likelihood", "perplexity")] == ["0", "0", "NA", "NA"]
    code, out, _ = run(capfdbinary, genome, "--model", folder, "--summary", "--json", "--both-strands")
    assert [json.loads(line)["record"] for line in out.splitlines()] == ["chr1", "none", "chr2"]
    found = list(summaries(LanguageModel(folder, "cpu"), [genome], both_strands=True))
    assert json.loads(out.splitlines()[0])["perplexity"] == pytest.approx(found[0].perplexity, rel=1e-6)


def test_regions_are_merged_in_tracks_and_kept_in_summaries(folder: Path, genome: Path, capfdbinary) -> None:
    (genome.parent / "r.bed").write_text("track name=x\nchr2\t3\t9\tlast\nchr1\t10\t20\n#\nchr1\t15\t30\tsecond\n")
    arguments = [genome, "--model", folder, "--regions", "r.bed", "--context", 5]
    _, out, _ = run(capfdbinary, *arguments)
    places = [(r.split("\t")[0], int(r.split("\t")[1])) for r in out.splitlines()[1:]]
    assert places == [("chr1", i + 1) for i in range(10, 30)] + [("chr2", i + 1) for i in range(3, 9)]
    _, out, _ = run(capfdbinary, *arguments, "--summary")
    assert [r.split("\t")[:4] for r in out.splitlines()[1:]] == [
        ["chr2", "3", "9", "last"],
        ["chr1", "10", "20", "chr1:10-20"],
        ["chr1", "15", "30", "second"],
    ]


BAD_REGIONS = {
    "no record": ("chr9\t1\t2\n", "r.bed:1: no record 'chr9' in the sequences, which have chr1, none, chr2"),
    "past the end": ("#\nchr1\t700\t801\n", "r.bed:2: end 801 is past the end of 'chr1', which has 800 bases"),
    "backwards": ("chr1\t5\t5\n", "r.bed:1: start 5 is not before end 5"),
    "no numbers": ("chr1\t5\tx\n", "r.bed:1: a row must be"),
    "nothing": ("\n#\n", "it holds no region"),
    "empty": ("", "the file is empty; give a BED file"),
}


@pytest.mark.parametrize("case", BAD_REGIONS, ids=list(BAD_REGIONS))
def test_bad_regions_are_one_line_and_exit_3(case: str, folder: Path, genome: Path, capfdbinary) -> None:
    (genome.parent / "r.bed").write_text(BAD_REGIONS[case][0])
    code, out, err = run(capfdbinary, genome, "--model", folder, "--regions", "r.bed", "--out", "x.tsv")
    assert (code, out) == (3, "")
    assert BAD_REGIONS[case][1] in err.splitlines()[-1]
    assert not (genome.parent / "x.tsv").exists()


def test_one_bad_file_of_several_is_named_at_the_end(folder: Path, genome: Path, capfdbinary) -> None:
    (genome.parent / "bad.fa").write_text(">x\nACGT\nAC-GT\n")
    code, out, err = run(capfdbinary, "bad.fa", genome, "missing.fa", "--model", folder, "--summary")
    assert code == 3
    assert [row.split("\t")[0] for row in out.splitlines()[1:]] == ["chr1", "none", "chr2"]
    assert "bad.fa:3: record 'x': a gap '-'" in err.splitlines()[-1]
    assert "missing.fa: no such file" in err.splitlines()[-1]
    code, out, err = run(capfdbinary, "bad.fa", "--model", folder, "--out", "x.tsv")
    assert code == 3
    assert list(genome.parent.glob("*x.tsv*")) == []  # nor a partial file


USAGE = {
    "bigwig to stdout": (["--format", "bigwig"], "add --out FILE.bw"),
    "summary as bigwig": (["--summary", "--out", "x.bw"], "--summary writes rows"),
    "json of values": (["--json"], "--json goes with --summary"),
    "bf16 on a CPU": (["--precision", "bf16", "--device", "cpu"], "bf16 is for a GPU"),
    "no such device": (["--device", "tpu"], "--device tpu"),
    "twice": (["g.fa"], "given twice"),
}


@pytest.mark.parametrize("case", USAGE, ids=list(USAGE))
def test_usage_errors(case: str, folder: Path, genome: Path, capfdbinary) -> None:
    code, out, err = run(capfdbinary, "g.fa", "--model", folder, *USAGE[case][0])
    assert (code, out) == (2, "")
    assert USAGE[case][1] in err.splitlines()[-1]


def test_models_that_do_not_fit_are_exit_4(folder: Path, genome: Path, capfdbinary) -> None:
    from mambagen.models import save_model
    from mambagen.models.heads import EncoderModelConfig, MaskedLM

    config = EncoderModelConfig(encoder="bert", encoder_config={"d_model": 16, "n_layer": 1})
    save_model(MaskedLM(config, seed=0), "masked", DnaTokenizer().model_dump(mode="json"), "# m\n")
    assert "kind masked-lm; what is needed here is mamba-lm" in run(capfdbinary, genome, "--model", "masked")[2]
    assert run(capfdbinary, genome, "--model", "masked")[0] == 4
    assert run(capfdbinary, genome, "--model", "nowhere")[0] == 4
    weights = small_folder(genome.parent / "damaged") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = run(capfdbinary, genome, "--model", "damaged")
    assert code == 4
    assert "cut off" in err


def test_an_output_that_cannot_be_written_is_said_first(folder: Path, genome: Path, capfdbinary) -> None:
    code, _, err = run(capfdbinary, genome, "--model", folder, "--out", "no/such/x.bw")
    assert code == 5
    assert "no/such/x.bw: cannot be written: No such file or directory" in err


def test_a_closed_pipe_is_silent(folder: Path, genome: Path) -> None:
    command = [sys.executable, "-m", "mambagen.cli", "score", str(genome), "--model", str(folder)]
    (genome.parent / "long.fa").write_text(">x\n" + random_dna(60_000))
    command[4] = "long.fa"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


def test_a_bigwig_that_fails_on_its_way_leaves_nothing(folder: Path, genome: Path, capfdbinary, monkeypatch) -> None:
    pytest.importorskip("pybigtools")
    (genome.parent / "n.fa").write_text(">x\nANNNN\n")
    code, _, err = run(capfdbinary, "n.fa", "--model", folder, "--out", "x.bw")
    assert code == 3
    assert "no base has a likelihood" in err
    real = LanguageModel.spans

    def stopped(*arguments, **options):
        yield next(real(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "spans", stopped)
    code, out, err = run(capfdbinary, genome, "--model", folder, "--out", "x.bw", "--batch-tokens", 100)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "mambagen: error: interrupted"
    assert sorted(path.name for path in genome.parent.iterdir()) == ["g.fa", "n.fa"]
