"""The figures of benchmarks.variants against scikit-learn and plain counting."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks.variants import auroc, bootstrap, frequencies, substitution_classes, within_classes
from mambagen.pipelines.score_variants import VariantScores

rng = np.random.default_rng(0)


def test_auroc_is_that_of_scikit_learn_and_counts_pairs_within_classes() -> None:
    scores = rng.integers(0, 20, 200).astype(float)  # with ties
    positive = rng.random(200) < 0.3
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    classes = rng.integers(0, 5, 200)
    shifted = scores + 100 * classes  # of no use within a class
    won = pairs = 0.0
    for i in np.flatnonzero(positive):
        for j in np.flatnonzero(~positive & (classes == classes[i])):
            won += (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])
            pairs += 1
    assert within_classes(shifted, positive, classes) == pytest.approx(won / pairs)
    assert np.isnan(auroc(scores, np.ones(200, bool)))


def test_the_bootstrap_draws_whole_blocks() -> None:
    values = np.repeat(rng.standard_normal(100), 20)  # twenty copies of a hundred values
    blocks = np.repeat(np.arange(100), 20)
    low, high = bootstrap(lambda at: float(values[at].mean()), blocks, 400, 0)
    assert (high - low) / (2 * 1.96) == pytest.approx(values.std() / 10, rel=0.2)  # not of 2,000 values
    assert low < values.mean() < high


def test_substitutions_are_folded_and_cpgs_found(tmp_path: Path) -> None:
    (tmp_path / "g.fa").write_text(">c\nACGTTGCA\n")
    cases = [(2, "C", "T"), (3, "G", "A"), (7, "C", "T"), (6, "G", "A"), (1, "A", "G"), (4, "T", "A"), (4, "T", "TA")]
    position, reference, alternate = zip(*cases, strict=True)
    empty = np.zeros(len(cases))
    scores = VariantScores(
        np.array(["c"] * len(cases)), np.array(position), np.array(reference), np.array(alternate),
        empty, empty, empty, np.arange(len(cases)),
    )  # fmt: skip
    transition, in_cpg, classes = substitution_classes(scores, str(tmp_path / "g.fa"))
    assert transition.tolist() == [True, True, True, True, True, False, False]
    assert in_cpg.tolist() == [True, True, False, False, False, False, False]
    assert classes[0] == classes[1]  # C>T and G>A of one CpG
    assert classes[2] == classes[3]  # the same outside
    assert len(set(classes.tolist())) == 5
    assert classes[-1] == 99


def test_frequencies_are_a_value_an_alt(tmp_path: Path) -> None:
    pytest.importorskip("pysam")
    (tmp_path / "v.vcf").write_text(
        "##fileformat=VCFv4.2\n##contig=<ID=c,length=9>\n"
        '##INFO=<ID=AF,Number=A,Type=Float,Description="x">\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n'
        "c\t1\t.\tA\tC,G\t.\t.\tAF=0.25,0.5\nc\t2\t.\tC\tT\t.\t.\t.\nc\t3\t.\tG\t.\t.\t.\t.\nc\t4\t.\tT\tA\t.\t.\tAF=1\n"
    )
    found = frequencies(str(tmp_path / "v.vcf"))
    np.testing.assert_array_equal(found, [0.25, 0.5, np.nan, 1.0])
