"""Making sound: clips, prompts, streams, seeds, the guard, and what can go wrong."""

import io
import json
import math
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import mambagen
from mambagen import cli
from mambagen.data.quantise import SILENCE, MuLaw
from mambagen.data.spoken_words import DIGITS
from mambagen.data.wav import to_int16, wav_header
from mambagen.errors import InputError, ModelError, UsageError
from mambagen.models.audio_stepper import Stepper
from mambagen.models.audio_unet import AudioUNet, AudioUNetConfig
from mambagen.models.files import write_folder_atomically
from mambagen.models.saving import CARD, Generation, model_writers, save_model
from mambagen.pipelines import generate_audio
from mambagen.pipelines.audio_output import file_name, write_audio_page
from mambagen.pipelines.generate_audio import AudioVoice, GenerateAudioConfig, MadeClip, stream_seed
from mambagen.pipelines.sc09_judge import DigitJudge
from tests.forks import fork

RATE = 16_000
SHORT = 600 / RATE  # seconds

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional model of the digits that was never trained: its sound is noise."""
    model = AudioUNet(AudioUNetConfig(d_model=8, n_layer=1, pool=(2, 2), classes=10), seed=0)
    with torch.no_grad():
        assert model.class_embedding is not None
        model.class_embedding.weight.mul_(10)  # so that classes differ without training
    place = tmp_path_factory.mktemp("models") / "noise"
    save_model(model, place, MuLaw(classes=DIGITS).model_dump(mode="json"), "A test.")
    return place


@pytest.fixture(scope="module")
def voice(folder: Path) -> AudioVoice:
    return AudioVoice(folder, "cpu", precision="float32")


@pytest.fixture
def command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]):
    """`command("-n", 2)` -> (exit code, stdout, stderr) of generate-audio with that model, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, guard: bool = False, model: object = folder) -> tuple[int, bytes, str]:
        options = ["--device", "cpu", *([] if guard else ["--no-guard"])]
        code = cli.run(["generate-audio", str(model), *options, *map(str, arguments)])
        sys.stdout.flush()
        out, err = capfdbinary.readouterr()
        return code, out, err.decode()

    return run


def made(voice: AudioVoice, **settings: object) -> list[MadeClip]:
    return list(voice.clips(GenerateAudioConfig(**{"seconds": SHORT, "guard": False, **settings})))  # type: ignore[arg-type]


def test_a_clip_depends_on_its_number_and_the_seed_alone(voice: AudioVoice) -> None:
    three = made(voice, count=3, classes=("1", "2", "3"), seed=7)
    assert [clip.label for clip in three] == ["one", "two", "three"]
    one_by_one = made(voice, count=3, classes=("1", "2", "3"), seed=7, at_once=1)
    for a, b in zip(three, one_by_one, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert (a.seed, a.nats) == (b.seed, b.nats)
    np.testing.assert_array_equal(made(voice, count=1, classes=("1",), seed=7)[0].tokens, three[0].tokens)
    assert not np.array_equal(made(voice, classes=("1",), seed=8)[0].tokens, three[0].tokens)
    assert len({stream_seed(s, i, c, a) for s in range(3) for i in range(3) for c in range(3) for a in range(3)}) == 81


def test_a_model_of_sound_loads_with_its_quantiser(folder: Path) -> None:
    model, quantiser = mambagen.load(folder)
    assert isinstance(model, AudioUNet)
    assert quantiser == MuLaw(classes=DIGITS)


def test_progress_tells_clips_seconds_and_the_speed_against_real_time(voice: AudioVoice) -> None:
    told: list[str] = []
    config = GenerateAudioConfig(seconds=0.5, count=2, guard=False)
    assert len(list(voice.clips(config, show=told.append))) == 2
    assert [line.split(", ")[:2] for line in told] == [
        ["0 of 2 clips", "0.50 of 1.00 s"], ["0 of 2 clips", "1.00 of 1.00 s"], ["2 of 2 clips", "1.00 of 1.00 s"],
    ]  # fmt: skip
    assert all(line.endswith(" x real time") and float(line.split(", ")[2].split()[0]) > 0 for line in told)


def test_classes_are_taken_in_turn_or_drawn_by_the_seed(voice: AudioVoice) -> None:
    def labels(**settings: object) -> list[str]:
        return [label for label, _ in voice.plan(GenerateAudioConfig(**settings))]  # type: ignore[arg-type]

    assert labels(count=4, classes=("7", "zero")) == ["seven", "zero", "seven", "zero"]
    assert labels(count=2, classes=("none",)) == ["", ""]
    drawn = labels(count=200, seed=1)
    assert set(drawn) == set(DIGITS)
    assert drawn[:50] == labels(count=50, seed=1)
    assert drawn != labels(count=200, seed=2)
    with pytest.raises(UsageError, match="--digit 12: this model knows zero, one"):
        labels(classes=("12",))
    different = made(voice, count=2, classes=("1", "2"), temperature=0)
    assert not np.array_equal(different[0].tokens, different[1].tokens)


def test_likelihood_is_that_of_the_model_step_by_step(voice: AudioVoice, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = np.random.default_rng(0).integers(0, 256, 37).astype(np.uint8)
    tokens = np.random.default_rng(1).integers(0, 256, 50).astype(np.uint8)
    state = voice.model.allocate_state(1)
    classes, total, token = torch.tensor([4]), 0.0, torch.tensor([SILENCE])
    with torch.no_grad():
        for place, wanted in enumerate([*prompt.tolist(), *tokens.tolist()]):
            logits, state = voice.model.step(token, state, classes)
            if place >= len(prompt):
                total += float(logits[0].double().log_softmax(-1)[wanted])
            token = torch.tensor([wanted])
    assert voice.log_likelihood(prompt, tokens, 4) == pytest.approx(total, abs=1e-3)
    monkeypatch.setattr(generate_audio, "SCORED", 16)
    assert voice.log_likelihood(prompt, tokens, 4) == pytest.approx(total, abs=1e-3)
    clip = made(voice, classes=("4",))[0]
    assert clip.nats == pytest.approx(-voice.log_likelihood(clip.tokens[:0], clip.tokens, 4) / len(clip.tokens))


def test_a_prompt_comes_back_unchanged_and_is_heard(voice: AudioVoice, tmp_path: Path) -> None:
    whole = (3000 * np.sin(np.arange(500) * 0.1)).astype(np.int16)
    soundfile.write(tmp_path / "prompt.wav", whole, RATE)
    clip = made(voice, prompt=str(tmp_path / "prompt.wav"), classes=("5",), temperature=0)[0]
    np.testing.assert_array_equal(clip.samples[:500], whole)
    assert (clip.prompt_samples, len(clip.samples), len(clip.tokens)) == (500, 1100, 600)
    state, classes = voice.model.allocate_state(1), torch.tensor([5])
    fed = [SILENCE, *MuLaw().encode(whole / 32768).tolist()]
    with torch.no_grad():
        for token in fed:  # one by one, where generation hears the prompt at once
            logits, state = voice.model.step(torch.tensor([token]), state, classes)
        drawn = []
        for _ in range(100):
            drawn.append(int(logits[0].argmax()))
            logits, state = voice.model.step(torch.tensor([drawn[-1]]), state, classes)
    assert clip.tokens[:100].tolist() == drawn


def test_of_candidates_the_best_is_kept(voice: AudioVoice) -> None:
    best = made(voice, classes=("3",), candidates=4)[0]
    alone = [voice._draw(voice._begin([s], s.tokens), 600, [s.seed], GenerateAudioConfig())[0] for s in [
        generate_audio._Stream(0, k, "three", 3, stream_seed(0, 0, k)) for k in range(4)
    ]]  # fmt: skip
    nats = [-voice.log_likelihood(best.tokens[:0], tokens, 3) / 600 for tokens in alone]
    assert best.nats == pytest.approx(min(nats))
    np.testing.assert_array_equal(best.tokens, alone[int(np.argmin(nats))])
    plain = made(voice, classes=("3",), candidates=3, rank="class")[0]
    each = np.array([voice.log_likelihood(plain.tokens[:0], plain.tokens, k) for k in range(10)])
    assert plain.confidence == pytest.approx(math.exp(each[3] - np.logaddexp.reduce(each)), rel=1e-6)


def test_the_guard_goes_back_and_draws_anew(voice: AudioVoice, monkeypatch: pytest.MonkeyPatch) -> None:
    tone = MuLaw().encode(0.3 * np.sin(np.arange(40_000) * 0.2))
    noise = np.random.default_rng(0).integers(0, 256, 40_000).astype(np.uint8)
    first = {stream_seed(0, 0), stream_seed(0, 1)}
    heard: list[int] = []

    def draw(stepper: object, steps: int, seeds: list[int], config: object) -> np.ndarray:
        heard.append(steps)
        rows = [noise if seed == stream_seed(0, 1) and sum(heard) > 8000 else tone for seed in seeds]
        return np.stack([row[:steps] for row in rows])

    read: list[int] = []
    prefill = Stepper.prefill

    def reading(self: Stepper, tokens: torch.Tensor | None = None, classes: object = None) -> torch.Tensor:
        if tokens is not None:
            read.append(tokens.shape[1])
        return prefill(self, tokens, classes)  # type: ignore[arg-type]

    monkeypatch.setattr(voice, "_draw", draw)
    monkeypatch.setattr(Stepper, "prefill", reading)
    said: list[str] = []
    clips = list(voice.clips(GenerateAudioConfig(seconds=1.0, count=2, classes=("1",)), warn=said.append))
    assert [clip.takes for clip in clips] == [1, 2]
    assert said == []
    assert clips[1].fault is None
    kept = 4000  # noticed at 0.75 s: the window and a tenth of a second are dropped, and what begins a window before
    assert read == [kept]
    assert {clip.seed for clip in clips} == first
    assert len(clips[1].tokens) == RATE
    np.testing.assert_array_equal(clips[1].tokens[kept:][:4000], tone[:4000])


def test_clips_that_ran_away_are_mended_together_as_each_alone(
    voice: AudioVoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(tokens: np.ndarray, finished: bool, prompt: np.ndarray) -> str | None:
        return "noise" if int(tokens[-4000:].astype(int).sum()) % 5 < 2 else None

    steppers: list[int] = []

    class Counted(Stepper):
        def __init__(self, model: AudioUNet, batch: int, *options: str) -> None:
            steppers.append(batch)
            super().__init__(model, batch, *options)

    monkeypatch.setattr(voice, "_fault", fault)
    monkeypatch.setattr(generate_audio, "Stepper", Counted)
    config = GenerateAudioConfig(seconds=0.75, count=8, seed=1, at_once=8)
    together = list(voice.clips(config, warn=lambda line: None))
    assert max(clip.takes for clip in together) > 2
    assert {clip.takes for clip in together} != {5}
    runaways = sum(clip.takes > 1 for clip in together)
    assert steppers[:2] == [8, runaways]
    assert sum(steppers[2:]) == sum(clip.takes - 1 for clip in together)
    assert len(steppers[2:]) <= 4 * 2  # kept are 0 or 4000 samples: two groups at each of the four tries
    alone = list(voice.clips(config.model_copy(update={"at_once": 1}), warn=lambda line: None))
    for one, other in zip(together, alone, strict=True):
        assert (one.takes, one.fault) == (other.takes, other.fault)
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert len(one.tokens) == 12_000


def test_many_clips_are_scored_at_once_as_each_alone(voice: AudioVoice) -> None:
    clips = made(voice, count=5)
    found = voice._whole(np.stack([clip.tokens for clip in clips]), [DIGITS.index(clip.label) for clip in clips])
    np.testing.assert_allclose([-nats / len(clips[0].tokens) for nats in found], [c.nats for c in clips], rtol=1e-5)


def test_the_guard_gives_up_after_some_tries_and_says_so(command: Command, tmp_path: Path) -> None:
    code, out, err = command("--seconds", 0.3, "--out", "clips", "--digit", "1", guard=True)
    assert code == 0
    assert "clip 1: noise came back 4 times" in err
    assert out.decode().splitlines()[1].split("\t")[-1] == "5"
    assert soundfile.info(tmp_path / "clips" / "0001-one.wav").frames == 4800


def test_clips_go_to_a_folder_with_a_row_each(command: Command, tmp_path: Path) -> None:
    code, out, err = command("-n", 3, "--digit", "7,zero", "--seconds", SHORT, "--out", "clips")
    assert (code, err) == (0, "")
    header, *rows = [line.split("\t") for line in out.decode().splitlines()]
    assert header == ["file", "class", "seconds", "seed", "bits_per_byte", "takes"]
    assert [row[0] for row in rows] == [f"clips/{name}.wav" for name in ("0001-seven", "0002-zero", "0003-seven")]
    assert [row[1] for row in rows] == ["seven", "zero", "seven"]
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == [Path(row[0]).name for row in rows]
    for row in rows:
        info = soundfile.info(row[0])
        assert (info.frames, info.samplerate, info.subtype, info.channels) == (600, RATE, "PCM_16", 1)
    code, out, _ = command("--digit", "7", "--seconds", SHORT, "--out", "one.wav", "--json")
    assert json.loads(out)["file"] == "one.wav"
    assert Path("one.wav").read_bytes() == Path("clips/0001-seven.wav").read_bytes()
    code, _, err = command("--seconds", SHORT, "--out", "clips")
    assert code == 2
    assert "clips: exists already" in err


def test_where_nothing_can_be_written_nothing_is_made(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said at once, not after an hour of sound; and a prompt that is none leaves no empty folder."""
    monkeypatch.setattr(AudioVoice, "clips", lambda *_: pytest.fail("clips were made"))
    (tmp_path / "file").write_text("")
    for out in ("none/one.wav", "file/clips", "/proc/clips"):
        code, _, err = command("--out", out)
        assert (code, err.count("\n")) == (5, 1)
        assert f"{Path(out).parent if out.endswith('.wav') else out}: cannot be written: " in err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert command("--prompt", "file", "--out", "clips")[0] == 3
    assert os.listdir(tmp_path) == ["file"]


def test_a_stream_holds_the_same_sound_as_the_files(command: Command, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "prompt.wav", 0.1 * np.sin(np.arange(300) * 0.1), RATE)
    arguments = ("-n", 2, "--digit", "7,0", "--seconds", 0.05, "--prompt", "prompt.wav", "--seed", 3)
    assert command(*arguments, "--out", "clips")[0] == 0
    files = [soundfile.read(path, dtype="int16")[0] for path in sorted((tmp_path / "clips").iterdir())]
    code, out, err = command(*arguments, "--out", "-")
    assert (code, err) == (0, "")
    samples, rate = soundfile.read(io.BytesIO(out), dtype="int16")
    assert rate == RATE
    np.testing.assert_array_equal(samples, np.concatenate(files))
    code, raw, _ = command(*arguments, "--out", "-", "--format", "s16le")
    assert raw == np.concatenate(files).astype("<i2").tobytes()


def test_the_first_block_of_a_stream_is_short(voice: AudioVoice) -> None:
    blocks: list[int] = []
    config = GenerateAudioConfig(seconds=0.2, guard=False)
    voice.stream(config, lambda samples: blocks.append(len(samples)))
    assert blocks == [320, 640, 1280, 960]


def test_a_stream_that_runs_away_goes_on_from_before(voice: AudioVoice, monkeypatch: pytest.MonkeyPatch) -> None:
    tone = MuLaw().encode(0.3 * np.sin(np.arange(40_000) * 0.2))
    noise = np.random.default_rng(0).integers(0, 256, 40_000).astype(np.uint8)
    calls: list[tuple[int, int]] = []

    def draw(stepper: object, steps: int, seeds: list[int], config: object) -> np.ndarray:
        calls.append((steps, seeds[0]))
        return (noise if seeds[0] == stream_seed(0, 0) and len(calls) > 6 else tone)[None, :steps]

    monkeypatch.setattr(voice, "_draw", draw)
    written: list[np.ndarray] = []
    back = voice.stream(GenerateAudioConfig(seconds=1.5), written.append)
    assert back == 1
    assert sum(map(len, written)) == round(1.5 * RATE)
    assert [seed for _, seed in calls][-1] == stream_seed(0, 0, 0, 1)


def test_a_stream_of_hours_takes_no_longer_for_each_second(voice: AudioVoice, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guard looks at is bounded, and silence late in a long stream is noticed as in a short one."""
    tone = MuLaw().encode(0.3 * np.sin(np.arange(4000) * 0.2))
    silence = np.full(4000, 128, np.uint8)
    drawn, looked = 0, []

    def draw(stepper: object, steps: int, seeds: list[int], config: object) -> np.ndarray:
        nonlocal drawn
        drawn += steps
        return (silence if drawn > 20 * RATE and seeds[0] == stream_seed(0, 0) else tone)[None, :steps]

    fault = voice.guard.fault
    monkeypatch.setattr(voice, "_draw", draw)
    monkeypatch.setattr(
        type(voice.guard),
        "fault",
        lambda guard, samples, begun=False: looked.append(len(samples)) or fault(samples, begun),
    )
    written: list[np.ndarray] = []
    assert voice.stream(GenerateAudioConfig(seconds=30), written.append) == 1
    assert sum(map(len, written)) == 30 * RATE
    quiet = [i for i, block in enumerate(written) if np.abs(block).max() < 50]
    assert 3 * RATE <= sum(len(written[i]) for i in quiet) < 3.5 * RATE
    assert max(looked) == voice.guard.memory < 4 * RATE


def test_a_wav_s_header_is_the_standard_one() -> None:
    samples = to_int16([0.0, 0.5, -1.0, 1.0, 2.0, -7.0])
    assert samples.tolist() == [0, 16384, -32768, 32767, 32767, -32768]
    content = wav_header(6, 22_050) + samples.astype("<i2").tobytes()
    again, rate = soundfile.read(io.BytesIO(content), dtype="int16")
    assert (again.tolist(), rate) == (samples.tolist(), 22_050)
    assert struct.unpack_from("<I", content, 4)[0] == len(content) - 8


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.wav", None, "cannot be read: No such file"),
        ("empty.wav", b"", "is empty"),
        ("text.wav", b"hello\n" * 50, "is text, not audio"),
        ("cut.wav", wav_header(100, RATE)[:20], "header is cut off"),
        ("zero.wav", wav_header(0, RATE), "holds no samples"),
        (".", None, "is a folder"),
    ],
    ids=["missing", "empty", "text", "cut", "zero", "folder"],
)
@pytest.mark.parametrize("out", ["clips", "-"])
def test_a_prompt_that_cannot_be_used_is_one_line(
    command: Command, tmp_path: Path, name: str, content: bytes | None, said: str, out: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, stdout, err = command("--prompt", name, "--out", out)
    assert code == 3
    assert err.count("\n") == 1
    assert said in err
    assert stdout == b""
    assert not list(tmp_path.glob("clips/*"))


def test_nan_and_long_prompts_are_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, voice: AudioVoice
) -> None:
    sound = np.full(800, 0.1)
    sound[3] = math.nan
    soundfile.write(tmp_path / "nan.wav", sound, RATE, subtype="FLOAT")
    code, _, err = command("--prompt", "nan.wav", "--out", "clips")
    assert code == 3
    assert "1 of 800 samples are NaN" in err
    code, _, err = command("--prompt", "nan.wav", "--fix-nan", "--seconds", SHORT, "--out", "fixed")
    assert code == 0
    assert "nan.wav: 1 of 800 samples were NaN or infinite: set to 0" in err
    monkeypatch.setattr(generate_audio, "PROMPT_LIMIT", 0.04)
    with pytest.raises(InputError, match=r"is 0\.1 s long; the limit is 0\.04 s"):
        made(voice, prompt=str(tmp_path / "nan.wav"))


def test_odd_prompts_are_warned_of(command: Command, tmp_path: Path) -> None:
    both = 0.1 * np.random.default_rng(0).normal(size=(400, 2))
    soundfile.write(tmp_path / "odd.wav", both, 8000)
    content = (tmp_path / "odd.wav").read_bytes()
    (tmp_path / "odd.wav").write_bytes(content[:-400])
    code, _, err = command("--prompt", "odd.wav", "--seconds", SHORT, "--out", "clips")
    assert code == 0
    assert [line.split("odd.wav: ")[1] for line in err.splitlines()] == [
        "truncated: 400 frames are promised, 300 are there; using those",
        "stereo: mixed to mono",
        "resampled from 8,000 to 16,000 Hz",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--seconds", "0"), "--seconds is 0.0: Input should be greater than 0"),
        (("--count", "0"), "-n is 0"),
        (("--top-p", "1.5"), "--top-p is 1.5"),
        (("--digit", "eleven"), "--digit eleven: this model knows zero"),
        (("--digit", ","), "--digit needs a digit"),
        (("--out", "-", "--candidates", "2"), "need --out DIR"),
        (("--out", "-", "--play-report"), "need --out DIR"),
        (("--out", "a.wav", "-n", "2"), "is one file"),
        (("--rank", "class", "--digit", "none"), "cannot be ranked"),
        (("--rank", "class", "--digit", "7"), "--candidates"),
        (("--device", "tpu"), "--device tpu"),
    ],
    ids=["seconds", "count", "top-p", "digit", "no-digit", "rank", "page", "one", "rank-none", "rank-one", "device"],
)
def test_options_that_cannot_be_are_one_line(command: Command, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, b"")
    assert said in err
    assert err.count("\n") == 1


def test_other_models_are_refused(command: Command, tmp_path: Path, folder: Path) -> None:
    code, _, err = command(model="nowhere")
    assert code == 4
    assert "nowhere: no such model folder" in err
    plain = AudioUNet(AudioUNetConfig(d_model=8, n_layer=1, pool=(2, 2)), seed=0)
    save_model(plain, tmp_path / "plain", MuLaw().model_dump(mode="json"), "A test.")
    for arguments in (("--digit", "1"), ("--guidance", "2"), ("--rank", "class", "--candidates", "2")):
        code, _, err = command(*arguments, model=tmp_path / "plain")
        assert code == 2
        assert "without" in err


def test_a_model_may_bring_its_own_guidance(voice: AudioVoice, folder: Path, tmp_path: Path) -> None:
    card, quantiser = "A test.", MuLaw(classes=DIGITS).model_dump(mode="json")
    files = model_writers(voice.model, quantiser, card, Generation(guidance=3.0))
    write_folder_atomically(tmp_path / "guided", files, unlisted=[CARD])
    guided = AudioVoice(tmp_path / "guided", "cpu", precision="float32")

    def tokens(voice: AudioVoice, **settings: object) -> list[list[int]]:
        return [clip.tokens.tolist() for clip in made(voice, count=2, classes=("4",), **settings)]

    assert tokens(guided) == tokens(voice, guidance=3) != tokens(voice)
    assert tokens(guided, guidance=1) == tokens(voice)
    assert AudioVoice("digits", "cpu").guidance == 2
    wrong = model_writers(voice.model, quantiser, card, Generation.model_construct(guidance=-3.0))
    write_folder_atomically(tmp_path / "wrong", wrong, unlisted=[CARD])
    with pytest.raises(ModelError, match=r"config.json: generation.guidance"):
        AudioVoice(tmp_path / "wrong", "cpu")


def test_the_built_in_model_says_what_it_is_asked_for() -> None:
    """Two clips of each digit; nine of ten are heard as asked, so fewer than 14 of 20 come once in a hundred draws."""
    made = list(AudioVoice("digits", "cpu").clips(GenerateAudioConfig(count=20, classes=DIGITS, seed=1)))
    judged = DigitJudge("digit-judge", "cpu").judge(np.stack([clip.samples / np.float32(32768) for clip in made]))
    assert [clip.label for clip in made] == [*DIGITS, *DIGITS]
    assert sum(DIGITS[int(heard)] == clip.label for heard, clip in zip(judged.heard, made, strict=True)) >= 14


def test_a_full_disk_leaves_no_half_file(command: Command, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # the second half of a file of 4,844 bytes fails
    try:
        code, _, err = command("--seconds", 0.15, "--digit", "1", "--out", "clips")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 5
    assert err.count("\n") == 1
    assert "clips/0001-one.wav: File too large; " in err
    assert list(tmp_path.iterdir()) == []


def generate_into(folder: Path, sink: str, stderr: Path) -> None:
    """In a process of its own: a stream to a full disk, or to a pipe that nobody reads any more."""
    read, write = os.pipe()
    if sink == "full":
        write = os.open("/dev/full", os.O_WRONLY)
    os.close(read)
    os.dup2(write, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (the process ends with it)
    sys.stderr = open(stderr, "w", buffering=1)  # noqa: SIM115
    options = ["--seconds", "0.05", "--no-guard", "--device", "cpu", "--out", "-"]
    os._exit(cli.run(["generate-audio", str(folder), *options]))  # multiprocessing would flush stdout once more


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize(("sink", "code", "said"), [("full", 5, "No space left on device"), ("closed", 141, "")])
def test_a_stream_that_cannot_be_written_ends_in_a_line_or_quietly(
    folder: Path, tmp_path: Path, sink: str, code: int, said: str
) -> None:
    process = fork(generate_into, folder, sink, tmp_path / "stderr")
    process.start()
    process.join(300)
    assert process.exitcode == code
    text = (tmp_path / "stderr").read_text()
    assert said in text
    assert text.count("\n") == bool(said)


@pytest.fixture(scope="module")
def page(voice: AudioVoice, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 clips of a second: decaying noise, about the worst there is for FLAC."""
    rng = np.random.default_rng(0)
    clips = []
    for i in range(64):
        samples = to_int16(rng.normal(0, 0.2, RATE) * np.exp(-np.arange(RATE) / 6000))
        clip = MadeClip(i, MuLaw().encode(samples / 32768), samples, RATE, DIGITS[i % 10], i, 1.5)
        clips.append((file_name(clip, 64), clip))
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_audio_page(path, voice, GenerateAudioConfig(count=64), clips)
    return path


def test_64_clips_fit_on_a_page_of_15_megabytes(page: Path) -> None:
    text = page.read_text()
    assert page.stat().st_size < 15e6
    assert text.count("<audio") == 64
    assert "0064-three.wav, three, 2.16 bits a byte" in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text


PROBE = """<script>(async () => {
const players = [...document.querySelectorAll("audio")];
for (let i = 0; i < 2000; i++) {
  await new Promise(go => setTimeout(go, 100));
  const loaded = players.filter(a => a.readyState >= 1 && Math.abs(a.duration - 1) < 0.01).length;
  const seen = [...document.querySelectorAll("img")].filter(i => i.naturalWidth > 0).length;
  document.title = `loaded ${loaded} of ${players.length}, pictures ${seen}`;
  if (loaded == players.length) break;
}})();</script></body>"""


def test_the_page_plays_in_a_browser(page: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed here (Debian: apt-get install chromium)")
    policy = "default-src 'none';"
    text = page.read_text()
    assert text.count(policy) == 1  # the page runs no script and asks for nothing; the probe's own is let in here
    probe = tmp_path / "probe.html"
    probe.write_text(text.replace(policy, f"{policy} script-src 'unsafe-inline';").replace("</body>", PROBE))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=300000", "--dump-dom"]
    run = subprocess.run(
        [chromium, *flags, f"--user-data-dir={tmp_path / 'profile'}", probe.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "<title>loaded 64 of 64, pictures 64</title>" in run.stdout
