"""train-sc09-classifier, sc09-stats and eval-sc09 through the command line, on made-up words."""

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mambagen import cli
from mambagen.data.generated_clips import asked_digit, natural, read_generated, summary
from mambagen.data.quantise import MuLaw
from mambagen.data.spoken_words import DIGITS, read_spoken_words
from mambagen.data.wav import to_int16
from mambagen.models import load_model, save_model
from mambagen.models.audio_unet import AudioUNet, AudioUNetConfig
from mambagen.models.builtin import find_model
from mambagen.models.files import write_folder_atomically
from mambagen.models.saving import CARD, Generation, model_writers
from mambagen.pipelines.audio_language_model import audio_loss
from mambagen.pipelines.eval_sc09 import write_samples
from mambagen.pipelines.sc09_findings import find_faults
from mambagen.pipelines.sc09_generation import Generator
from mambagen.pipelines.sc09_judge import DigitJudge, Judged
from mambagen.pipelines.sc09_metrics import Moments
from mambagen.pipelines.sc09_reference import load_reference
from mambagen.pipelines.sc09_stats import shipped_reference
from tests.pipelines.sc09_sounds import JUDGE, RATE, word, write_words
from tests.reports import chromium

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with words/ (real data), judge/ (trained on them) and stats.safetensors."""
    root = tmp_path_factory.mktemp("sc09")
    before = os.environ.get("MAMBAGEN_HOME")
    os.environ["MAMBAGEN_HOME"] = str(root / "home")
    write_words(root / "words", range(20))
    (root / "judge.toml").write_text(JUDGE)
    arguments = ["--data", str(root / "words"), "--config", str(root / "judge.toml"), "--out", str(root / "run")]
    assert cli.run(["train-sc09-classifier", *arguments]) == 0
    shutil.copytree(root / "run" / "model", root / "judge")
    stats = [
        "sc09-stats",
        str(root / "words"),
        "--judge",
        str(root / "judge"),
        "--out",
        str(root / "stats.safetensors"),
    ]
    assert cli.run([*stats, "--name", "made-up words"]) == 0
    yield root
    if before is None:
        del os.environ["MAMBAGEN_HOME"]
    else:
        os.environ["MAMBAGEN_HOME"] = before


@pytest.fixture
def evaluate(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`evaluate("--samples", folder)` -> (exit code, stdout, stderr), with the judge and the statistics of `place`."""

    def run(*arguments: object, stats: bool = True) -> tuple[int, str, str]:
        given = ["--stats", str(place / "stats.safetensors")] if stats else []
        words = ["eval-sc09", "--judge", str(place / "judge"), *given, "--threads", "1", *map(str, arguments)]
        capsys.readouterr()
        return cli.run(words), *capsys.readouterr()

    return run


def write_clips(folder: Path, clips: list[np.ndarray], names: list[str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, clip in enumerate(clips):
        name = names[number] if names else f"{number}.wav"
        soundfile.write(folder / name, np.pad(clip, (0, RATE - len(clip))), RATE, subtype="PCM_16")
    return folder


def test_the_judge_learns_words_of_speakers_it_has_not_heard_and_its_card_says_how_well(place: Path) -> None:
    words = read_spoken_words(place / "words")
    test = words.select(words.where(split="test"))
    judged = DigitJudge(place / "judge").judge(test.one_second(np.arange(len(test))))
    right = (judged.heard == test.indices(DIGITS)).mean()
    assert right > 0.9
    card = (place / "judge" / "README.md").read_text()
    assert f"test, {len(test):,} clips: accuracy {right:.4f}" in card
    assert "Confusion, test" in card
    assert not {s for s, p in zip(words.speakers, words.splits, strict=True) if p == "train"} & set(test.speakers)


def test_training_goes_on_and_is_refused_for_other_data(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(place / "run")
    assert cli.run(["train-sc09-classifier", "--resume", run, "--steps", "92", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 92
    assert result["figures"]["test"]["rows"] == 40
    assert cli.run(["train-sc09-classifier", "--resume", run, "--steps", "93"]) == 0
    advice = capsys.readouterr().out.splitlines()[-1].split()  # use it  mambagen eval-sc09 ...
    clips = write_clips(place / "advised", [word(digit, 700) for digit in range(10)])
    words = [{"DATA": str(place / "words"), "CLIPS": str(clips)}.get(each, each) for each in advice[3:]]
    assert cli.run([*words, "--no-report", "--out", str(place / "as advised")]) == 0
    assert cli.run(["train-sc09-classifier", "--resume", run, "--batch", "8"]) == 2
    assert "--batch cannot change" in capsys.readouterr().err
    assert cli.run(["train-sc09-classifier"]) == 2
    write_words(place / "few", range(9), range(3))
    assert cli.run(["train-sc09-classifier", "--data", str(place / "few")]) == 3
    assert "no training clips of three, four" in capsys.readouterr().err


def test_real_clips_are_near_the_reference_and_what_was_asked_is_heard(place: Path, evaluate: Run) -> None:
    clips = [word(digit, 500 + n) for n in range(8) for digit in range(10)]
    names = [f"{DIGITS[i % 10]}_{i:03d}.wav" for i in range(80)]
    folder = write_clips(place / "good", clips, names)
    out = place / "good-judged"
    code, told, _ = evaluate("--samples", folder, "--out", out, "--protocol", "sashimi", "--json", "--shown", 1)
    assert code == 0
    result = json.loads(told)
    assert json.loads((out / "metrics.json").read_text()) == result
    assert result["clips"] == 80
    assert result["findings"] == []
    assert result["asked_right"] > 0.9
    figures = {name: interval["value"] for name, interval in result["figures"].items()}
    real = {row["name"]: row["figures"] for row in result["reference"]["rows"]}
    assert real["train data"]["FID"][0] == pytest.approx(0, abs=1e-6)
    assert figures["IS"] == pytest.approx(real["test data"]["IS"][0], rel=0.2)
    assert result["sashimi"]["fid"] == pytest.approx(figures["FID"])
    assert result["sashimi_threshold"]["count"] == 22
    rows = (out / "clips.tsv").read_text().splitlines()
    assert rows[0].split("\t") == ["clip", "asked", "heard", "probability", "is_digit", "log_likelihood"]
    assert len(rows) == 81

    noise = [0.1 * np.random.default_rng(n).normal(size=RATE) for n in range(80)]
    code, told, _ = evaluate("--samples", write_clips(place / "noise", noise), "--out", place / "n", "--no-report")
    assert code == 0
    assert "Nothing suspicious" not in told
    worse = json.loads((place / "n" / "metrics.json").read_text())
    assert worse["figures"]["FID"]["value"] > 3 * figures["FID"]
    assert not (place / "n" / "report.html").exists()


def test_of_a_few_clips_no_more_is_said_than_they_show(place: Path, evaluate: Run) -> None:
    folder = write_clips(place / "four", [word(digit, 800) for digit in range(4)])
    code, told, _ = evaluate("--samples", folder, "--out", place / "four-judged", "--no-report")
    assert code == 0
    assert "fewer than 20 clips do not tell whether all digits are in use" in told
    assert "They are too few to say what it is for infinitely many." in told
    assert "use all of them" not in told


def test_a_generator_that_says_one_digit_is_told_so(place: Path, evaluate: Run) -> None:
    folder = write_clips(place / "one", [word(7, 600 + n) for n in range(30)])
    code, told, _ = evaluate("--samples", folder, "--out", place / "one-judged", "--no-report", "-n", 25)
    assert code == 0
    assert "25" in told
    assert "of the clips are heard as 'seven'" in told


def test_each_file_that_is_not_as_expected_is_named_with_what_was_done(place: Path, evaluate: Run) -> None:
    folder = write_clips(place / "bad", [word(digit, 700) for digit in range(6)])
    (folder / "text.wav").write_text("this is no sound at all, whatever its name says\n" * 9)
    (folder / "empty.wav").touch()
    soundfile.write(folder / "stereo.wav", np.stack([word(1, 701, 1.0)] * 2, axis=1), RATE)
    soundfile.write(
        folder / "fast.wav",
        np.interp(np.arange(44_100), np.arange(0, 44_100, 44_100 / RATE), word(2, 702, 1.0)),
        44_100,
    )
    soundfile.write(folder / "short.wav", word(3, 703, 0.5), RATE)
    soundfile.write(folder / "long.flac", np.tile(word(4, 704, 1.0), 3), RATE)
    soundfile.write(folder / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(folder / "holes.wav", np.full(100, np.nan), RATE, subtype="FLOAT")
    (folder / "readme.txt").write_text("not looked at")
    code, told, _ = evaluate("--samples", folder, "--out", place / "bad-judged", "--json", "--shown", 1)
    assert code == 0
    result = json.loads(told)
    notes = {note["path"]: note["text"] for note in result["notes"]}
    assert notes == {
        "empty.wav": "left out: is empty (0 bytes)",
        "fast.wav": "resampled from 44,100 to 16,000 Hz",
        "holes.wav": "left out: 100 of 100 samples are NaN or infinite (the first in frame 0)",
        "long.flac": "too long: 3.00 s; the first second is used",
        "short.wav": "too short: 0.50 s; silence is put after it",
        "silent.wav": "silent: no sample is above -60 dBFS",
        "stereo.wav": "stereo: mixed to mono",
        "text.wav": "left out: is text, not audio",
    }
    assert (result["clips"], result["files"]) == (11, 14)
    page = (place / "bad-judged" / "report.html").read_text()
    assert all(name in page and text in page for name, text in notes.items())
    assert "Silent: 1 of 11 clips" in page

    code, _, err = evaluate("--samples", folder, "--out", place / "strict", "--strict", "--no-report")
    assert code == 3
    assert "8 of 14 files are not as expected, the first: empty.wav: left out" in err
    assert (place / "strict" / "metrics.json").exists()


def test_a_folder_that_holds_nothing_to_judge_is_refused(place: Path, tmp_path: Path, evaluate: Run) -> None:
    assert evaluate("--samples", tmp_path / "nowhere")[0] == 3
    code, _, err = evaluate("--samples", tmp_path)
    assert (code, "holds no sound files" in err) == (3, True)
    (tmp_path / "a.wav").touch()
    code, _, err = evaluate("--samples", tmp_path)
    assert (code, "none of its 1 files can be used" in err) == (3, True)
    write_clips(tmp_path, [word(1, 1)])
    code, _, err = evaluate("--samples", tmp_path, "--out", tmp_path / "o")
    assert (code, "one clip has no figures" in err) == (3, True)
    assert not (tmp_path / "o").exists()
    assert evaluate("somewhere", "--samples", tmp_path)[0] == 2
    assert evaluate("--samples", tmp_path, "--top-p", "2")[0] == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert evaluate("--samples", tmp_path, "--out", tmp_path / "full")[0] == 2


def test_features_are_kept_by_content_and_a_damaged_cache_only_costs_time(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MAMBAGEN_HOME", str(place / "another-home"))
    clips = np.stack([np.pad(word(n, 800), (0, RATE))[:RATE] for n in range(4)])
    judge = DigitJudge(place / "judge")
    first = judge.judge_cached(clips)
    asked: list[int] = []
    real = DigitJudge.judge
    monkeypatch.setattr(DigitJudge, "judge", lambda self, c, done=None: asked.append(len(c)) or real(self, c, done))
    again = judge.judge_cached(clips)
    assert asked == []
    np.testing.assert_array_equal(again.features, first.features)
    np.testing.assert_array_equal(again.log_p, first.log_p)
    judge.judge_cached(clips[::-1].copy())
    assert asked == [4]
    for file in (place / "another-home").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    np.testing.assert_array_equal(judge.judge_cached(clips).features, first.features)
    assert asked == [4, 4]
    assert "not used" in caplog.text


def test_statistics_belong_to_their_judge_and_are_checked(place: Path, tmp_path: Path, evaluate: Run) -> None:
    reference = load_reference(place / "stats.safetensors")
    words = read_spoken_words(place / "words")
    judged = DigitJudge(place / "judge").judge(words.one_second(words.where(split="train")))
    np.testing.assert_allclose(reference.moments.mean, judged.features.astype(float).mean(0), rtol=1e-6)
    np.testing.assert_allclose(
        reference.moments.covariance, np.cov(judged.features, rowvar=False), rtol=1e-4, atol=1e-9
    )
    assert (reference.facts.count, reference.facts.test_count) == (140, 40)
    assert (place / "stats.safetensors").stat().st_mode == (place / "judge.toml").stat().st_mode
    assert reference.facts.data_sha256 == words.select(words.where(split="train")).fingerprint()

    folder = write_clips(tmp_path / "c", [word(n, 900) for n in range(3)])
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((place / "stats.safetensors").read_bytes()[:-50])
    code, _, err = evaluate("--samples", folder, "--stats", broken, stats=False)
    assert (code, "damaged" in err) == (4, True)
    code, _, err = evaluate("--samples", folder, "--stats", tmp_path / "none", stats=False)
    assert (code, "make one with mambagen sc09-stats" in err) == (4, True)
    model, fields = load_model(place / "judge")
    with torch.no_grad():
        model.head.bias += 1
    save_model(model, tmp_path / "other", fields["tokenizer"], "another judge")
    code, _, err = evaluate("--samples", folder, "--judge", tmp_path / "other")
    assert (code, "another judge" in err) == (4, True)


@pytest.mark.parametrize("classes", [0, 10], ids=["plain", "conditional"])
def test_a_model_is_asked_for_clips_and_its_likelihood_of_real_ones_is_measured(
    classes: int, place: Path, evaluate: Run, tmp_path: Path
) -> None:
    config = AudioUNetConfig(d_model=8, n_layer=1, pool=(4,), outer="s4d", centre="s4d", ssm_state=4, classes=classes)
    model = AudioUNet(config, seed=0).eval()
    quantiser = MuLaw(rate=200, classes=DIGITS if classes else ())
    save_model(model, tmp_path / "model", quantiser.model_dump(mode="json"), "a model")
    arguments = ("--data", place / "words", "-n", 4, "--nll-clips", 5, "--out", tmp_path / "o", "--json", "--shown", 1)
    code, told, err = evaluate(tmp_path / "model", *arguments, stats=False)
    assert code == 0, err
    result = json.loads(told)
    assert result["clips"] == 4
    assert (result["asked_right"] is None) == (classes == 0)
    assert len(list((tmp_path / "o" / "samples").glob("*.wav"))) == 4
    assert soundfile.info(tmp_path / "o" / "samples" / "00003.wav").frames == RATE

    if classes:  # a model's own guidance is what its clips are made by
        files = model_writers(model, quantiser.model_dump(mode="json"), "a model", Generation(guidance=50.0))
        write_folder_atomically(tmp_path / "guided", files, unlisted=[CARD])
        sounds = []
        for name, more in (("guided", ()), ("model", ("--guidance", 50)), ("guided", ("--guidance", 1)), ("model", ())):
            out = tmp_path / f"o{len(sounds)}"
            assert evaluate(tmp_path / name, *arguments[:-4], out, *more, stats=False)[0] == 0
            sounds.append([file.read_bytes() for file in sorted((out / "samples").glob("*.wav"))])
        assert sounds[0] == sounds[1] != sounds[2] == sounds[3]
        assert "guidance 50" in (tmp_path / "o0" / "report.html").read_text()

    words = read_spoken_words(place / "words")
    test = words.select(words.where(split="test"))
    generator = Generator(tmp_path / "model", torch.device("cpu"))
    total = samples = 0.0
    for row in np.linspace(0, len(test) - 1, 5).astype(int).tolist():
        import soxr

        sound = soxr.resample(test.clip(row), RATE, 200, quality="HQ")
        sound = np.pad(sound, (0, 10))[: -(-len(test.clip(row)) * 200 // RATE)]
        tokens = torch.from_numpy(quantiser.encode(sound.astype(np.float32)))[None]
        asked = torch.tensor([DIGITS.index(test.labels[row])]) if classes else None
        with torch.no_grad():
            total += float(audio_loss(model, tokens, torch.tensor([tokens.shape[1]]), asked))
        samples += tokens.shape[1]
    assert result["nll"]["nats"] == pytest.approx(total / samples, rel=1e-4)
    assert result["nll"]["bits"] == pytest.approx(total / samples / np.log(2), rel=1e-4)
    assert result["nll"]["samples"] == samples
    assert result["nll"]["low"] < result["nll"]["nats"] < result["nll"]["high"] < result["nll"]["nats"] * 1.1

    code, told, _ = evaluate(tmp_path / "model", "-n", 2, "--no-report", "--out", tmp_path / "without")
    assert (code, "give some with --data" in told) == (0, True)

    from mambagen.pipelines.sc09_generation import Sampling

    few, more = (generator.make(count, 0, Sampling()) for count in (2, 9))
    written = [soundfile.read(tmp_path / "o" / "samples" / f"0000{n}.wav", dtype="int16")[0] for n in range(2)]
    np.testing.assert_array_equal(written, to_int16(few.samples))  # as generate-audio writes them
    np.testing.assert_array_equal(few.samples, more.samples[:2])
    np.testing.assert_allclose(few.log_likelihood, more.log_likelihood[:2], rtol=1e-5)


def test_a_full_disk_leaves_no_half_of_a_sample(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"00000\.wav"):
            write_samples(tmp_path / "samples", np.zeros((2, RATE), np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "samples").iterdir()) == []


def test_findings_tell_noise_collapse_copies_and_silence() -> None:
    random = np.random.default_rng(0)
    reference = Moments(np.zeros(5), np.eye(5), 1000)
    samples = random.uniform(-0.5, 0.5, size=(60, 100)).astype(np.float32)

    def judged(classes: np.ndarray, sure: float = 0.98, is_digit: float = 1.0, spread: float = 1.0) -> Judged:
        log_p = np.full((60, 10), np.log((1 - sure) / 9))
        log_p[np.arange(60), classes] = np.log(sure)
        features = spread * random.normal(size=(60, 5)).astype(np.float32)
        return Judged(features, log_p, np.full(60, is_digit, np.float32))

    even = np.arange(60) % 10

    def found(judgement: Judged, sounds: np.ndarray = samples) -> list[str]:
        return [text.split(":")[0] for text in find_faults(sounds, judgement, reference, DIGITS)]

    assert found(judged(even)) == []
    assert found(judged(even, is_digit=0.1)) == ["Noise or other sound"]
    assert found(judged(even, sure=0.3)) == ["Unclear"]
    assert found(judged(np.full(60, 3))) == ["Collapsed"]
    assert found(judged(even % 4)) == ["Collapsed"]
    assert found(judged(even, spread=0.2)) == ["All alike"]
    assert found(judged(even), np.repeat(samples[:30], 2, axis=0)) == ["Repeated"]
    assert found(judged(even), 1e-4 * samples) == ["Silent"]


def test_names_of_files_sort_naturally_and_tell_what_was_asked(tmp_path: Path) -> None:
    assert sorted(["10.wav", "9.wav", "a2.wav", "a10.wav"], key=natural) == ["9.wav", "10.wav", "a2.wav", "a10.wav"]
    assert [asked_digit(n) for n in ("seven_01.wav", "seven/01.wav", "07.wav", "one_two.wav", "x/Nine-3.flac")] == [
        7, 7, -1, -1, 9,
    ]  # fmt: skip
    assert asked_digit("phone.wav") == -1
    write_clips(tmp_path / ".hidden", [word(0, 0)])
    clips = read_generated(write_clips(tmp_path / "two", [word(n, 0) for n in range(12)]).parent, limit=3)
    assert clips.names == ("two/0.wav", "two/1.wav", "two/2.wav")
    assert summary(clips.notes) == []


@pytest.mark.skipif(chromium.browser() is None, reason="no Chromium here")
def test_the_page_plays_in_a_browser_and_asks_for_nothing(place: Path, evaluate: Run, tmp_path: Path) -> None:
    folder = write_clips(tmp_path / "clips", [word(n % 10, 950 + n) for n in range(20)])
    assert evaluate("--samples", folder, "--out", tmp_path / "o", "--shown", 1)[0] == 0
    script = """(async () => {
        const players = [...document.querySelectorAll('audio')], first = players[0];
        first.muted = true;
        await first.play();
        await new Promise(done => first.onended = done);
        return {
            played: first.currentTime, players: players.length,
            ready: players.filter(p => p.readyState > 0 && Math.abs(p.duration - 1) < 1e-3).length,
            pictures: [...document.images].filter(i => i.naturalWidth > 0).length, images: document.images.length,
        }
    })()"""
    try:
        with chromium.tab(tmp_path / "o" / "report.html", tmp_path / "profile") as page:
            seen = page.evaluate(script)
            asked = [url for url in page.requests if not url.startswith("data:")]
            errors = page.errors
    except (RuntimeError, TimeoutError) as error:
        pytest.skip(f"Chromium does not run here: {error}")
    assert seen["played"] == pytest.approx(1, abs=0.01)
    assert seen["players"] == seen["ready"] > 5
    assert seen["pictures"] == seen["images"] > seen["players"]
    assert len(asked) == 1
    assert errors == []


@pytest.mark.skipif("MAMBAGEN_DIGITS" not in os.environ, reason="MAMBAGEN_DIGITS names no real digits")
def test_halves_of_real_digits_are_near_one_another_by_the_built_in_judge() -> None:
    from mambagen.pipelines.sc09_metrics import frechet_distance, score

    words = read_spoken_words(os.environ["MAMBAGEN_DIGITS"])
    train = words.select(words.where(split="train", labels=DIGITS))
    judged = DigitJudge().judge_cached(train.one_second(np.arange(len(train))))
    order = np.random.default_rng(0).permutation(len(train))
    one, other = judged.rows(order[::2]), judged.rows(order[1::2])
    mean = np.exp(one.log_p).mean(0)
    moments = Moments.of(one.features)
    scores = score(other.features, other.log_p, moments, mean)
    noise = 0.1 * np.random.default_rng(0).normal(size=(200, RATE)).astype(np.float32)
    heard = DigitJudge().judge(noise)
    far = frechet_distance(moments, Moments.of(heard.features))
    assert scores.fid.value < 0.05 * far
    assert scores.inception.value > 7
    assert any(text.startswith(("Noise", "Unclear")) for text in find_faults(noise, heard, moments, DIGITS))


def test_the_built_in_judge_comes_whole_and_small_with_its_statistics_and_does_not_hear_digits_in_noise() -> None:
    folder = find_model("digit-judge")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 16_000_000
    judge = DigitJudge()
    assert judge.digits == DIGITS
    reference = shipped_reference(judge)
    assert reference.facts.digits == DIGITS
    assert reference.moments.mean.shape == (judge.model.config.feature_size,)
    assert np.linalg.eigvalsh(reference.moments.covariance).min() > -1e-6
    assert reference.mean_prediction.sum() == pytest.approx(1)
    card = (folder / "README.md").read_text()
    assert "Confusion, test" in card
    assert "CC BY-SA 4.0" in card
    random = np.random.default_rng(0)
    noise = (0.1 * random.normal(size=(40, RATE))).astype(np.float32)
    hum = np.sin(2 * np.pi * 100 * np.arange(RATE) / RATE + random.uniform(0, 6, (10, 1))).astype(np.float32)
    assert (judge.judge(noise).is_digit < 0.5).all()
    assert (judge.judge(0.3 * hum).is_digit < 0.5).mean() > 0.8
    told = list(find_faults(noise, judge.judge(noise), reference.moments, DIGITS))
    assert told[0].startswith("Noise or other sound: the judge takes 40 of 40 clips")


def test_batches_on_several_cores_give_the_same_in_the_same_order() -> None:
    clips = np.stack([np.pad(word(n % 10, n), (0, RATE))[:RATE] for n in range(13)])
    judge = DigitJudge(device="cpu", batch=4)
    before = torch.get_num_threads()
    told: list[int] = []
    try:
        torch.set_num_threads(2)
        many = judge.judge(clips, told.append)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        one = judge.judge(clips)
    finally:
        torch.set_num_threads(before)
    assert told == [4, 8, 12, 13]
    np.testing.assert_allclose(many.features, one.features, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(many.log_p, one.log_p, rtol=1e-4, atol=1e-5)
    assert len(judge.judge(clips[:0])) == 0
