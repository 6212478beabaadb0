"""The audio data sets: their manifests, and their clips once they are in place."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mambagen.data.quantise import MuLaw
from mambagen.data.spoken_words import DIGITS
from mambagen.data_manifests import load_manifest
from mambagen.data_manifests.cache import folder_of
from mambagen.errors import InputError
from mambagen.pipelines.audio_data import AudioRequest, clips_of, open_audio

SETS = ["sc09", "sc09-v0.01", "youtubemix", "beethoven"]


@pytest.mark.parametrize("name", SETS)
def test_audio_manifests_say_where_from_and_under_which_licence(name: str) -> None:
    manifest = load_manifest(name)
    assert manifest.kind == "audio"
    assert manifest.audio
    assert manifest.licence
    assert manifest.citations
    assert all(file.role == "audio" and file.unpack != "none" for file in manifest.files)
    if name.startswith("sc09"):
        assert manifest.audio.labels == DIGITS
        assert manifest.files[0].known_sha256


def test_speech_commands_checksums_are_those_of_torchaudio() -> None:
    speechcommands = pytest.importorskip("torchaudio.datasets.speechcommands")
    known = {url.rsplit("/", 1)[1]: digest for url, digest in speechcommands._CHECKSUMS.items()}
    for name in ("sc09", "sc09-v0.01"):
        file = load_manifest(name).files[0]
        assert known[file.name] == file.sha256


@pytest.mark.parametrize("name", SETS)
def test_a_set_that_is_not_here_says_how_to_fetch_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAMBAGEN_HOME", str(tmp_path))
    with pytest.raises(InputError, match=f"mambagen data fetch {name}"):
        clips_of(AudioRequest((name,), MuLaw()))


def test_dna_is_no_audio() -> None:
    with pytest.raises(InputError, match="'demo' is dna, not audio"):
        clips_of(AudioRequest(("demo",), MuLaw()))


def in_place(name: str) -> Path:
    """A data set's folder as a fetch would leave it, without sound files."""
    manifest = load_manifest(name)
    folder = folder_of(manifest)
    unpacked = folder / f"{manifest.files[0].name}.unpacked"
    unpacked.mkdir(parents=True)
    (folder / manifest.files[0].name).write_bytes(b"")
    return unpacked


def test_youtubemix_is_divided_in_natural_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBAGEN_HOME", str(tmp_path))
    unpacked = in_place("youtubemix")
    (unpacked / "youtube_mix").mkdir()
    for i in range(241):
        (unpacked / "youtube_mix" / f"out{i}.wav").touch()
    clips = clips_of(AudioRequest(("youtubemix",), MuLaw()))
    assert [clip.path.name for clip in clips] == [f"out{i}.wav" for i in range(241)]
    assert [clip.split for clip in clips] == ["train"] * 212 + ["valid"] * 14 + ["test"] * 15
    (unpacked / "youtube_mix" / "out0.wav").unlink()
    with pytest.raises(InputError, match="has 240 sound files, not 241"):
        clips_of(AudioRequest(("youtubemix",), MuLaw()))


def test_sc09_takes_the_digits_and_keeps_what_was_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBAGEN_HOME", str(tmp_path))
    unpacked = in_place("sc09")
    for word in ("one", "six", "yes"):
        (unpacked / word).mkdir()
        for speaker in ("aa", "bb", "cc"):
            samples = np.random.default_rng(0).normal(0, 0.1, 800)
            soundfile.write(unpacked / word / f"{speaker}_nohash_0.wav", samples, 16_000)
    (unpacked / "validation_list.txt").write_text("one/bb_nohash_0.wav\nyes/bb_nohash_0.wav\n")
    (unpacked / "testing_list.txt").write_text("six/cc_nohash_0.wav\n")
    request = AudioRequest(("sc09",), MuLaw())
    assert Counter((clip.label, clip.split) for clip in clips_of(request)) == {
        ("one", "train"): 2, ("one", "valid"): 1, ("six", "train"): 2, ("six", "test"): 1,
    }  # fmt: skip
    shards = open_audio(request)
    assert shards.folder.is_relative_to(tmp_path / "shards")
    again = open_audio(request)
    assert again.folder == shards.folder
    assert again.index == shards.index
    given = open_audio(AudioRequest((str(shards.folder),), MuLaw()))
    assert given.fingerprint("train") == shards.fingerprint("train")
    os.utime(unpacked / "one" / "aa_nohash_0.wav", (1, 1))
    assert open_audio(request).folder != shards.folder  # a file that changed is read anew
    with pytest.raises(InputError, match="was prepared as mu-law at 16,000 Hz, not mu-law at 8,000 Hz"):
        open_audio(AudioRequest((str(shards.folder),), MuLaw(rate=8000)))


def test_what_was_done_to_the_files_is_said_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MAMBAGEN_HOME", str(tmp_path / "home"))
    (tmp_path / "in").mkdir()
    for i in range(3):
        samples = np.random.default_rng(i).normal(0, 0.1, 4_000)
        soundfile.write(tmp_path / "in" / f"{i}.wav", samples, 8_000 if i < 2 else 16_000)
    request = AudioRequest((str(tmp_path / "in"),), MuLaw())
    said = []
    for given in (request, request, AudioRequest((str(open_audio(request).folder),), MuLaw())):
        caplog.clear()
        open_audio(given)
        said.append([record.getMessage() for record in caplog.records if record.levelname == "WARNING"])
    assert said[0] == said[1] == said[2]
    assert len(said[0]) == 1
    assert said[0][0].startswith("2 of 3 files, as ")
    assert "resampled from 8,000 to 16,000 Hz" in said[0][0]
