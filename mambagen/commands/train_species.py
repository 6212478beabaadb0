"""`mambagen train-species`: train a model that tells species apart."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mambagen.commands.options import (
    BASES,
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
    from mambagen.pipelines.train_species import TrainSpeciesResult

EPILOG = """\b
Examples:
  mambagen train-species
  mambagen train-species --data genomes/ --splits splits.bed --steps 4000 --baselines
  mambagen train-species --data human.fa mouse.fa cow.fa --test-records chr1,chr3 --valid-records chr5
  mambagen train-species --data great-apes --encoder mamba --size 1.4m --from runs/hg38 --context 16384
  mambagen train-species --resume runs/train-species-20250131-120000 --steps 8000
"""


@click.command(name="train-species", context_settings=CONTEXT_SETTINGS, epilog=EPILOG)
@click.option(
    "--data", metavar="DATA...", multiple=True,
    help="A folder with a sequence file (or a folder of them) for each species, such files, or names of data sets. "
    "Several may follow.  [default: simulated species]",
)  # fmt: skip
@click.argument("more_data", metavar="", nargs=-1)
@click.option(
    "--splits", metavar="BED",
    help="Rows of record, start, end, train|valid|test and, where a file holds several species, the species.",
)  # fmt: skip
@click.option("--species", metavar="NAME[,NAME]", multiple=True, help="Only these species of the data.")
@click.option("--valid-fraction", type=float, metavar="SHARE", help="Held out where nothing else says.  [default: 0.1]")
@click.option("--test-fraction", type=float, metavar="SHARE", help="The same for the test.  [default: 0.1]")
@click.option("--valid-records", metavar="NAME[,NAME]", multiple=True, help="Whole records, such as chr5, instead.")
@click.option("--test-records", metavar="NAME[,NAME]", multiple=True, help="The same for the test.")
@click.option("--simulated-species", type=int, metavar="N", help="Of simulated data.  [default: 5]")
@click.option("--simulated-length", type=BASES, help="Bases of each of them.  [default: 500000]")
@click.option("--divergence", type=float, metavar="X", help="Substitutions a site between them.  [default: 0.05]")
@click.option(
    "--encoder", type=click.Choice([*ENCODERS, "mamba"]), help="What reads the sequence (bimamba, or that of --from)."
)
@click.option("--size", type=click.Choice(SIZES), help="Parameters of the encoder, where it reads single bases.")
@click.option("--from", "start_from", metavar="MODEL", help="Begin with the encoder of this pretrained model folder.")
@click.option("--pooling", type=click.Choice(POOLINGS), help="From positions to one vector (mean; last for mamba).")
@click.option("--equivariant", is_flag=True, default=None, help="Read both strands, for exactly the same answer.")
@click.option("--dropout", type=float, metavar="SHARE", help="Before the head, in training.  [default: 0.1]")
@click.option(
    "--patch", type=int, metavar="N", help="Bases in a position of the bimamba: 1 reads single bases.  [default: 32]"
)
@click.option("--k", type=int, metavar="K", help="Of the k-mers that a patch is made of.  [default: 7]")
@click.option("--context", type=BASES, metavar="N", help="Bases in the longest windows.  [default: 4096]")
@click.option(
    "--shortest",
    type=BASES,
    metavar="N",
    help="Steps have windows from here, doubling, to the context.  [default: 256]",
)
@click.option(
    "--length-warmup", type=BASES, metavar="N",
    help="Begin with windows of N bases, doubled in even stages until they have the context (needs --steps).",
)  # fmt: skip
@click.option("--batch-tokens", type=BASES, metavar="N", help="Bases in an update.  [default: 65536]")
@click.option(
    "--by-record", type=click.Choice(["bases", "uniform"]),
    help="Records of a species are drawn by their length, or each as likely.  [default: bases]",
)  # fmt: skip
@click.option("--steps", type=int, metavar="N", help="Train for exactly N updates.")
@click.option("--minutes", type=float, metavar="M", help="Train for M minutes.  [default: 1]")
@click.option(
    "--patience", type=int, metavar="N",
    help="Stop after so many of the ten looks at validation without a better model.  [default: 10]",
)  # fmt: skip
@click.option("--lr", type=float, metavar="X", help="Peak learning rate.  [default: 0.004]")
@update_options()
@machine_options
@click.option(
    "--reverse-complement/--no-reverse-complement", default=None,
    help="Read half of the windows from the other strand (or none).",
)  # fmt: skip
@click.option("--shuffled", is_flag=True, default=None, help="A control: train on labels drawn at random.")
@click.option(
    "--valid-windows", type=int, metavar="N", help="For validation, of each species and length.  [default: 40]"
)
@click.option("--test-windows", type=int, metavar="N", help="The same for the test, at most.  [default: 100]")
@click.option(
    "--lengths", metavar="N[,N]", multiple=True,
    help="Lengths of the test records.  [default: 1024,4096,16384,65536,262144]",
)  # fmt: skip
@click.option(
    "--baselines", is_flag=True, default=None,
    help="Fit logistic regressions on k-mers, N and case beside it, at every length.",
)  # fmt: skip
@click.option("--baseline-windows", type=int, metavar="N", help="Of each species, to fit them on.  [default: 400]")
@checkpoint_options("weights, windows and hold-out")
@run_options("train-species", "batch_tokens = 131072")
@debug_option
def train_species(
    data: tuple[str, ...],
    more_data: tuple[str, ...],
    species: tuple[str, ...],
    valid_records: tuple[str, ...],
    test_records: tuple[str, ...],
    lengths: tuple[str, ...],
    out: Path | None,
    resume: Path | None,
    config: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a model that tells species apart.

    Windows are drawn species first, so that each counts alike. Keeps the model that is best on validation sequence,
    calibrates it there, and prints its accuracy on test sequence against the length of a record.
    """
    if more_data and not data:
        raise UsageError(f"{more_data[0]!r} stands alone: data come after --data, as in --data {' '.join(more_data)}")
    if out and resume:
        raise UsageError("--out and --resume do not go together: a run goes on in its own folder")
    options = given(
        data=data + more_data,
        species=_names(species),
        valid_records=_names(valid_records),
        test_records=_names(test_records),
        lengths=_numbers(lengths),
        **settings,
    )

    from mambagen.training.progress import Progress

    with Progress() as progress:
        progress.state("starting ...")

        from mambagen.pipelines.train_species import TrainSpeciesConfig, resume_train_species
        from mambagen.pipelines.train_species import train_species as run_new
        from mambagen.training.config import configure

        if resume:
            result = resume_train_species(resume, options, config, progress)
        else:
            result = run_new(configure(TrainSpeciesConfig, config, options), out, progress)
    click.echo(as_machine(result) if as_json else as_table(result))


def as_table(result: "TrainSpeciesResult") -> str:
    """Accuracy by length, beside the baselines where they were fitted, and what to do with the model."""
    early = ", stopped early" if result.stopped_early else ""
    speed = f" ({result.tokens_per_second:,.0f} bases/s)" if result.tokens_per_second else ""
    lines = [
        f"{len(result.species)} species, {result.train_bases:,} training bases, {result.parameters:,} parameters",
        f"{result.steps:,} steps, {result.tokens:,} bases in {result.seconds:.0f} s{speed}{early}",
    ]
    if result.test is None:
        lines += ["", "nothing is held out for test, so nothing is measured"]
    else:
        table = [("bases", "windows", "species", "accuracy", "95 % interval")]
        table += [
            (f"{a.length:,}", str(a.rows), str(a.species), f"{a.accuracy:.4f}", f"{a.low:.3f} to {a.high:.3f}")
            for a in result.test.by_length
        ]
        widths = [max(len(row[i]) for row in table) for i in range(5)]
        lines += ["", *("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in table)]
        lines += [
            "",
            f"calibration error {result.test.after.error:.3f} (before: {result.test.before.error:.3f})",
        ]
        if result.baselines:
            lines += ["", *baseline_lines(result)]
    lines += [
        "",
        f"model       {result.model}",
        f"report      {result.report}",
        f"use it      mambagen classify-species --model {result.model} SEQUENCES.fa",
    ]
    return "\n".join(lines)


def baseline_lines(result: "TrainSpeciesResult") -> list[str]:
    """A row a baseline, a column a length."""
    assert result.test is not None
    lengths = [a.length for a in result.test.by_length]
    names = list(dict.fromkeys(b.name for b in result.baselines))
    width = max(len(name) for name in names)
    lines = [f"{'regression on':<{width}}" + "".join(f"{length:>10,}" for length in lengths)]
    for name in names:
        cells = []
        for length in lengths:
            at = [b.accuracy.accuracy for b in result.baselines if (b.name, b.accuracy.length) == (name, length)]
            cells.append(f"{at[0]:>10.4f}" if at else f"{'-':>10}")
        lines.append(f"{name:<{width}}" + "".join(cells))
    chance = {b.accuracy.length: b.chance for b in result.baselines}
    guess = [f"{chance[length][1]:>10.3f}" if length in chance else f"{'-':>10}" for length in lengths]
    return [*lines, f"{'guessing, at most':<{width}}" + "".join(guess)]


def as_machine(result: "TrainSpeciesResult") -> str:
    """One JSON object."""
    fields = asdict(result)
    paths = {name: str(fields[name]) for name in ("run", "model", "report")}
    return json.dumps(fields | paths, indent=1)


def _names(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.strip() for text in values for name in text.split(",") if name.strip())


def _numbers(values: tuple[str, ...]) -> tuple[int, ...]:
    try:
        return tuple(int(number.replace("_", "")) for number in _names(values))
    except ValueError:
        raise UsageError(f"--lengths {','.join(values)}: give whole numbers of bases, such as 1024,65536") from None
