"""`mambagen pretrain-audio`: train a model of raw sound."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mambagen.commands.options import (
    CONTEXT_SETTINGS,
    checkpoint_options,
    debug_option,
    given,
    machine_options,
    run_options,
    update_options,
)
from mambagen.errors import UsageError

if TYPE_CHECKING:
    from mambagen.pipelines.audio_best import BestModel
    from mambagen.pipelines.pretrain_audio import PretrainAudioResult

BLOCKS = ("mamba", "s4", "s4d", "s4+mlp", "s4d+mlp", "attention+mlp")  # mambagen.models.audio_unet.BlockKind
RECIPES = ("sc09", "youtubemix", "digits")  # the keys of mambagen.pipelines.pretrain_audio.RECIPES (a test compares)

EPILOG = """\b
Examples:
  mambagen pretrain-audio --data recordings/ --minutes 60
  mambagen pretrain-audio --recipe sc09
  mambagen pretrain-audio --recipe youtubemix --length 8192 --outer s4+mlp --centre s4+mlp
  mambagen pretrain-audio --data index.csv --labels digits --conditional
  mambagen pretrain-audio --resume runs/pretrain-audio-20250131-120000 --minutes 120
"""


@click.command(name="pretrain-audio", context_settings=CONTEXT_SETTINGS, epilog=EPILOG)
@click.option(
    "--data",
    metavar="DATA...",
    multiple=True,
    help="What to train on: folders, lists (.txt), tables (.csv: path, start_frame, n_frames, digit, speaker, split), "
    "audio files, or names of data sets (mambagen data list). Several may follow.",
)
@click.argument("more_data", metavar="", nargs=-1)
@click.option(
    "--recipe", type=click.Choice(RECIPES), help="Published settings, and those of the built-in model, to begin from."
)
@click.option("--d-model", type=int, metavar="D", help="Channels of the outermost stage.  [default: 64]")
@click.option("--n-layer", type=int, metavar="N", help="Layers a stage.  [default: 8]")
@click.option("--pool", metavar="S[,S]", help="By how much each next stage is slower.  [default: 4,4]")
@click.option("--stages", type=click.Choice(["3", "5"]), help="5: blocks before the pools too.  [default: 5]")
@click.option("--outer", type=click.Choice(BLOCKS), help="Layers of the outer stages.  [default: mamba]")
@click.option("--centre", type=click.Choice(BLOCKS), help="Layers of the slowest stage.  [default: mamba]")
@click.option("--from", "start_from", metavar="MODEL", help="Begin with the weights of this model folder.")
@click.option(
    "--length", "lengths", metavar="N[,N]",
    help="Samples in a window; several: the run goes through them in equal parts of its steps.  [default: 16000]",
)  # fmt: skip
@click.option(
    "--batch", type=int, metavar="N",
    help="Windows in an update.  [default: 16 up to 16,000 samples, then about 2^20 samples in all]",
)  # fmt: skip
@click.option("--conditional/--unconditional-model", default=None, help="Learn each label as a class, to ask for it.")
@click.option("--labels", metavar="WORD[,WORD]|digits", help="Only clips with these labels.")
@click.option(
    "--unconditional", type=float, metavar="SHARE",
    help="Of rows that lose their class in training, which is what guidance needs.  [default: 0.1]",
)  # fmt: skip
@click.option(
    "--class-contrast", type=float, metavar="WEIGHT",
    help="Of telling a clip's class from another, which teaches a model to heed it.  [default: 0]",
)  # fmt: skip
@click.option(
    "--quantiser", type=click.Choice(["mu-law", "linear", "min-max"]), help="Sound as 256 levels.  [default: mu-law]"
)
@click.option("--rate", type=int, metavar="HZ", help="Samples a second; files are resampled.  [default: 16000]")
@click.option(
    "--pad", type=click.Choice(["ignore", "silence"]),
    help="What follows a clip shorter than the window: not counted, or silence that is learnt.  [default: ignore]",
)  # fmt: skip
@click.option("--gain-db", type=float, metavar="DB", help="Augment: louder or softer by up to this.  [default: 0]")
@click.option("--shift", type=float, metavar="S", help="Augment: up to S seconds of silence in front.  [default: 0]")
@click.option("--speed", type=float, metavar="SHARE", help="Augment: faster or slower by up to this.  [default: 0]")
@click.option("--steps", type=int, metavar="N", help="Train for exactly N updates.")
@click.option(
    "--minutes", type=float, metavar="M", help="Train for M minutes; the schedule follows the clock.  [default: 1]"
)
@click.option("--lr", type=float, metavar="X", help="Peak learning rate.  [default: 0.002]")
@update_options(clip=0.1)
@machine_options
@click.option(
    "--valid-fraction", type=float, metavar="SHARE",
    help="Hold out this share where the data do not say what to hold out.  [default: 0.1]",
)  # fmt: skip
@click.option(
    "--valid-samples", type=int, metavar="N", help="Measure on at most N held-out samples.  [default: 4194304]"
)
@click.option("--samples", type=int, metavar="N", help="Clips to make on the way and at the end.  [default: 4]")
@click.option("--sample-seconds", type=float, metavar="S", help="Their length.  [default: 1]")
@click.option("--fix-nan", is_flag=True, default=None, help="Samples that are NaN or infinite become 0.")
@click.option("--skip-bad", is_flag=True, default=None, help="Leave out files that cannot be read.")
@click.option("--shards", metavar="DIR", help="Keep the prepared audio here.  [default: the cache]")
@checkpoint_options("weights and order of the data")
@run_options("pretrain-audio", "d_model = 96", "Go on with this run; budget and learning rate may change.")
@debug_option
def pretrain_audio(
    data: tuple[str, ...],
    more_data: tuple[str, ...],
    pool: str | None,
    stages: str | None,
    lengths: str | None,
    labels: str | None,
    out: Path | None,
    resume: Path | None,
    config: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a model of raw sound.

    Reads any audio, quantises each sample to 256 levels, and learns to predict the next one. Ends with its loss on
    held-out sound beside Markov chains, and a report.html with samples to hear.
    """
    if more_data and not data:
        raise UsageError(f"{more_data[0]!r} stands alone: data come after --data, as in --data {' '.join(more_data)}")
    if out and resume:
        raise UsageError("--out and --resume do not go together: a run goes on in its own folder")
    words = None if labels is None else tuple(word for word in labels.split(",") if word)
    options = given(
        data=data + more_data,
        pool=whole_numbers("pool", pool),
        stages=None if stages is None else int(stages),
        lengths=whole_numbers("length", lengths),
        labels=words,
        **settings,
    )

    from mambagen.training.progress import Progress

    with Progress() as progress:
        progress.state("starting ...")  # what follows imports torch

        from mambagen.pipelines.pretrain_audio import pretrain_audio as run_new
        from mambagen.pipelines.pretrain_audio import resume_pretrain_audio as run_resumed
        from mambagen.pipelines.pretrain_audio import with_recipe

        if resume:
            result = run_resumed(resume, options, config, progress)
        else:
            result = run_new(with_recipe(config, options), out, progress)
    click.echo(as_machine(result) if as_json else as_table(result))


def whole_numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """ "4,4" as (4, 4)."""
    if text is None:
        return None
    parts = [part.strip().replace("_", "") for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--{option} {text}: it must be a whole number, or several with commas between them")
    return tuple(int(part) for part in parts)


def as_table(result: "PretrainAudioResult") -> str:
    """The figures beside those to beat, where the checkpoint is, and what to do next."""
    from mambagen.pipelines.audio_best import best_row, times

    best = result.best
    lines = [
        f"{result.steps:,} steps, {result.samples:,} samples in {result.seconds:.0f} s"
        + (f" ({result.samples_per_second:,.0f} samples/s)" if result.samples_per_second else "")
        + f", {times(result.epochs)} through the data"
    ]
    if result.loss is None:
        lines += ["", "nothing is held out, so nothing is measured"]
    else:
        rows = [(f"{result.name} ({result.parameters:,} parameters)", result.loss)]
        rows += best_row(best, result.steps).items()
        rows += [(f"Markov chain of order {order} over bytes", loss) for order, loss in result.baselines.items()]
        rows += [("uniform", math.log(256))]
        width = max(len(name) for name, _ in rows)
        lines += ["", f"held out: {result.held_out}", ""]
        lines += [f"{'':<{width}}  nats/sample  bits/byte"]
        lines += [f"{name:<{width}}  {loss:11.4f}  {loss / math.log(2):9.4f}" for name, loss in rows]
    word = f" --digit {result.classes[-1]}" if result.classes else ""
    lines += [
        "",
        f"checkpoint  {result.checkpoint}",
        *([f"best        {best.path} ({about(best, result)})"] if best else []),
        f"report      {result.report}",
        f"listen      mambagen generate-audio {result.to_use}{word} --out heard",
    ]
    if not result.warning:
        longer = max(10, round(result.seconds / 6))
        lines += [f"train on    mambagen pretrain-audio --resume {result.run} --minutes {longer}"]
    return "\n".join(lines)


def about(best: "BestModel", result: "PretrainAudioResult") -> str:
    """Which model the best one is, and by what."""
    if best.step == result.steps:
        return "the last weights"
    if best.loss is not None and best.look_targets == result.targets:
        return f"step {best.step:,}"
    return (
        f"step {best.step:,}; on the {best.look_targets:,} samples of the looks {best.look_loss:.4f} nats, the last "
        f"weights {best.last_look_loss:.4f}"
    )


def as_machine(result: "PretrainAudioResult") -> str:
    """One JSON object; losses in nats a sample. `held_out` and `best_held_out` are of all held-out samples, `looks` of
    the part that every look measured."""
    held_out = None
    if result.loss is not None:
        held_out = {"loss": result.loss, "bits_per_byte": result.bits_per_byte, "targets": result.targets}
    best = result.best
    at_best = looks = None
    if best:
        looks = {"best": best.look_loss, "last": best.last_look_loss, "targets": best.look_targets}
        at_best = None if best.loss is None else {"loss": best.loss, "bits_per_byte": best.loss / math.log(2)}
    return json.dumps(
        {
            "run": str(result.run),
            "checkpoint": str(result.checkpoint),
            "best": None if best is None else str(best.path),
            "best_step": None if best is None else best.step,
            "report": str(result.report),
            "parameters": result.parameters,
            "classes": list(result.classes),
            "steps": result.steps,
            "samples": result.samples,
            "seconds": result.seconds,
            "samples_per_second": result.samples_per_second,
            "epochs": result.epochs,
            "held_out": held_out,
            "best_held_out": at_best,
            "looks": looks,
            "warning": result.warning,
            "baselines": {f"order{order}": loss for order, loss in result.baselines.items()},
        },
        indent=1,
    )
