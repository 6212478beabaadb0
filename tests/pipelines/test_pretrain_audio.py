"""Training on sound: from files to a checkpoint, on tones that are learnt in seconds."""

import json
import math
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import soundfile
import torch

import mambagen.commands.pretrain_audio as command
from mambagen import cli
from mambagen.data.quantise import SILENCE, MuLaw, load_quantiser
from mambagen.data.spoken_words import DIGITS
from mambagen.models import load_model
from mambagen.models.audio_unet import AudioUNet, AudioUNetConfig, BlockKind
from mambagen.pipelines.audio_language_model import audio_loss, contrasted_loss, other_classes, shifted
from mambagen.pipelines.pretrain_audio import PUBLISHED_ROWS, RECIPES, PretrainAudioConfig, rows_of, with_recipe

RATE = 16_000
TINY = """
d_model = 8
n_layer = 1
pool = [2, 2]
lengths = [256]
batch = 4
steps = 6
save_every = "3"
threads = 1
samples = 0
sample_seconds = 0.004
valid_samples = 2000
lr = 0.01
clip = 1.0
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two words, each a tone of its own, five speakers: a folder a word with official lists."""
    monkeypatch.setenv("MAMBAGEN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "words"
    for word, hertz in (("one", 400), ("two", 1100)):
        (root / word).mkdir(parents=True)
        for i, speaker in enumerate(("aa", "bb", "cc", "dd", "ee")):
            time = np.arange(400 + 100 * i) / RATE
            soundfile.write(root / word / f"{speaker}_nohash_0.wav", 0.3 * np.sin(2 * np.pi * hertz * time + i), RATE)
    (root / "validation_list.txt").write_text("one/dd_nohash_0.wav\ntwo/dd_nohash_0.wav\n")
    (root / "testing_list.txt").write_text("one/ee_nohash_0.wav\ntwo/ee_nohash_0.wav\n")
    return root


@pytest.fixture
def run(words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    tiny = tmp_path / "tiny.toml"
    tiny.write_text(TINY)

    def go(*arguments: object, config: bool = True) -> tuple[int, str, str]:
        configured = ["--config", str(tiny)] if config else []
        code = cli.run(["pretrain-audio", *configured, *map(str, arguments)])
        out, err = capsys.readouterr()
        said = [line for line in err.splitlines(keepends=True) if not line.startswith("step ")]  # of a slow machine
        return code, out, "".join(said)

    return go


def test_a_run_leaves_a_model_its_figures_and_a_page_to_hear(run: Run, words: Path, tmp_path: Path) -> None:
    code, out, err = run("--data", words, "--out", "run", "--samples", 1, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["steps"] == 6
    assert result["samples"] == 6 * 4 * 256
    assert result["held_out"]["targets"] == 2 * 700
    assert result["held_out"]["bits_per_byte"] == pytest.approx(result["held_out"]["loss"] / np.log(2))
    assert 0 < result["baselines"]["order2"] < result["baselines"]["order0"] < np.log(256)
    model, fields = load_model(result["checkpoint"])
    assert load_quantiser(fields["quantiser"]) == MuLaw()
    assert model.config == AudioUNetConfig(d_model=8, n_layer=1, pool=(2, 2))
    card = Path(result["checkpoint"], "README.md").read_text()
    assert f"{result['held_out']['loss']:.4f} nats a sample" in card
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert sum("valid_bits_per_byte" in row for row in rows) == result_looks(rows)
    best = min(
        (row for row in rows if "valid_loss" in row), key=lambda row: row.get("valid_look_loss", row["valid_loss"])
    )
    assert f"{best['valid_loss']:.4f} nats a sample" in Path(result["best"], "README.md").read_text()
    assert result["best_step"] == best["step"]
    assert result["epochs"] == pytest.approx(
        6 * 4 / (2 * (2 + 2 + 3))
    )  # clips of 400, 500, 600 samples in windows of 256
    assert load_model(result["best"])[0].config == model.config
    page = Path("run/report.html").read_text()
    assert "data:audio/flac" in page
    assert "bits a byte" in page
    assert Path("run/loss.png").stat().st_size > 1000


def result_looks(rows: list[dict[str, Any]]) -> int:
    return sum("valid_loss" in row for row in rows)


def test_the_measured_loss_is_that_of_the_clips_one_by_one(run: Run, words: Path) -> None:
    _, out, _ = run("--data", words, "--out", "run", "--json")
    result = json.loads(out)
    model, _ = load_model(result["checkpoint"])
    total = count = 0
    for word in ("one", "two"):
        samples, _ = soundfile.read(words / word / "dd_nohash_0.wav", dtype="float32")
        tokens = MuLaw().encode(samples)
        for window in (tokens[:256], tokens[256:512], tokens[512:]):  # each begins anew
            fed = torch.tensor([SILENCE, *window[:-1].tolist()])[None]
            logits = model(fed)[0][0].double()
            total -= (
                logits.log_softmax(-1)[torch.arange(len(window)), torch.from_numpy(window.astype(int))].sum().item()
            )
            count += len(window)
    assert result["held_out"]["targets"] == count
    assert result["held_out"]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_all_looks_are_compared_on_the_same_samples(run: Run, words: Path) -> None:
    code, out, err = run("--data", words, "--out", "run", "--lr", 1e-12, "--steps", 8, "--json")  # nothing changes
    assert (code, err) == (0, "")
    looks = [row for row in map(json.loads, Path("run/metrics.jsonl").read_text().splitlines()) if "valid_loss" in row]
    *on_the_way, end = looks
    assert len(on_the_way) > 3
    for row in on_the_way:
        assert row["valid_loss"] == pytest.approx(end["valid_look_loss"], rel=1e-5)
        assert row["valid_targets"] == end["valid_look_targets"] < end["valid_targets"] == 1400
        assert abs(row["valid_loss"] - end["valid_loss"]) > 1e-4
    result = json.loads(out)
    assert result["best_step"] == on_the_way[0]["step"]  # none is better, so the first was kept
    assert f"over {on_the_way[0]['valid_targets']:,} samples" in Path("run/best/README.md").read_text()
    assert result["looks"]["last"] == end["valid_look_loss"]
    assert result["looks"]["targets"] == end["valid_look_targets"]
    assert result["warning"] is None
    assert f"step-{8:08d}" in run("--resume", "run", config=False)[1].split("listen")[1]


@pytest.fixture
def noise(words: Path, tmp_path: Path) -> Path:
    """Two words of white noise: nothing of the training clips helps with those that are held out."""
    root = tmp_path / "noise"
    random = np.random.default_rng(0)
    for name in ("one/aa", "one/bb", "one/cc"):
        (root / "one").mkdir(parents=True, exist_ok=True)
        soundfile.write(root / f"{name}_nohash_0.wav", random.uniform(-0.5, 0.5, 900 if "aa" not in name else 64), RATE)
    (root / "validation_list.txt").write_text("one/bb_nohash_0.wav\none/cc_nohash_0.wav\n")
    (root / "testing_list.txt").write_text("")
    return root


def test_a_run_that_learnt_its_sound_by_heart_says_so(run: Run, noise: Path) -> None:
    options = ("--data", noise, "--out", "run", "--d-model", 16, "--length", 64, "--batch", 8, "--steps", 160)
    code, out, err = run(*options, "--lr", 0.02)
    assert code == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    end = rows[-1]
    best = min(
        (row for row in rows if "valid_loss" in row), key=lambda row: row.get("valid_look_loss", row["valid_loss"])
    )
    assert best["step"] < 160
    model, _ = load_model("run/best")
    total = 0.0
    for name in ("bb", "cc"):  # on all held-out samples, as the end is
        tokens = torch.from_numpy(
            MuLaw().encode(soundfile.read(noise / f"one/{name}_nohash_0.wav", dtype="float32")[0])
        )
        total += sum(audio_loss(model, part[None], torch.tensor([len(part)])).item() for part in tokens.split(64))
    at_best = total / 1800
    assert (end["step"], end["valid_targets"]) == (160, 1800)
    assert end["valid_loss"] > at_best + 0.1
    assert err.count("\n") == 1
    assert f"rose from {at_best:.4f} nats a sample at step {best['step']} to {end['valid_loss']:.4f} at step 160" in err
    assert "0.004 seconds of sound, gone through 1,280 times, were learnt by heart" in err
    assert "1,280 times through the data" in out
    assert f"the same after step {best['step']} (best)" in out
    assert f"{at_best:11.4f}" in out
    assert "mambagen generate-audio run/best --out heard" in out
    assert "train on" not in out
    page = Path("run/report.html").read_text()
    assert f"the same after step {best['step']} (best)" in page
    assert err.strip().removeprefix("mambagen: warning: ") in page.replace("&#39;", "'")
    code, out, err = run("--resume", "run", "--json", config=False)  # measured again, and nothing lost
    result = json.loads(out)
    assert (code, result["best_step"], result["epochs"]) == (0, best["step"], 1280)
    assert result["best_held_out"]["loss"] == pytest.approx(at_best, rel=1e-5)
    assert result["held_out"]["loss"] == pytest.approx(end["valid_loss"], rel=1e-5)
    assert result["warning"] in err


def test_the_loss_does_not_see_what_is_past_a_clip_s_end() -> None:
    torch.manual_seed(0)
    model = AudioUNet(AudioUNetConfig(d_model=8, n_layer=1, pool=(2, 2)), seed=0)
    tokens = torch.randint(0, 256, (2, 50), dtype=torch.uint8)
    counted = torch.tensor([50, 31])
    loss = audio_loss(model, tokens, counted)
    other = tokens.clone()
    other[1, 31:] = 7
    assert audio_loss(model, other, counted).item() == loss.item()
    alone = audio_loss(model, tokens[:1], counted[:1]) + audio_loss(model, tokens[1:, :31], counted[1:])
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
    assert shifted(tokens)[:, 0].tolist() == [SILENCE, SILENCE]
    assert torch.equal(shifted(tokens)[:, 1:], tokens[:, :-1])


def test_telling_classes_apart_is_bayes_rule_over_two_of_them() -> None:
    torch.manual_seed(0)
    model = AudioUNet(AudioUNetConfig(d_model=8, n_layer=1, pool=(2, 2), classes=3), seed=0)
    tokens, counted = torch.randint(0, 256, (3, 40), dtype=torch.uint8), torch.tensor([40, 22, 40])
    own, others = torch.tensor([0, 3, 2]), torch.tensor([2, -1, 1])

    def nats(row: int, of: int) -> float:
        return audio_loss(model, tokens[row : row + 1], counted[row : row + 1], torch.tensor([of])).item()

    plain = sum(nats(row, int(of)) for row, of in enumerate(own))
    assert contrasted_loss(model, tokens, counted, own, others, 0.0).item() == pytest.approx(plain, rel=1e-5)
    # the first half of three rows are two, of which the second has no class; -log p(0 | clip) of classes 0 and 2
    told = -math.log(1 / (1 + math.exp(nats(0, 0) - nats(0, 2))))
    found = contrasted_loss(model, tokens, counted, own, others, 100.0).item()
    assert found - plain == pytest.approx(100 * told, rel=1e-3)


def test_a_model_without_classes_can_learn_them(run: Run, words: Path) -> None:
    assert run("--data", words, "--out", "plain", "--steps", 2)[0] == 0
    options = ("--data", words, "--conditional", "--steps", 2, "--class-contrast", 5, "--out", "run", "--json")
    code, out, err = run(*options, "--from", "plain/best", "--lr", 1e-9)
    assert (code, err) == (0, "")
    model, _ = load_model(json.loads(out)["checkpoint"])
    plain, _ = load_model("plain/best")
    assert torch.allclose(model.lm_head.weight, plain.lm_head.weight, atol=1e-6)
    assert model.class_embedding is not None
    assert 0 < model.class_embedding.weight.std() < 0.15
    more = ("--data", words, "--steps", 1, "--lr", 1e-9, "--json")
    code, out, err = run(*more, "--from", "plain/best", "--out", "on")  # and a plain one may go on as it is
    assert (code, err) == (0, "")
    assert torch.allclose(load_model(json.loads(out)["checkpoint"])[0].lm_head.weight, plain.lm_head.weight, atol=1e-6)
    code, _, err = run(*more, "--from", "run/best", "--out", "no")
    assert (code, "holds another architecture" in err) == (4, True)
    others = [drawn_others(seed) for seed in (0, 0, 1)]
    assert others[0] == others[1] != others[2]


def drawn_others(seed: int) -> list[int]:
    """The classes that a task sets against classes 0, 1, 2 and none, which have to be others."""
    classes = np.array([0, 1, 2, 3] * 8)
    drawn = other_classes(seed, 5, classes, 3)
    assert (drawn[classes == 3] == -1).all()
    assert (drawn[classes < 3] != classes[classes < 3]).all()
    assert set(drawn[classes < 3].tolist()) == {0, 1, 2}
    return drawn.tolist()


def test_a_resumed_run_ends_with_the_same_weights(run: Run, words: Path) -> None:
    assert run("--data", words, "--out", "run", "--gain-db", 3, "--shift", 0.005)[0] == 0
    whole = Path("run/checkpoints/step-00000006/model.safetensors").read_bytes()
    shutil.rmtree("run/checkpoints/step-00000006")
    code, _, err = run("--resume", "run", config=False)
    assert (code, err) == (0, "")
    assert Path("run/checkpoints/step-00000006/model.safetensors").read_bytes() == whole
    steps = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines() if "lr" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_prepared_audio_may_move_and_other_audio_is_refused(run: Run, words: Path, tmp_path: Path) -> None:
    assert run("--data", words, "--shards", "kept", "--out", "first")[0] == 0
    assert run("--data", "kept", "--out", "run")[0] == 0
    shutil.rmtree("run/checkpoints/step-00000006")
    Path("kept").rename("moved")
    assert run("--resume", "run", "--data", "moved", config=False)[0] == 0
    code, _, err = run("--resume", "run", "--data", words / "one", config=False)
    assert code == 4
    assert "the training audio is not what the run began with" in err


def test_a_conditional_model_knows_its_words(run: Run, words: Path) -> None:
    code, out, err = run(
        "--data", words, "--conditional", "--labels", "one,two", "--out", "run", "--json", "--steps", 3
    )
    assert (code, err) == (0, "")
    model, fields = load_model(json.loads(out)["checkpoint"])
    assert model.config.classes == 2
    assert fields["quantiser"]["classes"] == ["one", "two"]
    assert "one" in Path("run/report.html").read_text()


def test_lengths_grow_in_equal_parts_of_the_steps(run: Run, words: Path) -> None:
    code, out, _ = run("--data", words, "--length", "64,128,256", "--batch", 2, "--out", "run", "--json")
    assert code == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "lr" in row] == [1, 2, 3, 4, 5, 6]
    assert json.loads(out)["samples"] == 6 * round((64 + 128 + 256) * 2 / 3)


def test_the_published_schedule_is_about_a_million_samples_at_every_length() -> None:
    assert rows_of(958_464) == 1
    assert all(rows_of(length) == rows for length, rows in PUBLISHED_ROWS.items())
    assert all(0.9e6 < length * rows_of(length) <= 1 << 20 for length in (*PUBLISHED_ROWS, 20_000, 500_000))
    assert rows_of(16_000) == 16


def test_recipes_have_the_published_settings_and_options_win() -> None:
    sc09 = with_recipe(None, {"recipe": "sc09"})
    assert (sc09.lr, sc09.steps, sc09.rows(), sc09.warmup, sc09.weight_decay, sc09.clip) == (
        2e-3, 200_000, (16,), 0.1, 0.1, 0.1,
    )  # fmt: skip
    assert sc09.lengths == (16_000,)
    assert sc09.architecture(0) == AudioUNetConfig()
    assert with_recipe(None, {"recipe": "youtubemix"}).rows() == (1,)
    assert with_recipe(None, {"recipe": "youtubemix", "lengths": (8192,)}).rows() == (128,)
    assert with_recipe(None, {"recipe": "sc09", "minutes": 5.0}).steps is None
    digits = with_recipe(None, {"recipe": "digits", "data": ("x",), "lr": 1e-3})
    assert (digits.lr, digits.labels, digits.pad) == (1e-3, DIGITS, "silence")
    model = AudioUNet(digits.architecture(10), seed=0)
    assert 4 * sum(p.numel() for p in model.parameters()) < 16e6  # the package's limit for a built-in model


def test_every_row_of_the_ablation_can_be_built(tmp_path: Path) -> None:
    for outer in ("s4+mlp", "mamba"):
        for centre in ("attention+mlp", "s4+mlp", "mamba"):
            config = PretrainAudioConfig(data=("x",), outer=outer, centre=centre)  # type: ignore[arg-type]
            assert config.architecture(0).outer == outer
    assert get_args(BlockKind) == command.BLOCKS
    assert tuple(RECIPES) == command.RECIPES


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "no audio is given"),
        (("--data", "none"), 3, "none: cannot be read"),
        (("--data", "words", "--labels", "nine"), 3, "no clip that is labelled nine"),
        (("--data", "text.wav"), 3, "text.wav: is text, not audio"),
        (("--data", "empty.wav"), 3, "empty.wav: is empty"),
        (("--data", "words", "--pool", "4,x"), 2, "--pool 4,x: it must be a whole number"),
        (("--data", "words", "--pool", "1"), 2, "the architecture: pool"),
        (("--data", "words", "--length", "64,32"), 2, "lengths must grow: give the shortest first"),
        (("--data", "words", "--length", "64,7"), 2, "--length is 7: "),
        (("--data", "words", "--length", "32,64", "--minutes", "1"), 2, "give --steps in place of --minutes"),
        (("--data", "words", "--from", "none"), 4, "no such model folder"),
        (("words",), 2, "stands alone"),
        (("--resume", "words"), 4, "is not the folder of a run"),
        (("--data", "demo"), 3, "is dna, not audio"),
    ],
    ids=[
        *("no-data", "missing", "label", "text", "empty", "pool", "pool-1", "shrink", "short", "minutes"),
        *("from", "alone", "resume", "dna"),
    ],
)
def test_what_cannot_be_is_one_line(
    run: Run, words: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "empty.wav").write_bytes(b"")
    got, out, err = run(*arguments)
    assert (got, out) == (code, "")
    assert err.count("\n") == 1
    assert said in err
    assert not (tmp_path / "runs").exists()


def test_files_are_told_of_once_a_kind_and_bad_ones_can_be_left_out(run: Run, words: Path, tmp_path: Path) -> None:
    for i in range(3):
        soundfile.write(tmp_path / "words" / "one" / f"x{i}_nohash_0.wav", np.zeros((4000, 2)), 8000)
    (words / "two" / "bad_nohash_0.wav").write_text("no sound")
    code, _, err = run("--data", words, "--out", "run", "--steps", 1)
    assert code == 3
    assert "bad_nohash_0.wav: is text" in err
    assert "1 of 14 files cannot be used (--skip-bad leaves them out)" in err
    code, _, err = run("--data", words, "--out", "run", "--steps", 1, "--skip-bad")
    assert code == 0
    assert "left out" in err
    assert "3 of 14 files, as" in err
    assert "resampled from 8,000 to 16,000 Hz" in err
    assert "stereo: mixed to mono" in err
    assert "silent" in err


def test_a_full_disk_is_told_with_the_place_of_the_prepared_audio(run: Run, words: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        code, _, err = run("--data", words, "--out", "run", "--steps", 1, "--shards", tmp_path / "prepared")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, err.count("\n")) == (5, 1)
    assert f"{tmp_path / 'prepared'}: File too large; --shards DIR keeps" in err
    assert not (tmp_path / "prepared").exists()
    code, _, err = run("--data", words, "--out", "run", "--steps", 1, "--shards", "/proc/prepared")
    assert (code, err.count("\n"), "--shards DIR keeps" in err) == (5, 1, True)


def test_settings_that_make_another_model_are_refused_on_resuming(run: Run, words: Path) -> None:
    assert run("--data", words, "--out", "run", "--steps", 1)[0] == 0
    code, _, err = run("--resume", "run", "--length", 128, config=False)
    assert code == 2
    assert "--length cannot change when a run goes on" in err
