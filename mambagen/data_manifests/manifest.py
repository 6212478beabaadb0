"""The manifest of a data set: what it is, where it comes from, under which licence, how it is checked and divided."""

import difflib
import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from mambagen.errors import InputError, UsageError

PIN_AT_FIRST_FETCH = "unknown: pin at first fetch"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]  # no separators, no ".."
Split = Literal["train", "valid", "test"]


class SplitInterval(NamedTuple):
    """Bases [start, end) of a record, 0-based, and the part they belong to."""

    record: str
    start: int
    end: int
    split: str


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Strict):
    """One file: downloaded from the first of ``urls`` that works, or ``packaged`` with mambagen itself."""

    name: Name
    urls: tuple[str, ...] = ()
    packaged: str | None = None
    sha256: Annotated[str, Field(pattern=f"^([0-9a-f]{{64}}|{PIN_AT_FIRST_FETCH})$")]
    bytes: Annotated[int, Field(ge=0)] | None = None
    unpack: Literal["none", "tar", "zip"] = "none"
    unpacked_bytes_at_most: Annotated[int, Field(gt=0)] = 50 * 10**9
    role: Literal["sequence", "splits", "audio", "other"]

    @field_validator("urls")
    @classmethod
    def _only_http(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("https://", "http://")):
                raise ValueError(f"{url} is no http or https address")
        return urls

    @model_validator(mode="after")
    def _one_origin(self) -> "FileEntry":
        if bool(self.urls) == bool(self.packaged):
            raise ValueError("a file has either urls or packaged")
        return self

    @property
    def known_sha256(self) -> str | None:
        """The checksum, None where it is to be pinned at the first fetch."""
        return None if self.sha256 == PIN_AT_FIRST_FETCH else self.sha256


class IntervalEntry(_Strict):
    """One row of a split, 0-based and half-open."""

    record: str
    start: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(gt=0)]
    split: Split

    @model_validator(mode="after")
    def _not_empty(self) -> "IntervalEntry":
        if self.end <= self.start:
            raise ValueError(f"start {self.start} is not before end {self.end}")
        return self


Label = Annotated[str, Field(pattern=r"^([0-9]{1,2}[AB]?|[XYWZM]|MT)$")]


class ChromosomeEntry(_Strict):
    """Whole chromosomes of every file, by their labels ("1", "2A", "X"); what is in none of the three is left out."""

    train: Annotated[tuple[Label, ...], Field(min_length=1)]
    valid: tuple[Label, ...] = ()
    test: tuple[Label, ...] = ()

    @model_validator(mode="after")
    def _each_once(self) -> "ChromosomeEntry":
        labels = self.train + self.valid + self.test
        if twice := {label for label in labels if labels.count(label) > 1}:
            raise ValueError(f"chromosome {min(twice)} is named twice")
        return self


class Splits(_Strict):
    """How the data set is divided: intervals written out, a BED file (record, start, end, split) among its files, or
    whole chromosomes.

    Where a file of sequences has no train interval, all of it that is neither valid nor test is for training.
    """

    intervals: tuple[IntervalEntry, ...] = ()
    bed: Name | None = None
    chromosomes: ChromosomeEntry | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "Splits":
        if bool(self.intervals) + bool(self.bed) + bool(self.chromosomes) != 1:
            raise ValueError("splits are given either as intervals or as bed or as chromosomes")
        return self


class AudioLayout(_Strict):
    """Which sound files of the unpacked archive are the data set's, and how they are divided.

    Either by the lists of Speech Commands beside them, of which the folders `labels` are taken, or by their place in
    natural order: from file `valid_from` (counted from 0) validation, from `test_from` test.
    """

    labels: tuple[str, ...] = ()
    files: Annotated[int, Field(gt=0)] | None = None  # how many there must be
    valid_from: Annotated[int, Field(ge=0)] | None = None
    test_from: Annotated[int, Field(ge=0)] | None = None


class Manifest(_Strict):
    """A data set. ``kind`` says which jobs can use it."""

    name: Name
    title: str
    kind: Literal["dna", "audio"]
    licence: str
    provenance: str
    citations: tuple[str, ...] = ()
    notes: str = ""
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1)]
    splits: Splits | None = None
    _given: str = PrivateAttr("")
    audio: AudioLayout | None = None  # of kind "audio"

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        names = [file.name for file in self.files]
        if len(set(names)) < len(names):
            raise ValueError("two files share a name")
        if self.splits and self.splits.bed and self.splits.bed not in names:
            raise ValueError(f"splits.bed names {self.splits.bed}, which is not among the files")
        return self

    @property
    def given(self) -> str:
        """What a command takes for this data set: its name, or the path of a manifest of the user's own."""
        return self._given or self.name

    @property
    def packaged(self) -> bool:
        """Does all of it come with mambagen, so that nothing is to be fetched?"""
        return all(file.packaged for file in self.files)


def shipped() -> Path:
    """The folder of the manifests that come with mambagen."""
    return Path(str(resources.files("mambagen.data_manifests")))


def manifest_names() -> list[str]:
    """Names of the manifests that come with mambagen."""
    return sorted(path.stem for path in shipped().glob("*.toml"))


def list_manifests() -> list[Manifest]:
    """The manifests that come with mambagen, by name."""
    return [load_manifest(name) for name in manifest_names()]


def load_manifest(name_or_path: str | Path) -> Manifest:
    """A manifest by its name, or from a TOML file of the user's own.

    Raises UsageError for an unknown name, InputError for a file that is no valid manifest.
    """
    text = str(name_or_path)
    own_file = text.endswith(".toml")
    if not own_file and text not in manifest_names():
        raise UsageError(f"no data set is called '{text}'; {_known(text)} (a manifest file of your own ends in .toml)")
    path = Path(text) if own_file else shipped() / f"{text}.toml"
    try:
        with path.open("rb") as file:
            manifest = Manifest.model_validate(tomllib.load(file))
    except OSError as error:
        raise InputError.at(path, None, f"the manifest cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError.at(path, None, f"the manifest is no TOML: {error}") from None
    except ValidationError as error:
        raise InputError.at(path, None, f"the manifest is not valid: {_faults(error)}") from None
    if own_file and manifest.name in manifest_names() and path.resolve().parent != shipped().resolve():
        raise InputError.at(
            path, None, f"the name '{manifest.name}' is taken by a data set of mambagen; choose another"
        )
    manifest._given = text
    return manifest


def _known(text: str) -> str:
    names = manifest_names()
    near = difflib.get_close_matches(text, names, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"


def _faults(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in fault['loc']) or 'manifest'}: {fault['msg']}" for fault in error.errors()
    )


def read_bed(path: str | Path) -> list[SplitInterval]:
    """The rows (record, start, end, split) of a BED file; further columns are passed over.

    Raises InputError with file and line for rows that are not of this form.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return list(_bed_rows(path, file))
    except OSError as error:
        raise InputError.at(path, None, f"the intervals cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError.at(path, None, "the intervals are no text; give a plain BED file") from None


def _bed_rows(path: str | Path, lines: Iterable[str]) -> Iterable[SplitInterval]:
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields or fields[0].startswith("#") or fields[0] in ("track", "browser"):
            continue
        if len(fields) < 4 or not (fields[1].isdecimal() and fields[2].isdecimal()):
            raise InputError.at(path, number, "a row must be: record, start, end, split (train, valid or test)")
        row = SplitInterval(fields[0], int(fields[1]), int(fields[2]), fields[3])
        if row.start >= row.end:
            raise InputError.at(path, number, f"start {row.start} is not before end {row.end}")
        if row.split not in ("train", "valid", "test"):
            raise InputError.at(path, number, f"the split must be train, valid or test, not '{row.split}'")
        yield row
