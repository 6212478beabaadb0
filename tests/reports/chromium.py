"""A page in headless Chromium, by its debugging protocol over two pipes: no driver and no network needed."""

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--autoplay-policy=no-user-gesture-required",
    "--remote-debugging-pipe",
)


def browser() -> str | None:
    """The path of a Chromium, where there is one."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


class Tab:
    """A page that is open; `requests` are the addresses that it asked for, the page itself first."""

    def __init__(self, read: int, write: int, timeout: float) -> None:
        self._read, self._write, self._deadline = read, write, time.monotonic() + timeout
        self._numbers = itertools.count(1)
        self._pending = b""
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._session: str | None = None

    def open(self, url: str) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)
        self.evaluate(
            "new Promise(done => document.readyState == 'complete' ? done() : addEventListener('load', () => done()))"
        )

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(event["params"]["request"]["url"])
        if event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
            self.errors.append(event["params"]["entry"]["text"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            left = self._deadline - time.monotonic()
            ready, _, _ = select.select([self._read], [], [], max(0, left))
            if not ready:
                raise TimeoutError("Chromium does not answer")
            part = os.read(self._read, 1 << 16)
            if not part:
                raise RuntimeError("Chromium has ended")
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\0")
        event: dict[str, Any] = json.loads(line)
        return event


@contextlib.contextmanager
def tab(page: Path, profile: Path, timeout: float = 120) -> Iterator[Tab]:
    """The page `page` in a Chromium of its own, ended afterwards.

    Raises RuntimeError or TimeoutError where it does not start, as in a container without what it needs.
    """
    path = browser()
    assert path
    from_us, to_browser = os.pipe()
    from_browser, to_us = os.pipe()

    def pipes() -> None:  # Chromium reads from 3 and writes to 4; first out of the way of each other
        commands, answers = os.dup(from_us), os.dup(to_us)
        high = [os.dup2(fd, 100 + i) for i, fd in enumerate((commands, answers))]
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    process = subprocess.Popen(
        [path, *FLAGS, f"--user-data-dir={profile}"],
        preexec_fn=pipes,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(from_us)
    os.close(to_us)
    try:
        opened = Tab(from_browser, to_browser, timeout)
        opened.open(page.resolve().as_uri())
        yield opened
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, 9)
        process.wait(20)
        os.close(from_browser)
        os.close(to_browser)
