"""Audio made ready for training once: every clip decoded, resampled, quantised, one byte a sample, mapped into memory.

FOLDER/shards.json    what it is: quantiser, labels, counts, what was done to the files
FOLDER/train.u8       the samples' tokens, clip after clip (valid.u8, test.u8 alike)
FOLDER/train.npy      (clips, 3) int64: first sample, number of samples, index of the label or -1
FOLDER/train.tsv      name and speaker of each clip

The folder appears whole or not at all, and can be carried to another machine.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mambagen.data.audio_files import AudioWarning, read_audio, resample, without_remarks
from mambagen.data.audio_sources import SPLITS, ClipSource, Split
from mambagen.data.quantise import AnyQuantiser, MuLaw, Quantiser
from mambagen.data.spoken_words import DIGITS
from mambagen.errors import InputError

INDEX = "shards.json"
READERS = 8  # threads: decoding releases the interpreter
AT_ONCE = 64  # files that are decoded before they are written
BY_FILES = 10  # files without a split, from which on whole files are held out, and not the ends of all
NAMED = 3  # bad files that a message names

Tokens = NDArray[np.uint8]


class SplitEntry(BaseModel):
    """Counts of a split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clips: Annotated[int, Field(ge=0)]
    samples: Annotated[int, Field(ge=0)]
    sha256: str


class ShardIndex(BaseModel):
    """What shards.json holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    quantiser: AnyQuantiser
    labels: tuple[str, ...]
    splits: dict[Split, SplitEntry]
    warnings: dict[str, int] = {}  # kind -> files
    remarks: tuple[str, ...] = ()  # the same and the files left out, as lines to be shown
    source: str = ""  # in words


@dataclass(frozen=True)
class Clips:
    """The clips of a split."""

    tokens: Tokens  # (samples,), mapped from the file
    start: NDArray[np.int64]  # (clips,)
    length: NDArray[np.int64]  # (clips,)
    label: NDArray[np.int64]  # (clips,) index into the labels, -1 without
    names: Sequence[str]
    sha256: str

    def __len__(self) -> int:
        return len(self.start)

    def clip(self, row: int) -> Tokens:
        """The tokens of a clip."""
        return self.tokens[self.start[row] : self.start[row] + self.length[row]]


class AudioShards:
    """A folder of shards, opened: `shards["train"]` are the clips of a split."""

    def __init__(self, folder: Path | str) -> None:
        """Raises InputError where the folder is none, or not whole."""
        self.folder = Path(folder)
        try:
            self.index = ShardIndex.model_validate_json((self.folder / INDEX).read_text("utf-8"))
        except OSError as error:
            raise InputError.at(folder, None, f"is no folder of prepared audio: {error.strerror}") from None
        except (ValidationError, UnicodeDecodeError):
            raise InputError.at(self.folder / INDEX, None, "is damaged, or of another version; prepare anew") from None
        self._clips = {split: self._open(split) for split in self.index.splits}

    @property
    def quantiser(self) -> Quantiser:
        return self.index.quantiser

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels there are; the digits in their order, others by the alphabet."""
        return self.index.labels

    def __getitem__(self, split: Split) -> Clips:
        return self._clips.get(split) or _no_clips()

    def fingerprint(self, split: Split) -> str:
        """SHA-256 of what a split holds."""
        return self[split].sha256

    def _open(self, split: Split) -> Clips:
        entry = self.index.splits[split]
        tokens_file = self.folder / f"{split}.u8"
        try:
            rows = np.load(self.folder / f"{split}.npy", allow_pickle=False)
            names = (self.folder / f"{split}.tsv").read_text("utf-8").splitlines()
            held = tokens_file.stat().st_size
        except (OSError, ValueError) as error:
            raise InputError.at(self.folder, None, f"is not whole ({error}); prepare the audio anew") from None
        if held != entry.samples or rows.shape != (entry.clips, 3) or len(names) != entry.clips:
            raise InputError.at(tokens_file, None, "is not of the length that shards.json says; prepare the audio anew")
        tokens: Tokens = np.memmap(tokens_file, np.uint8, "r") if held else np.zeros(0, np.uint8)
        start, length, label = (np.ascontiguousarray(column) for column in rows.T)
        return Clips(tokens, start, length, label, [name.split("\t")[0] for name in names], entry.sha256)


def is_shards(path: str | Path) -> bool:
    """Whether a path is a folder that `prepare_shards` wrote."""
    return (Path(path) / INDEX).is_file()


def prepare_shards(
    clips: Sequence[ClipSource],
    folder: Path | str,
    quantiser: Quantiser | None = None,
    valid_fraction: float = 0.1,
    fix_nan: bool = False,
    skip_bad: bool = False,
    source: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> AudioShards:
    """Decode all clips into a folder of shards.

    Clips without a split are divided here: with ten files or more of that kind, a `valid_fraction` of the files (picked
    by a hash of their names) is held out; with fewer, the last part of each.

    Args:
        quantiser: its rate is that of the shards (default: mu-law at 16 kHz).
        skip_bad: leave out files that cannot be read, instead of stopping at the end.
        progress: called with the files that are done, and their number.

    Returns:
        The shards; `index.remarks` are warnings, one a kind ("3 of 20 files, as a.wav: resampled from 44,100 to ...").

    Raises:
        InputError: files that cannot be read, or nothing to train on.
    """
    if not clips:
        raise InputError("no audio is given")
    quantiser = quantiser or MuLaw()
    labels = in_order({clip.label for clip in clips if clip.label})
    divided, cut = divide(clips, valid_fraction)
    target = Path(os.path.realpath(folder))
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    writers: dict[Split, _SplitWriter] = {}
    seen = _Warnings()
    bad: list[str] = []
    try:
        partial.mkdir(parents=True)
        by_file = group_by_file(divided)
        done = 0
        for results in _decoded(by_file, quantiser, fix_nan):
            for group, decoded in results:
                done += 1
                if isinstance(decoded, InputError):
                    bad.append(str(decoded))
                    continue
                pieces, warnings = decoded
                seen.add(group[0].name, warnings)
                for clip, tokens in zip(group, pieces, strict=True):
                    for split, part in _cut(clip, tokens, valid_fraction, cut):
                        if split not in writers:
                            writers[split] = _SplitWriter(partial, split)
                        writers[split].add(part, labels.index(clip.label) if clip.label else -1, clip)
                if progress:
                    progress(done, len(by_file))
        if bad and (not skip_bad or len(bad) == done):
            raise InputError(_bad_files(bad, done))
        if "train" not in writers:
            raise InputError(f"{source or 'the audio'}: nothing is left to train on: all clips are held out")
        left_out = [f"left out: {text}" for text in bad[:NAMED]]
        if len(bad) > NAMED:
            left_out.append(f"left out: {len(bad):,} of {done:,} files in all")
        index = ShardIndex(
            quantiser=quantiser,  # type: ignore[arg-type] # one of AnyQuantiser, as there are no others
            labels=labels,
            splits={split: writers[split].close() for split in SPLITS if split in writers},
            warnings=dict(seen.counts),
            remarks=(*left_out, *seen.lines(done)),
            source=source,
        )
        (partial / INDEX).write_text(json.dumps(index.model_dump(mode="json"), indent=1) + "\n", "utf-8")
        if target.exists():  # another process was quicker, or an earlier preparation that was not whole
            shutil.rmtree(target)
        os.rename(partial, target)
    finally:
        for writer in writers.values():
            writer.abandon()
        shutil.rmtree(partial, ignore_errors=True)
    return AudioShards(target)


def divide(clips: Sequence[ClipSource], valid_fraction: float) -> tuple[list[ClipSource], bool]:
    """The clips with a split each, and whether those without one are to be cut at their ends instead."""
    open_files = sorted({str(clip.path) for clip in clips if clip.split is None})
    if not open_files:
        return list(clips), False
    if len(open_files) < BY_FILES:
        return list(clips), valid_fraction > 0
    common = os.path.commonpath(open_files)
    by_hash = sorted(open_files, key=lambda file: hashlib.sha256(os.path.relpath(file, common).encode()).digest())
    held = set(by_hash[: round(valid_fraction * len(by_hash)) or (valid_fraction > 0)])
    return [
        clip if clip.split else replace(clip, split="valid" if str(clip.path) in held else "train") for clip in clips
    ], False


def in_order(labels: set[str]) -> tuple[str, ...]:
    """Digits in their order, then the others by the alphabet."""
    return tuple(sorted(labels, key=lambda label: (DIGITS.index(label) if label in DIGITS else len(DIGITS), label)))


def group_by_file(clips: Sequence[ClipSource]) -> list[list[ClipSource]]:
    """Clips of one file together, so that it is decoded once."""
    groups: dict[Path, list[ClipSource]] = {}
    for clip in clips:
        groups.setdefault(clip.path, []).append(clip)
    return list(groups.values())


Decoded = tuple[list[Tokens], tuple[AudioWarning, ...]]


def _decoded(
    groups: Sequence[list[ClipSource]], quantiser: Quantiser, fix_nan: bool
) -> Iterator[list[tuple[list[ClipSource], Decoded | InputError]]]:
    def work(group: list[ClipSource]) -> Decoded | InputError:
        try:
            return decode_clips(group, quantiser, fix_nan)
        except InputError as error:
            return error

    with ThreadPoolExecutor(READERS) as readers:
        for at in range(0, len(groups), AT_ONCE):
            some = groups[at : at + AT_ONCE]
            with without_remarks():
                decoded = list(readers.map(work, some))
            yield list(zip(some, decoded, strict=True))


def decode_clips(group: Sequence[ClipSource], quantiser: Quantiser, fix_nan: bool = False) -> Decoded:
    """The tokens of each clip of one file."""
    first = group[0]
    if len(group) == 1:
        read = read_audio(first.path, quantiser.rate, fix_nan, first.start, first.frames)
        return [quantiser.encode(read.samples)], read.warnings
    whole = read_audio(first.path, None, fix_nan)
    warnings = whole.warnings
    if whole.rate != quantiser.rate:
        text = f"resampled from {whole.rate:,} to {quantiser.rate:,} Hz"
        warnings = (*warnings, AudioWarning("resampled", text))
    pieces = []
    for clip in group:
        end = len(whole.samples) if clip.frames is None else clip.start + clip.frames
        if clip.start >= end or end > len(whole.samples):
            raise InputError.at(
                clip.path, None, f"has {len(whole.samples):,} frames; a clip is said to be {clip.start:,} to {end:,}"
            )
        pieces.append(quantiser.encode(resample(whole.samples[clip.start : end], whole.rate, quantiser.rate)))
    return pieces, warnings


def _cut(clip: ClipSource, tokens: Tokens, valid_fraction: float, cut: bool) -> list[tuple[Split, Tokens]]:
    if clip.split is not None:
        return [(clip.split, tokens)]
    if not cut:
        return [("train", tokens)]
    at = len(tokens) - round(valid_fraction * len(tokens))
    parts: list[tuple[Split, Tokens]] = [("train", tokens[:at]), ("valid", tokens[at:])]
    return [(split, part) for split, part in parts if len(part)]


class _SplitWriter:
    """The growing files of a split."""

    def __init__(self, folder: Path, split: Split) -> None:
        self._folder, self._split = folder, split
        self._file = open(folder / f"{split}.u8", "wb")  # noqa: SIM115 (open as long as clips come)
        self._digest = hashlib.sha256()
        self._rows: list[tuple[int, int, int]] = []
        self._names: list[str] = []
        self._at = 0

    def add(self, tokens: Tokens, label: int, clip: ClipSource) -> None:
        content = tokens.tobytes()
        self._file.write(content)
        self._digest.update(content)
        self._rows.append((self._at, len(tokens), label))
        self._names.append(f"{_plain(clip.name)}\t{_plain(clip.speaker)}")
        self._at += len(tokens)

    def close(self) -> SplitEntry:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        rows = np.array(self._rows, np.int64).reshape(-1, 3)
        np.save(self._folder / f"{self._split}.npy", rows)
        (self._folder / f"{self._split}.tsv").write_text("".join(f"{name}\n" for name in self._names), "utf-8")
        self._digest.update(rows.tobytes())
        return SplitEntry(clips=len(rows), samples=self._at, sha256=self._digest.hexdigest())

    def abandon(self) -> None:
        self._file.close()


class _Warnings:
    """Warnings of many files, told as one line a kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, tuple[str, str]] = {}

    def add(self, name: str, warnings: Sequence[AudioWarning]) -> None:
        for warning in warnings:
            self.counts[warning.kind] += 1
            self._first.setdefault(warning.kind, (name, warning.text))

    def lines(self, files: int) -> list[str]:
        lines = []
        for kind, count in self.counts.items():
            name, text = self._first[kind]
            lines.append(f"{name}: {text}" if count == 1 else f"{count:,} of {files:,} files, as {name}: {text}")
        return lines


def _bad_files(bad: Sequence[str], files: int) -> str:
    more = f"; and {len(bad) - NAMED:,} more" if len(bad) > NAMED else ""
    some = f"; {len(bad):,} of {files:,} files cannot be used (--skip-bad leaves them out)" if files > len(bad) else ""
    return "; ".join(bad[:NAMED]) + more + some


def _plain(text: str) -> str:
    return " ".join(text.split())


def _no_clips() -> Clips:
    nothing: Any = np.zeros(0, np.int64)
    return Clips(np.zeros(0, np.uint8), nothing, nothing, nothing, [], hashlib.sha256().hexdigest())
