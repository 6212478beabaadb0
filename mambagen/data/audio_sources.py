"""Which clips there are in what a user gives as audio: folders, lists, tables, single files.

    find_clips(["recordings/"])                 # every audio file below the folder
    find_clips(["speech_commands_v0.02/"])      # a folder a word; its own lists say what is held out
    find_clips(["index.csv"])                   # path,start_frame,n_frames,digit,speaker,split; paths beside the table
    find_clips(["files.txt"])                   # a path a line

Nothing is decoded here.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mambagen.data.audio_files import SUFFIXES
from mambagen.data.spoken_words import DIGITS, speaker_of, split_by_speaker
from mambagen.errors import InputError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
LISTS: tuple[tuple[str, Split], ...] = (("validation_list.txt", "valid"), ("testing_list.txt", "test"))
NOISE = "_background_noise_"  # of Speech Commands: minutes of noise, no words


@dataclass(frozen=True)
class ClipSource:
    """A clip: a file or a part of it, and what is known of it."""

    path: Path
    name: str  # for messages
    start: int = 0  # frames at the file's own rate
    frames: int | None = None  # None: to the end
    label: str = ""  # the word, or the folder
    speaker: str = ""
    split: Split | None = None  # None: nobody said


def find_clips(data: Sequence[str | Path], labels: Iterable[str] | None = None) -> list[ClipSource]:
    """The clips of all that is given, in its order; folders in natural order of their names (2 before 10).

    Args:
        labels: only clips with one of these.

    Raises:
        InputError: what is not there, holds no audio, or a row of a table that cannot be meant.
    """
    wanted = None if labels is None else set(labels)
    found: list[ClipSource] = []
    for given in data:
        path = Path(given)
        if path.is_dir():
            clips = _folder(path)
        elif path.suffix.lower() == ".csv":
            clips = list(_table(path))
        elif path.suffix.lower() in (".txt", ".lst"):
            clips = list(_list(path))
        else:
            clips = [ClipSource(path, str(given), label=path.parent.name)]
        kept = clips if wanted is None else [clip for clip in clips if clip.label in wanted]
        if clips and not kept:
            some = ", ".join(sorted({clip.label for clip in clips})[:5])
            asked = ", ".join(sorted(wanted or ())[:10])
            raise InputError.at(path, None, f"holds no clip that is labelled {asked} (but {some or 'nothing'})")
        found += kept
    return found


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key by which names sort as people count: clip2 before clip10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def _folder(root: Path) -> list[ClipSource]:
    """All audio below a folder, divided by lists where it has them (Speech Commands), or by speakers' names."""
    found = (file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    visible = (file for file in found if not any(part.startswith(".") for part in file.relative_to(root).parts))
    files = sorted(visible, key=lambda file: natural(str(file.relative_to(root))))
    if not files:
        raise InputError.at(root, None, f"holds no audio files ({', '.join(SUFFIXES[:6])}, ...)")
    listed = _listed(root)
    clips = []
    for file in files:
        below = file.relative_to(root)
        if NOISE in below.parts:
            continue
        split: Split | None = None
        if listed is not None:
            split = listed.get(str(below.with_suffix("")), "train")
        elif "_nohash_" in file.name:
            split = _checked_split(root, None, split_by_speaker(file.name))
        speaker = speaker_of(file.name) if "_nohash_" in file.name else ""
        clips.append(ClipSource(file, str(file), label=file.parent.name, speaker=speaker, split=split))
    return clips


def _listed(root: Path) -> dict[str, Split] | None:
    """File -> split of the official lists, without suffixes (copies exist in other formats); None without lists."""
    found: dict[str, Split] = {}
    for name, split in LISTS:
        if not (root / name).is_file():
            return None
        for line in (root / name).read_text("utf-8", errors="replace").split():
            found[str(Path(line).with_suffix(""))] = split
    return found


def _list(path: Path) -> Iterator[ClipSource]:
    for number, line in enumerate(_lines(path), start=1):
        name = line.strip()
        if name and not name.startswith("#"):
            file = path.parent / name
            if not file.is_file():
                raise InputError.at(path, number, f"{name}: no such file beside the list")
            yield ClipSource(file, name, label=file.parent.name)


def _table(path: Path) -> Iterator[ClipSource]:
    reader = csv.DictReader(_lines(path))
    columns = [name.strip() for name in reader.fieldnames or []]
    if "path" not in columns:
        raise InputError.at(path, 1, "has no column called path; a table of clips needs path, and may have "
                                     "start_frame, n_frames, digit or label, speaker, split")  # fmt: skip
    count = 0
    for number, row in enumerate(reader, start=2):
        name = (row.get("path") or "").strip()
        file = path.parent / name
        if not name:
            raise InputError.at(path, number, "has no path")
        if not file.is_file():
            raise InputError.at(path, number, f"{name}: no such file beside the table")
        count += 1
        yield ClipSource(
            file,
            f"{name}:{row['start_frame']}" if row.get("start_frame") else name,
            start=_count(path, number, row, "start_frame") or 0,
            frames=_count(path, number, row, "n_frames"),
            label=_label(path, number, row),
            speaker=(row.get("speaker") or "").strip(),
            split=_checked_split(path, number, (row.get("split") or "").strip()),
        )
    if not count:
        raise InputError.at(path, None, "lists no clips")


def _label(path: Path, number: int, row: Mapping[str, str | None]) -> str:
    digit = (row.get("digit") or "").strip()
    if digit:
        if digit not in "0123456789" or len(digit) != 1:
            raise InputError.at(path, number, f"the digit is {digit!r}, not one of 0 to 9")
        return DIGITS[int(digit)]
    return (row.get("label") or "").strip()


def _count(path: Path, number: int, row: Mapping[str, str | None], column: str) -> int | None:
    text = (row.get(column) or "").strip()
    if not text:
        return None
    if not text.isdecimal():
        raise InputError.at(path, number, f"{column} is {text!r}, not a number of frames")
    return int(text)


def _checked_split(path: Path, number: int | None, text: str) -> Split | None:
    if not text:
        return None
    for split in SPLITS:
        if text == split:
            return split
    raise InputError.at(path, number, f"the split is {text!r}; it must be train, valid or test")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise InputError.at(path, None, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError.at(path, None, "is no text; a list or table of clips is needed here") from None
