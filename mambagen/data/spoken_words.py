"""Labelled recordings of single words: the layout of Speech Commands (and SC09), or a table that lists clips.

    clips = read_spoken_words("speech_commands")            # folders zero ... nine, yes, no, ...
    clips = read_spoken_words("speech_index.csv")           # columns path, label, speaker, split, start_frame, n_frames
    train = clips.select(clips.where(split="train"))
    train.one_second([0, 1, 2])                             # (3, 16000) float32

Speakers are never in two splits where the source tells them apart.
"""

import csv
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambagen.data.audio_files import read_audio, resample, without_remarks
from mambagen.data.wav import to_int16
from mambagen.errors import InputError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SILENCE = "_silence_"
RATE = 16_000
SECOND = RATE
SPLITS = ("train", "valid", "test")
SOUNDS = {".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".au"}
READERS = 8  # threads: decoding releases the interpreter

# What Speech Commands' own `which_set` uses, so that its splits come out where the two lists are missing.
_MOST_A_CLASS = 2**27 - 1
_SPLIT_FOLDERS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "test": "test",
                  "testing": "test"}  # fmt: skip


@dataclass(frozen=True)
class SpokenWords:
    """Clips of 16 kHz as 16-bit integers, one after another, and what is known of each."""

    samples: NDArray[np.int16]  # (frames,)
    starts: NDArray[np.int64]  # (clips + 1,)
    labels: tuple[str, ...]
    speakers: tuple[str, ...]
    splits: tuple[str, ...]
    names: tuple[str, ...]
    path: str

    def __len__(self) -> int:
        return len(self.labels)

    def clip(self, row: int) -> NDArray[np.float32]:
        """One clip as it is, between -1 and 1."""
        return self.samples[self.starts[row] : self.starts[row + 1]].astype(np.float32) * np.float32(2**-15)

    def one_second(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """(rows, 16000): shorter clips have zeros after them, of longer ones this is the second with most energy."""
        seconds = [fit_second(self.clip(int(row))) for row in rows]
        return np.stack(seconds) if seconds else np.zeros((0, SECOND), np.float32)

    def where(self, split: str | None = None, labels: Iterable[str] | None = None) -> NDArray[np.int64]:
        """Rows of a split and of some labels."""
        wanted = None if labels is None else set(labels)
        return np.array(
            [
                row
                for row, (label, its_split) in enumerate(zip(self.labels, self.splits, strict=True))
                if (split is None or its_split == split) and (wanted is None or label in wanted)
            ],
            dtype=np.int64,
        )

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> "SpokenWords":
        """These clips alone, in this order."""
        chosen = [int(row) for row in rows]
        pieces = [self.samples[self.starts[row] : self.starts[row + 1]] for row in chosen]
        return _joined(
            pieces,
            [(self.labels[r], self.speakers[r], self.splits[r], self.names[r]) for r in chosen],
            self.path,
        )

    def with_splits(self, splits: Sequence[str]) -> "SpokenWords":
        """The same clips, divided otherwise."""
        return replace(self, splits=tuple(splits))

    def indices(self, classes: Sequence[str]) -> NDArray[np.int64]:
        """The class of each clip; KeyError for a label that is none."""
        number = {name: index for index, name in enumerate(classes)}
        return np.array([number[label] for label in self.labels], dtype=np.int64)

    def fingerprint(self) -> str:
        """SHA-256 of the sounds and their labels."""
        found = hashlib.sha256()
        found.update(np.ascontiguousarray(self.samples).view(np.uint8).data)
        found.update(self.starts.tobytes())
        found.update("\n".join(self.labels).encode())
        return found.hexdigest()


def fit_second(samples: NDArray[np.float32], length: int = SECOND) -> NDArray[np.float32]:
    """`length` samples: zeros after a shorter clip, of a longer one the stretch with most energy."""
    if len(samples) <= length:
        return np.pad(samples, (0, length - len(samples)))
    energy = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
    start = int((energy[length:] - energy[:-length]).argmax())
    return samples[start : start + length]


def read_spoken_words(path: Path | str) -> SpokenWords:
    """The clips of a folder or of a table.

    A folder holds one folder a word, as Speech Commands has it; `validation_list.txt` and `testing_list.txt` say what
    is held out, without them the rule by which the data set itself is divided (a hash of the speaker's name in
    `SPEAKER_nohash_N.wav`). It may also hold train, valid and test folders with a folder a word in each. A folder with
    one `*index*.csv` that has the columns of a table is read as that table.

    A table has the columns path and label; optional are start_frame and n_frames (at the file's own rate),
    speaker, split. Paths are relative to the table.

    Raises:
        InputError: names the file and line that cannot be used.
    """
    path = Path(path)
    if path.is_file():
        return _read_table(path)
    if not path.is_dir():
        raise InputError.at(path, None, "no such file or folder; give a Speech Commands folder or a table of clips")
    word_folders = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    if {entry.name for entry in word_folders} & set(DIGITS):
        return _read_folder(path, {path: None})
    divided: dict[Path, str | None] = {e: _SPLIT_FOLDERS[e.name] for e in word_folders if e.name in _SPLIT_FOLDERS}
    if divided:
        return _read_folder(path, divided)
    tables = [table for table in sorted(path.glob("*index*.csv")) if _has_columns(table)]
    if len(tables) == 1:
        return _read_table(tables[0])
    raise InputError.at(
        path, None, "holds no folders zero to nine, no folders train, valid, test, and no single table of clips"
    )


def split_by_speaker(name: str) -> str:
    """The split of a file SPEAKER_nohash_N by Speech Commands' rule: a tenth each for valid and test."""
    digest = hashlib.sha1(speaker_of(name).encode(), usedforsecurity=False).hexdigest()
    share = (int(digest, 16) % (_MOST_A_CLASS + 1)) * (100.0 / _MOST_A_CLASS)
    return "valid" if share < 10 else "test" if share < 20 else "train"


def speaker_of(name: str) -> str:
    """The speaker in a file name of Speech Commands."""
    return re.sub(r"_nohash_.*$", "", Path(name).stem)


def _read_folder(root: Path, parts: Mapping[Path, str | None]) -> SpokenWords:
    listed: dict[str, str] = {}
    for list_name, split in (("validation_list.txt", "valid"), ("testing_list.txt", "test")):
        if (root / list_name).is_file():
            lines = (root / list_name).read_text("utf-8", errors="replace").split()
            listed |= {str(Path(line).with_suffix("")): split for line in lines}
    files: list[Path] = []
    facts: list[tuple[str, str, str, str]] = []
    noises: list[tuple[Path, str]] = []
    for part, part_split in parts.items():
        for folder in sorted(entry for entry in part.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
            for file in sorted(entry for entry in folder.iterdir() if entry.suffix.lower() in SOUNDS):
                if folder.name == "_background_noise_":
                    noises.append((file, part_split or "train"))
                    continue
                key = f"{folder.name}/{file.stem}"
                split = part_split or (listed.get(key, "train") if listed else split_by_speaker(file.name))
                files.append(file)
                facts.append((folder.name, speaker_of(file.name), split, str(file.relative_to(root))))
    if not files:
        raise InputError.at(root, None, "its folders hold no sound files")
    pieces = [sound for _, sound in _read_all(files, RATE)]
    for file, split in noises:  # minutes long: every second of it is a clip
        _, long = _read_int16(file, RATE)
        for at in range(0, len(long) - SECOND + 1, SECOND):
            pieces.append(long[at : at + SECOND])
            facts.append((SILENCE, "silence", split, f"{file.relative_to(root)}:{at}"))
    return _joined(pieces, facts, str(root))


def _has_columns(table: Path) -> bool:
    with open(table, encoding="utf-8", newline="") as stream:
        return {"path", "label"} <= set(next(csv.reader(stream), []))


def _read_table(path: Path) -> SpokenWords:
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            columns = set(reader.fieldnames or [])
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError.at(path, None, f"is no table of clips: {error}") from error
    except OSError as error:
        raise InputError.at(path, None, f"cannot be read: {error.strerror}") from error
    if missing := {"path", "label"} - columns:
        raise InputError.at(path, 1, f"has no column {' and '.join(sorted(missing))}")
    if not rows:
        raise InputError.at(path, None, "lists no clips")
    files = sorted({row["path"] for row in rows})
    whole = dict(zip(files, _read_all([path.parent / file for file in files], None), strict=True))
    pieces, facts = [], []
    for line, row in enumerate(rows, start=2):
        rate, sound = whole[row["path"]]
        start = _number(path, line, row, "start_frame", 0)
        count = _number(path, line, row, "n_frames", len(sound) - start)
        if start + count > len(sound):
            raise InputError.at(
                path, line, f"frames {start} to {start + count} of {row['path']}, which has {len(sound)}"
            )
        split = row.get("split") or "train"
        if split not in SPLITS:
            raise InputError.at(path, line, f"the split is {split!r}; it must be one of {', '.join(SPLITS)}")
        pieces.append(_at_16k(sound[start : start + count], rate))
        facts.append((row["label"], row.get("speaker") or row["path"], split, f"{row['path']}:{start}"))
    return _joined(pieces, facts, str(path))


def _number(path: Path, line: int, row: Mapping[str, str], column: str, default: int) -> int:
    text = row.get(column) or ""
    if not text:
        return default
    if not text.isdecimal():
        raise InputError.at(path, line, f"{column} is {text!r}, not a number of frames")
    return int(text)


def _read_all(files: Sequence[Path], rate: int | None) -> list[tuple[int, NDArray[np.int16]]]:
    with without_remarks(progress=True), ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(lambda file: _read_int16(file, rate), files))


def _read_int16(path: Path, rate: int | None) -> tuple[int, NDArray[np.int16]]:
    """Samples and their rate: the file's own with None."""
    clip = read_audio(path, rate, fix_nan=None)
    return clip.rate, to_int16(clip.samples)


def _at_16k(samples: NDArray[np.int16], rate: int) -> NDArray[np.int16]:
    if rate == RATE:
        return samples
    return to_int16(resample(samples.astype(np.float32) * np.float32(2**-15), rate, RATE))


def _joined(pieces: Sequence[NDArray[np.int16]], facts: Sequence[tuple[str, str, str, str]], path: str) -> SpokenWords:
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces], dtype=np.int64)]).astype(np.int64)
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.int16)
    labels, speakers, splits, names = zip(*facts, strict=True) if facts else ((), (), (), ())
    return SpokenWords(samples, starts, labels, speakers, splits, names, path)
