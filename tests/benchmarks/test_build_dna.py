"""The built-in model's last steps: rounding, measuring on test intervals, the folder and its card."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import mambagen
from benchmarks import build_dna
from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.models import save_model
from mambagen.pipelines.pretrain_dna import PretrainDnaConfig
from tests.data.helpers import random_dna
from tests.pipelines.dna_models import in_transformers, likelihoods_by_transformers, small_model


def test_figures_are_of_the_test_intervals_and_the_folder_loads(tmp_path: Path, monkeypatch) -> None:
    human, yeast = random_dna(900, 1), random_dna(500, 2, b"ACGTN")
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "human.fa").write_text(f">h\n{human}\n")
    (tmp_path / "g" / "yeast.fa").write_text(f">y\n{yeast}\n")
    (tmp_path / "s.bed").write_text(
        "h\t0\t600\ttrain\thuman\nh\t600\t900\ttest\thuman\ny\t0\t300\ttrain\tyeast\ny\t300\t500\ttest\tyeast\n"
        "other\t0\t9\ttest\tother\n"
    )
    monkeypatch.setattr(build_dna, "CONTEXTS", (50, 100))
    save_model(small_model(), tmp_path / "trained", DnaTokenizer().model_dump(mode="json"), "# t")
    result = build_dna.Training(checkpoint=tmp_path / "trained", steps=3, tokens=300, seconds=1.0)
    model = build_dna.rounded(result.checkpoint)
    files = build_dna.fasta_files(tmp_path / "g")
    figures = build_dna.measure(model, files, tmp_path / "s.bed", "cpu")

    theirs = in_transformers(model)
    expected = likelihoods_by_transformers(theirs, human[600:])
    assert figures["species"]["human"]["perplexity"] == pytest.approx(math.exp(-np.nanmean(expected)), rel=1e-4)
    assert figures["species"]["human"]["bases"] == 299
    assert figures["species"]["yeast"]["bases"] == sum(base != "N" for base in yeast[301:])
    assert 3.5 < figures["species"]["human"]["markov"] < 4.6  # random bases
    pieces = [likelihoods_by_transformers(theirs, human[at : at + 50]) for at in range(600, 900, 50)]
    assert figures["contexts"][50] == pytest.approx(math.exp(-np.nanmean(pieces)), rel=1e-4)
    assert list(figures["species"]) == ["human", "yeast"]
    less = build_dna.measure(model, files, tmp_path / "s.bed", "cpu", 100)
    assert less["species"]["human"]["bases"] == 99
    assert list(less["contexts"]) == [50, 100]

    config = PretrainDnaConfig(data=tuple(map(str, files)), steps=3, length_warmup=1024, context=2048)
    build_dna.write_weights(model, config, result, figures, tmp_path / "dna", "Apache-2.0")
    loaded, _ = mambagen.load(tmp_path / "dna")
    tokens = torch.randint(7, 11, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens)[0], model(tokens)[0], rtol=0, atol=0)
    parameters = sum(p.numel() for p in model.parameters())
    assert (tmp_path / "dna" / "model.safetensors").stat().st_size < 2 * parameters + 8000
    card = (tmp_path / "dna" / "README.md").read_text()
    assert f"| human | 299 | {figures['species']['human']['perplexity']:.3f} |" in card
    assert str(tmp_path) not in card


def test_a_folder_without_fasta_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("no")
    with pytest.raises(SystemExit, match="no FASTA files there"):
        build_dna.fasta_files(tmp_path)
