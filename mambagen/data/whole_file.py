"""Files that are either whole or not there: written under a temporary name, fsynced, then renamed."""

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from mambagen.errors import ResourceError, UsageError

STDOUT = "-"


@contextlib.contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """A temporary path beside ``path``, with the same suffixes, that takes its name when the block ends well.

    Whatever goes wrong before, nothing is left and an earlier file of that name stays as it was.

    Raises UsageError where ``path`` is a folder, ResourceError where its folder is missing or cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise UsageError(f"{path}: is a folder; name the file to write")
    partial = target.with_name(f".partial-{secrets.token_hex(4)}-{target.name}")
    try:
        partial.open("xb").close()  # said before hours of work, not after
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror or error}; choose another place") from None
    try:
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
def byte_output(path: Path | str | None) -> Iterator[BinaryIO]:
    """Where bytes go: stdout for None and ``-``, else a file that gets its name when it is whole.

    A name that ends in ``.gz`` is written as bgzip, so that tabix can index it.
    """
    if path is None or str(path) == STDOUT:
        sys.stdout.flush()
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with whole_file(path) as partial:
        if Path(path).suffix == ".gz":
            import pysam

            with pysam.BGZFile(str(partial), "wb", None) as packed:
                yield cast(BinaryIO, packed)
        else:
            with open(partial, "wb") as plain:
                yield plain
