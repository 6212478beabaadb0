"""Where a job that answers record by record writes its rows of text."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from mambagen.data.whole_file import byte_output
from mambagen.errors import InputError


@contextlib.contextmanager
def row_output(path: Path | str | None, header: str = "") -> Iterator[Callable[[str], None]]:
    """A function that writes rows of text, in UTF-8, to where `byte_output` would.

    An InputError does not undo the rows there are: the file gets its name, then the error goes on. It is how a job
    over several files ends of which one was bad. Without a row nothing is written over an earlier file.
    """
    failure: InputError | None = None
    with byte_output(path) as stream:
        seen = stream is sys.stdout.buffer and sys.stdout.isatty()
        rows = 0

        def write(row: str) -> None:
            nonlocal rows
            rows += 1
            stream.write(row.encode())
            if seen:  # by someone who waits for it
                stream.flush()

        stream.write(header.encode())
        try:
            yield write
        except InputError as error:
            if not rows:
                raise
            failure = error
    if failure is not None:
        raise failure
