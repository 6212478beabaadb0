"""Windows of prepared audio: drawn for training, side by side for evaluation.

A window holds `length` tokens; a clip that is shorter is placed in it and the rest is silence, which the loss either
does not count ("ignore") or does ("silence": the model learns that a word is over). A longer clip gives a stretch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from mambagen.data.audio_shards import Clips
from mambagen.data.quantise import SILENCE, Quantiser
from mambagen.errors import InputError

Tokens = NDArray[np.uint8]

SHORTEST = 0.1  # seconds: an augmented clip is never pushed so far that less than this of it stays in the window


@dataclass(frozen=True)
class AudioBatch:
    """Windows as arrays, a row each."""

    tokens: Tokens  # (rows, length) the samples themselves; what is fed is these, one position later
    counted: NDArray[np.int64]  # (rows,) positions that the loss counts; the others are the window's last
    classes: NDArray[np.int64]  # (rows,) class of each
    where: list[tuple[str, int, str]]  # name of the clip, first sample in it, how it was changed


class Augmentation(BaseModel):
    """Light changes that leave sound what it is; 0 is none. Amounts are uniform up to these, either way.

    Gain and speed decode, change and quantise anew; each token is first spread evenly over the samples that it stands
    for, as a clip would otherwise come back with a comb of tokens that never occur.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    gain_db: Annotated[float, Field(ge=0, le=40)] = 0.0
    shift: Annotated[float, Field(ge=0, le=10)] = (
        0.0  # seconds of silence in front of a clip that is shorter than the window
    )
    speed: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # share by which it is faster or slower, pitch included

    @property
    def on(self) -> bool:
        return self.gain_db > 0 or self.speed > 0


class TrainingWindows:
    """Batches of windows, each a function of (seed, step) alone.

    Every epoch takes each clip once in a new order; a clip of several windows' length is taken that many times, at
    random places.
    """

    def __init__(
        self,
        clips: Clips,
        length: int,
        rows: int,
        seed: int,
        quantiser: Quantiser,
        pad: str = "ignore",
        augmentation: Augmentation | None = None,
        classes: NDArray[np.int64] | None = None,
        unconditional: float = 0.0,
    ) -> None:
        """`classes` of the clips; with the chance `unconditional` a row has the class `none` = max + 1 instead.

        Raises InputError where there is no clip.
        """
        if not len(clips):
            raise InputError("there are no clips to train on")
        self.clips, self.length, self.rows, self.seed = clips, length, rows, seed
        self.quantiser, self.pad = quantiser, pad
        self.augmentation = augmentation or Augmentation()
        self.classes = classes
        self.unconditional = unconditional
        self._none = len(quantiser.classes)
        times = np.maximum(1, -(-clips.length // length))
        self._units = np.repeat(np.arange(len(clips)), times)
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))

    @property
    def units(self) -> int:
        """Windows in an epoch."""
        return len(self._units)

    def batch(self, step: int) -> AudioBatch:
        """The windows of a step."""
        tokens = np.full((self.rows, self.length), SILENCE, np.uint8)
        counted = np.full(self.rows, self.length, np.int64)
        classes = np.zeros(self.rows, np.int64)
        where = []
        random = np.random.Generator(np.random.Philox(key=[self.seed, (1 << 63) + step]))
        draws = random.random((self.rows, 5))
        for row in range(self.rows):
            clip = self._clip_of(step * self.rows + row)
            piece, start, change = self._piece(clip, draws[row], random)
            lead = 0
            if self.augmentation.shift and len(piece) < self.length:
                room = self.length - min(len(piece), round(SHORTEST * self.quantiser.rate))
                lead = int(draws[row, 3] * (min(self.augmentation.shift * self.quantiser.rate, room) + 1))
            piece = piece[: self.length - lead]
            tokens[row, lead : lead + len(piece)] = piece
            if self.pad == "ignore":
                counted[row] = lead + len(piece)
            if self.classes is not None:
                dropped = draws[row, 4] < self.unconditional or self.classes[clip] < 0
                classes[row] = self._none if dropped else self.classes[clip]
            where.append((self.clips.names[clip], start, change))
        return AudioBatch(tokens, counted, classes, where)

    def _clip_of(self, unit: int) -> int:
        epoch, at = divmod(unit, self.units)
        if self._order[0] != epoch:
            words = np.random.Philox(key=[self.seed, epoch]).random_raw(self.units)
            self._order = (epoch, np.argsort(words, kind="stable"))
        return int(self._units[self._order[1][at]])

    def _piece(self, clip: int, draw: NDArray[np.float64], random: np.random.Generator) -> tuple[Tokens, int, str]:
        """A clip or a stretch of it, changed; where it begins in the clip; and the change in words."""
        change = self.augmentation
        factor = 1 + change.speed * (2 * draw[1] - 1)
        span = min(int(self.clips.length[clip]), math.ceil(self.length * factor))
        start = int(draw[0] * (self.clips.length[clip] - span + 1))
        piece = self.clips.clip(clip)[start : start + span]
        if not change.on or not len(piece):
            return piece, start, "+"
        decibels = change.gain_db * (2 * draw[2] - 1)
        samples = spread(piece, self.quantiser, random) * np.float32(10 ** (decibels / 20))
        if change.speed:
            import soxr

            samples = soxr.resample(samples, factor * 1000, 1000, quality="MQ")
        return self.quantiser.encode(samples)[: self.length], start, f"{decibels:+.1f} dB, speed {factor:.3f}"


def spread(tokens: Tokens, quantiser: Quantiser, random: np.random.Generator) -> NDArray[np.float32]:
    """Samples of tokens, uniform over what each token stands for; silence stays silence."""
    edges = quantiser.edges
    low = edges[tokens]
    samples = low + random.random(len(tokens), dtype=np.float32) * (edges[tokens.astype(np.int64) + 1] - low)
    samples[tokens == SILENCE] = 0.0
    return samples


class HeldOutWindows:
    """Windows side by side over all clips, for evaluation: iterate over them for batches.

    Every sample is a target once, each window begins anew, and nothing past a clip's end counts.
    """

    def __init__(
        self,
        clips: Clips,
        length: int,
        rows: int,
        classes: NDArray[np.int64] | None = None,
        none: int = 0,
        at_most: int | None = None,
    ) -> None:
        """`at_most` samples, in windows spread evenly over all, make a quicker and rougher figure.

        `none` is the class of clips whose own is -1.
        """
        self.clips, self.length, self.rows = clips, length, rows
        self.classes, self.none = classes, none
        times = -(-clips.length // length)
        clip = np.repeat(np.arange(len(clips)), times)
        first = np.concatenate([np.arange(n) * length for n in times]) if len(clips) else np.zeros(0)
        start = first.astype(np.int64)
        size = np.minimum(length, clips.length[clip] - start)
        if at_most is not None and size.sum() > at_most:
            wanted = max(1, int(len(size) * at_most / size.sum()))
            chosen = np.linspace(0, len(size) - 1, wanted).round().astype(np.int64)
            clip, start, size = clip[chosen], start[chosen], size[chosen]
        order = np.argsort(size, kind="stable")  # windows of like length together: less padding
        self._clip, self._start, self._size = clip[order], start[order], size[order]
        self.targets = int(self._size.sum())

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(windows,) samples of each, in the order in which they come."""
        return self._size

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._clip)

    def __iter__(self) -> Iterator[AudioBatch]:
        for at in range(0, len(self), self.rows):
            some = slice(at, at + self.rows)
            size = self._size[some]
            tokens = np.full((len(size), int(size.max())), SILENCE, np.uint8)
            where = []
            for row, (clip, start) in enumerate(zip(self._clip[some], self._start[some], strict=True)):
                tokens[row, : size[row]] = self.clips.clip(clip)[start : start + size[row]]
                where.append((self.clips.names[clip], int(start), "+"))
            classes = np.zeros(len(size), np.int64)
            if self.classes is not None:
                classes = self.classes[self._clip[some]].copy()
                classes[classes < 0] = self.none
            yield AudioBatch(tokens, size.copy(), classes, where)


def classes_of(clips: Clips, labels: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64]:
    """The class of each clip, -1 where its label is none of them."""
    number = {name: index for index, name in enumerate(classes)}
    table = np.array([*(number.get(label, -1) for label in labels), -1], dtype=np.int64)
    return table[clips.label]
