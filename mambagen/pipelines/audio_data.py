"""From what a user gives as `--data` to shards of audio: names of data sets, folders, lists, tables, files.

Prepared audio is kept in the cache and found again by what went into it: the files' paths, sizes and times, and the
settings. A folder of shards may be given itself, as on a machine that the files did not come to.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mambagen.data.audio_shards import AudioShards, is_shards, prepare_shards
from mambagen.data.audio_sources import ClipSource, find_clips, natural
from mambagen.data.quantise import Quantiser
from mambagen.data_manifests import cache_home, load_manifest, manifest_names
from mambagen.data_manifests.audio import audio_folders, audio_layout
from mambagen.errors import InputError, ResourceError, UsageError
from mambagen.training.progress import Progress

log = logging.getLogger("mambagen")


@dataclass(frozen=True)
class AudioRequest:
    """What is to be prepared, and how."""

    data: tuple[str, ...]
    quantiser: Quantiser
    labels: tuple[str, ...] = ()  # only clips with one of these; () takes all
    valid_fraction: float = 0.1
    fix_nan: bool = False
    skip_bad: bool = False


def open_audio(request: AudioRequest, shards: Path | None = None, progress: Progress | None = None) -> AudioShards:
    """The shards of a request, prepared now or before; warnings about the files go to the log, each time.

    Args:
        shards: where to keep them (default: in the cache).

    Raises:
        InputError, ResourceError: see `find_clips`, `prepare_shards`.
    """
    found = _shards(request, shards, progress or Progress())
    for line in found.index.remarks:
        log.warning("%s", line)
    return found


def _shards(request: AudioRequest, shards: Path | None, progress: Progress) -> AudioShards:
    if not request.data:
        raise UsageError(
            "no audio is given: --data takes names of data sets (mambagen data list), folders, lists, tables"
        )
    if len(request.data) == 1 and is_shards(request.data[0]):
        found = AudioShards(request.data[0])
        wanted = request.quantiser.model_dump(exclude={"classes"})
        if found.quantiser.model_dump(exclude={"classes"}) != wanted:
            raise InputError.at(
                request.data[0],
                None,
                f"was prepared as {_in_words(found.quantiser)}, not {_in_words(request.quantiser)}",
            )
        return found
    for given in request.data:
        if is_shards(given):
            raise UsageError(f"{given} is prepared audio: it stands alone after --data")
    progress.state("looking for audio files ...")
    clips = clips_of(request)
    place = shards or cache_home() / "shards" / f"{_name(request.data)}-{_key(request, clips)}"
    if is_shards(place):
        return AudioShards(place)
    log.info("preparing %d clips in %s", len(clips), place)

    def done(files: int, total: int) -> None:
        progress.state(f"preparing the audio: {files:,} of {total:,} files ...")

    try:
        return prepare_shards(
            clips,
            place,
            request.quantiser,
            request.valid_fraction,
            request.fix_nan,
            request.skip_bad,
            ", ".join(request.data),
            done,
        )
    except OSError as error:
        where, what = error.filename or place, error.strerror or error
        raise ResourceError(f"{where}: {what}; --shards DIR keeps the prepared audio elsewhere") from error


def clips_of(request: AudioRequest) -> list[ClipSource]:
    """The clips of a request, divided as the data sets among them say."""
    clips: list[ClipSource] = []
    for given in request.data:
        if given.endswith(".toml") or given in manifest_names():
            clips += _of_data_set(given, request.labels)
        else:
            clips += find_clips([given], request.labels or None)
    return clips


def _of_data_set(name: str, labels: Sequence[str]) -> list[ClipSource]:
    manifest = load_manifest(name)
    layout = audio_layout(manifest)
    clips = find_clips(audio_folders(manifest), labels or layout.labels or None)
    if layout.files is not None and len(clips) != layout.files:
        raise InputError(f"the data set '{name}' has {len(clips):,} sound files, not {layout.files:,}; fetch it anew")
    if layout.valid_from is None:
        return clips
    clips = sorted(clips, key=lambda clip: natural(clip.path.name))
    test_from = len(clips) if layout.test_from is None else layout.test_from
    return [
        replace(clip, split="test" if i >= test_from else "valid" if i >= layout.valid_from else "train")
        for i, clip in enumerate(clips)
    ]


def _key(request: AudioRequest, clips: Sequence[ClipSource]) -> str:
    """A hash over all that the shards depend on."""
    digest = hashlib.sha256()
    settings = request.quantiser.model_dump(mode="json", exclude={"classes"})
    digest.update(json.dumps([1, settings, request.valid_fraction, request.fix_nan, request.skip_bad]).encode())
    stamps: dict[Path, tuple[int, int]] = {}
    for clip in clips:
        if clip.path not in stamps:
            try:
                status = clip.path.stat()
                stamps[clip.path] = (status.st_size, status.st_mtime_ns)
            except OSError as error:
                raise InputError.at(clip.path, None, f"cannot be read: {error.strerror}") from None
        facts = [os.path.abspath(clip.path), clip.start, clip.frames, clip.label, clip.split, *stamps[clip.path]]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()[:16]


def _name(data: Sequence[str]) -> str:
    stem = Path(data[0]).stem or "audio"
    return "".join(letter if letter.isalnum() else "-" for letter in stem)[:40]


def _in_words(quantiser: Quantiser) -> str:
    return f"{quantiser.model_dump()['kind']} at {quantiser.rate:,} Hz"
