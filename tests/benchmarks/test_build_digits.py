"""The recipe of the built-in digits, from a table of clips to a model folder, with a tiny model."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from benchmarks import build_digits
from mambagen.data.audio_shards import AudioShards
from mambagen.data.spoken_words import DIGITS
from mambagen.models import load_model
from mambagen.pipelines.generate_audio import AudioVoice

TINY = ("d_model=8", "n_layer=1", "pool=[2, 2]", "lengths=[256]", "batch=2", "threads=1", "samples=0")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two clips of each digit, by another speaker for validation, and a word; one clip is longer than a second."""
    rows = ["path,start_frame,n_frames,label,digit,speaker,split"]
    rng = np.random.default_rng(0)
    samples, at = [], 0
    for digit, word in enumerate(DIGITS):
        for split in ("train", "valid", "test"):
            size = 20_000 if (digit, split) == (3, "train") else 400
            sound = 0.1 * rng.normal(size=size)
            sound[: size // 4] = 0
            samples.append(sound)
            rows.append(f"all.wav,{at},{size},{word},{digit},{split},{split}")
            at += size
    samples.append(0.1 * rng.normal(size=500))
    rows.append(f"all.wav,{at},500,yes,,train,train")
    soundfile.write(tmp_path / "all.wav", np.concatenate(samples), 16_000)
    (tmp_path / "index.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "index.csv"


def test_from_a_table_to_a_model_folder(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_digits.shutil, "which", lambda name: None)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["build_digits", "--work", str(tmp_path / "work"), *arguments])
        build_digits.main()
        return capsys.readouterr().out

    assert "espeak-ng is not installed" in run("prepare", "--data", str(table))
    real = AudioShards(tmp_path / "work" / "prepared" / "real")
    assert {split: len(real[split]) for split in real.index.splits} == {"train": 10, "valid": 10}
    assert real["train"].length.max() == 16_000  # of the long clip the second that is heard
    assert (real["train"].clip(int(real["train"].length.argmax())) == 128).sum() < 1500
    spoken = AudioShards(tmp_path / "work" / "prepared" / "spoken")
    assert (len(spoken["train"]), len(spoken["valid"])) == (1, 10)

    settings = [part for text in TINY for part in ("--set", text)]
    budgets = ("--spoken-minutes", "0.01", "--real-minutes", "0.02", "--device", "cpu", "--minutes", "5")
    assert "done: now" in run("train", *budgets, *settings, "--export", str(tmp_path / "out"))
    kept = {path.name for path in (tmp_path / "out" / "real").iterdir()}
    assert {"config.json", "model.safetensors", "manifest.json", "report.html", "metrics.jsonl"} <= kept
    assert load_model(tmp_path / "out" / "real")[0].config.classes == 10
    assert "done: now" in run("train", *budgets, *settings)  # nothing is left to do

    out = run("finish", "--out", str(tmp_path / "digits"), "--device", "cpu")
    figures = json.loads(out[: out.index("\n}") + 2])
    assert figures["held-out clips"] == 10
    assert figures["samples"] == 4000
    voice, valid, nats = AudioVoice(tmp_path / "digits", "cpu"), real["valid"], 0.0
    for row in range(len(valid)):
        tokens = valid.clip(row)
        nats -= voice.log_likelihood(tokens[:0], tokens, DIGITS.index(real.labels[valid.label[row]]))
    assert figures["nats a sample"] == pytest.approx(nats / 4000, rel=1e-5)
    card = (tmp_path / "digits" / "README.md").read_text()
    assert f"{figures['nats a sample']:.4f} nats a sample" in card
    assert "real: " in card
    _, fields = load_model(tmp_path / "digits")
    assert tuple(fields["quantiser"]["classes"]) == DIGITS
    shutil.rmtree(tmp_path / "work")


def test_a_copy_is_known_however_loud_and_late() -> None:
    random = np.random.default_rng(0)
    clips = random.standard_normal((3, 6000)).astype(np.float32)
    spectra = np.stack([build_digits.unit_spectrum(clip) for clip in clips])
    late = np.concatenate([np.zeros(3000, np.float32), 0.1 * clips[1]])
    assert build_digits.likeness(spectra, late) == pytest.approx(1, abs=2e-3)
    assert build_digits.likeness(spectra, late, without=1) < 0.1
