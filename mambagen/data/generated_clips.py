"""A folder of sound files that some generator made, as clips of one second, with a note for all that was not so.

clips = read_generated("samples/")
clips.samples                        # (N, 16000) float32
clips.asked                          # the digit that a clip was to be, where folder or file name says so, or -1
for note in clips.notes: print(note) # samples/12.wav: too long: 2.00 s, the first second is used
"""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambagen.data.audio_files import SUFFIXES, AudioWarning, audio_info, read_audio, without_remarks
from mambagen.data.spoken_words import DIGITS, RATE, READERS, SECOND
from mambagen.errors import InputError

MORE = 0.1  # seconds beyond the first that are read of a long file, so that resampling has what comes after


@dataclass(frozen=True)
class Note:
    """Something about one file: what it was and what was done."""

    path: str
    kind: str  # one word: unreadable, short, long, resampled, stereo, silent, ...
    text: str
    left_out: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@dataclass(frozen=True)
class GeneratedClips:
    """Clips of one second at 16 kHz in the natural order of their files' names."""

    samples: NDArray[np.float32]  # (N, 16000)
    names: tuple[str, ...]  # relative to the folder
    asked: NDArray[np.int64]  # (N,) index of the digit, -1 where nothing says
    notes: tuple[Note, ...]
    path: str

    def __len__(self) -> int:
        return len(self.samples)


def read_generated(
    folder: Path | str, limit: int | None = None, done: Callable[[int, int], None] | None = None
) -> GeneratedClips:
    """The sound files in a folder and the folders in it; what cannot be used is left out with a note.

    Args:
        limit: use the first so many files.
        done: is told how many files of how many are read.

    Raises:
        InputError: no folder, no sound files in it, or none that can be used.
    """
    root = Path(folder)
    if not root.is_dir():
        what = "is a file; give the folder that holds the clips" if root.exists() else "no such folder"
        raise InputError.at(folder, None, what)
    files = [
        path for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not _hidden(path.relative_to(root))
    ]  # fmt: skip
    files = sorted(files, key=lambda path: natural(str(path.relative_to(root))))[:limit]
    if not files:
        raise InputError.at(folder, None, f"holds no sound files ({', '.join(SUFFIXES[:4])}, ...)")
    found = []
    with without_remarks(progress=True), ThreadPoolExecutor(READERS) as readers:
        for result in readers.map(lambda path: _read(path, root), files):
            found.append(result)
            if done is not None:
                done(len(found), len(files))
    notes = tuple(note for _, its in found for note in its)
    used = [(file, samples) for file, (samples, _) in zip(files, found, strict=True) if samples is not None]
    if not used:
        raise InputError(f"{folder}: none of its {len(files)} files can be used; the first: {notes[0]}")
    names = tuple(str(file.relative_to(root)) for file, _ in used)
    samples = np.stack([samples for _, samples in used])
    return GeneratedClips(samples, names, np.array([asked_digit(name) for name in names]), notes, str(folder))


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts 2.wav before 10.wav."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def asked_digit(name: str) -> int:
    """The digit whose word stands in a file's name (seven_0012.wav) or its folder's (seven/0012.wav), or -1."""
    path = Path(name)
    for text in (path.stem, path.parent.name):
        words = [DIGITS.index(word) for word in re.split(r"[^a-z]+", text.lower()) if word in DIGITS]
        if len(set(words)) == 1:
            return words[0]
    return -1


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read(path: Path, root: Path) -> tuple[NDArray[np.float32] | None, list[Note]]:
    """One second of a file, or None, and what there is to say of it."""
    name = str(path.relative_to(root))
    try:
        info = audio_info(path)
        clip = read_audio(path, RATE, fix_nan=None, frames=min(info.frames, int((1 + MORE) * info.rate) + 1))
    except InputError as error:
        text = str(error).removeprefix(f"{path}: ")
        return None, [Note(name, "unreadable", f"left out: {text}", left_out=True)]
    warnings: list[AudioWarning] = [w for w in clip.warnings if w.kind != "truncated" or info.seconds <= 1 + MORE]
    notes = [Note(name, warning.kind, warning.text) for warning in warnings]
    length = round(info.frames * RATE / info.rate)
    if length > SECOND:
        notes.append(Note(name, "long", f"too long: {info.seconds:.2f} s; the first second is used"))
    elif len(clip.samples) < SECOND:
        missing = len(clip.samples) / RATE
        notes.append(Note(name, "short", f"too short: {missing:.2f} s; silence is put after it"))
    samples = clip.samples[:SECOND]
    return np.pad(samples, (0, SECOND - len(samples))), notes


def summary(notes: Sequence[Note]) -> list[str]:
    """One line a kind of note: how many files, and the first of them."""
    kinds: dict[str, list[Note]] = {}
    for note in notes:
        kinds.setdefault(note.kind, []).append(note)
    return [
        str(its[0]) if len(its) == 1 else f"{len(its)} files are {kind}, such as {its[0]}"
        for kind, its in kinds.items()
    ]
