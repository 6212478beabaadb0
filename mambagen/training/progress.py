"""The progress of a run on stderr: one line that is redrawn on a terminal, a plain line now and then elsewhere."""

import math
import shutil
import sys
import time
from typing import TextIO

PLAIN_EVERY = 30.0  # seconds between two lines where stderr is no terminal
REDRAW_EVERY = 0.2


class Progress:
    """Shows step, loss, perplexity, tokens/s and the time left."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.total_steps: int | None = None
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._shown = -math.inf if self._live else time.monotonic() - PLAIN_EVERY + 5  # the first plain line after 5 s
        self._average: float | None = None
        self._drawn = False

    def update(self, step: int, loss: float | None, tokens_per_second: float, seconds_left: float) -> None:
        """Take in a step's loss (nats a target) and show the line when it is due."""
        if loss is not None and math.isfinite(loss):  # smoothed, as one small batch says little
            self._average = loss if self._average is None else 0.75 * self._average + 0.25 * loss
        now = time.monotonic()
        if now - self._shown < (REDRAW_EVERY if self._live else PLAIN_EVERY):
            return
        self._shown = now
        average = self._average
        loss_text = "loss -" if average is None else f"loss {average:.4f}  ppl {math.exp(average):.3f}"
        speed = f"{_count(tokens_per_second)} tokens/s"
        total = f"/{self.total_steps}" if self.total_steps else ""
        self._draw(f"step {step}{total}  {loss_text}  {speed}  {_time(seconds_left)} left")

    def note(self, text: str) -> None:
        """A line that stays, above the live one; on a terminal only."""
        if self._live:
            self._clear()
            print(text, file=self._stream, flush=True)

    def state(self, text: str) -> None:
        """Show what is going on where that takes time; on a terminal only."""
        if self._live:
            self._draw(text)

    def close(self) -> None:
        """Take the live line away."""
        self._clear()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _draw(self, text: str) -> None:
        if self._live:
            width = shutil.get_terminal_size().columns
            self._stream.write("\r\x1b[2K" + text[: max(10, width - 1)])
            self._drawn = True
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def _clear(self) -> None:
        if self._drawn:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()
            self._drawn = False


def _count(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.0f}"


def _time(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
