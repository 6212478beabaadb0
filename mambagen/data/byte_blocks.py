"""Text files as large blocks of bytes: plain or gzip (bgzip too), from a path or from stdin, with plain line ends.

Reading a genome a line at a time costs more than all the rest; blocks of some MiB let bytes methods do the work.
"""

import gzip
import logging
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from mambagen.errors import InputError, UsageError

log = logging.getLogger("mambagen")

STDIN = "-"
BLOCK = 4 << 20

_GZIP = b"\x1f\x8b"
_BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
"""The empty block that ends every BGZF file (SAM specification, section 4.1.2)."""

_OTHER_FORMATS = {
    _GZIP: ("packed twice by gzip", "unpack it once (gunzip)"),  # seen here only below another gzip
    b"BZh": ("compressed by bzip2", "unpack it first (bunzip2)"),
    b"\xfd7zXZ\x00": ("compressed by xz", "unpack it first (unxz)"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unpack it first (unzstd)"),
    b"PK\x03\x04": ("a zip archive", "unpack it first (unzip)"),
    b"\x1a\x41\x27\x43": ("a .2bit file", "give it as a file that is not compressed, not through a pipe"),
    b"\x43\x27\x41\x1a": ("a .2bit file", "give it as a file that is not compressed, not through a pipe"),
    b"\xff\xfe": ("UTF-16 text", "convert it first (iconv -f UTF-16 -t ASCII)"),
    b"\xfe\xff": ("UTF-16 text", "convert it first (iconv -f UTF-16 -t ASCII)"),
}


def shown(path: str | Path) -> str:
    """The name of an input in messages."""
    return "stdin" if str(path) == STDIN else str(path)


def text_blocks(path: str | Path, size: int = BLOCK, wanted: str = "a FASTA or GenBank file") -> Iterator[bytes]:
    """The text of ``path`` (``-``: stdin) in blocks of about ``size`` bytes, unpacked if it is gzip.

    ``wanted`` is what to give in place of an empty file.

    Line ends are ``\\n``, whatever they were; a run of blanks is never cut in two, so that blanks at the end of a line
    can be told from blanks inside it. Raises InputError where the file is missing, unreadable, empty, cut off, damaged
    or not text.
    """
    held = b""
    for block in _whole_text(path, size, wanted):
        block = held + block if held else block
        body = block.rstrip(b" \t\r")  # a \r may be half of a \r\n
        held = block[len(body) :]
        if body:
            yield _plain_line_ends(body)
    if held:
        yield _plain_line_ends(held)


def _plain_line_ends(block: bytes) -> bytes:
    return block.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in block else block


def _whole_text(path: str | Path, size: int, wanted: str) -> Iterator[bytes]:
    """The unpacked bytes, with the first block looked at: it must be text."""
    first = True
    for block in _unpacked(path, size):
        if first:
            block = block.removeprefix(b"\xef\xbb\xbf")  # a UTF-8 byte order mark
            _refuse_other_formats(path, block)
            first = False
        yield block
    if first:
        raise InputError.at(shown(path), None, f"the file is empty; give {wanted}")


def _refuse_other_formats(path: str | Path, head: bytes) -> None:
    for magic, (what, advice) in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise InputError.at(shown(path), None, f"this is {what}; {advice}")
    start = head[:4096]
    if start.count(0) * 4 > len(start):
        wide = start[1:16:2].count(0) > 6 or start[0:16:2].count(0) > 6
        what = "UTF-16 text; convert it first (iconv -f UTF-16 -t ASCII)" if wide else "a binary file, not text"
        raise InputError.at(shown(path), None, f"this looks like {what}")


def _unpacked(path: str | Path, size: int) -> Iterator[bytes]:
    """The bytes of the file, unpacked if they are gzip."""
    name = shown(path)
    try:
        with _Source(path) as source:
            if source.peek(2) != _GZIP:
                yield from _reads(source.read, size)
                return
            is_bgzf = source.peek(18)[12:16] == b"BC\x02\x00"
            with gzip.GzipFile(fileobj=source, mode="rb") as unpacked:  # type: ignore[call-overload]
                try:
                    yield from _reads(unpacked.read, size)
                except EOFError:
                    raise InputError.at(name, None, "the gzip file is cut off; copy or download it again") from None
                except (gzip.BadGzipFile, zlib.error) as error:
                    raise InputError.at(
                        name, None, f"the gzip file is damaged ({error}); copy or download it again"
                    ) from None
            if is_bgzf and source.tail != _BGZF_END:
                # All of its blocks were whole, so it may be; a file that was cut just between two of them is the same.
                log.warning(
                    "%s: the bgzip file has no end marker: if it was cut off, records are missing; compare its size "
                    "with that of its source",
                    name,
                )
    except FileNotFoundError:
        raise InputError.at(name, None, "no such file") from None
    except IsADirectoryError:
        raise InputError.at(name, None, f"this is a folder; name the files in it, as {name}/*.fa.gz") from None
    except PermissionError:
        raise InputError.at(name, None, "no permission to read it") from None
    except OSError as error:
        raise InputError.at(name, None, f"it cannot be read: {error.strerror or error}") from None


def _reads(read: Callable[[int], bytes], size: int) -> Iterator[bytes]:
    block = read(max(size, 64))  # enough to tell the format by
    while block:
        yield block
        block = read(size)


class _Source:
    """A file or stdin that can be looked at before it is read, never seeks (pipes cannot), and remembers its end."""

    def __init__(self, path: str | Path) -> None:
        self._own = str(path) != STDIN
        self._file: BinaryIO = open(path, "rb") if self._own else _stdin()  # noqa: SIM115
        self._ahead = b""
        self.tail = b""

    def __enter__(self) -> "_Source":
        return self

    def __exit__(self, *_: object) -> None:
        if self._own:
            self._file.close()

    def peek(self, count: int) -> bytes:
        while len(self._ahead) < count and (more := self._file.read(count - len(self._ahead))):
            self._ahead += more
        return self._ahead[:count]

    def read(self, count: int) -> bytes:
        """Up to ``count`` bytes, none at the end only."""
        block, self._ahead = self._ahead[:count], self._ahead[count:]
        if len(block) < count:
            block += self._file.read(count - len(block))
        self.tail = (self.tail + block[-len(_BGZF_END) :])[-len(_BGZF_END) :]
        return block


def _stdin() -> BinaryIO:
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("'-' reads the data from stdin, but stdin is a terminal; pipe a FASTA file into it")
    return sys.stdin.buffer
