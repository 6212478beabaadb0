"""Folders that are either whole or not there: written under a temporary name, fsynced, renamed; verified by sha256.

A folder has a `manifest.json` that lists its files with size and SHA-256:

    {"format": 1, "files": {"model.safetensors": {"bytes": 1053824, "sha256": "..."}, ...}}

Model folders and training checkpoints are written with this. Standard library and pydantic only.
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mambagen.errors import ModelError, ResourceError, UsageError

MANIFEST = "manifest.json"
Writer = Callable[[Path], None]
_CHECKPOINT = re.compile(r"step-(\d{8,})")


class FileEntry(BaseModel):
    """One file of a folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class FolderManifest(BaseModel):
    """What `manifest.json` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    files: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$")], FileEntry]


def write_folder_atomically(
    folder: Path | str, writers: Mapping[str, Writer], unlisted: Iterable[str] = (), replace: bool = False
) -> None:
    """Write a folder of files so that its final name never shows a part of them, not even after a power cut.

    Args:
        folder: where it shall stand; missing parents are made.
        writers: file name -> a function that writes the file at the path it is given, raising OSError where it cannot.
        unlisted: files that the manifest leaves out, as people may edit them (the README).
        replace: put it in the place of a folder that was written by this function before.

    Raises:
        UsageError: something stands there already (with `replace`: something that is not such a folder).
        ResourceError: the disk is full or cannot be written. What stood there before is untouched.
    """
    target = Path(os.path.realpath(folder))  # through links, and with a name also where it is "."
    unlisted = set(unlisted)
    partial = _partial_name(target)
    try:
        if target.exists() and not replace:
            raise UsageError(f"{folder}: already exists; choose another name or remove it first")
        if target.exists() and not (target / MANIFEST).is_file():
            raise UsageError(f"{folder}: is not a folder that mambagen wrote (no {MANIFEST}), so it is not replaced")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        entries = {}
        for name, write in writers.items():
            write(partial / name)
            _sync(partial / name)
            if name not in unlisted:
                entries[name] = _entry(partial / name)
        manifest = FolderManifest(files=entries)
        (partial / MANIFEST).write_text(json.dumps(manifest.model_dump(), indent=1) + "\n", encoding="utf-8")
        _sync(partial / MANIFEST)
        _sync(partial)
        _put_in_place(partial, target)
        _sync(target.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.filename and not str(error.filename).startswith(str(partial)):
            reason += f" ({error.filename})"
        raise ResourceError(f"{folder}: cannot be written: {reason}; free space or choose another place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # what is left of a failed write, or the folder that was replaced


def verify_folder(folder: Path | str, names: Iterable[str] | None = None) -> FolderManifest:
    """Check the files of a folder (or only those named) against its manifest, byte for byte.

    Raises:
        ModelError: names the first file that is missing, cut off or changed, or says why there is no manifest to read.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name in manifest.files if names is None else names:
        path = folder / name
        if name not in manifest.files:
            raise ModelError(f"{path}: is not listed in {MANIFEST}; the folder is of another kind")
        expected = manifest.files[name]
        try:
            size = path.stat().st_size
            if size != expected.bytes:
                change = "cut off" if size < expected.bytes else "changed"
                raise ModelError(
                    f"{path}: {change}: {size} bytes where {MANIFEST} says {expected.bytes}; take another copy"
                )
            if _entry(path).sha256 != expected.sha256:
                raise ModelError(
                    f"{path}: damaged or edited after it was written: its SHA-256 is not the one in {MANIFEST}; "
                    "take another copy"
                )
        except FileNotFoundError:
            raise ModelError(f"{path}: missing; the folder is incomplete, take another copy") from None
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    return manifest


def read_manifest(folder: Path | str) -> FolderManifest:
    """The manifest of a folder, read but not yet held against the files; ModelError where there is none."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not os.path.exists(folder):
        raise ModelError(f"{folder}: no such folder; give a model folder that mambagen wrote")
    if not os.path.isdir(folder):
        raise ModelError(f"{folder}: is a file; give the model folder itself")
    if not os.path.exists(path):
        raise ModelError(f"{folder}: has no {MANIFEST}, so it is no model folder of mambagen or an incomplete one")
    fields = read_json(path)
    if fields.get("format") != 1:
        raise ModelError(f"{path}: format {fields.get('format')!r} is not known to this mambagen (1); upgrade mambagen")
    try:
        return FolderManifest.model_validate(fields)
    except ValidationError as error:
        raise ModelError(f"{path}: damaged: {first_fault(error)}") from None


def read_json(path: Path) -> dict[str, object]:
    """A file that holds one JSON object; ModelError (with the line where it breaks) for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; the folder is incomplete, take another copy") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}:{error.lineno}: damaged: not JSON ({error.msg}); take another copy") from None
    except (UnicodeDecodeError, RecursionError):
        raise ModelError(f"{path}: damaged: not JSON text; take another copy") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: damaged: holds a {type(value).__name__} where an object is expected")
    return value


def first_fault(error: ValidationError) -> str:
    """The first thing that pydantic found wrong, on one line: `model.d_state: Input should be ...`."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"unknown key {where}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def remove_partial_folders(parent: Path | str) -> list[Path]:
    """Remove what killed writers left in a folder; only for a folder into which nobody writes now.

    Returns what was removed.
    """
    left = [path for path in Path(parent).glob(".*.partial-*") if path.is_dir() and not path.is_symlink()]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return left


def _partial_name(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial-{secrets.token_hex(4)}")


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileEntry(bytes=file.tell(), sha256=digest.hexdigest())


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # a folder cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename, exchanging the two where a folder stands there already (it is then found under the partial's name)."""
    if not folder.exists():
        partial.rename(folder)
        return
    if _exchange(partial, folder):
        return
    aside = _partial_name(folder)
    folder.rename(aside)  # no exchange in one step on this system: a moment without either
    try:
        partial.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    aside.rename(partial)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step (renameat2 of Linux); False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of what bears a checkpoint's name, newest first; nothing is verified."""
    if not folder.is_dir():
        return []
    found = [(_CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)
