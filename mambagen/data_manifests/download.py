"""Downloads that go on where they stopped.

A file grows under ``NAME.part`` beside a note of what the server said about it (``NAME.part.json``); a connection that
drops is taken up again with an HTTP Range request, in the same run or a later one. Checking the checksum and giving the
file its final name is the caller's (pooch's) part.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mambagen.errors import ResourceError

Progress = Callable[[str, int, int | None], None]
"""Called with a file's name, the bytes that are here and the bytes that there will be, if known."""

_BLOCK = 1 << 20
_TIMEOUT = (15.0, 60.0)  # seconds to connect, and between two pieces of data
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that may be better at the next try


@dataclass
class _Origin:
    """What the server said of the file, so that parts of two versions are never joined."""

    url: str
    validator: str | None = None  # a strong ETag or a date
    total: int | None = None


class ResumingDownloader:
    """A downloader for pooch. ``attempts`` counts tries in a row that bring nothing new; ``pause`` is in seconds."""

    def __init__(self, part: Path, progress: Progress | None = None, attempts: int = 5, pause: float = 1.0) -> None:
        self.part = part
        self.progress = progress
        self.attempts = attempts
        self.pause = pause

    def __call__(self, url: str, output_file: str | os.PathLike[str], pooch: object = None) -> None:
        """Fetch ``url`` into ``output_file``. Raises ResourceError, keeping the part, where that fails for good."""
        import requests
        import urllib3

        self._resumable(url)
        furthest, failures = self._size(), 0
        while True:
            try:
                self._go_on(url)
                break
            except (requests.RequestException, urllib3.exceptions.HTTPError, _TryAgain) as error:
                size = self._size()
                failures = 1 if size > furthest else failures + 1
                furthest = max(furthest, size)
                if failures >= self.attempts:
                    raise ResourceError(
                        f"{url}: the download failed ({_reason(error)}) after {failures} tries without progress;"
                        " try again later, it goes on where it stopped"
                    ) from None
                time.sleep(min(self.pause * 2 ** (failures - 1), 30))
            except OSError as error:
                raise self._disk_error(error) from None
        os.replace(self.part, output_file)
        self._note().unlink(missing_ok=True)

    def begun_from(self) -> str | None:
        """The address that the part comes from, if there is one to go on with."""
        try:
            return str(json.loads(self._note().read_text())["url"]) if self.part.exists() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _note(self) -> Path:
        return self.part.with_name(self.part.name + ".json")

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _resumable(self, url: str) -> _Origin:
        """The note of an earlier try, where it is of the same address; otherwise a new one, and no part."""
        try:
            origin = _Origin(**json.loads(self._note().read_text()))
            if origin.url == url and self.part.exists():
                return origin
        except (OSError, ValueError, TypeError):
            pass
        self.part.unlink(missing_ok=True)
        return _Origin(url)

    def _go_on(self, url: str) -> None:
        """One connection: from where the part ends to the end of the file."""
        import requests

        origin = self._resumable(url)
        have = self._size()
        if have and have == origin.total:
            return
        # The bytes as they are stored: a server must not pack them on the way, that would spoil Range and checksum.
        headers = {"Accept-Encoding": "identity", "User-Agent": "mambagen"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if origin.validator:
                headers["If-Range"] = origin.validator
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
            status = response.status_code
            if status == 416:  # the part is no beginning of this file
                self.part.unlink(missing_ok=True)
                raise _TryAgain("the server refuses to go on from here")
            if status in _PASSING:
                raise _TryAgain(f"HTTP {status} {response.reason}")
            if status not in (200, 206):
                raise ResourceError(f"{url}: HTTP {status} {response.reason}; nothing was downloaded")
            if status == 206:
                start, total = _content_range(response.headers.get("Content-Range", ""))
                if start != have or (origin.total is not None and total != origin.total):
                    self.part.unlink(missing_ok=True)
                    raise _TryAgain("the file changed on the server")
            else:
                have, total = 0, _whole_number(response.headers.get("Content-Length"))
            origin = _Origin(url, _validator(response.headers), total)
            self._note().write_text(json.dumps(asdict(origin)))
            self._check_space(have, total)
            self._receive(response, have, total)

    def _receive(self, response: Any, have: int, total: int | None) -> None:
        name = self.part.name.removesuffix(".part")
        with open(self.part, "ab" if have else "wb") as file:
            for block in response.raw.stream(_BLOCK, decode_content=False):
                file.write(block)
                have += len(block)
                if self.progress:
                    self.progress(name, have, total)
            file.flush()
            os.fsync(file.fileno())
        if total is not None and have != total:
            raise _TryAgain(f"the connection ended after {have} of {total} bytes")

    def _check_space(self, have: int, total: int | None) -> None:
        free = shutil.disk_usage(self.part.parent).free
        if total is not None and total - have > free:
            raise ResourceError(
                f"{self.part.parent}: {total - have:,} more bytes are needed and {free:,} are free;"
                " make room, or set MAMBAGEN_HOME to a larger disk"
            )

    def _disk_error(self, error: OSError) -> ResourceError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "make room and fetch again, which goes on where it stopped, or set MAMBAGEN_HOME to a larger disk"
            return ResourceError(f"{self.part.parent}: the disk is full; {advice}")
        return ResourceError(f"{self.part}: it cannot be written: {error.strerror or error}")


class _TryAgain(Exception):
    """A try that failed in a way that may pass."""


def _content_range(value: str) -> tuple[int, int | None]:
    """Start and total of ``bytes 100-199/200``; a start of -1 where the header is not of this form."""
    span, _, total = value.removeprefix("bytes ").partition("/")
    start = _whole_number(span.partition("-")[0])
    return (-1 if start is None else start), _whole_number(total)


def _whole_number(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdecimal() else None


def _validator(headers: Any) -> str | None:
    etag = headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")


def _reason(error: Exception) -> str:
    """The innermost cause, which is what the user can act on: requests and urllib3 wrap it several times."""
    cause: BaseException = error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__ or cause
    text = " ".join(str(cause).split())
    return text if isinstance(error, _TryAgain) else f"{type(error).__name__}: {text}"
