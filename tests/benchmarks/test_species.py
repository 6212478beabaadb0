"""Sets of species measured at once or in halves: the same figures, joined only where they are of the same windows."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import species
from tests.benchmarks.small_genomes import genomes

SMALL = {
    "model": {"d_model": 16, "n_layer": 1}, "context": 256, "shortest": 128, "batch_tokens": 4096, "lr": 1e-2,
    "valid_windows": 20, "test_windows": 20, "baseline_windows": 30, "lengths": (128, 512), "k": 3, "patch": 8,
    "seed": 1,
}  # fmt: skip

Measure = Callable[..., dict[str, Any]]


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Runs the benchmark with these arguments on a set of three species; gives back what it wrote."""
    data, splits = genomes(tmp_path)
    monkeypatch.setattr(species, "RECIPE", SMALL)

    def run(*arguments: object, out: Path, of: str = "alpha,beta,gamma") -> dict[str, Any]:
        place = [] if "--join" in arguments else ["--data", data, "--splits", splits]
        given = [*place, "--set", of, "--device", "cpu", "--threads", 1, "--out", out, *arguments]
        monkeypatch.setattr(sys, "argv", ["species", *map(str, given)])
        species.main()
        return dict(json.loads(out.read_text()))

    return run


def test_halves_that_are_joined_are_what_is_measured_at_once(
    measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = measure("--run", tmp_path / "once", "--steps", 12, out=tmp_path / "once.json")
    fitted = measure("--baselines-only", out=tmp_path / "cpu.json")
    assert "model" not in fitted
    trained = measure(
        "--run", tmp_path / "half", "--steps", 12, "--no-baselines", "--control", out=tmp_path / "gpu.json"
    )
    assert "baselines" not in trained
    assert trained["control"]["steps"] == 1
    capsys.readouterr()
    halves = (tmp_path / "cpu.json", tmp_path / "gpu.json")
    both = measure("--join", *halves, "--figure", tmp_path / "x.png", out=tmp_path / "both.json")
    text = capsys.readouterr().out

    assert both["windows"] == once["windows"]
    assert set(both["windows"]) == {"128", "512"}
    assert len(set(both["windows"].values())) == 2
    assert both["baselines"]["rows"] == once["baselines"]["rows"]
    assert both["model"]["test"] == once["model"]["test"]
    assert both["control"] == trained["control"]
    assert {row["windows"] for row in both["baselines"]["rows"]} == set(both["windows"].values())
    composition = {row["length"]: row["accuracy"] for row in both["baselines"]["rows"] if row["name"] == "composition"}
    assert composition[512] > 0.9  # that is how these species differ
    assert "| bases | 128 | 512 |" in text
    assert f"| composition | {composition[128]:.3f} | {composition[512]:.3f} |" in text
    shares = [row["accuracy"] for row in both["model"]["test"]["by_length"]]
    assert f"| model | {shares[0]:.3f} | {shares[1]:.3f} |" in text
    assert "| model of shuffled labels |" in text
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_half_is_added_to_the_file_that_is_there(measure: Measure, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    fitted = measure("--baselines-only", out=out)
    trained = measure("--run", tmp_path / "run", "--steps", 4, "--no-baselines", out=out)
    assert trained["baselines"] == fitted["baselines"]
    assert [row["windows"] for row in trained["model"]["test"]["by_length"]] == list(fitted["windows"].values())


@pytest.mark.parametrize("what", ["set", "windows", "rows"])
def test_halves_of_other_windows_are_not_joined(measure: Measure, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out.json"
    found = measure("--baselines-only", out=out)
    if what == "set":
        found["set"] = "beta,gamma"
    elif what == "windows":  # as of other genomes: said before any work is done
        found["windows"]["512"] = "0123456789abcdef"
    else:
        found["baselines"]["rows"][0]["windows"] = "0123456789abcdef"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(found))
    wanted = {"set": "not the same set", "windows": "not the same windows", "rows": "measured on other windows"}[what]
    with pytest.raises(SystemExit, match=wanted):
        measure("--join", out, other, out=tmp_path / "both.json")
    if what == "windows":
        with pytest.raises(SystemExit, match="not the windows of these data"):
            measure("--run", tmp_path / "run", "--steps", 4, "--no-baselines", out=other)
        assert not (tmp_path / "run").exists()
    assert not (tmp_path / "both.json").exists()


def test_a_model_that_is_always_right_is_drawn(tmp_path: Path) -> None:
    row = {"length": 128, "accuracy": 1.0, "low": 0.9, "high": 1 - 2**-53}  # as Wilson's interval of 39 of 39 ends
    found = {"set": "x", "species": ["a", "b"], "windows": {"128": "0"}, "model": {"test": {"by_length": [row]}}}
    species.draw(found, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
