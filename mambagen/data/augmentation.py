"""Changes of a spoken word that leave it the same word: rate, place, colour of the recording, room, noise.

Every change is drawn from the generator that is given, so a row of a batch is a function of (seed, step, row).
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Samples = NDArray[np.float32]
TRIM_DB = (22.0, 40.0)  # what is so far below the loudest 10 ms counts as quiet


class Augmentation(BaseModel):
    """How far recordings are changed; the strength 0 leaves them as they are but for their place."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: Annotated[float, Field(gt=0)] = 16_000.0  # samples a second
    trim: Annotated[float, Field(ge=0, le=1)] = 0.5  # share of clips whose quiet beginning and end are cut off
    speed: Annotated[float, Field(ge=0, lt=1)] = 0.2  # pitch and formants by up to this share, up or down
    tilt_db: Annotated[float, Field(ge=0)] = 12.0  # over the whole band, up or down; drawn as a smooth curve
    narrow: Annotated[float, Field(ge=0, le=1)] = 0.3  # share of clips without what is above 3 to 7 kHz
    room: Annotated[float, Field(ge=0, le=1)] = 0.2  # share of clips in a room
    noise: Annotated[float, Field(ge=0, le=1)] = 0.8  # share of clips with noise
    noise_db: tuple[float, float] = (0.0, 45.0)  # of the clip over the noise

    def scaled(self, strength: float) -> "Augmentation":
        """The same, weaker or stronger: amounts and shares times `strength`."""
        return self.model_copy(
            update={
                "trim": min(1.0, self.trim * strength),
                "speed": min(0.9, self.speed * strength),
                "tilt_db": self.tilt_db * strength,
                "narrow": min(1.0, self.narrow * strength),
                "room": min(1.0, self.room * strength),
                "noise": min(1.0, self.noise * strength),
            }
        )

    def word(self, clip: Samples, length: int, random: np.random.Generator, noises: Sequence[Samples] = ()) -> Samples:
        """A changed clip at a random place within `length` samples; a longer one is cut at a random place.

        Args:
            noises: recordings of rooms without words, mixed in beside noise that is made here.
        """
        if random.random() < self.trim:
            clip = trimmed(clip, random.uniform(*TRIM_DB), int(self.rate * 0.01))
        if self.speed:
            clip = resampled(clip, float(np.exp(random.uniform(-1, 1) * np.log1p(self.speed))))
        clip = placed(clip, length, random)
        clip = self._coloured(clip, random)
        if random.random() < self.noise:
            level = random.uniform(*self.noise_db)
            clip = clip + noise_like(clip, level, self.some_noise(length, random, noises))
        return np.asarray(clip, dtype=np.float32)

    def some_noise(self, length: int, random: np.random.Generator, noises: Sequence[Samples] = ()) -> Samples:
        """`length` samples of noise, recorded or made, of some colour."""
        if len(noises) and random.random() < 0.5:
            noise = placed(noises[int(random.integers(len(noises)))], length, random, cyclic=True)
        else:
            noise = coloured_noise(length, float(random.uniform(0, 2)), random)
        return self._coloured(noise, random)

    def _coloured(self, clip: Samples, random: np.random.Generator) -> Samples:
        """Through a random microphone, band and room, all in one product of spectra."""
        if not (self.tilt_db or self.narrow or self.room):
            return clip
        size = 2 * len(clip)  # so that a room's end does not come back at the beginning
        frequencies = np.fft.rfftfreq(size, 1 / self.rate)
        spectrum = np.fft.rfft(clip, size)
        if self.tilt_db:
            at = np.linspace(0, self.rate / 2, 5)
            gains = np.interp(frequencies, at, random.uniform(-0.5, 0.5, len(at)) * self.tilt_db)
            spectrum *= 10 ** (gains / 20)
        if random.random() < self.narrow:
            cut = random.uniform(0.19, 0.44) * self.rate
            spectrum *= 1 / (1 + (frequencies / cut) ** 24)
        if random.random() < self.room:
            decay = random.uniform(0.02, 0.12) * self.rate
            echo = random.normal(size=int(4 * decay)) * np.exp(-np.arange(int(4 * decay)) / decay)
            echo *= random.uniform(0.1, 0.6) / np.sqrt(np.square(echo).sum())
            echo[0] = 1.0
            spectrum *= np.fft.rfft(echo, size)
        return np.fft.irfft(spectrum, size)[: len(clip)].astype(np.float32)


def placed(clip: Samples, length: int, random: np.random.Generator, cyclic: bool = False) -> Samples:
    """`clip` at a random place among `length` samples: zeros around it (or itself again), or a cut through it."""
    if len(clip) == 0:
        return np.zeros(length, dtype=np.float32)
    if cyclic and len(clip) < length:
        return np.resize(np.roll(clip, int(random.integers(len(clip)))), length)
    if len(clip) >= length:
        start = int(random.integers(len(clip) - length + 1))
        return clip[start : start + length]
    before = int(random.integers(length - len(clip) + 1))
    return np.pad(clip, (before, length - len(clip) - before))


def trimmed(clip: Samples, decibels: float, frame: int) -> Samples:
    """`clip` without the frames at its ends that are more than `decibels` below its loudest."""
    count = len(clip) // frame
    if count < 2:
        return clip
    power = np.square(clip[: count * frame], dtype=np.float64).reshape(count, frame).mean(1)
    loud = np.flatnonzero(power > power.max() * 10 ** (-decibels / 10))
    return clip[loud[0] * frame : (loud[-1] + 1) * frame] if len(loud) else clip


def resampled(clip: Samples, factor: float) -> Samples:
    """`clip` played `factor` times as fast, by linear interpolation."""
    count = max(1, round(len(clip) / factor))
    at = np.linspace(0, max(0, len(clip) - 1), count)
    return np.interp(at, np.arange(len(clip)), clip).astype(np.float32) if len(clip) else clip


def coloured_noise(length: int, exponent: float, random: np.random.Generator) -> Samples:
    """Noise whose power falls as 1 / frequency^exponent: 0 white, 1 pink, 2 brown; of unit power."""
    spectrum = random.normal(size=length // 2 + 1) + 1j * random.normal(size=length // 2 + 1)
    spectrum *= np.maximum(np.arange(length // 2 + 1), 1) ** (-exponent / 2)
    noise = np.fft.irfft(spectrum, length)
    return (noise / max(float(np.sqrt(np.mean(noise**2))), 1e-12)).astype(np.float32)


def noise_like(clip: Samples, decibels: float, noise: Samples) -> Samples:
    """`noise`, scaled to be `decibels` under the loud part of `clip` (1 % of the full scale where it is silent)."""
    power = np.square(clip, dtype=np.float64)
    loud = float(power[power > 0.1 * power.mean()].mean()) if power.any() else 1e-4
    own = float(np.square(noise, dtype=np.float64).mean())
    return (noise * np.sqrt(loud / max(own, 1e-20)) * 10 ** (-decibels / 20)).astype(np.float32)
