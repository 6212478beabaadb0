"""Make sound with a model: clips in a folder, or a stream as it is made.

From Python:

    from mambagen.pipelines.generate_audio import AudioVoice, GenerateAudioConfig
    voice = AudioVoice("digits")
    for clip in voice.clips(GenerateAudioConfig(count=3, classes=("seven",))):
        clip.samples                    # (n,) int16, the prompt's own samples in front

Every clip has its own seed, made of the seed, its number and its candidate: neither the other clips nor how many are
made at once change it.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from mambagen.data.audio_files import read_audio
from mambagen.data.sound_guard import Fault, Guard
from mambagen.data.spoken_words import DIGITS
from mambagen.data.wav import Samples16, to_int16
from mambagen.errors import ModelError, UsageError
from mambagen.models.audio_stepper import BACKENDS, Stepper
from mambagen.models.audio_unet import StageState
from mambagen.models.builtin import find_model
from mambagen.models.saving import CONFIG
from mambagen.pipelines.audio_language_model import shifted
from mambagen.pipelines.sound_models import open_sound_model
from mambagen.training.loop import choose_device

Tokens = NDArray[np.uint8]

PROMPT_LIMIT = 600.0  # seconds of sound that can be continued
LONGEST = 24 * 3600.0  # seconds that can be asked for
STREAMS = {"cpu": 8, "cuda": 128}  # that are made at once
SCORED = 1 << 16  # samples of a stream that go through the model at once to be scored
SCORED_AT_ONCE = 1 << 19  # of all streams, on a GPU
FIRST_BLOCK, BLOCK = 0.02, 0.25  # seconds: a stream's first block, and the largest
ATTEMPTS = 4  # times that a clip is taken back before it is left as it is

Rank = Literal["likelihood", "class"]


class GenerateAudioConfig(BaseModel):
    """What is to be made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: Annotated[float, Field(gt=0, le=LONGEST)] = 1.0  # of new sound, in each clip
    count: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    prompt: str | None = None  # an audio file to go on from
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    classes: tuple[str, ...] = ()  # taken in turn by the clips; () draws one for each; "none" is no class
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None  # the model's own, 1 where it says nothing
    candidates: Annotated[int, Field(ge=1, le=1000)] = 1  # made for each clip, of which the best is kept
    rank: Rank = "likelihood"
    guard: bool = True
    at_once: Annotated[int, Field(ge=1)] | None = None
    fix_nan: bool = False

    @model_validator(mode="after")
    def _ranked_by_class(self) -> "GenerateAudioConfig":
        if self.rank == "class" and "none" in self.classes:
            raise ValueError("clips without a class cannot be ranked by it")
        if self.rank == "class" and self.candidates == 1:
            raise ValueError("--rank class picks one of several: say of how many with --candidates")
        return self


@dataclass(frozen=True)
class MadeClip:
    """A clip that was made."""

    index: int  # counted from 0
    tokens: Tokens  # (n,) what was drawn, without the prompt
    samples: Samples16  # (m,) the prompt's samples, then those of the tokens
    rate: int
    label: str  # its class, "" where there is none
    seed: int  # of its stream
    nats: float  # mean negative log-likelihood of the drawn samples under the model, class and all, at temperature 1
    takes: int = 1  # more where the guard took it back
    fault: Fault | None = None  # what the guard could not mend
    confidence: float | None = None  # share of its class among all, by Bayes' rule; where ranked by it
    prompt_samples: int = 0

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2)


@dataclass
class _Stream:
    """A clip while it is made."""

    index: int
    candidate: int
    label: str
    class_index: int
    seed: int
    tokens: Tokens = field(default_factory=lambda: np.zeros(0, np.uint8))
    takes: int = 1
    fault: Fault | None = None
    nats: float = math.nan
    confidence: float | None = None


class Meter:
    """Where generation stands: told to `show` as text, with its speed against real time."""

    def __init__(self, show: Callable[[str], None] | None, clips: int, samples: int, rate: int) -> None:
        self._show, self._clips, self._samples, self._rate = show, clips, samples, rate
        self._began = time.monotonic()
        self.made = 0  # samples, of all streams

    def add(self, samples: int, finished: int) -> None:
        """So many more samples were made, and so many clips are finished in all."""
        self.made += samples
        if self._show:
            seconds, total = self.made / self._rate, self._clips * self._samples / self._rate
            speed = f"{self.real_time_factor():.2f} x real time"
            self._show(f"{finished} of {self._clips} clips, {seconds:.2f} of {total:.2f} s, {speed}")

    def real_time_factor(self) -> float:
        """Seconds of sound a second."""
        return self.made / self._rate / max(1e-9, time.monotonic() - self._began)


class AudioVoice:
    """A model of sound, ready to make some."""

    def __init__(
        self, model: Path | str, device: str = "auto", backend: str = "auto", precision: str = "bfloat16"
    ) -> None:
        """The folder or the name of a model, and how it is stepped (see `mambagen.models.audio_stepper.Stepper`).

        Raises:
            ModelError: it is no model of sound. UsageError: no such device or backend.
        """
        if backend not in BACKENDS:
            raise UsageError(f"--backend {backend}: it must be {', '.join(BACKENDS)}")
        self.device = choose_device(device)
        self.model, self.quantiser, self.guidance = open_sound_model(model, self.device)
        self.backend, self.precision = backend, precision
        if len(self.quantiser.classes) != self.model.config.classes:
            raise ModelError(
                f"{find_model(model) / CONFIG}: names {len(self.quantiser.classes)} classes, but the model has "
                f"{self.model.config.classes}"
            )
        self.rate = self.quantiser.rate
        self.guard = Guard(self.rate)
        self._states: dict[tuple[int, int], StageState] = {}

    def warm(self) -> None:
        """Have the compiled loop loaded, so that the first block of a stream takes no longer than the others."""
        self._draw(self._begin([_Stream(0, 0, "", 0, 0)], np.zeros(0, np.uint8)), 1, [0], GenerateAudioConfig())

    # ---- what is asked for

    def plan(self, config: GenerateAudioConfig) -> list[tuple[str, int]]:
        """Label and class index of each clip. UsageError where the model has no such class, or none at all."""
        names, none = self.quantiser.classes, self.model.config.classes
        if not names:
            if config.classes:
                raise UsageError("--digit: this model was trained without classes; leave it out")
            if config.guidance not in (None, 1):
                raise UsageError("--guidance needs a model with classes; this one was trained without")
            if config.rank == "class":
                raise UsageError("--rank class needs a model with classes; this one was trained without")
            return [("", 0)] * config.count
        if config.classes:
            asked = [self._class(name) for name in config.classes]
            return [asked[i % len(asked)] for i in range(config.count)]
        drawn = np.random.Philox(key=[config.seed, 1 << 62]).random_raw(config.count) % np.uint64(none)
        return [(names[int(i)], int(i)) for i in drawn]

    def _class(self, name: str) -> tuple[str, int]:
        names = self.quantiser.classes
        if name == "none":
            return "", len(names)
        for same in (name, name.lower()):
            if same in names:
                return same, names.index(same)
        if name.isdecimal() and int(name) < len(DIGITS) and DIGITS[int(name)] in names:
            return DIGITS[int(name)], names.index(DIGITS[int(name)])
        raise UsageError(f"--digit {name}: this model knows {', '.join(names)} (or none)")

    def read_prompt(self, config: GenerateAudioConfig) -> tuple[Tokens, Samples16, list[str]]:
        """A prompt's tokens, its samples, and warnings about the file; empty without one.

        Raises InputError: it cannot be read, or is longer than 600 s.
        """
        if config.prompt is None:
            return np.zeros(0, np.uint8), np.zeros(0, np.int16), []
        clip = read_audio(config.prompt, self.rate, config.fix_nan, limit_seconds=PROMPT_LIMIT)
        warnings = [f"{config.prompt}: {warning}" for warning in clip.warnings]
        return self.quantiser.encode(clip.samples), to_int16(clip.samples), warnings

    # ---- clips

    def clips(
        self,
        config: GenerateAudioConfig,
        show: Callable[[str], None] | None = None,
        warn: Callable[[str], None] = print,
    ) -> Iterator[MadeClip]:
        """The clips in their order, each when it is finished.

        Args:
            show: is told where generation stands.
            warn: is told what is odd about the prompt, and of clips that the guard could not mend.

        Raises:
            UsageError, InputError: see `plan`, `read_prompt`.
        """
        plan = self.plan(config)
        prompt, heard, warnings = self.read_prompt(config)
        for line in warnings:
            warn(line)
        steps = max(1, round(config.seconds * self.rate))
        meter = Meter(show, config.count * config.candidates, steps, self.rate)
        at_once = config.at_once or STREAMS[self.device.type]
        clips_at_once = max(1, at_once // config.candidates)
        done = 0
        for first in range(0, config.count, clips_at_once):
            numbers = range(first, min(config.count, first + clips_at_once))
            streams = [
                _Stream(i, candidate, *plan[i], seed=stream_seed(config.seed, i, candidate))
                for i in numbers
                for candidate in range(config.candidates)
            ]
            for at in range(0, len(streams), at_once):
                some = streams[at : at + at_once]
                self._make(some, prompt, steps, config, meter, done)
                done += len(some)
            self._score(streams, prompt, config)
            for i in numbers:
                best = min((s for s in streams if s.index == i), key=lambda s: _worse(s, config.rank))
                if best.fault:
                    warn(f"clip {i + 1}: {best.fault} came back {ATTEMPTS} times; the clip is left as it is")
                yield self._finished(best, heard)

    def _finished(self, stream: _Stream, heard: Samples16) -> MadeClip:
        return MadeClip(
            stream.index,
            stream.tokens,
            np.concatenate((heard, to_int16(self.quantiser.decode(stream.tokens)))),
            self.rate,
            stream.label,
            stream.seed,
            stream.nats,
            stream.takes,
            stream.fault,
            stream.confidence,
            len(heard),
        )

    def _make(
        self,
        streams: Sequence[_Stream],
        prompt: Tokens,
        steps: int,
        config: GenerateAudioConfig,
        meter: Meter,
        done: int,
    ) -> None:
        """Fill the streams' tokens, all at once; those that run away are then taken back, all at once again."""
        begun = self._begin(streams, prompt)
        made = [np.zeros(0, np.uint8) for _ in streams]
        seeds = [stream.seed for stream in streams]
        faults = self._go_on(begun, made, seeds, prompt, steps, config, lambda n: meter.add(n, done))
        for stream, tokens in zip(streams, made, strict=True):
            stream.tokens = tokens
        if faults:
            self._mend([(streams[row], *fault) for row, fault in faults.items()], prompt, steps, config)
        meter.add(0, done + len(streams))

    def _go_on(
        self,
        stepper: Stepper,
        made: list[Tokens],
        seeds: Sequence[int],
        prompt: Tokens,
        steps: int,
        config: GenerateAudioConfig,
        tell: Callable[[int], None] | None = None,
        to_the_end: bool = False,
    ) -> dict[int, tuple[int, Fault]]:
        """Draw what the rows of `made`, all of one length, lack of `steps`; where faults came up in which rows.

        Ends earlier where all rows have one, but for `to_the_end`; `tell` is told of samples as they are made.
        """
        faults: dict[int, tuple[int, Fault]] = {}
        at = len(made[0])
        while at < steps and (to_the_end or len(faults) < len(made)):
            block = min(self.guard.window_samples, steps - at)
            drawn = self._draw(stepper, block, seeds, config)
            at += block
            for row, tokens in enumerate(drawn):
                made[row] = np.concatenate((made[row], tokens))
                if config.guard and row not in faults:
                    fault = self._fault(made[row], at == steps, prompt)
                    if fault:
                        faults[row] = (at, fault)
            if tell:
                tell(block * len(made))
        return faults

    def _mend(
        self, faults: list[tuple[_Stream, int, Fault]], prompt: Tokens, steps: int, config: GenerateAudioConfig
    ) -> None:
        """Take streams back to before their faults and go on with other seeds, until they are well or given up.

        Each goes back to the beginning of a window, so that many meet there and are drawn on together.
        """
        after_prompt = self._begin([stream for stream, *_ in faults], prompt).snapshot()
        wrong = {row: (at, fault) for row, (_, at, fault) in enumerate(faults)}
        for attempt in range(1, ATTEMPTS + 1):
            meeting: dict[int, list[int]] = {}  # samples that are kept -> rows
            for row, (at, fault) in wrong.items():
                heard = self.quantiser.decode(faults[row][0].tokens[:at])
                kept = self.guard.go_back_to(at, fault, heard)
                meeting.setdefault(kept - kept % self.guard.window_samples, []).append(row)
            wrong = {}
            for kept, rows in sorted(meeting.items()):
                streams = [faults[row][0] for row in rows]
                made = [stream.tokens[:kept] for stream in streams]
                stepper = Stepper(self.model, len(rows), self.backend, self.precision)
                stepper.restore(after_prompt.rows(rows))
                if kept:
                    stepper.prefill(torch.from_numpy(np.stack(made).astype(np.int64)))
                seeds = [stream_seed(config.seed, s.index, s.candidate, attempt) for s in streams]
                found = self._go_on(stepper, made, seeds, prompt, steps, config, to_the_end=attempt == ATTEMPTS)
                for i, (row, stream) in enumerate(zip(rows, streams, strict=True)):
                    stream.tokens, stream.takes, stream.fault = made[i], attempt + 1, None
                    if i in found:
                        wrong[row], stream.fault = found[i], found[i][1]

    def _fault(self, tokens: Tokens, finished: bool, prompt: Tokens) -> Fault | None:
        samples = self.quantiser.decode(tokens[-self.guard.memory :])
        begun = len(prompt) > 0 or len(tokens) > len(samples)
        fault = self.guard.fault(samples, begun)
        if fault is None and finished and not begun and len(samples) >= self.guard.window_samples:
            fault = replace(self.guard, first_sound=0.0).fault(samples)
        return fault

    def _begin(self, streams: Sequence[_Stream], prompt: Tokens) -> Stepper:
        stepper = Stepper(self.model, len(streams), self.backend, self.precision)
        classes = [s.class_index for s in streams] if self.model.config.classes else None
        heard = None
        if len(prompt):
            heard = torch.from_numpy(prompt.astype(np.int64)).expand(len(streams), -1)
        if classes is not None or heard is not None:
            stepper.prefill(heard, classes)
        return stepper

    def _draw(self, stepper: Stepper, steps: int, seeds: Sequence[int], config: GenerateAudioConfig) -> Tokens:
        guidance = self.guidance if config.guidance is None else config.guidance
        drawn = stepper.generate(steps, config.temperature, config.top_k, config.top_p, seeds=seeds, guidance=guidance)
        tokens: Tokens = drawn.cpu().numpy()
        return tokens

    # ---- how likely they are

    def _score(self, streams: Sequence[_Stream], prompt: Tokens, config: GenerateAudioConfig) -> None:
        nats = self._likelihoods(streams, prompt, [stream.class_index for stream in streams])
        for stream, found in zip(streams, nats, strict=True):
            stream.nats = -found / len(stream.tokens)
        if config.rank != "class" or config.candidates == 1:
            return
        none = self.model.config.classes
        each = np.array([self._likelihoods(streams, prompt, [k] * len(streams)) for k in range(none)])
        total = np.logaddexp.reduce(each, axis=0)
        for row, stream in enumerate(streams):
            stream.confidence = math.exp(each[stream.class_index, row] - total[row])

    def _likelihoods(self, streams: Sequence[_Stream], prompt: Tokens, classes: Sequence[int]) -> list[float]:
        """`log_likelihood` of each stream under its class; on a GPU many at once where there is no prompt."""
        steps = len(streams[0].tokens)
        rows = SCORED_AT_ONCE // steps if self.device.type == "cuda" and not len(prompt) else 1
        found: list[float] = []
        for at in range(0, len(streams), max(1, rows)):
            some = slice(at, at + max(1, rows))
            if rows < 2:
                found.append(self.log_likelihood(prompt, streams[at].tokens, classes[at]))
            else:
                found += self._whole(np.stack([s.tokens for s in streams[some]]), classes[some])
        return found

    @torch.no_grad()
    def _whole(self, tokens: Tokens, classes: Sequence[int]) -> list[float]:
        """`log_likelihood` of rows (batch, length) without a prompt that pass through the model as they are."""
        targets = torch.from_numpy(tokens.astype(np.int64)).to(self.device)
        asked = torch.tensor(classes, device=self.device) if self.model.config.classes else None
        logits, _ = self.model(shifted(targets), None, asked)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return (-nats.view(targets.shape).double().sum(1)).tolist()

    @torch.no_grad()
    def log_likelihood(self, prompt: Tokens, tokens: Tokens, class_index: int = 0) -> float:
        """Of tokens after a prompt, in nats, at temperature 1 and without guidance."""
        whole = torch.from_numpy(np.concatenate((prompt, tokens)).astype(np.int64))[None].to(self.device)
        classes = torch.tensor([class_index], device=self.device) if self.model.config.classes else None
        fed, begin, total = shifted(whole), len(prompt), 0.0
        state = None
        if begin:
            state = self._state_after(fed[:, :begin], classes, (hash(prompt.tobytes()), class_index))
        elif len(tokens) > SCORED:
            state = self.model.allocate_state(1)
        for chunk, targets in zip(fed[:, begin:].split(SCORED, 1), whole[:, begin:].split(SCORED, 1), strict=True):
            logits, state = self.model(chunk, state, classes)
            total -= float(F.cross_entropy(logits[0].float(), targets[0], reduction="none").double().sum())
        return total

    def _state_after(self, fed: Tensor, classes: Tensor | None, key: tuple[int, int]) -> StageState:
        """The model's state after a prompt; the last ones are kept, as every clip of a call has the same."""
        if key not in self._states:
            state = self.model.allocate_state(1)
            for chunk in fed.split(SCORED, 1):
                _, after = self.model.backbone(chunk, state, classes)
                assert after is not None
                state = after
            while len(self._states) > self.model.config.classes:
                self._states.pop(next(iter(self._states)))
            self._states[key] = state
        return self._states[key]

    # ---- a stream

    def stream(
        self,
        config: GenerateAudioConfig,
        write: Callable[[Samples16], None],
        show: Callable[[str], None] | None = None,
        warn: Callable[[str], None] = print,
    ) -> int:
        """Write each clip's samples as they are made, the prompt's first; returns how often the guard went back.

        The first block is 20 ms, so that the first sound comes at once. What has been written cannot be taken back:
        where a clip runs away, the model is put back to where it was before, and what follows goes on from there.
        """
        plan = self.plan(config)
        prompt, heard, warnings = self.read_prompt(config)
        for line in warnings:
            warn(line)
        steps = max(1, round(config.seconds * self.rate))
        meter = Meter(show, config.count, steps, self.rate)
        back = 0
        for index in range(config.count):
            stream = _Stream(index, 0, *plan[index], seed=stream_seed(config.seed, index, 0))
            stepper = self._begin([stream], prompt)
            if len(heard):
                write(heard)
            seed, attempt, made, at = stream.seed, 0, np.zeros(0, np.uint8), 0
            before = stepper.snapshot() if config.guard else None
            checked = 0  # samples of `made` at the last snapshot
            size = FIRST_BLOCK
            while at < steps:
                block = min(round(size * self.rate), steps - at)
                size = min(BLOCK, 2 * size)
                tokens = self._draw(stepper, block, [seed], config)[0]
                made, at = np.concatenate((made, tokens)), at + block
                write(to_int16(self.quantiser.decode(tokens)))
                meter.add(block, index)
                if before is None or len(made) - checked < self.guard.window_samples:
                    continue
                fault = self._fault(made, False, prompt)
                if fault and attempt < ATTEMPTS:
                    attempt, back = attempt + 1, back + 1
                    stepper.restore(before)
                    seed = stream_seed(config.seed, index, 0, attempt)
                    made = made[:checked]
                else:
                    made = made[-self.guard.memory - 1 :]  # a stream may last for hours
                    before, checked = stepper.snapshot(), len(made)
        meter.add(0, config.count)
        return back


def stream_seed(seed: int, index: int, candidate: int = 0, attempt: int = 0) -> int:
    """The seed of one stream, below 2^63: a function of these four numbers alone."""
    return int(
        np.random.SeedSequence([seed, index, candidate, attempt]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    )


def _worse(stream: _Stream, rank: Rank) -> tuple[bool, float]:
    """What is smaller is better: no fault first, then by the rank."""
    if rank == "class" and stream.confidence is not None:
        return stream.fault is not None, -stream.confidence
    return stream.fault is not None, stream.nats
