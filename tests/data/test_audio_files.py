"""Audio files of every kind, whole, odd and damaged."""

import contextlib
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from mambagen.data.audio_files import audio_info, clipped_samples, read_audio, resample
from mambagen.data.audio_shards import prepare_shards
from mambagen.data.audio_sources import find_clips
from mambagen.data.generated_clips import read_generated
from mambagen.errors import InputError

RATE = 16_000
Sound = NDArray[np.float64]


def tone(seconds: float = 0.5, rate: int = RATE, hertz: float = 440.0, loud: float = 0.4) -> Sound:
    return loud * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, samples: Sound, rate: int = RATE, subtype: str | None = None) -> Path:
        path = tmp_path / name
        soundfile.write(path, samples, rate, subtype=subtype)
        return path

    return make


def kinds(path: Path, **options: object) -> list[str]:
    return [warning.kind for warning in read_audio(path, **options).warnings]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "subtype", "bits"),
    [
        ("a.wav", "PCM_U8", 7),
        ("a.wav", "PCM_16", 15),
        ("a.wav", "PCM_24", 23),
        ("a.wav", "PCM_32", 23),
        ("a.wav", "FLOAT", 23),
        ("a.wav", "DOUBLE", 23),
        ("a.flac", "PCM_16", 15),
        ("a.flac", "PCM_24", 23),
        ("a.aiff", "PCM_16", 15),
    ],
)
def test_lossless_formats_come_back_to_their_own_precision(
    write: Callable[..., Path], name: str, subtype: str, bits: int
) -> None:
    sound = tone()
    clip = read_audio(write(name, sound, subtype=subtype))
    assert clip.rate == RATE
    assert clip.samples.dtype == np.float32
    assert clip.samples.shape == sound.shape
    assert clip.warnings == ()
    assert np.abs(clip.samples - sound).max() <= 1.01 * 2.0**-bits + 1e-7


@pytest.mark.parametrize(("name", "db"), [("a.ogg", 20), ("a.mp3", 20)])
def test_lossy_formats_sound_the_same(write: Callable[..., Path], name: str, db: float) -> None:
    sound = tone(1.0)
    clip = read_audio(write(name, sound))
    assert abs(len(clip.samples) - len(sound)) <= 1152
    n = min(len(sound), len(clip.samples))
    spectrum = np.abs(np.fft.rfft(clip.samples[:n] * np.hanning(n)))
    assert np.fft.rfftfreq(n, 1 / RATE)[spectrum.argmax()] == pytest.approx(440, abs=2)
    tail = slice(2000, n - 2000)
    assert np.sqrt(np.mean(clip.samples[tail] ** 2)) == pytest.approx(0.4 / np.sqrt(2), rel=0.05)


def test_sixteen_bits_are_kept_exactly(write: Callable[..., Path]) -> None:
    whole = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)
    path = write("a.wav", whole / 32768, subtype="PCM_16")
    np.testing.assert_array_equal(np.round(read_audio(path).samples * 32768).astype(int), whole)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_another_rate_is_resampled_and_both_are_named(write: Callable[..., Path], rate: int) -> None:
    clip = read_audio(write("a.wav", tone(1.0, rate, 1000), rate))
    assert [str(w) for w in clip.warnings] == [f"resampled from {rate:,} to 16,000 Hz"]
    assert len(clip.samples) == RATE
    inner = slice(1600, -1600)
    assert np.abs(clip.samples - tone(1.0, RATE, 1000))[inner].max() < 2e-3


def test_what_the_new_rate_cannot_hold_is_filtered_out() -> None:
    out = resample(tone(1.0, 48_000, 11_000, 0.5).astype(np.float32), 48_000, RATE)
    assert np.abs(out[1600:-1600]).max() < 1e-3


def test_stereo_is_averaged(write: Callable[..., Path]) -> None:
    both = np.stack([tone(hertz=400), tone(hertz=900)], axis=1)
    clip = read_audio(write("a.wav", both, subtype="FLOAT"))
    assert [str(w) for w in clip.warnings] == ["stereo: mixed to mono"]
    np.testing.assert_allclose(clip.samples, both.mean(axis=1), atol=1e-6)


def test_opposite_channels_are_noticed_and_one_is_taken(write: Callable[..., Path]) -> None:
    sound = tone()
    clip = read_audio(write("a.wav", np.stack([sound, -0.9 * sound], axis=1), subtype="FLOAT"))
    assert [w.kind for w in clip.warnings] == ["anti-phase"]
    assert "channel 1 of 2" in str(clip.warnings[0])
    np.testing.assert_allclose(clip.samples, sound, atol=1e-6)
    six = np.random.default_rng(0).normal(0, 0.1, (8000, 6))
    assert kinds(write("six.wav", six)) == ["stereo"]  # without relation is not opposite
    assert kinds(write("left.wav", np.stack([sound, 0 * sound], axis=1))) == ["stereo"]


def test_clipped_and_silent_are_warned_of(write: Callable[..., Path]) -> None:
    loud = (3 * tone()).clip(-1, 1)
    clip = read_audio(write("loud.wav", loud))
    assert [w.kind for w in clip.warnings] == ["clipped"]
    assert f"{np.sum(np.abs(loud) >= 1):,} samples" in str(clip.warnings[0])
    assert kinds(write("peak.wav", tone(loud=0.9999))) == []
    assert kinds(write("silent.wav", 1e-4 * tone())) == ["silent"]
    assert clipped_samples(np.array([1, 1, 0, 1, 1, 1, -1, -1, -1, -1], np.float32)) == 7


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"path,digit\na.wav,3\n", "is text, not audio"),
        ("Grüße\n".encode() * 1000, "is text, not audio"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "is no audio"),
        (b"RIFF\x24\x00\x00\x00WAVEfm", "header is cut off"),
        (b"fLaC\x00\x00", "header is cut off"),
        (b"OggS\x00\x02", "header is cut off"),
    ],
    ids=["empty", "text", "umlauts", "png", "riff", "flac", "ogg"],
)
@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.raw"])
def test_what_is_no_audio_is_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        read_audio(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_and_missing_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        read_audio(tmp_path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_audio(tmp_path / "none.wav")
    with pytest.raises(InputError, match="No such file"):
        audio_info(tmp_path / "none.wav")


def test_no_samples_are_an_error(write: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="holds no samples"):
        read_audio(write("a.wav", np.zeros(0)))
    with pytest.raises(InputError, match="from frame 9,000"):
        read_audio(write("b.wav", tone()), start=9000)


@pytest.mark.parametrize("channels", [1, 2])
def test_nan_is_an_error_or_becomes_zero_on_request(write: Callable[..., Path], channels: int) -> None:
    sound = np.repeat(tone()[:, None], channels, axis=1)
    sound[100, 0], sound[200, -1] = np.nan, np.inf
    path = write("a.wav", sound, subtype="FLOAT")
    with pytest.raises(InputError, match=rf"2 of {sound.size:,} samples .* frame 100.*--fix-nan"):
        read_audio(path)
    clip = read_audio(path, fix_nan=True)
    assert clip.warnings[0].kind == "nan"
    assert f"2 of {sound.size:,}" in str(clip.warnings[0])
    assert np.isfinite(clip.samples).all()
    if channels == 1:
        assert clip.samples[100] == clip.samples[200] == 0


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.ogg"])
def test_a_truncated_file_is_used_and_said(write: Callable[..., Path], name: str) -> None:
    path = write(name, np.random.default_rng(0).normal(0, 0.1, 3 * RATE))
    whole = len(read_audio(path).samples)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    clip = read_audio(path)
    assert [w.kind for w in clip.warnings] == ["truncated"]
    assert 0.25 * whole < len(clip.samples) < 0.75 * whole  # a page of OGG holds a second
    if name == "a.wav":
        assert f"{whole:,} frames are promised, {len(clip.samples):,} are there" in str(clip.warnings[0])


def test_a_stream_s_wav_without_a_length_is_whole(write: Callable[..., Path]) -> None:
    path = write("a.wav", tone())
    content = bytearray(path.read_bytes())
    at = content.index(b"data")
    content[at + 4 : at + 8] = struct.pack("<I", 0xFFFFFFFF)
    path.write_bytes(content)
    clip = read_audio(path)
    assert clip.warnings == ()
    assert len(clip.samples) == len(tone())


def test_a_flac_that_does_not_say_how_long_it_is_is_read_to_its_end(write: Callable[..., Path]) -> None:
    path = write("a.flac", np.random.default_rng(0).normal(0, 0.1, 20_000))
    content = bytearray(path.read_bytes())
    facts = int.from_bytes(content[18:26], "big")  # of STREAMINFO: the lowest 36 bits are the number of samples
    assert facts & (1 << 36) - 1 == 20_000
    content[18:26] = (facts >> 36 << 36).to_bytes(8, "big")
    path.write_bytes(content)
    clip = read_audio(path)
    assert clip.warnings == ()
    assert 20_000 - 16 <= len(clip.samples) <= 20_000  # libsndfile takes the end for a fault, and drops its last block
    with pytest.raises(InputError, match="is longer than that; the limit is 1 s"):
        read_audio(path, limit_seconds=1)


def test_chunks_before_the_data_are_passed_over(write: Callable[..., Path]) -> None:
    path = write("a.wav", tone())
    content = path.read_bytes()
    at = content.index(b"data")
    path.write_bytes(content[:at] + b"LIST" + struct.pack("<I", 5) + b"abcde\0" + content[at:])
    assert kinds(path) == []
    path.write_bytes(path.read_bytes()[:-1001])
    assert kinds(path) == ["truncated"]


def test_a_part_is_read_at_the_file_s_own_rate(write: Callable[..., Path]) -> None:
    sound = np.random.default_rng(0).normal(0, 0.1, 3000)
    path = write("a.wav", sound, 8_000, "FLOAT")
    clip = read_audio(path, None, start=1000, frames=500)
    assert clip.rate == 8_000
    np.testing.assert_allclose(clip.samples, sound[1000:1500], atol=1e-6)
    assert audio_info(path).seconds == pytest.approx(0.375)
    assert kinds(path, rate=None, start=2900, frames=500) == ["truncated"]


def test_more_than_the_limit_is_refused(write: Callable[..., Path]) -> None:
    path = write("a.wav", tone(2.0))
    with pytest.raises(InputError, match=r"is 2\.0 s long; the limit is 1 s"):
        read_audio(path, limit_seconds=1)
    assert len(read_audio(path, limit_seconds=2).samples) == 2 * RATE


def test_the_decoder_s_own_remarks_do_not_stand_beside_our_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """libmpg123 writes to stderr itself, in whatever thread; what we write before and after is there."""
    broken, cut = tmp_path / "random.mp3", tmp_path / "cut.mp3"
    broken.write_bytes(np.random.default_rng(0).bytes(5000))
    soundfile.write(cut, 0.3 * np.sin(np.arange(64_000) * 0.1), RATE)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])

    def remarks() -> int:
        for path in (broken, cut):
            with contextlib.suppress(soundfile.LibsndfileError), soundfile.SoundFile(path) as file:
                file.read()
        return len(capfd.readouterr().err)

    assert remarks() > 50  # else this shows nothing
    print("before", file=sys.stderr)
    with pytest.raises(InputError):
        read_audio(broken)
    assert [warning.kind for warning in read_audio(cut).warnings] == ["truncated"]
    assert {note.kind for note in read_generated(tmp_path).notes} == {"long", "unreadable"}
    prepare_shards(find_clips([tmp_path]), tmp_path / "shards", skip_bad=True)
    print("after", file=sys.stderr)
    assert capfd.readouterr().err == "before\nafter\n"
