"""Ctrl-C, SIGTERM and a closed terminal as wishes that the loop fulfils after the step at hand."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Which signal asked for a stop, if any."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """As a shell counts it: 130 for Ctrl-C, 143 for SIGTERM, 129 for a closed terminal."""
        return 128 + self.signal if self.signal else 0


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """While open, the first signal is noted; a second Ctrl-C stops at once. Signals that are ignored stay ignored."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number)

    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {}
    if threading.current_thread() is threading.main_thread():  # only there may handlers be set
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
