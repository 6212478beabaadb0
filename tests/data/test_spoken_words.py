"""Folders and tables of spoken words: what is read, how it is divided, what is refused."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from mambagen.data.audio_files import read_audio
from mambagen.data.audio_sources import find_clips
from mambagen.data.augmentation import Augmentation, noise_like, placed, resampled, trimmed
from mambagen.data.spoken_words import (
    DIGITS,
    RATE,
    SILENCE,
    fit_second,
    read_spoken_words,
    speaker_of,
    split_by_speaker,
)
from mambagen.errors import InputError


def write(path: Path, seconds: float, frequency: float = 440.0, rate: int = 16_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(round(seconds * rate)) / rate
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * frequency * times), rate, subtype="PCM_16")
    return path


def test_speakers_are_divided_by_the_rule_of_the_data_set() -> None:
    """The rule, written out once more: a hash of the speaker modulo 2^27 as per cent; 10 valid, 10 test."""
    import hashlib

    for number in range(300):
        speaker = f"{number * 7919:08x}"
        per_cent = int(hashlib.sha1(speaker.encode()).hexdigest(), 16) % 2**27 * (100.0 / (2**27 - 1))
        expected = "valid" if per_cent < 10 else "test" if per_cent < 20 else "train"
        assert split_by_speaker(f"{speaker}_nohash_{number % 4}.wav") == expected
    assert speaker_of("seven/0a7c2a8d_nohash_1.wav") == "0a7c2a8d"


def test_a_folder_with_lists_is_divided_by_them_and_long_noise_becomes_seconds(tmp_path: Path) -> None:
    for word, speaker in [("zero", "aa"), ("one", "bb"), ("one", "cc"), ("yes", "cc")]:
        write(tmp_path / word / f"{speaker}_nohash_0.wav", 0.5)
    write(tmp_path / "_background_noise_" / "tap.wav", 3.4)
    (tmp_path / "validation_list.txt").write_text("one/bb_nohash_0.wav\n")
    (tmp_path / "testing_list.txt").write_text("one/cc_nohash_0.wav\nyes/cc_nohash_0.wav\n")
    words = read_spoken_words(tmp_path)
    rows = sorted(zip(words.labels, words.speakers, words.splits, strict=True))
    assert rows == [
        *[(SILENCE, "silence", "train")] * 3,
        ("one", "bb", "valid"),
        ("one", "cc", "test"),
        ("yes", "cc", "test"),
        ("zero", "aa", "train"),
    ]
    assert words.one_second(words.where(split="valid")).shape == (1, 16_000)
    assert len(words.select(words.where(labels=DIGITS))) == 3


def test_folders_of_splits_and_tables_hold_the_same_clips(tmp_path: Path) -> None:
    for split, folder in [("train", "train"), ("valid", "validation"), ("test", "testing")]:
        for number, word in enumerate(DIGITS):
            write(tmp_path / "parts" / folder / word / f"{split}{number}.wav", 0.3, 200 + 50 * number)
    parts = read_spoken_words(tmp_path / "parts")
    assert [parts.splits.count(split) for split in ("train", "valid", "test")] == [10, 10, 10]

    whole = np.concatenate([parts.clip(row) for row in range(len(parts))])
    soundfile.write(tmp_path / "all.flac", whole, 16_000, subtype="PCM_16")
    lines = ["path,start_frame,n_frames,label,speaker,split"]
    lines += [
        f"all.flac,{parts.starts[row]},{parts.starts[row + 1] - parts.starts[row]},{parts.labels[row]},s{row},"
        f"{parts.splits[row]}"
        for row in range(len(parts))
    ]
    (tmp_path / "my_index.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "other_index.csv").write_text("path,title\n")
    table = read_spoken_words(tmp_path)
    assert table.labels == parts.labels
    np.testing.assert_array_equal(table.samples, parts.samples)
    assert table.fingerprint() == parts.fingerprint()
    assert table.select([3]).fingerprint() != table.fingerprint()


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("path,word\na.wav,one\n", "1: has no column label"),
        ("path,label\n", "lists no clips"),
        ("path,label,start_frame,n_frames\na.wav,one,0,99999\n", "2: frames 0 to 99999 of a.wav, which has 4800"),
        ("path,label,start_frame\na.wav,one,-3\n", "2: start_frame is '-3', not a number of frames"),
        ("path,label,split\na.wav,one,dev\n", "2: the split is 'dev'"),
        ("path,label\nb.wav,one\n", "b.wav: cannot be read: No such file"),
    ],
    ids=["column", "empty", "frames", "number", "split", "file"],
)
def test_a_bad_table_is_told_by_file_and_line(table: str, told: str, tmp_path: Path) -> None:
    write(tmp_path / "a.wav", 0.3)
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(InputError, match=told.replace(".", r"\.")):
        read_spoken_words(tmp_path / "t.csv")


def test_parts_of_files_are_counted_at_the_files_own_rate(tmp_path: Path) -> None:
    """As `find_clips` counts them, so that one table serves both."""
    sound = np.concatenate([0.5 * np.sin(0.05 * k * np.arange(2000)) for k in (1, 2, 3)])
    soundfile.write(tmp_path / "long.wav", sound, 8000)
    (tmp_path / "t.csv").write_text("path,label,start_frame,n_frames\nlong.wav,one,2000,2000\nlong.wav,two,4000,\n")
    words = read_spoken_words(tmp_path / "t.csv")
    for row, (source, frequency) in enumerate(zip(find_clips([tmp_path / "t.csv"]), (800, 1200), strict=True)):
        alone = read_audio(source.path, RATE, start=source.start, frames=source.frames).samples
        np.testing.assert_allclose(words.clip(row), alone, atol=1 / 32768)
        assert len(words.clip(row)) == 4000
        assert abs(np.abs(np.fft.rfft(words.clip(row))).argmax() * RATE / 4000 - frequency / (2 * np.pi)) < 4


def test_folders_without_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folders zero to nine"):
        read_spoken_words(tmp_path)
    (tmp_path / "one").mkdir()
    with pytest.raises(InputError, match="hold no sound files"):
        read_spoken_words(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        read_spoken_words(tmp_path / "nowhere")


def test_a_second_is_the_loudest_one_or_filled_up() -> None:
    long = np.zeros(40_000, np.float32)
    long[20_000:30_000] = 1
    assert fit_second(long).sum() == 10_000
    short = fit_second(np.ones(100, np.float32))
    assert (short[:100] == 1).all()
    assert not short[100:].any()


def test_changes_are_a_function_of_the_generator_and_do_what_they_say() -> None:
    clip = np.sin(2 * np.pi * 500 * np.arange(8_000) / 16_000).astype(np.float32)
    change = Augmentation()

    def changed(seed: int) -> np.ndarray:
        return change.word(clip, 16_000, np.random.default_rng(seed), [clip])

    np.testing.assert_array_equal(changed(1), changed(1))
    assert np.abs(changed(1) - changed(2)).max() > 0.1
    still = change.scaled(0).word(clip, 16_000, np.random.default_rng(0))
    start = int(np.flatnonzero(np.abs(still) > 1e-3)[0])
    np.testing.assert_allclose(still[start : start + 7_900], clip[1:7_901], atol=1e-3)

    spectrum = np.abs(np.fft.rfft(resampled(clip, 1.25)))
    assert spectrum.argmax() * 16_000 / len(resampled(clip, 1.25)) == pytest.approx(625, abs=3)
    noise = noise_like(clip, 20.0, np.random.default_rng(0).normal(size=16_000).astype(np.float32))
    loud = float(np.square(clip[np.square(clip) > 0.05]).mean())
    assert 10 * np.log10(loud / np.square(noise).mean()) == pytest.approx(20, abs=0.1)
    framed = np.concatenate([np.zeros(800), clip, np.zeros(1600)]).astype(np.float32)
    np.testing.assert_array_equal(trimmed(framed, 30.0, 160), clip)
    assert len(placed(clip, 4_000, np.random.default_rng(0))) == 4_000
