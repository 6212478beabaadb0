"""Files that are either whole or not there: written under a temporary name, fsynced, then renamed."""

import contextlib
import errno
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from mambagen.errors import ResourceError, UsageError

STDOUT = "-"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """A temporary path beside ``path``, with the same suffixes, that takes its name when the block ends well.

    Whatever goes wrong before, nothing is left and an earlier file of that name stays as it was.

    Raises UsageError where ``path`` is a folder or a device, ResourceError where its folder is missing or cannot be
    written.
    """
    target = Path(path)
    if target.is_dir():
        raise UsageError(f"{path}: is a folder; name the file to write")
    if _is_special(target):  # a rename would put a file in its place: /dev/null would be one from then on
        raise UsageError(f"{path}: is a device or pipe; this is written into a file only")
    partial = target.with_name(f".partial-{secrets.token_hex(4)}-{target.name}")
    try:
        partial.open("xb").close()  # said before hours of work, not after
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror or error}; choose another place") from None
    try:
        with naming(path):
            yield partial
            descriptor = os.open(partial, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Have a full disk told with this name: a failed write does not say to what file."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM and error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def writable_folder(path: Path, make: bool) -> Iterator[None]:
    """Have a folder (with `make` a new one, if need be) into which files can be written: said before the work.

    A folder that was made here and holds nothing when the block fails is taken away again.

    Raises ResourceError where it is missing or cannot be written.
    """
    new = make and not path.exists()
    try:
        if make:
            path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror or error}; choose another place") from None
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def byte_output(path: Path | str | None) -> Iterator[BinaryIO]:
    """Where bytes go: stdout for None and ``-``, else a file that gets its name when it is whole.

    A name that ends in ``.gz`` is written as bgzip, so that tabix can index it. A device or a named pipe is written
    to as it is.
    """
    if path is None or str(path) == STDOUT:
        sys.stdout.flush()
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if _is_special(Path(path)):
        with open(path, "wb") as special:
            yield special
        return
    with whole_file(path) as partial:
        if Path(path).suffix == ".gz":
            import pysam

            before = pysam.set_verbosity(0)  # htslib would speak of its own of a failed write
            try:
                with pysam.BGZFile(str(partial), "wb", None) as packed:
                    yield cast(BinaryIO, packed)
            except OSError as error:
                if "BGZFile" not in str(error):
                    raise
                raise ResourceError(
                    f"{path}: cannot be written whole; is the disk full? Free some space and try again"
                ) from None
            finally:
                pysam.set_verbosity(before)
        else:
            with open(partial, "wb") as plain:
                yield plain


def _is_special(path: Path) -> bool:
    """Is it there, and neither a file nor a folder?"""
    return path.exists() and not path.is_file() and not path.is_dir()
