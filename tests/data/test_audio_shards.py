"""From folders, lists and tables of audio to shards, and from there to windows."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mambagen.data.audio_files import read_audio
from mambagen.data.audio_shards import AudioShards, is_shards, prepare_shards
from mambagen.data.audio_sources import find_clips, natural
from mambagen.data.audio_windows import Augmentation, HeldOutWindows, TrainingWindows, classes_of, spread
from mambagen.data.quantise import SILENCE, MuLaw
from mambagen.data.spoken_words import DIGITS
from mambagen.errors import InputError

RATE = 16_000


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE))


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)
    return path


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A small Speech Commands: three words of four speakers, official lists, noise and a hidden file."""
    root = tmp_path / "speech_commands"
    for w, word in enumerate(("two", "one", "yes")):
        for s, speaker in enumerate(("aa01", "bb02", "cc03", "dd04")):
            write(root / word / f"{speaker}_nohash_0.wav", sound(0.05 + 0.01 * s, 10 * w + s))
    write(root / "_background_noise_" / "hum.wav", sound(0.2))
    (root / "one" / ".aa01_nohash_9.wav").write_bytes(b"")
    write(root / ".trash" / "one" / "zz99_nohash_0.wav", sound(0.1))
    (root / "validation_list.txt").write_text("one/bb02_nohash_0.wav\ntwo/bb02_nohash_0.wav\n")
    (root / "testing_list.txt").write_text("one/cc03_nohash_0.wav\n")
    return root


def test_speech_commands_is_divided_by_its_own_lists(words: Path) -> None:
    clips = find_clips([words], labels=DIGITS)
    assert Counter((clip.label, clip.split) for clip in clips) == {
        ("one", "train"): 2, ("one", "valid"): 1, ("one", "test"): 1, ("two", "train"): 3, ("two", "valid"): 1,
    }  # fmt: skip
    assert {clip.speaker for clip in clips} == {"aa01", "bb02", "cc03", "dd04"}
    assert len(find_clips([words])) == 12
    with pytest.raises(InputError, match="no clip that is labelled nine"):
        find_clips([words], labels=["nine"])


def test_without_lists_speakers_are_divided_by_the_hash_of_their_names(words: Path) -> None:
    for name in ("validation_list.txt", "testing_list.txt"):
        (words / name).unlink()

    def rule(speaker: str) -> str:  # the data set's own which_set
        share = int(hashlib.sha1(speaker.encode()).hexdigest(), 16) % 2**27 * 100.0 / (2**27 - 1)
        return "valid" if share < 10 else "test" if share < 20 else "train"

    assert {clip.speaker: clip.split for clip in find_clips([words])} == {
        speaker: rule(speaker) for speaker in ("aa01", "bb02", "cc03", "dd04")
    }


def test_names_sort_as_people_count() -> None:
    names = ["out10.wav", "out2.wav", "a/out1.wav", "out.wav"]
    assert sorted(names, key=natural) == ["a/out1.wav", "out2.wav", "out10.wav", "out.wav"]


def test_a_table_names_parts_of_files(tmp_path: Path) -> None:
    whole = sound(1.0)
    write(tmp_path / "audio" / "all.flac", whole)
    (tmp_path / "audio" / "index.csv").write_text(
        "path,start_frame,n_frames,digit,speaker,split\n"
        "all.flac,0,4000,3,ann,train\nall.flac,4000,2000,0,bob,valid\nall.flac,6000,,,cid,test\n"
    )
    clips = find_clips([tmp_path / "audio" / "index.csv"])
    assert [(c.start, c.frames, c.label, c.speaker, c.split) for c in clips] == [
        (0, 4000, "three", "ann", "train"), (4000, 2000, "zero", "bob", "valid"), (6000, None, "", "cid", "test"),
    ]  # fmt: skip
    shards = prepare_shards(clips, tmp_path / "shards")
    assert shards.index.remarks == ()
    tokens = MuLaw().encode(read_audio(tmp_path / "audio" / "all.flac").samples)
    np.testing.assert_array_equal(shards["train"].clip(0), tokens[:4000])
    np.testing.assert_array_equal(shards["valid"].clip(0), tokens[4000:6000])
    np.testing.assert_array_equal(shards["test"].clip(0), tokens[6000:])
    assert shards.labels == ("zero", "three")
    assert shards["train"].label.tolist() == [1]
    assert shards["test"].label.tolist() == [-1]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("file,digit\na.wav,1\n", "index.csv:1: has no column called path"),
        ("path\n", "lists no clips"),
        ("path\nnone.wav\n", "index.csv:2: none.wav: no such file"),
        ("path,digit\na.wav,11\n", "index.csv:2: the digit is '11'"),
        ("path,n_frames\na.wav,-3\n", "index.csv:2: n_frames is '-3'"),
        ("path,split\na.wav,dev\n", "index.csv:2: the split is 'dev'"),
    ],
    ids=["columns", "empty", "missing", "digit", "frames", "split"],
)
def test_a_table_s_fault_is_named_with_its_line(tmp_path: Path, table: str, said: str) -> None:
    write(tmp_path / "a.wav", sound(0.1))
    (tmp_path / "index.csv").write_text(table)
    with pytest.raises(InputError) as caught:
        find_clips([tmp_path / "index.csv"])
    assert said in str(caught.value)


def test_a_table_that_asks_for_more_than_a_file_has_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", sound(0.1))
    (tmp_path / "index.csv").write_text("path,start_frame,n_frames\na.wav,0,800\na.wav,800,900\n")
    with pytest.raises(InputError, match="has 1,600 frames; a clip is said to be 800 to 1,700"):
        prepare_shards(find_clips([tmp_path / "index.csv"]), tmp_path / "shards")


def test_lists_folders_and_files_go_together(tmp_path: Path) -> None:
    for name in ("x/a.wav", "x/b.flac", "y/c.ogg", "d.wav"):
        write(tmp_path / name, sound(0.1))
    (tmp_path / "list.txt").write_text("# two of them\nx/a.wav\n\ny/c.ogg\n")
    found = find_clips([tmp_path / "list.txt", tmp_path / "x", tmp_path / "d.wav"])
    assert [clip.path.name for clip in found] == ["a.wav", "c.ogg", "a.wav", "b.flac", "d.wav"]
    assert [clip.label for clip in found][:3] == ["x", "y", "x"]
    (tmp_path / "list.txt").write_text("x/a.wav\nnone.wav\n")
    with pytest.raises(InputError, match=r"list\.txt:2: none\.wav"):
        find_clips([tmp_path / "list.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no audio files"):
        find_clips([tmp_path / "empty"])


def test_a_folder_of_files_has_a_tenth_of_them_held_out_and_always_the_same(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path / "in" / f"{i}.wav", sound(0.05, i))
    first = prepare_shards(find_clips([tmp_path / "in"]), tmp_path / "one")
    assert (len(first["train"]), len(first["valid"])) == (18, 2)
    os.rename(tmp_path / "in", tmp_path / "elsewhere")
    again = prepare_shards(find_clips([tmp_path / "elsewhere"]), tmp_path / "two")
    assert {Path(name).name for name in again["valid"].names} == {Path(name).name for name in first["valid"].names}


def test_of_few_files_the_ends_are_held_out(tmp_path: Path) -> None:
    paths = [write(tmp_path / "in" / f"{i}.wav", sound(0.5, i)) for i in range(2)]
    shards = prepare_shards(find_clips([tmp_path / "in"]), tmp_path / "shards", valid_fraction=0.25)
    tokens = MuLaw().encode(read_audio(paths[1]).samples)
    np.testing.assert_array_equal(shards["train"].clip(1), tokens[:6000])
    np.testing.assert_array_equal(shards["valid"].clip(1), tokens[6000:])
    whole = prepare_shards(find_clips([tmp_path / "in"]), tmp_path / "all", valid_fraction=0)
    assert list(whole.index.splits) == ["train"]
    assert len(whole["valid"]) == 0


def test_bad_files_are_all_named_or_left_out(tmp_path: Path) -> None:
    for i in range(5):
        write(tmp_path / "in" / f"{i}.wav", sound(0.05, i), 8_000 if i else RATE)
    (tmp_path / "in" / "text.wav").write_text("no sound\n" * 100)
    (tmp_path / "in" / "empty.wav").write_bytes(b"")
    clips = find_clips([tmp_path / "in"])
    with pytest.raises(InputError, match=r"empty\.wav: is empty.*text\.wav: is text.*2 of 7 files cannot be used"):
        prepare_shards(clips, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    shards = prepare_shards(clips, tmp_path / "shards", skip_bad=True)
    warnings = shards.index.remarks
    assert len(shards["train"]) == 5
    assert any("4 of 7 files, as" in line and "resampled from 8,000 to 16,000 Hz" in line for line in warnings)
    assert sum(line.startswith("left out") for line in warnings) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "shards"]
    for i in range(3):
        (tmp_path / "in" / f"more{i}.wav").write_text("no sound")
    warnings = prepare_shards(find_clips([tmp_path / "in"]), tmp_path / "again", skip_bad=True).index.remarks
    left_out = [line for line in warnings if line.startswith("left out")]
    assert len(left_out) == 4  # three by name
    assert left_out[-1] == "left out: 5 of 10 files in all"


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.wav", sound(0.5))
    prepare_shards(find_clips([tmp_path / "in"]), tmp_path / "shards")
    assert is_shards(tmp_path / "shards")
    assert not is_shards(tmp_path / "in")
    with open(tmp_path / "shards" / "train.u8", "ab") as stream:
        stream.write(b"x")
    with pytest.raises(InputError, match="not of the length"):
        AudioShards(tmp_path / "shards")
    (tmp_path / "shards" / "shards.json").write_text("{}")
    with pytest.raises(InputError, match="damaged, or of another version"):
        AudioShards(tmp_path / "shards")


@pytest.fixture
def shards(tmp_path: Path) -> AudioShards:
    """Seven clips of 400, 500, ... tokens: the k-th holds only the token 10 + k, the labels are zero to six."""
    rows = ["path,start_frame,n_frames,digit,split"]
    table = MuLaw().decode(np.repeat(np.arange(10, 17), np.arange(400, 1100, 100)))
    write(tmp_path / "all.wav", table)
    at = 0
    for k in range(7):
        rows.append(f"all.wav,{at},{400 + 100 * k},{k},train")
        at += 400 + 100 * k
    (tmp_path / "index.csv").write_text("\n".join(rows) + "\n")
    return prepare_shards(find_clips([tmp_path / "index.csv"]), tmp_path / "shards")


def test_every_epoch_takes_each_clip_once_in_another_order(shards: AudioShards) -> None:
    windows = TrainingWindows(shards["train"], 1000, 3, seed=5, quantiser=MuLaw())
    rows = [batch.tokens[row, 0] for batch in map(windows.batch, range(7)) for row in range(3)]
    epochs = [rows[7 * i : 7 * i + 7] for i in range(3)]
    assert all(sorted(epoch) == list(range(10, 17)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    other = TrainingWindows(shards["train"], 1000, 3, seed=5, quantiser=MuLaw())
    np.testing.assert_array_equal(other.batch(6).tokens, windows.batch(6).tokens)  # no need of the steps before


def test_what_is_past_a_clip_s_end_is_silence_and_not_counted(shards: AudioShards) -> None:
    batch = TrainingWindows(shards["train"], 1000, 7, seed=0, quantiser=MuLaw()).batch(0)
    for row in range(7):
        size = 400 + 100 * (int(batch.tokens[row, 0]) - 10)
        assert batch.counted[row] == size
        assert (batch.tokens[row, :size] == batch.tokens[row, 0]).all()
        assert (batch.tokens[row, size:] == SILENCE).all()
    counted = TrainingWindows(shards["train"], 1000, 7, seed=0, quantiser=MuLaw(), pad="silence").batch(0)
    assert (counted.counted == 1000).all()


def test_long_clips_are_taken_as_often_as_windows_fit(shards: AudioShards) -> None:
    windows = TrainingWindows(shards["train"], 250, 10, seed=0, quantiser=MuLaw())
    sizes = range(400, 1100, 100)
    assert windows.units == sum(-(-size // 250) for size in sizes)
    batch = windows.batch(0)
    assert (batch.counted == 250).all()
    starts = [start for name, start, _ in (where for i in range(20) for where in windows.batch(i).where)]
    assert min(starts) < 10
    assert max(starts) > 600


def test_classes_follow_the_clips_and_are_dropped_by_chance(shards: AudioShards) -> None:
    names = DIGITS[:6]  # the clips of six have no class
    classes = classes_of(shards["train"], shards.labels, names)
    assert classes.tolist() == [0, 1, 2, 3, 4, 5, -1]
    quantiser = MuLaw(classes=names)
    batch = TrainingWindows(shards["train"], 1000, 7, 0, quantiser, classes=classes).batch(0)
    assert all(
        c == (t - 10 if t < 16 else 6) for c, t in zip(batch.classes, batch.tokens[:, 0].astype(int), strict=True)
    )
    often = TrainingWindows(shards["train"], 1000, 700, 0, quantiser, classes=classes, unconditional=0.25).batch(0)
    assert np.mean(often.classes == 6) == pytest.approx(1 / 7 + 6 / 7 * 0.25, abs=0.05)


def test_shifts_put_silence_in_front(shards: AudioShards) -> None:
    change = Augmentation(shift=0.02)
    batch = TrainingWindows(shards["train"], 1000, 210, 0, MuLaw(), augmentation=change).batch(0)
    lead = (batch.tokens != SILENCE).argmax(axis=1)
    assert lead.min() <= 10
    assert 250 < lead.max() <= 320
    assert (batch.counted <= 1000).all()
    first = batch.tokens[np.arange(210), lead].astype(int)
    np.testing.assert_array_equal(batch.counted, np.minimum(1000, lead + 400 + 100 * (first - 10)))


def test_gain_and_speed_change_a_tone_by_what_they_say(tmp_path: Path) -> None:
    write(tmp_path / "tone.wav", 0.25 * np.sin(2 * np.pi * 500 * np.arange(RATE) / RATE))
    shards = prepare_shards(find_clips([tmp_path / "tone.wav"]), tmp_path / "shards", valid_fraction=0)
    change = Augmentation(gain_db=6, speed=0.1)
    batch = TrainingWindows(shards["train"], 8000, 12, 0, MuLaw(), augmentation=change).batch(0)
    for tokens, (_, _, words) in zip(batch.tokens, batch.where, strict=True):
        decibels, factor = float(words.split(" dB")[0]), float(words.split("speed ")[1])
        samples = MuLaw().decode(tokens)[200:-200]
        assert np.sqrt(2 * np.mean(samples**2)) == pytest.approx(0.25 * 10 ** (decibels / 20), rel=0.02)
        spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 1 << 18))
        assert spectrum.argmax() * RATE / (1 << 18) == pytest.approx(500 * factor, rel=2e-3)
    assert len({words for _, _, words in batch.where}) == 12


def test_spreading_leaves_every_token_what_it_is() -> None:
    tokens = np.repeat(np.arange(256, dtype=np.uint8), 50)
    samples = spread(tokens, MuLaw(), np.random.default_rng(0))
    off = np.abs(MuLaw().encode(samples).astype(int) - tokens)
    assert (off > 0).mean() < 1e-3
    assert (samples[tokens == SILENCE] == 0).all()
    assert len(np.unique(samples[tokens == 200])) == 50


def test_held_out_windows_hold_every_sample_once(shards: AudioShards) -> None:
    classes = classes_of(shards["train"], shards.labels, DIGITS[:6])
    windows = HeldOutWindows(shards["train"], 300, 4, classes, none=6)
    found: Counter[int] = Counter()
    for batch in windows:
        assert batch.tokens.shape[1] == batch.counted.max()
        for tokens, counted, its_class in zip(batch.tokens, batch.counted, batch.classes, strict=True):
            assert len(set(tokens[:counted].tolist())) == 1
            assert its_class == min(6, int(tokens[0]) - 10)
            found[int(tokens[0])] += int(counted)
    assert found == {10 + k: 400 + 100 * k for k in range(7)}
    assert windows.targets == sum(found.values())
    few = HeldOutWindows(shards["train"], 300, 4, at_most=1000)
    assert 0 < few.targets <= 1300
