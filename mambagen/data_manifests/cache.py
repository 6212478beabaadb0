"""Data sets on this machine: fetching them into the cache, checking them, and finding their files.

The cache is ``MAMBAGEN_HOME``, or else the platform's own cache folder. A data set lies in ``data/NAME`` of it, beside
``pins.json``, which holds what the fetch saw of each file: where a manifest cannot name a checksum, later fetches and
checks are held against that.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mambagen.data_manifests.download import Progress, ResumingDownloader
from mambagen.data_manifests.manifest import (
    FileEntry,
    Manifest,
    SplitInterval,
    load_manifest,
    manifest_names,
    read_bed,
    shipped,
)
from mambagen.data_manifests.unpack import unpack
from mambagen.errors import InputError, MambagenError, ResourceError, UsageError

log = logging.getLogger("mambagen")

State = Literal["ok", "missing", "damaged"]


@dataclass(frozen=True)
class Pin:
    """What was seen of a file when it came."""

    sha256: str
    bytes: int
    url: str
    fetched: str  # UTC, ISO 8601
    unpacked: dict[str, str]  # sha256 of the files of an archive, by name


@dataclass(frozen=True)
class FileReport:
    """A file of a data set as it was found: ``note`` says what is wrong, or against what it was checked."""

    file: str
    path: Path
    state: State
    bytes: int | None
    sha256: str | None
    note: str


def cache_home() -> Path:
    """The folder for everything that is fetched: ``MAMBAGEN_HOME``, or else the platform's cache folder."""
    if home := os.environ.get("MAMBAGEN_HOME"):
        return Path(home).expanduser()
    import pooch

    return Path(pooch.os_cache("mambagen"))


def folder_of(manifest: Manifest) -> Path:
    """Where a data set's fetched files lie."""
    return cache_home() / "data" / manifest.name


def path_of(manifest: Manifest, file: FileEntry) -> Path:
    """Where a file of a data set lies, whether it is there or not."""
    return shipped() / file.packaged if file.packaged else folder_of(manifest) / file.name


def unpacked_path(manifest: Manifest, file: FileEntry) -> Path:
    """The folder that an archive is unpacked into."""
    return folder_of(manifest) / f"{file.name}.unpacked"


def present(manifest: Manifest) -> bool:
    """Are all files in place? Their content is not looked at: ``verify`` does that."""
    return all(
        path_of(manifest, file).is_file() and (file.unpack == "none" or unpacked_path(manifest, file).is_dir())
        for file in manifest.files
    )


def fetch(manifest: Manifest, progress: Progress | None = None, attempts: int = 5, pause: float = 1.0) -> Path:
    """Bring a data set into the cache and return its folder; what is there and whole is left as it is.

    Raises ResourceError where a download, a checksum, the disk or an archive fails: nothing is then left under a final
    name, but the part that came is kept, and the next fetch goes on from it.
    """
    if manifest.packaged:
        _demand_ok(manifest, verify(manifest))
        return path_of(manifest, manifest.files[0]).parent
    folder = folder_of(manifest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            for file in manifest.files:
                if file.packaged is None:
                    _fetch_file(manifest, file, progress, attempts, pause)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full; make room, or" if full else f"it cannot be written ({error.strerror or error});"
        raise ResourceError(f"{folder}: {what} set MAMBAGEN_HOME to another folder") from None
    return folder


def verify(manifest: Manifest) -> list[FileReport]:
    """Read every file of a data set again and compare its checksum: with the manifest, or else with its pin."""
    pins = _read_pins(folder_of(manifest))
    return [_inspect(manifest, file, pins.get(file.name)) for file in manifest.files]


def sequence_paths(manifest: Manifest) -> list[Path]:
    """The FASTA files of a data set that is in place. Raises InputError where it is not, or is not DNA."""
    if manifest.kind != "dna":
        raise InputError(f"the data set '{manifest.name}' is {manifest.kind}, not DNA")
    if not present(manifest):
        raise InputError(f"the data set '{manifest.name}' is not here yet; run: mambagen data fetch {manifest.given}")
    return [path_of(manifest, file) for file in manifest.files if file.role == "sequence"]


def split_intervals(manifest: Manifest) -> list[SplitInterval]:
    """The intervals that a data set in place is divided by; empty where it has none (see ``chromosomes_of``)."""
    if manifest.splits is None:
        return []
    if manifest.splits.bed:
        return read_bed(folder_of(manifest) / manifest.splits.bed)
    return [SplitInterval(row.record, row.start, row.end, row.split) for row in manifest.splits.intervals]


def resolve_dna(data: Sequence[str | Path]) -> list[Path | Literal["-"]]:
    """The files behind what a user gave as data: names of data sets, manifest files, DNA files, ``-`` for stdin.

    Raises UsageError where nothing or stdin twice is given, InputError for what is neither a file nor a data set, or a
    data set that is not fetched yet. A name of a data set comes before a file so called: write ./NAME for the file.
    """
    if not data:
        raise UsageError("no data is given; name a data set (demo), a FASTA file, or - for stdin")
    files: list[Path | Literal["-"]] = []
    for given in map(str, data):
        if given == "-":
            files.append("-")
        elif given.endswith(".toml") or given in manifest_names():
            files += sequence_paths(load_manifest(given))
        elif os.path.lexists(given) or os.path.basename(given) != given or "." in given:
            files.append(Path(given))
        else:
            names = ", ".join(manifest_names())
            raise InputError(f"{given}: no such file, and no data set of this name (there are {names})")
    if files.count("-") > 1:
        raise UsageError("'-' is given twice, but stdin can be read once only")
    return files


def default_splits(data: Sequence[str | Path]) -> list[SplitInterval]:
    """The intervals that the data sets among ``data`` are divided by; files of the user's own have none."""
    names = [str(given) for given in data if str(given).endswith(".toml") or str(given) in manifest_names()]
    return [interval for name in names for interval in split_intervals(load_manifest(name))]


def chromosomes_of(data: Sequence[str | Path]) -> list[tuple[list[Path], dict[str, tuple[str, ...]]]]:
    """For each data set among ``data`` that is divided by chromosomes: its files, and the labels of each part."""
    names = [str(given) for given in data if str(given).endswith(".toml") or str(given) in manifest_names()]
    divided = []
    for manifest in map(load_manifest, names):
        if manifest.splits and (entry := manifest.splits.chromosomes):
            labels = {"train": entry.train, "valid": entry.valid, "test": entry.test}
            divided.append((sequence_paths(manifest), labels))
    return divided


# ---- one file -------------------------------------------------------------------------------------------------------


def _fetch_file(manifest: Manifest, file: FileEntry, progress: Progress | None, attempts: int, pause: float) -> None:
    folder = folder_of(manifest)
    pin = _read_pins(folder).get(file.name)
    found = _inspect(manifest, file, pin)
    if found.state == "ok" and pin:
        return
    if found.state == "ok":
        log.warning("%s: taken as it is, its checksum is noted in pins.json", found.path)
        url = "found in place"
    elif found.state == "damaged" and pin and found.sha256 == pin.sha256:
        url = pin.url  # the archive is whole, only what it was unpacked to is not
    else:
        if found.state == "damaged":
            log.warning("%s: %s; fetching it again", found.path, found.note)
            found.path.unlink(missing_ok=True)
        url = _download(manifest, file, pin, progress, attempts, pause)
    path = path_of(manifest, file)
    digest, size = sha256_of(path)
    if file.bytes is not None and size != file.bytes:
        path.unlink()
        raise ResourceError(f"{url}: it has {size:,} bytes, its manifest says {file.bytes:,}; it was not kept")
    unpacked: dict[str, str] = {}
    if file.unpack != "none":
        target = unpacked_path(manifest, file)
        _remove_folder(target)
        try:
            unpacked = unpack(path, file.unpack, target, file.unpacked_bytes_at_most)
        except ResourceError:
            path.unlink()  # an archive that cannot be used must not look like one that is in place
            raise
    fetched = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    _write_pin(folder, file.name, Pin(digest, size, url, fetched, unpacked))


def _download(
    manifest: Manifest, file: FileEntry, pin: Pin | None, progress: Progress | None, attempts: int, pause: float
) -> str:
    """Download from the first address that works and has the right checksum; returns the address."""
    import pooch

    pooch.get_logger().setLevel("ERROR")  # it would tell what progress and pins tell
    folder = folder_of(manifest)
    downloader = ResumingDownloader(folder / f"{file.name}.part", progress, attempts, pause)
    expected = file.known_sha256 or (pin.sha256 if pin else None)
    failure: MambagenError | None = None
    begun = downloader.begun_from()
    for url in sorted(file.urls, key=lambda url: url != begun):  # what was begun is gone on with
        try:
            pooch.retrieve(
                url,
                known_hash=f"sha256:{expected}" if expected else None,
                fname=file.name,
                path=folder,
                downloader=downloader,
            )
            return url
        except ResourceError as error:
            failure = error
        except ValueError as error:  # pooch's word for a checksum that does not agree
            seen = re.search(r"got ([0-9a-f]{64})", str(error))
            whose = "its manifest" if file.known_sha256 else f"the fetch of {pin.fetched if pin else ''}"
            failure = ResourceError(
                f"{url}: the sha256 is {seen[1] if seen else 'another'}, {whose} says {expected}; the download was"
                f" damaged or the file has changed; nothing was kept, fetch it again"
            )
    assert failure is not None
    raise failure


def _inspect(manifest: Manifest, file: FileEntry, pin: Pin | None) -> FileReport:
    path = path_of(manifest, file)
    if not path.is_file():
        return FileReport(file.name, path, "missing", None, None, "not fetched")
    digest, size = sha256_of(path)
    expected = file.known_sha256 or (pin.sha256 if pin else None)
    if expected and digest != expected:
        whose = "the manifest's" if file.known_sha256 else "the one of its first fetch"
        return FileReport(file.name, path, "damaged", size, digest, f"its sha256 is not {whose}, {expected}")
    if file.unpack != "none" and pin and (fault := _unpacked_fault(unpacked_path(manifest, file), pin)):
        return FileReport(file.name, path, "damaged", size, digest, fault)
    note = (
        "as in the manifest" if file.known_sha256 else f"as at its first fetch, {pin.fetched}" if pin else "not pinned"
    )
    return FileReport(file.name, path, "ok", size, digest, note)


def _unpacked_fault(folder: Path, pin: Pin) -> str | None:
    for name, digest in pin.unpacked.items():
        if not (folder / name).is_file():
            return f"unpacked file {name} is missing"
        if sha256_of(folder / name)[0] != digest:
            return f"unpacked file {name} has changed"
    return None


def _demand_ok(manifest: Manifest, reports: list[FileReport]) -> None:
    for report in reports:
        if report.state != "ok":
            raise ResourceError(f"{report.path}: {report.note}; install mambagen again")


def sha256_of(path: Path) -> tuple[str, int]:
    """Checksum and size in bytes of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()


# ---- pins and the lock ----------------------------------------------------------------------------------------------


def _read_pins(folder: Path) -> dict[str, Pin]:
    path = folder / "pins.json"
    if not path.exists():
        return {}
    try:
        return {name: Pin(**pin) for name, pin in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        raise ResourceError(f"{path}: it is damaged; delete it, and fetch the data set again") from None


def _write_pin(folder: Path, name: str, pin: Pin) -> None:
    pins = {key: asdict(value) for key, value in (_read_pins(folder) | {name: pin}).items()}
    scratch = folder / ".pins.json.new"
    with open(scratch, "w") as file:
        json.dump(pins, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, folder / "pins.json")


def _remove_folder(folder: Path) -> None:
    import shutil

    if folder.exists():
        shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One fetch of a data set at a time: two processes that grow the same part would spoil it."""
    with open(folder / ".lock", "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):  # not on this platform or file system
            pass
        yield
