"""Audio files as mono float32 at the rate that is asked for: WAV (8, 16, 24, 32 bit, float), FLAC, OGG, MP3, AIFF.

    clip = read_audio("speech.mp3", rate=16_000)
    clip.samples                         # (n,) float32, loudness as it was
    for warning in clip.warnings:        # what was done to it, or is odd about it
        print(warning)                   # resampled from 44,100 to 16,000 Hz

What cannot be used is an InputError of one line that names the file; what can be used after something was done to it
comes with a warning that says what.
"""

import contextlib
import math
import os
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mambagen.errors import InputError

# What a folder is searched for; a file that is named by itself may be called anything.
SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".caf")

SILENT = 10 ** (-60 / 20)  # no sample above -60 dBFS: nothing to be heard
FULL_SCALE = 0.9995  # from here on a sample may be cut off; 16-bit sound ends at 0.99997, or at 0.9999 after MP3
CLIPPED_RUN = 3  # samples in a row at full scale, of one sign, are no peak but a cut
OPPOSITE = 0.2  # of the power that channels without relation would leave in their mean: with less they cancel
_BLOCKS = (1 << 20, 1 << 10, 1 << 4)  # frames read at once
_UNKNOWN = 1 << 60  # frames from which on a header says that it does not know


@dataclass(frozen=True)
class AudioWarning:
    """Something that was done to a file or is odd about it. `kind` is one word, the same for all files with it."""

    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Clip:
    """Mono sound in memory."""

    samples: NDArray[np.float32]  # (n,), in [-1, 1] unless the file went beyond
    rate: int  # samples a second
    warnings: tuple[AudioWarning, ...] = ()

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says; `frames` may be more than the file holds."""

    rate: int
    channels: int
    frames: int
    format: str  # as libsndfile calls it: WAV, FLAC, OGG, MP3, ...

    @property
    def seconds(self) -> float:
        return self.frames / self.rate


@contextlib.contextmanager
def without_remarks(progress: bool = False) -> Iterator[None]:
    """Keep what libmpg123 has to say of damaged MP3 files off stderr: we say what is wrong in one line.

    It takes stderr from the whole process, so it is for the main thread alone, and with `progress`, where others than
    the reader write to a terminal meanwhile, it leaves terminals as they are.
    """
    if threading.current_thread() is not threading.main_thread() or (progress and os.isatty(2)):
        yield
        return
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


@without_remarks()
def read_audio(
    path: str | Path,
    rate: int | None = 16_000,
    fix_nan: bool | None = False,
    start: int = 0,
    frames: int | None = None,
    limit_seconds: float | None = None,
) -> Clip:
    """A file, or a part of it, as mono float32 at `rate` samples a second (None: the file's own).

    Args:
        fix_nan: samples that are NaN or infinite become 0 with a warning; otherwise they are an error, which names the
            option --fix-nan unless this is None.
        start, frames: the part, counted at the file's own rate; frames None: to the end.
        limit_seconds: a longer part is refused.

    Channels are averaged; where they cancel one another (one is the other turned upside down) the louder one is taken.
    Nothing is made louder or softer. Resampling is soxr's "HQ", as librosa's default.

    Raises:
        InputError: no file, a folder, empty, text, no audio, a header that is cut off, no samples, NaN.
    """
    info = audio_info(path)
    promised = _promised_frames(path, info)
    wanted = max(0, promised - start) if frames is None else frames
    known = wanted < _UNKNOWN
    at_most = wanted if limit_seconds is None else min(wanted, int(limit_seconds * info.rate) + 1)
    channels = _read_frames(path, start, at_most, info)
    got = len(channels)
    if limit_seconds is not None and (wanted if known else got) > limit_seconds * info.rate:
        length = f"{wanted / info.rate:,.1f} s long" if known else "longer than that"
        raise InputError.at(path, None, f"is {length}; the limit is {limit_seconds:,.6g} s: cut it first")
    warnings: list[AudioWarning] = []
    if got == 0:
        where = f"from frame {start:,} on " if start else ""
        raise InputError.at(path, None, f"holds no samples {where}(its header says {info.frames:,} frames)")
    if got < wanted and known:
        warnings.append(
            AudioWarning("truncated", f"truncated: {wanted:,} frames are promised, {got:,} are there; using those")
        )
    elif info.format == "OGG" and frames is None and not _ogg_ends(path):
        warnings.append(AudioWarning("truncated", f"truncated: the last page is missing; using {got:,} frames"))
    _check_finite(path, channels, fix_nan, warnings)
    _note_clipping(channels, warnings)
    samples = _mixed(channels, warnings)
    if rate is not None and rate != info.rate:
        warnings.append(AudioWarning("resampled", f"resampled from {info.rate:,} to {rate:,} Hz"))
        samples = resample(samples, info.rate, rate)
    if float(np.abs(samples).max(initial=0.0)) < SILENT:
        warnings.append(AudioWarning("silent", "silent: no sample is above -60 dBFS"))
    return Clip(samples, rate or info.rate, tuple(warnings))


@without_remarks()
def audio_info(path: str | Path) -> AudioInfo:
    """Rate, channels and length by the header. Raises InputError as `read_audio` does."""
    with _opened(path) as file:
        return AudioInfo(file.samplerate, file.channels, file.frames, file.format)


def resample(samples: NDArray[np.float32], old: int, new: int) -> NDArray[np.float32]:
    """Samples at another rate; their number becomes ceil(n new / old), as librosa has it."""
    if old == new:
        return samples
    import soxr

    wanted = math.ceil(len(samples) * new / old)
    out = np.asarray(soxr.resample(samples, old, new, quality="HQ"), dtype=np.float32)
    return np.pad(out, (0, wanted - len(out))) if len(out) < wanted else out[:wanted]


def _opened(path: str | Path) -> Any:
    """The file as a soundfile.SoundFile; InputError says what else it is."""
    import soundfile

    place = Path(path)
    if place.is_dir():
        raise InputError.at(path, None, "is a folder; an audio file is needed here")
    try:
        size = place.stat().st_size
        if size == 0 and place.is_file():
            raise InputError.at(path, None, "is empty (0 bytes)")
        return soundfile.SoundFile(os.fspath(path))
    except OSError as error:
        raise InputError.at(path, None, f"cannot be read: {error.strerror or error}") from None
    except soundfile.LibsndfileError as error:
        raise InputError.at(path, None, _why_not(place, error.error_string)) from None
    except (TypeError, ValueError) as error:  # soundfile takes a file called .raw for one without a header
        raise InputError.at(path, None, _why_not(place, str(error))) from None


def _why_not(path: Path, reason: str) -> str:
    """What a file is that libsndfile does not open."""
    try:
        with path.open("rb") as stream:
            start = stream.read(4096)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if start[:4] in (b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS", b"FORM", b".snd") or start[:3] == b"ID3":
        return f"its header is cut off or damaged ({reason.rstrip('.').strip()}); take another copy of the file"
    if _is_text(start):
        return "is text, not audio"
    return "is no audio that can be read here (WAV, FLAC, OGG, MP3 or AIFF are)"


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4:  # not merely a letter that the end of the block cut in two
            return False
        text = start[: error.start].decode("utf-8")
    return not any(ord(letter) < 32 and letter not in "\t\n\r\f\x1b" for letter in text)


def _promised_frames(path: str | Path, info: AudioInfo) -> int:
    """The frames that the header promises: of WAV files libsndfile itself says only how many there are."""
    if info.format not in ("WAV", "WAVEX"):
        return info.frames
    promised = _riff_frames(Path(path))
    return info.frames if promised is None else max(promised, info.frames)


def _riff_frames(path: Path) -> int | None:
    """The length of a WAV's data chunk in frames; None where it is not stated (a stream's 0xFFFFFFFF or 0)."""
    with path.open("rb") as stream:
        head = stream.read(12)
        order = ">" if head[:4] == b"RIFX" else "<"
        align = 0
        while len(chunk := stream.read(8)) == 8:
            name, size = chunk[:4], struct.unpack(order + "I", chunk[4:])[0]
            if name == b"data":
                stated = 0 < size < 0xFFFFFFFF - 0xFFFF and align
                return size // align if stated else None
            if name == b"fmt ":
                body = stream.read(min(size, 64))
                if len(body) < 14:
                    return None
                align = struct.unpack_from(order + "H", body, 12)[0]
                stream.seek(size - len(body) + size % 2, os.SEEK_CUR)
            else:
                stream.seek(size + size % 2, os.SEEK_CUR)
    return None


def _read_frames(path: str | Path, start: int, frames: int, info: AudioInfo) -> NDArray[np.float32]:
    """(frames, channels), or as many as the file has; a stream that breaks off ends there."""
    blocks: list[NDArray[np.float32]] = []
    fault = ""
    if start < info.frames:
        for size in _BLOCKS:  # what came before a fault in its block is lost with it: from there on in smaller ones
            got = sum(map(len, blocks))
            fault = _read_blocks(path, start, got, frames, size, blocks)
            if not fault:
                break
    if fault and not blocks:
        raise InputError.at(path, None, f"its sound cannot be decoded ({fault}); take another copy")
    if not blocks:
        return np.zeros((0, info.channels), np.float32)
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def _read_blocks(
    path: str | Path, start: int, got: int, frames: int, size: int, blocks: list[NDArray[np.float32]]
) -> str:
    """Append blocks, after those that were got before, up to the end or the first fault; returns what that was."""
    import soundfile

    with _opened(path) as file:
        try:
            if start:
                file.seek(start)
            for at in range(0, got, _BLOCKS[0]):
                file.read(min(_BLOCKS[0], got - at), dtype="float32")
            while got < frames:
                block = file.read(min(frames - got, size), dtype="float32", always_2d=True)
                if not len(block):
                    break
                blocks.append(block)
                got += len(block)
        except soundfile.LibsndfileError as error:
            return str(error.error_string).rstrip(".").strip()
    return ""


def _ogg_ends(path: str | Path) -> bool:
    """Whether an OGG file's last page bears the mark of the last one."""
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        stream.seek(max(0, size - (1 << 17)))  # a page is 65,307 bytes at most
        tail = stream.read()
    at = tail.rfind(b"OggS")
    return at >= 0 and len(tail) > at + 5 and bool(tail[at + 5] & 4)


def _check_finite(
    path: str | Path, channels: NDArray[np.float32], fix_nan: bool | None, warnings: list[AudioWarning]
) -> None:
    finite = np.isfinite(channels)
    bad = int(channels.size - np.count_nonzero(finite))
    if not bad:
        return
    if not fix_nan:
        first = int(np.argmin(finite.all(axis=1)))
        raise InputError.at(
            path,
            None,
            f"{bad:,} of {channels.size:,} samples are NaN or infinite (the first in frame {first:,})"
            + ("" if fix_nan is None else "; --fix-nan makes them 0"),
        )
    channels[~finite] = 0.0
    warnings.append(AudioWarning("nan", f"{bad:,} of {channels.size:,} samples were NaN or infinite: set to 0"))


def _note_clipping(channels: NDArray[np.float32], warnings: list[AudioWarning]) -> None:
    clipped = sum(clipped_samples(channels[:, i]) for i in range(channels.shape[1]))
    if clipped:
        share = clipped / channels.size
        warnings.append(AudioWarning("clipped", f"clipped: {clipped:,} samples ({share:.2%}) lie at full scale"))


def clipped_samples(samples: NDArray[np.float32]) -> int:
    """Samples that stand in runs of three or more at or beyond full scale, all of one sign."""
    count = 0
    for high in (samples >= FULL_SCALE, samples <= -FULL_SCALE):
        if high.any():
            count += sum(length for length in _runs(high) if length >= CLIPPED_RUN)
    return count


def _runs(mask: NDArray[np.bool_]) -> Iterator[int]:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    yield from (edges[1::2] - edges[::2]).tolist()


def _mixed(channels: NDArray[np.float32], warnings: list[AudioWarning]) -> NDArray[np.float32]:
    count = channels.shape[1]
    if count == 1:
        return np.ascontiguousarray(channels[:, 0])
    name = "stereo" if count == 2 else f"{count} channels"
    mono = channels.mean(axis=1, dtype=np.float64).astype(np.float32)
    powers = np.mean(np.square(channels, dtype=np.float64), axis=0)
    left = np.mean(np.square(mono, dtype=np.float64))
    if powers.mean() > SILENT**2 / 2 and left < OPPOSITE / count * powers.mean() and powers.min() > 0.1 * powers.max():
        loudest = int(powers.argmax())
        lost = f"{10 * math.log10(left / powers.mean()):.0f} dB" if left > 0 else "nothing"
        text = (
            f"anti-phase: the channels cancel one another ({lost} is left of them when mixed); "
            f"channel {loudest + 1} of {count} is used instead"
        )
        warnings.append(AudioWarning("anti-phase", text))
        return np.ascontiguousarray(channels[:, loudest])
    warnings.append(AudioWarning("stereo", f"{name}: mixed to mono"))
    return mono
