"""`mambagen pretrain-dna`: train a Mamba language model on DNA."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mambagen.commands.options import (
    BASES,
    CONTEXT_SETTINGS,
    ENCODERS,
    RECIPES,
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
    from mambagen.pipelines.pretrain_dna import PretrainDnaResult

EPILOG = """\b
Examples:
  mambagen pretrain-dna
  mambagen pretrain-dna --data genome.fa.gz --size 7m --minutes 60
  mambagen pretrain-dna --data chr1.fa chr2.fa --valid-records chr2 --steps 5000
  mambagen pretrain-dna --data genomes/*.fa.gz --splits splits.bed --tokens 1B --context 64Ki --length-warmup 1Ki
  mambagen pretrain-dna --recipe scaling --size 7m
  mambagen pretrain-dna --resume runs/pretrain-dna-20250131-120000
  mambagen pretrain-dna --objective mlm --encoder bigs --context 128 --out runs/bigs
  mambagen pretrain-dna --resume runs/bigs --context 4096
"""


@click.command(name="pretrain-dna", context_settings=CONTEXT_SETTINGS, epilog=EPILOG)
@click.option(
    "--data",
    metavar="DATA...",
    multiple=True,
    help="What to train on: FASTA, GenBank or 2bit files, plain or gzip, - for stdin, or names of data sets "
    "(mambagen data list). Several may follow.  [default: demo]",
)
@click.argument("more_data", metavar="", nargs=-1)
@click.option(
    "--recipe",
    type=click.Choice(RECIPES),
    help="Published settings, on hg38 unless --data says otherwise; all other options win over them.",
)
@click.option("--size", type=click.Choice(SIZES), help="Parameters of the model.  [default: 250k]")
@click.option("--context", type=BASES, help="Bases in a window, as 131072 or 1Mi.  [default: 1024]")
@click.option(
    "--length-warmup",
    type=BASES,
    help="Begin with windows of N bases; they double until they have the context, and the batch halves with them.",
)
@click.option(
    "--length-shares",
    metavar="X,X,...",
    help="Of the steps at each length, relative to each other; alike unless given.",
)
@click.option(
    "--objective",
    type=click.Choice(["ar", "mlm"]),
    help="ar: predict each next base; mlm: predict masked bases from both sides.  [default: ar]",
)
@click.option(
    "--encoder",
    type=click.Choice(ENCODERS),
    help="Of masked models (bigs unless given), with as many parameters as the --size says.",
)
@click.option(
    "--equivariant",
    is_flag=True,
    default=None,
    help="Of masked models: read both strands, so that the other strand's answer is exactly the answer's other strand.",
)
@click.option("--from", "start_from", metavar="MODEL", help="Begin with the weights of this model folder.")
@click.option("--steps", type=int, metavar="N", help="Train for exactly N updates.")
@click.option("--tokens", type=BASES, help="Train on N tokens, as 10B: a whole number of updates.")
@click.option(
    "--minutes", type=float, metavar="M", help="Train for M minutes; the schedule follows the clock.  [default: 1]"
)
@click.option("--batch-tokens", type=BASES, help="Bases in an update, all windows together.  [default: 8192]")
@click.option(
    "--lr",
    type=float,
    metavar="X",
    help="Peak learning rate; of encoders less unless given: bimamba 0.004, bigs 0.002, bert 0.001.  [default: 0.008]",
)
@update_options()
@click.option(
    "--recompute",
    type=click.Choice(["auto", "always", "never"]),
    help="Compute activations again in the backward, which saves memory; auto: where a GPU has too little.  "
    "[default: auto]",
)
@machine_options
@click.option(
    "--reverse-complement/--no-reverse-complement", default=None, help="Read half of the windows from the other strand."
)
@click.option(
    "--lower-case",
    type=click.Choice(["same", "n"]),
    help="Soft-masked letters: as upper case, or as N.  [default: same]",
)
@click.option(
    "--n", type=click.Choice(["ignore", "predict"]), help="N as a target: not counted, or predicted.  [default: ignore]"
)
@click.option(
    "--windows",
    type=click.Choice(["stretches", "intervals"]),
    help="Draw windows anywhere inside the training part, or around the train intervals of the data set or of "
    "--splits, which longer windows leave.  [default: stretches]",
)
@click.option(
    "--strict-split/--no-strict-split",
    default=None,
    help="Windows around intervals never touch held-out bases (or may, as published); strict unless given.",
)
@click.option("--splits", metavar="BED", help="Divide the data by rows of record, start, end and train|valid|test.")
@click.option(
    "--valid-fraction",
    type=float,
    metavar="SHARE",
    help="Hold out this share of each record in one piece.  [default: the data set's own split, else 0.1]",
)
@click.option("--valid-records", metavar="NAME[,NAME]", multiple=True, help="Hold out whole records instead.")
@click.option("--valid-tokens", type=BASES, help="Measure on at most N held-out bases.  [default: 262144]")
@checkpoint_options("weights, order of the data and hold-out")
@run_options(
    "pretrain-dna",
    "batch_tokens = 65536",
    "Go on with this run; budget and learning rate may change. A masked model with another --context: a "
    "new run beside it (or in --out) that begins with its weights.",
)
@debug_option
def pretrain_dna(
    data: tuple[str, ...],
    more_data: tuple[str, ...],
    valid_records: tuple[str, ...],
    out: Path | None,
    resume: Path | None,
    config: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a Mamba language model on DNA.

    Without options: a small model on embedded human, chimpanzee and chloroplast DNA, for about a minute. Ends with its
    perplexity on held-out bases beside Markov chains, which have to be beaten.
    """
    if more_data and not data:
        raise UsageError(f"{more_data[0]!r} stands alone: data come after --data, as in --data {' '.join(more_data)}")
    if out and resume and settings["context"] is None:
        raise UsageError("--out and --resume do not go together: a run goes on in its own folder")
    records = tuple(name for text in valid_records for name in text.split(",") if name)
    options = given(data=data + more_data, valid_records=records, **settings)

    from mambagen.training.progress import Progress

    with Progress() as progress:
        progress.state("starting ...")  # what follows imports torch

        from mambagen.pipelines.pretrain_dna import PretrainDnaConfig
        from mambagen.pipelines.pretrain_dna import pretrain_dna as run_new
        from mambagen.pipelines.pretrain_dna import resume_pretrain_dna as run_resumed
        from mambagen.training.config import configure

        if resume:
            result = run_resumed(resume, options, config, progress, out)
        else:
            result = run_new(configure(PretrainDnaConfig, config, options), out, progress)
    click.echo(as_machine(result) if as_json else as_table(result))


def as_table(result: "PretrainDnaResult") -> str:
    """The figures beside those to beat, where the checkpoint is, and what to do next."""
    lines = [
        f"{result.steps:,} steps, {result.tokens:,} tokens in {result.seconds:.0f} s"
        + (f" ({result.tokens_per_second:,.0f} tokens/s)" if result.tokens_per_second else "")
    ]
    if result.loss is None:
        lines += ["", "nothing is held out, so nothing is measured"]
    else:
        rows = [(f"{result.name} ({result.parameters:,} parameters)", result.loss)]
        rows += [(baseline_name(result, key), loss) for key, loss in result.baselines.items()]
        rows += [("uniform", result.uniform)]
        width = max(len(name) for name, _ in rows)
        lines += ["", f"held out: {result.held_out}", ""]
        lines += [f"{'':<{width}}  perplexity  bits/base"]
        lines += [f"{name:<{width}}  {math.exp(loss):10.4f}  {loss / math.log(2):9.4f}" for name, loss in rows]
        if result.accuracy is not None:
            lines += ["", f"{result.accuracy:.2%} of the masked bases are guessed right"]
        lines += ["", verdict(result)]
    lines += [
        "",
        f"checkpoint  {result.checkpoint}",
        f"report      {result.run / 'report.html'}",
        *(
            []
            if result.warning
            else [f"train on    mambagen pretrain-dna --resume {result.run} --minutes {longer(result)}"]
        ),
        "your data   mambagen pretrain-dna --data GENOME.fa.gz --size 1.4m --minutes 60",
    ]
    return "\n".join(lines)


def verdict(result: "PretrainDnaResult") -> str:
    """In words which baselines the model beats, and which it does not."""
    assert result.loss is not None
    named, one, many = "order {}", "the Markov chain of", "the Markov chains of"
    if result.objective == "mlm":
        named, one, many = "{}", "the count by bases on either side:", "the counts by bases on either side:"
    beaten = [named.format(key) for key, loss in result.baselines.items() if result.loss < loss]
    ahead = [named.format(key) for key, loss in result.baselines.items() if result.loss >= loss]
    if not ahead:
        return f"The model beats {many} {_and(beaten)}."
    behind = f"still behind {many if len(ahead) > 1 else one} {_and(ahead)}"
    advice = "train longer or on more data"
    if not beaten:
        return f"The model is {behind}: {advice}."
    return f"The model beats {many if len(beaten) > 1 else one} {_and(beaten)}, and is {behind}: {advice}."


def baseline_name(result: "PretrainDnaResult", key: int) -> str:
    """A figure to beat, for the table."""
    if result.objective == "ar":
        return f"Markov chain of order {key}"
    return f"counts by {key} bases on either side" if key else "frequency of the bases"


def longer(result: "PretrainDnaResult") -> int:
    """Minutes for the whole of a run that is about ten times this one."""
    return max(10, math.ceil(result.seconds / 60) * 10)


def as_machine(result: "PretrainDnaResult") -> str:
    """One JSON object; losses in nats a base."""
    kind = "flanks" if result.objective == "mlm" else "order"
    baselines = {f"{kind}{key}": {"loss": loss, "perplexity": math.exp(loss)} for key, loss in result.baselines.items()}
    accuracy = {} if result.accuracy is None else {"accuracy": result.accuracy}
    return json.dumps(
        {
            "run": str(result.run),
            "checkpoint": str(result.checkpoint),
            "parameters": result.parameters,
            "steps": result.steps,
            "tokens": result.tokens,
            "seconds": result.seconds,
            "tokens_per_second": result.tokens_per_second,
            "held_out": None
            if result.loss is None
            else {"loss": result.loss, "perplexity": math.exp(result.loss), **accuracy, "targets": result.targets},
            "baselines": baselines,
            "warning": result.warning,
        },
        indent=1,
    )


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
