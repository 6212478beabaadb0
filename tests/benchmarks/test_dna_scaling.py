"""Perplexity against size and context: every model is measured on the same held-out bases, whatever its context."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import dna_scaling
from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.genome import Genome, Stretches
from mambagen.pipelines.likelihood import LanguageModel
from tests.benchmarks.small_genomes import genomes
from tests.data.helpers import random_dna
from tests.pipelines.dna_models import in_transformers, likelihoods_by_transformers, small_model


def test_windows_of_any_context_predict_the_same_bases(tmp_path: Path) -> None:
    texts = [random_dna(400, 1, b"ACGTN"), random_dna(150, 2)]
    (tmp_path / "g.fa").write_text("".join(f">{i}\n{text}\n" for i, text in enumerate(texts)))
    genome = Genome.from_files([tmp_path / "g.fa"])
    places = [(0, 100, 331), (1, 0, 90), (1, 149, 150)]
    held_out = dna_scaling.HeldOut(Stretches(genome.records, places, DnaTokenizer()), 4.0)
    model = LanguageModel(small_model(), "cpu")
    theirs = in_transformers(model.model)
    known = sum(base != "N" for record, start, end in places for base in texts[record][start + 1 : end])

    carried = []
    for context in (50, 64, 1000):
        found = held_out.measure(model, context)
        windows = [
            likelihoods_by_transformers(theirs, texts[record][at : min(at + context + 1, end)])
            for record, start, end in places
            for at in range(start, end - 1, context)
        ]
        assert found["held-out bases"] == known
        assert found["perplexity"] == pytest.approx(math.exp(-np.nanmean(np.concatenate(windows))), rel=1e-4)
        carried.append(found["carried"])
    assert carried == pytest.approx([found["perplexity"]] * 3, rel=1e-5)  # the last context is longer than any stretch


def test_both_series_are_of_the_same_bases_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, splits = genomes(tmp_path)
    monkeypatch.setattr(dna_scaling, "FIRST", 256)
    monkeypatch.setattr(dna_scaling, "MIDDLE", "250k")
    files = [str(folder / f"{name}.fa") for name in ("alpha", "beta", "gamma")]
    arguments = [
        *("--data", *files, "--splits", splits, "--runs", tmp_path / "runs", "--device", "cpu"),
        *("--tokens", 8192, "--valid-tokens", 6000, "--sizes", "250k", "--contexts", 256, 2048),
        *(
            "--size-batch",
            2048,
            "--context-batch",
            2048,
            "--out",
            tmp_path / "out.json",
            "--figure",
            tmp_path / "x.png",
        ),
    ]
    monkeypatch.setattr(sys, "argv", ["dna_scaling", *map(str, arguments)])
    dna_scaling.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]

    assert [(row["series"], row["context"], row["tokens"]) for row in rows] == [
        ("size", 256, 8192), ("context", 256, 8192), ("context", 2048, 8192),
    ]  # fmt: skip
    assert {row["held-out bases"] for row in rows} == {2047 + 1799}  # pieces at 0 and 5,400 of 3 x 3,600
    assert len({row["Markov 8"] for row in rows}) == 1
    assert rows[0]["perplexity"] == rows[1]["perplexity"]  # the same run twice
    assert rows[2]["perplexity"] == pytest.approx(rows[2]["carried"], rel=1e-5)  # a piece is no longer than its context
    assert 3 < rows[2]["perplexity"] < 12
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

    dna_scaling.main()  # trains no more
    again = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["perplexity"] for row in again] == [row["perplexity"] for row in rows]

    arguments[arguments.index("--tokens") + 1] = 16384
    monkeypatch.setattr(sys, "argv", ["dna_scaling", *map(str, arguments)])
    with pytest.raises(SystemExit, match="a run of 8,192 tokens, not 16,384; give another --runs"):
        dna_scaling.main()


def test_the_contexts_go_on_from_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, splits = genomes(tmp_path)
    monkeypatch.setattr(dna_scaling, "FIRST", 256)
    monkeypatch.setattr(dna_scaling, "MIDDLE", "250k")
    arguments = [
        *("--data", folder / "alpha.fa", folder / "beta.fa", folder / "gamma.fa", "--splits", splits),
        *("--runs", tmp_path / "runs", "--device", "cpu", "--tokens", 8192, "--valid-tokens", 6000, "--sizes"),
        *("--contexts", 256, 2048, "--size-batch", 2048, "--context-batch", 2048, "--branch-tokens", 2048),
        *("--branch-lr", 1e-9, "--out", tmp_path / "out.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["dna_scaling", *map(str, arguments)])
    dna_scaling.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["context"], row["tokens"]) for row in rows] == [(256, 2048), (2048, 2048)]
    # a learning rate of next to nothing leaves both what they began with: one model, read with its state carried
    assert rows[0]["carried"] == pytest.approx(rows[1]["carried"], rel=1e-5)
    assert rows[0]["carried"] != rows[0]["perplexity"]
