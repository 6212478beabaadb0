"""Where generated sound goes: WAV files, a stream of bytes, a page that plays it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from mambagen.data.wav import wav_header, write_wav
from mambagen.data.whole_file import writable_folder
from mambagen.errors import UsageError
from mambagen.pipelines.generate_audio import AudioVoice, GenerateAudioConfig, MadeClip
from mambagen.reports.page import Page

SHOWN = 64  # clips on a page
WAV_LIMIT = (1 << 32) - 64  # bytes of sound


def configured(settings: Mapping[str, Any]) -> GenerateAudioConfig:
    """UsageError, naming the option, where a setting is out of its range."""
    try:
        return GenerateAudioConfig(**settings)
    except ValidationError as error:
        fault = error.errors()[0]
        if not fault["loc"]:
            raise UsageError(str(fault["msg"]).removeprefix("Value error, ")) from error
        name = {"count": "-n", "classes": "--digit"}.get(str(fault["loc"][0]), f"--{fault['loc'][0]}".replace("_", "-"))
        raise UsageError(f"{name} is {fault['input']!r}: {fault['msg']}") from error


def clips_to_files(
    voice: AudioVoice,
    config: GenerateAudioConfig,
    out: Path,
    report: bool = False,
    show: Callable[[str], None] | None = None,
    warn: Callable[[str], None] = print,
) -> Iterator[dict[str, Any]]:
    """Write OUT/0001-seven.wav and so on (or OUT itself where it ends in .wav), yielding a row each when it is there.

    With `report`, OUT/report.html plays them all: up to 64 in under 15 MB.

    Raises:
        ResourceError, OSError: the disk is full or refuses; what is there under its name is whole.
    """
    single = out.suffix.lower() == ".wav"
    with writable_folder(out.parent if single else out, make=not single):
        yield from _clips_to_files(voice, config, out, single, report, show, warn)


def _clips_to_files(
    voice: AudioVoice,
    config: GenerateAudioConfig,
    out: Path,
    single: bool,
    report: bool,
    show: Callable[[str], None] | None,
    warn: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    heard: list[tuple[str, MadeClip]] = []
    for clip in voice.clips(config, show, warn):
        file = out if single else out / file_name(clip, config.count)
        write_wav(file, clip.samples, clip.rate)
        if report:
            heard.append((file.name, clip))
        row: dict[str, Any] = {
            "file": str(file),
            "class": clip.label,
            "seconds": round(len(clip.samples) / clip.rate, 4),
            "seed": clip.seed,
            "bits_per_byte": round(clip.bits_per_byte, 4),
            "takes": clip.takes,
        }
        yield row if clip.confidence is None else row | {"confidence": round(clip.confidence, 4)}
    if report:
        write_audio_page(out / "report.html", voice, config, heard)


def file_name(clip: MadeClip, count: int) -> str:
    """0007-seven.wav; names sort in the clips' order."""
    width = max(4, len(str(count)))
    label = "".join(letter if letter.isalnum() else "-" for letter in clip.label)
    return f"{clip.index + 1:0{width}d}" + (f"-{label}" if label else "") + ".wav"


def stream_to(
    voice: AudioVoice,
    config: GenerateAudioConfig,
    form: Literal["wav", "s16le"] | str,
    write: Callable[[bytes], None],
    show: Callable[[str], None] | None = None,
    warn: Callable[[str], None] = print,
) -> None:
    """The clips one after another as bytes, as they are made: little-endian 16-bit samples, or a WAV of them."""
    heard = voice.read_prompt(config)[1]  # before the header: a bad prompt writes nothing
    total = config.count * (len(heard) + max(1, round(config.seconds * voice.rate)))
    voice.warm()
    if form == "wav":
        if 2 * total > WAV_LIMIT:
            raise UsageError("that is more than a WAV can hold (4 GB); use --format s16le")
        write(wav_header(total, voice.rate))
    voice.stream(config, lambda samples: write(samples.astype("<i2").tobytes()), show, warn)


def write_audio_page(
    path: Path, voice: AudioVoice, config: GenerateAudioConfig, clips: Sequence[tuple[str, MadeClip]]
) -> None:
    """A page with a player, waveform and spectrogram for each clip."""
    shown = clips[:SHOWN]
    page = Page(
        "Generated sound",
        f"{len(clips)} clips of {config.seconds:g} s"
        + (f" after the sound of {config.prompt}" if config.prompt else "")
        + (f"; the first {SHOWN} are here" if len(clips) > SHOWN else ""),
    )
    for name, clip in shown:
        words = [name, *([clip.label] if clip.label else []), f"{clip.bits_per_byte:.2f} bits a byte"]
        if clip.takes > 1:
            words.append(f"take {clip.takes}")
        if clip.prompt_samples:
            words.append(f"the first {clip.prompt_samples / clip.rate:.2f} s are the prompt")
        page.audio(clip.samples.astype(np.float32) / np.float32(32768), clip.rate, ", ".join(words))
    page.heading("How")
    settings = config.model_dump(mode="json", exclude_none=True)
    settings["classes"] = ", ".join(config.classes) or "any"
    page.table(["setting", "value"], [(key, str(value)) for key, value in settings.items()], number_columns=())
    page.text(f"The model: {voice.model.config.description}.")
    page.write(path)
