"""`mambagen generate-audio`: make sound."""

import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mambagen.commands.options import CONTEXT_SETTINGS, DEVICES, debug_option, given
from mambagen.errors import UsageError

if TYPE_CHECKING:
    from mambagen.pipelines.generate_audio import AudioVoice, GenerateAudioConfig
    from mambagen.training.progress import Progress

DEFAULT_MODEL = "digits"

EPILOG = """\b
Examples:
  mambagen generate-audio --digit 7
  mambagen generate-audio -n 10 --digit 0,1,2,3,4,5,6,7,8,9 --out digits --play-report
  mambagen generate-audio --out - | aplay
  mambagen generate-audio --out - --format s16le | ffplay -f s16le -ar 16000 -
  mambagen generate-audio runs/piano/checkpoints/step-00020000 --prompt start.wav --seconds 10
"""


@click.command(name="generate-audio", context_settings=CONTEXT_SETTINGS, epilog=EPILOG)
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--seconds", type=float, metavar="S", help="Of new sound in each clip.  [default: 1]")
@click.option("-n", "--count", type=int, metavar="N", help="Clips to make.  [default: 1]")
@click.option(
    "--digit", metavar="D[,D]", help="The digit or other class to say, several in turn, or none.  [default: any]"
)
@click.option("--prompt", metavar="FILE", help="An audio file to go on from; its samples stay as they are.")
@click.option("--temperature", type=float, metavar="T", help="0 takes the likeliest sample.  [default: 1]")
@click.option("--top-k", type=int, metavar="K", help="Draw from the K likeliest only.")
@click.option("--top-p", type=float, metavar="P", help="Draw from the fewest that have this chance.  [default: 1]")
@click.option(
    "--guidance",
    type=float,
    metavar="G",
    help="Above 1: say the class more plainly, for twice the work.  [default: the model's; digits: 2]",
)
@click.option("--seed", type=int, metavar="S", help="The same seed gives the same sound.  [default: 0]")
@click.option("--candidates", type=int, metavar="K", help="Make K for each clip and keep the best.  [default: 1]")
@click.option(
    "--rank", type=click.Choice(["likelihood", "class"]),
    help="Best is the likeliest, or the one in which the model itself hears the class best.  [default: likelihood]",
)  # fmt: skip
@click.option("--guard/--no-guard", default=None, help="Go back where sound runs away into noise or silence.")
@click.option("--out", metavar="DIR|FILE.wav|-", help="Where to; - is stdout.  [default: audio-DATE-TIME]")
@click.option(
    "--format", "form", type=click.Choice(["wav", "s16le"]), default="wav", show_default=True, help="Of --out -."
)
@click.option("--play-report", is_flag=True, help="Write DIR/report.html with players and pictures.")
@click.option("--fix-nan", is_flag=True, default=None, help="Samples of the prompt that are NaN or infinite become 0.")
@click.option("--device", default="auto", show_default=True, metavar="|".join(DEVICES), help="Where to compute.")
@click.option("--backend", default="auto", show_default=True, metavar="NAME", help="How the model is stepped.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object a clip instead of TSV.")
@debug_option
def generate_audio(
    model: str,
    digit: str | None,
    out: str | None,
    form: str,
    play_report: bool,
    device: str,
    backend: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Make sound: spoken digits, or what a model of yours learnt.

    MODEL is the folder of a model, or a built-in one's name (digits unless given). Writes 16-bit WAV files and a row
    for each: file, class, seconds, seed of its stream, bits a byte under the model, takes (more than one where the
    guard went back). With --out - the sound itself goes to stdout as it is made.
    """
    if device not in DEVICES and not device.startswith("cuda:"):
        raise UsageError(f"--device {device}: it must be {', '.join(DEVICES)} or cuda:N")
    classes = tuple(word.strip() for word in digit.split(",") if word.strip()) if digit is not None else ()
    if digit is not None and not classes:
        raise UsageError("--digit needs a digit, such as --digit 7")
    if classes == ("any",):
        classes = ()
    settings = given(classes=classes, **options)
    count = settings.get("count", 1)
    if out == "-":
        if sys.stdout.isatty():
            raise UsageError("--out - writes sound to stdout, which is a terminal here; pipe it on, as in | aplay")
        if settings.get("candidates", 1) > 1 or play_report:
            raise UsageError("--out - writes sound as it is made: --candidates and --play-report need --out DIR")
    elif out is not None and out.lower().endswith(".wav"):
        if count != 1 or play_report:
            raise UsageError(f"--out {out} is one file: with -n or --play-report give a folder")
        if Path(out).exists():
            raise UsageError(f"{out}: exists already; choose another name")
    else:
        out = out or f"audio-{datetime.now():%Y%m%d-%H%M%S}"
        if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
            raise UsageError(f"{out}: exists already; choose another --out")

    from mambagen.training.progress import Progress

    with Progress() as progress:
        # what follows imports torch, and at its first start compiles
        progress.state("starting; the first start on a machine compiles for up to a minute ...")

        from mambagen.pipelines.audio_output import configured
        from mambagen.pipelines.generate_audio import AudioVoice

        config = configured(settings)
        voice = AudioVoice(model, device, backend)
        voice.plan(config)
        if out == "-":
            to_stdout(voice, config, form, progress)
        else:
            to_files(voice, config, Path(out), play_report, as_json, progress)


def to_stdout(voice: "AudioVoice", config: "GenerateAudioConfig", form: str, progress: "Progress") -> None:
    """The sound itself; a WAV's header says how long it will be."""
    from mambagen.pipelines.audio_output import stream_to

    def write(content: bytes) -> None:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()

    stream_to(voice, config, form, write, progress.state, warn)


def to_files(
    voice: "AudioVoice",
    config: "GenerateAudioConfig",
    out: Path,
    play_report: bool,
    as_json: bool,
    progress: "Progress",
) -> None:
    """WAV files, each written when it is finished, and their rows on stdout."""
    from mambagen.pipelines.audio_output import clips_to_files

    columns = ("file", "class", "seconds", "seed", "bits_per_byte", "takes")
    for i, row in enumerate(clips_to_files(voice, config, out, play_report, progress.state, warn)):
        if as_json:
            click.echo(json.dumps(row))
            continue
        if i == 0:
            click.echo("\t".join(columns))
        click.echo("\t".join(str(row[name]) for name in columns))
    if play_report:
        progress.close()
        click.echo(f"mambagen: the report is {os.path.join(out, 'report.html')}", err=True)


def warn(text: str) -> None:
    """A line on stderr, in the form of the errors."""
    clear = "\r\x1b[2K" if sys.stderr.isatty() else ""
    click.echo(f"{clear}mambagen: warning: {' '.join(text.split())}", err=True)
