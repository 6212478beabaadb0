"""Unpacking of downloaded archives: regular files only, below one folder, up to a size.

Everything else in an archive (links, devices, absolute names, names with ``..``) refuses the whole of it.
"""

import errno
import hashlib
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from mambagen.errors import ResourceError

_BLOCK = 1 << 20
_FILES_AT_MOST = 2_000_000

Member = tuple[str, int, IO[bytes]]


def unpack(archive: Path, kind: str, folder: Path, bytes_at_most: int) -> dict[str, str]:
    """Unpack a ``tar`` (plain or compressed) or ``zip`` archive into ``folder``, which must not exist yet.

    Returns the sha256 of each file by its name below the folder. Raises ResourceError where the archive is damaged,
    holds what is not allowed, or grows beyond ``bytes_at_most``; ``folder`` is then not there.
    """
    scratch = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    try:
        members = _tar_members(archive) if kind == "tar" else _zip_members(archive)
        digests = _write_all(archive, members, scratch, bytes_at_most)
        scratch.chmod(0o755)
        os.rename(scratch, folder)
        return digests
    except ResourceError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full; make room and fetch again" if full else f"unpacking failed: {error}"
        raise ResourceError(f"{archive}: {what}") from None
    except Exception as error:  # damaged archives make the readers raise errors of many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ResourceError(f"{archive}: the archive cannot be unpacked: {reason}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_all(archive: Path, members: Iterator[Member], folder: Path, bytes_at_most: int) -> dict[str, str]:
    digests: dict[str, str] = {}
    left = bytes_at_most
    for name, size, source in members:
        where = _safe(archive, name)
        if str(where) in digests:
            raise ResourceError(f"{archive}: it holds '{name}' twice; it was not unpacked")
        if size > left or len(digests) >= _FILES_AT_MOST:
            raise ResourceError(
                f"{archive}: it unpacks to more than the {bytes_at_most:,} bytes that its manifest allows"
            )
        target = folder / where
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with open(target, "xb") as file:
            while block := source.read(_BLOCK):
                left -= len(block)
                if left < 0:  # a header may lie about the size
                    raise ResourceError(
                        f"{archive}: it unpacks to more than the {bytes_at_most:,} bytes that its manifest allows"
                    )
                digest.update(block)
                file.write(block)
        digests[str(where)] = digest.hexdigest()
    return digests


def _safe(archive: Path, name: str) -> PurePosixPath:
    """A member's name, if it stays below the folder that it is unpacked into."""
    where = PurePosixPath(name)
    if where.is_absolute() or ".." in where.parts or not where.parts or any(c in name for c in "\\:\0"):
        raise ResourceError(f"{archive}: it holds the unsafe name {name!r}; it was not unpacked")
    return where


def _tar_members(archive: Path) -> Iterator[Member]:
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            if member.isdir():
                _safe(archive, member.name + "/x")
                continue
            if not member.isreg():
                raise ResourceError(f"{archive}: '{member.name}' is a link or a device; it was not unpacked")
            source = tar.extractfile(member)
            assert source is not None
            yield member.name, member.size, source


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as zipped:
        for member in zipped.infolist():
            mode = member.external_attr >> 16
            if member.is_dir():
                _safe(archive, member.filename + "x")
                continue
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise ResourceError(f"{archive}: '{member.filename}' is a link or a device; it was not unpacked")
            with zipped.open(member) as source:
                yield member.filename, member.file_size, source
