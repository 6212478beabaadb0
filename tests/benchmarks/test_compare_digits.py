"""The comparison of generators of digits goes on where it stopped: in training, making clips, or judging."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from benchmarks import compare_digits
from benchmarks.wavenet import WaveNet
from mambagen.pipelines.pretrain_audio import PretrainAudioConfig

RATE = 16_000


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    for word in ("zero", "one"):
        (tmp_path / "data" / word).mkdir(parents=True)
        for number in range(4):
            sound = 0.2 * np.sin(np.arange(1200) * (0.05 + 0.01 * number))
            soundfile.write(tmp_path / "data" / word / f"{number}.wav", sound, RATE)
    return tmp_path / "data"


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A judge that takes no time, and says what it was shown."""
    shown: list[str] = []

    def judged(config: object, out: Path) -> object:
        shown.append(config.samples)  # type: ignore[attr-defined]
        return SimpleNamespace()

    figures = ["1.0", "2.0", "3.0", "4.0"]
    rows = [["clips", "3", "", *figures], ["digits, test", "9", "", *figures]]
    monkeypatch.setattr(compare_digits, "eval_sc09", judged)
    monkeypatch.setattr(compare_digits, "own_rows", lambda result: [list(row) for row in rows])
    return shown


def no_more(*arguments: object, **named: object) -> None:
    raise AssertionError("this was done already")


@pytest.mark.parametrize("name", ["mamba", "wavenet"])
def test_a_row_whose_clips_failed_goes_on_with_them(
    name: str, clips: Path, judge: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"outer": "mamba", "centre": "mamba", "d_model": 8, "pool": (2, 2), "lengths": (256,), "threads": 1}
    monkeypatch.setattr(compare_digits, "MODELS", {name: small})
    monkeypatch.setattr(compare_digits, "WaveNet", lambda seed=0: TinyWaveNet(8, 8, 1, 4, seed))

    class TinyWaveNet(WaveNet):
        def generate(self, count: int, steps: int, seed: int = 0) -> torch.Tensor:
            return super().generate(count, 200, seed)

    def run(*arguments: str) -> None:
        budget = ("--minutes", "0.01", "--batch", "2", "--n-layer", "1", "--clips", "3", "--device", "cpu")
        command = ["compare_digits", "--data", str(clips), *budget, "--only", name, "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        compare_digits.main()

    place = tmp_path / "out" / name
    with monkeypatch.context() as patch:
        patch.setattr(compare_digits, "make_clips", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run()
    trained = json.loads((place / "trained.json").read_text())
    assert trained["steps"] > 0
    assert (Path(trained["checkpoint"]) / "model.safetensors").is_file()
    with pytest.raises(SystemExit, match="other settings"):
        run("--lr", "0.5")

    for training in ("train_unet", "train_wavenet"):
        monkeypatch.setattr(compare_digits, training, no_more)
    with monkeypatch.context() as patch:
        patch.setattr(compare_digits, "eval_sc09", no_more)
        with pytest.raises(AssertionError, match="done already"):
            run()
    assert len(list((place / "clips").glob("*.wav"))) == 3

    monkeypatch.setattr(compare_digits, "make_clips", no_more)
    run()
    assert judge == [str(place / "clips")]
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())["rows"]
    assert [row["clips of"] for row in rows] == [name, "digits, test"]
    assert rows[0]["steps"] == trained["steps"]
    seconds = json.loads((place / "made.json").read_text())["seconds"]
    assert rows[0]["clips/s"] == pytest.approx(3 / seconds)
    monkeypatch.setattr(compare_digits, "measure", no_more)
    run()


def test_each_generator_has_the_learning_rate_that_suits_it(
    clips: Path, judge: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[float, float]] = []

    def trained(config: PretrainAudioConfig, run: Path, progress: object) -> compare_digits.Trained:
        run.mkdir(parents=True)
        assert config.minutes is not None
        tried.append((config.lr, config.minutes))
        return compare_digits.Trained("nowhere", abs(config.lr - 0.004) + 1, 7, 60.0)

    monkeypatch.setattr(compare_digits, "train_unet", trained)
    monkeypatch.setattr(compare_digits, "open_generator", lambda *_: SimpleNamespace(parameters=5))
    monkeypatch.setattr(compare_digits, "make_clips", lambda *_: 2.0)
    command = [
        "compare_digits",
        "--data",
        str(clips),
        "--only",
        "mamba",
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    command += ["--out", str(tmp_path / "out"), "--minutes", "3", "--lr", "0.001", "0.005", "0.02"]
    monkeypatch.setattr(sys, "argv", command)
    compare_digits.main()
    assert tried == [(0.001, 0.25), (0.005, 0.25), (0.02, 0.25), (0.005, 3.0)]
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())["rows"]
    assert rows[0]["lr"] == 0.005
    assert not (tmp_path / "out" / "mamba" / "trial").exists()


def test_a_training_that_was_stopped_goes_on(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a WaveNet, whose checkpoints are no model folders."""
    settings = {"data": (str(clips),), "batch": 2, "lengths": (256,), "threads": 1, "device": "cpu", "samples": 0}
    monkeypatch.setattr(compare_digits, "WaveNet", lambda seed=0: WaveNet(8, 8, 1, 4, seed))
    with compare_digits.Progress() as progress:
        results = [
            compare_digits.train_wavenet(
                compare_digits.with_recipe(None, {**settings, "steps": steps}), tmp_path / "run", progress
            )
            for steps in (3, 5)
        ]
    assert [result.steps for result in results] == [3, 5]
    assert results[0].checkpoint != results[1].checkpoint
    weights = [compare_digits.read_tensors(Path(r.checkpoint) / "model.safetensors") for r in results]
    assert not torch.equal(weights[0]["lm_head.weight"], weights[1]["lm_head.weight"])
