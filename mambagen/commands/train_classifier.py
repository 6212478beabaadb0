"""`mambagen train-classifier`: train a classifier of labelled DNA sequences."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mambagen.commands.options import (
    CONTEXT_SETTINGS,
    ENCODERS,
    POOLINGS,
    SIZES,
    checkpoint_options,
    debug_option,
    given,
    machine_options,
    run_options,
    update_options,
)
from mambagen.errors import UsageError

if TYPE_CHECKING:
    from mambagen.pipelines.sequence_classification import Figures
    from mambagen.pipelines.train_classifier import TrainClassifierResult

EPILOG = """\b
Examples:
  mambagen train-classifier --data train.csv --valid dev.csv --test test.csv --encoder bimamba
  mambagen train-classifier --data all.csv.gz --from runs/bigs --epochs 5
  mambagen train-classifier --data seqs.fa --labels labels.tsv --reverse-complement
"""
SHOWN = 12  # classes of which the confusion matrix is printed


@click.command(name="train-classifier", context_settings=CONTEXT_SETTINGS, epilog=EPILOG)
@click.option("--data", metavar="FILE", help="CSV or TSV with sequences and labels, or a FASTA file with --labels.")
@click.option("--labels", metavar="FILE", help="Table of record name and label, for FASTA files.")
@click.option("--valid", metavar="FILE", help="Validation data like --data.  [default: a share of --data]")
@click.option("--test", metavar="FILE", help="Test data like --data, measured once, at the end.")
@click.option(
    "--valid-fraction", type=float, metavar="SHARE", help="Held out where --valid is not given.  [default: 0.1]"
)
@click.option("--sequence-column", metavar="NAME", help="Of the tables.  [default: sequence]")
@click.option("--label-column", metavar="NAME", help="Of the tables.  [default: label]")
@click.option(
    "--encoder", type=click.Choice([*ENCODERS, "mamba"]), help="What reads the sequences (bigs, or that of --from)."
)
@click.option("--size", type=click.Choice(SIZES), help="Parameters of the encoder.  [default: 250k]")
@click.option("--from", "start_from", metavar="MODEL", help="Begin with the encoder of this pretrained model folder.")
@click.option("--pooling", type=click.Choice(POOLINGS), help="From positions to one vector (mean; last for mamba).")
@click.option(
    "--equivariant", is_flag=True, default=None, help="Read both strands, so that both get exactly the same answer."
)
@click.option("--dropout", type=float, metavar="SHARE", help="Before the head, in training.  [default: 0.1]")
@click.option("--batch", type=int, metavar="N", help="Sequences in an update.  [default: 64]")
@click.option("--epochs", type=int, metavar="N", help="Passes over the data.  [default: 10]")
@click.option("--steps", type=int, metavar="N", help="Updates, instead of epochs.")
@click.option("--minutes", type=float, metavar="M", help="Time, instead of epochs.")
@click.option(
    "--patience",
    type=int,
    metavar="N",
    help="Stop after so many of the ten looks at validation without a better model.  [default: 4]",
)
@click.option("--lr", type=float, metavar="X", help="Peak learning rate.  [default: 0.001]")
@update_options()
@machine_options
@click.option(
    "--reverse-complement/--no-reverse-complement", default=None, help="Read half of the rows from the other strand."
)
@click.option(
    "--lower-case",
    type=click.Choice(["same", "n"]),
    help="Soft-masked letters: as upper case, or as N.  [default: same]",
)
@click.option("--baseline/--no-baseline", default=None, help="Fit a logistic regression on k-mers beside it, or not.")
@checkpoint_options("weights, order of the data and hold-out")
@run_options("train-classifier", "batch = 32")
@debug_option
def train_classifier(
    out: Path | None, resume: Path | None, config: Path | None, as_json: bool, **settings: Any
) -> None:
    """Train a classifier of labelled DNA sequences.

    Keeps the model that is best on validation (MCC) and prints its figures beside those of a logistic regression on
    5-mer frequencies, which have to be beaten.
    """
    if out and resume:
        raise UsageError("--out and --resume do not go together: a run goes on in its own folder")
    if not resume and not config and settings["data"] is None:
        raise UsageError("no --data: give a table of sequences and labels, or a FASTA file with --labels")
    options = given(**settings)

    from mambagen.training.progress import Progress

    with Progress() as progress:
        progress.state("starting ...")

        from mambagen.pipelines.train_classifier import TrainClassifierConfig, resume_train_classifier
        from mambagen.pipelines.train_classifier import train_classifier as run_new
        from mambagen.training.config import configure

        if resume:
            result = resume_train_classifier(resume, options, config, progress)
        else:
            result = run_new(configure(TrainClassifierConfig, config, options), out, progress)
    click.echo(as_machine(result) if as_json else as_table(result))


def as_table(result: "TrainClassifierResult") -> str:
    """Figures of model and baseline, the confusion matrix, where the model is and what to do with it."""
    rows = [(f"{result.name}, validation", result.valid), ("5-mer logistic regression", result.baseline_valid)]
    rows += [(f"{result.name}, test", result.test), ("5-mer logistic regression", result.baseline_test)]
    shown = [(name, figures) for name, figures in rows if figures is not None]
    width = max(len(name) for name, _ in shown)
    early = ", stopped early" if result.stopped_early else ""
    lines = [
        f"{result.train_rows:,} sequences, {len(result.classes)} classes, {result.parameters:,} parameters, "
        f"{result.steps:,} steps in {result.seconds:.0f} s{early}",
        "",
        f"{'':<{width}}  {'rows':>6}  accuracy      F1     MCC",
    ]
    lines += [f"{name:<{width}}  {f.rows:>6}  {f.accuracy:8.4f}  {f.f1:6.4f}  {f.mcc:6.4f}" for name, f in shown]
    if len(result.classes) <= SHOWN:
        lines += ["", *confusion(result.classes, result.test or result.valid)]
    lines += ["", verdict(result), "", f"model       {result.model}"]
    lines += [f"report      {result.run / 'report.html'}"]
    lines += [f"use it      mambagen classify {result.model} SEQUENCES.fa"]
    return "\n".join(lines)


def confusion(classes: tuple[str, ...], figures: "Figures") -> list[str]:
    """The confusion matrix, a row a true class."""
    width = max(8, *(len(name) for name in classes))
    head = "true \\ said".ljust(max(width, 11))
    lines = [f"{head}  " + "  ".join(f"{name:>{width}}" for name in classes)]
    for name, row in zip(classes, figures.confusion, strict=True):
        lines.append(f"{name:<{len(head)}}  " + "  ".join(f"{count:>{width}}" for count in row))
    return lines


def verdict(result: "TrainClassifierResult") -> str:
    """Whether the model is above the baseline, where one was fitted."""
    ours, other = (result.test, result.baseline_test) if result.test else (result.valid, result.baseline_valid)
    if other is None:
        return "No baseline was fitted."
    if ours.mcc > other.mcc:
        return f"The model beats the k-mer baseline by {ours.mcc - other.mcc:.4f} of MCC."
    return (
        f"The model is still behind the k-mer baseline ({ours.mcc:.4f} against {other.mcc:.4f} of MCC): train longer."
    )


def as_machine(result: "TrainClassifierResult") -> str:
    """One JSON object."""
    fields = asdict(result)
    return json.dumps(fields | {"run": str(result.run), "model": str(result.model)}, indent=1)
