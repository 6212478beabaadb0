"""The recipe of the built-in species model, on small genomes: which species, and a folder that works."""

import json
import sys
from pathlib import Path

import pytest

import mambagen
from benchmarks import build_species
from mambagen import cli
from tests.benchmarks.small_genomes import LETTERS, genomes
from tests.data.helpers import random_dna


def test_the_recipe_chooses_trains_writes_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, splits = genomes(tmp_path)
    monkeypatch.setattr(build_species, "LEAST_TRAINING", 10_000)
    monkeypatch.setattr(build_species, "LENGTH", 1024)
    monkeypatch.setattr(build_species, "WINDOWS", 20)
    small = {
        "model": {"d_model": 16, "n_layer": 1}, "context": 256, "shortest": 128, "batch_tokens": 4096, "lr": 1e-2,
        "valid_windows": 20, "test_windows": 20, "lengths": (128, 256), "k": 3, "patch": 8, "save_every": "5",
    }  # fmt: skip
    monkeypatch.setattr(build_species, "RECIPE", small)
    arguments = [
        *("build_species", "--data", str(data), "--splits", str(splits), "--run", str(tmp_path / "run")),
        *("--threads", "1", "--no-baselines", "--device", "cpu", "--out", str(tmp_path / "weights" / "species")),
    ]
    (tmp_path / "weights").mkdir()
    monkeypatch.setattr(sys, "argv", [*arguments, "--steps", "10"])
    build_species.main()
    chosen = json.loads((tmp_path / "run" / "chosen.json").read_text())
    assert chosen["species"] == ["alpha", "beta", "gamma"]
    assert "taken for gamma" in chosen["left_out"]["delta"]
    assert chosen["left_out"]["tiny"] == "4,200 training bases"
    assert chosen["left_out"]["short"] == "no window of 1,024 bases for validation or test"

    monkeypatch.setattr(sys, "argv", [*arguments, "--steps", "30"])
    build_species.main()
    steps = [int(path.name[5:]) for path in (tmp_path / "run" / "train" / "checkpoints").iterdir()]
    assert max(steps) == 30
    assert (tmp_path / "run" / "report.html").is_file()
    folder = tmp_path / "weights" / "species"
    card = (folder / "README.md").read_text("utf-8")
    for text in ("Apache-2.0", "| delta | gamma (", "| 256 |", "30 steps", 'mambagen.load("species")'):
        assert text in card
    monkeypatch.setattr("mambagen.models.builtin.WEIGHTS_HOME", tmp_path / "weights")
    model, _ = mambagen.load("species")
    assert model.classes == ("alpha", "beta", "gamma")
    capsys.readouterr()
    (tmp_path / "x.fa").write_text(f">x\n{random_dna(5000, 7, LETTERS['alpha'])}\n")
    assert cli.run(["classify-species", str(tmp_path / "x.fa")]) == 0  # the built-in model is the default
    assert capsys.readouterr().out.splitlines()[1].split("\t")[2] == "alpha"
