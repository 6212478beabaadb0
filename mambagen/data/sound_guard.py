"""Noticing that generated sound has run away: into loud white noise, to full scale, or into silence.

A model of raw sound draws thousands of samples a second from its own past; one unlikely draw can take it where no
training clip ever was, and it does not come back by itself. The limits are far from what speech and music do.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]
Fault = Literal["noise", "full scale", "silence"]

LOUD = 0.15  # RMS from which white noise is no consonant any more
WHITE = 0.5  # spectral flatness of the window: white noise has 0.95, an s about 0.2, vowels and music below 0.05
FULL = 0.98
FULL_SHARE = 0.2  # of a window's samples at full scale
AUDIBLE = 10 ** (-50 / 20)
_SEGMENT = 512  # samples of a spectrum


@dataclass(frozen=True)
class Guard:
    """Limits in seconds."""

    rate: int
    window: float = 0.25  # looked at in one piece
    first_sound: float = 0.75  # by when something is to be heard
    silence: float = 3.0  # that is allowed later on, before it counts as the end of everything
    rewind: float = 0.1  # how far before the window to go back

    @property
    def window_samples(self) -> int:
        return round(self.window * self.rate)

    @property
    def memory(self) -> int:
        """Samples from the end that are enough to tell a fault, where it is known that there were more of them."""
        return round(max(self.silence, self.first_sound) * self.rate) + self.window_samples

    def fault(self, samples: Samples, begun: bool = False) -> Fault | None:
        """What is wrong with the end of what was generated so far.

        Args:
            samples: all of it without the prompt, or the last `memory` of them.
            begun: something was to be heard before (a prompt, or what is not given here): only a long silence counts.
        """
        window = samples[-self.window_samples :]
        if len(window) >= _SEGMENT:
            if float(np.mean(np.abs(window) >= FULL)) > FULL_SHARE:
                return "full scale"
            if float(np.sqrt(np.mean(np.square(window)))) > LOUD and flatness(window) > WHITE:
                return "noise"
        heard = np.abs(samples) > AUDIBLE
        if not begun and not heard.any():
            return "silence" if len(samples) >= self.first_sound * self.rate else None
        quiet = len(samples) - 1 - int(np.flatnonzero(heard)[-1]) if heard.any() else len(samples)
        return "silence" if quiet >= self.silence * self.rate else None

    def go_back_to(self, made: int, fault: Fault, heard: Samples) -> int:
        """How many of the `made` samples to keep."""
        if fault == "silence":
            audible = np.flatnonzero(np.abs(heard) > AUDIBLE)
            kept = int(audible[-1]) + 1 if len(audible) else 0
        else:
            kept = made - self.window_samples
        return max(0, kept - round(self.rewind * self.rate))


def flatness(samples: Samples) -> float:
    """Geometric over arithmetic mean of the averaged power spectrum, 0 to 1."""
    count = len(samples) // _SEGMENT
    segments = samples[: count * _SEGMENT].reshape(count, _SEGMENT) * np.hanning(_SEGMENT)
    power = np.mean(np.abs(np.fft.rfft(segments, axis=1)) ** 2, axis=0)[1:-1] + 1e-20
    return float(np.exp(np.mean(np.log(power))) / np.mean(power))
