"""`mambagen train-sc09-classifier`: train the judge of eval-sc09."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mambagen.commands.options import (
    CONTEXT_SETTINGS,
    debug_option,
    given,
    machine_options,
    run_options,
    save_every_option,
)
from mambagen.errors import UsageError

if TYPE_CHECKING:
    from mambagen.pipelines.train_sc09_classifier import TrainJudgeResult

EPILOG = """\b
Examples:
  mambagen train-sc09-classifier --data speech_commands_v0.02 --arch resnext29 --steps 20000
  mambagen train-sc09-classifier --data clips.csv --minutes 10 --out runs/judge
  mambagen eval-sc09 --judge runs/judge/model --data clips.csv --samples CLIPS
"""
ARCHITECTURES = ("small", "resnext29")


@click.command(name="train-sc09-classifier", context_settings=CONTEXT_SETTINGS, epilog=EPILOG)
@click.option(
    "--data", metavar="PATH", help="Speech Commands or SC09 folder, or a CSV of clips (path, label, speaker, split)."
)
@click.option(
    "--arch", type=click.Choice(ARCHITECTURES),
    help="small (0.7M parameters), or the published ResNeXt (34M).  [default: small]",
)  # fmt: skip
@click.option("--words/--digits-only", default=None, help="Other words are further classes, or left out.")
@click.option("--augmentation", type=float, metavar="X", help="How far clips are changed; 0: moved only.  [default: 1]")
@click.option("--masks", type=float, metavar="X", help="How much of the pictures is covered up.  [default: 1]")
@click.option("--dropout", type=float, metavar="SHARE", help="Before the head, in training.  [default: 0.2]")
@click.option("--batch", type=int, metavar="N", help="Clips in an update.  [default: 64]")
@click.option("--steps", type=int, metavar="N", help="Updates.  [default: 3000]")
@click.option("--minutes", type=float, metavar="M", help="Time, instead of steps.")
@click.option(
    "--patience", type=int, metavar="N",
    help="Stop after so many of the ten looks at validation without a better model.  [default: 5]",
)  # fmt: skip
@click.option("--lr", type=float, metavar="X", help="Peak learning rate.  [default: 0.003]")
@click.option("--weight-decay", type=float, metavar="X", help="AdamW's weight decay.  [default: 0.05]")
@machine_options
@save_every_option
@click.option("--seed", type=int, metavar="S", help="Of weights and order of the data.  [default: 0]")
@click.option("--licence", metavar="TEXT", help="What the model card says of the weights' licence.")
@run_options("train-sc09-classifier", "batch = 32")
@debug_option
def train_sc09_classifier(
    out: Path | None, resume: Path | None, config: Path | None, as_json: bool, **settings: Any
) -> None:
    """Train the judge of eval-sc09 on spoken digits.

    Keeps the model that is best on the validation speakers and measures it on the test speakers, once. Words that are
    no digits, where the data have them, become classes of their own, so that noise and babble are not taken for digits.
    """
    if out and resume:
        raise UsageError("--out and --resume do not go together: a run goes on in its own folder")
    if not resume and not config and settings["data"] is None:
        raise UsageError("no --data: give a Speech Commands folder or a table of clips")
    options = given(**settings)

    from mambagen.training.progress import Progress

    with Progress() as progress:
        progress.state("starting ...")

        from mambagen.pipelines.train_sc09_classifier import TrainJudgeConfig, resume_train_judge, train_judge
        from mambagen.training.config import configure

        if resume:
            result = resume_train_judge(resume, options, config, progress)
        else:
            result = train_judge(configure(TrainJudgeConfig, config, options), out, progress)
    click.echo(as_machine(result) if as_json else as_table(result))


def as_table(result: "TrainJudgeResult") -> str:
    """Figures, the confusion of the last part, where the model is and what to do with it."""
    early = ", stopped early" if result.stopped_early else ""
    width = max(len(name) for name in result.figures)
    lines = [
        f"{result.arch}, {result.parameters:,} parameters, {result.train_clips:,} clips of {len(result.digits)} digits "
        f"and {result.other_classes} other classes, {result.steps:,} steps in {result.seconds:.0f} s{early}",
        "",
        f"{'':<{width}}   clips  accuracy      F1     MCC    loss",
    ]
    for name, f in result.figures.items():
        lines.append(f"{name:<{width}}  {f.rows:>6}  {f.accuracy:8.4f}  {f.f1:6.4f}  {f.mcc:6.4f}  {f.loss:6.4f}")
    name, figures = list(result.figures.items())[-1]
    lines += ["", f"{f'{name}: said, heard':<22}" + "".join(f"{digit:>7}" for digit in result.digits)]
    for digit, row in zip(result.digits, figures.confusion, strict=True):
        lines.append(f"{digit:<22}" + "".join(f"{count:>7}" for count in row))
    lines += ["", f"model       {result.model}"]
    lines += [f"use it      mambagen eval-sc09 --judge {result.model} --data DATA --samples CLIPS"]
    return "\n".join(lines)


def as_machine(result: "TrainJudgeResult") -> str:
    """One JSON object."""
    fields = asdict(result)
    return json.dumps(fields | {"run": str(result.run), "model": str(result.model)}, indent=1)
