"""`mambagen eval-sc09`: figures of generated spoken digits, and a page to listen to."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mambagen.commands.options import CONTEXT_SETTINGS, DEVICES, debug_option, given
from mambagen.errors import UsageError

if TYPE_CHECKING:
    from mambagen.pipelines.sc09_results import EvalSc09Config, EvalSc09Result

EPILOG = """\b
Examples:
  mambagen eval-sc09
  mambagen eval-sc09 runs/digits/model --data sc09 -n 2048
  mambagen eval-sc09 --samples wavs/ --protocol sashimi --out judged
"""
NOTE_KINDS = 8  # kinds of notes on files that are printed


@click.command(name="eval-sc09", context_settings=CONTEXT_SETTINGS, epilog=EPILOG)
@click.argument("model", required=False)
@click.option("--samples", metavar="DIR", help="Judge the sound files in this folder instead of a model.")
@click.option("--data", metavar="PATH", help="Real digits to compare with.  [default: statistics that come with it]")
@click.option("--stats", metavar="FILE", help="Statistics of real digits, made by sc09-stats.")
@click.option(
    "-n", "count", type=click.IntRange(min=2), metavar="N",
    help="Clips: so many are generated (2048; 40 on a CPU), or the first N files of --samples (all).",
)  # fmt: skip
@click.option(
    "--protocol", type=click.Choice(["standard", "sashimi"]),
    help="sashimi: also the figures by the published code's arithmetic.  [default: standard]",
)  # fmt: skip
@click.option("--judge", metavar="MODEL", help="A model of train-sc09-classifier.  [default: digit-judge, built in]")
@click.option("--temperature", type=float, metavar="T", help="Of generation.  [default: 1.0]")
@click.option("--top-k", type=int, metavar="K", help="Draw from the K likeliest values only.")
@click.option("--top-p", type=float, metavar="P", help="Draw from the likeliest values of this probability only.")
@click.option(
    "--guidance",
    type=float,
    metavar="X",
    help="Above 1: say the digit more plainly.  [default: the model's; digits: 2]",
)
@click.option(
    "--nll-clips", type=int, metavar="N", help="Real test clips for the likelihood.  [default: all; 16 on a CPU]"
)
@click.option("--shown", type=int, metavar="N", help="Clips a digit on the page.  [default: 6]")
@click.option("--report/--no-report", default=None, help="Write report.html, or only the figures.")
@click.option("--strict", is_flag=True, default=None, help="Exit with 3 where a file is not one second of 16 kHz mono.")
@click.option("--seed", type=int, metavar="S", help="Of generation and intervals.  [default: 0]")
@click.option("--device", metavar="|".join(DEVICES), help="Where to compute; cuda:1 is the second GPU.")
@click.option("--threads", type=int, metavar="N", help="CPU threads.  [default: all cores]")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR",
    help="Folder for report.html, metrics.json, clips.tsv.  [default: runs/eval-sc09-DATE-TIME]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@debug_option
def eval_sc09(model: str | None, out: Path | None, as_json: bool, **settings: Any) -> None:
    """Judge generated spoken digits: FID, IS, mIS, AM, likelihood; with a page to listen to.

    MODEL is the folder of an audio model (or the built-in one); --samples judges sound files that anybody made, one
    clip a file. Words such as seven in the names of files or folders say which digit was asked for.
    """
    options = given(model=model, **settings)

    from mambagen.training.progress import Progress

    with Progress() as progress:
        progress.state("starting ...")

        from pydantic import ValidationError

        from mambagen.pipelines.eval_sc09 import eval_sc09 as run
        from mambagen.pipelines.sc09_results import EvalSc09Config
        from mambagen.training.config import explain_invalid

        try:
            config = EvalSc09Config(**options)
        except ValidationError as error:
            raise UsageError(explain_invalid(EvalSc09Config, error, options, None)) from error
        result = run(config, out, progress)
    if as_json:
        click.echo(json.dumps(result.numbers(config), indent=1))
        return
    click.echo(as_table(result, config))


def as_table(result: "EvalSc09Result", config: "EvalSc09Config") -> str:
    """Figures beside real data, what is wrong, where the page is."""
    from mambagen.pipelines.sc09_report import COLUMNS, findings, notes_in_short, own_rows, sashimi_rows

    lines = aligned([list(COLUMNS), *own_rows(result)])
    if rows := sashimi_rows(result):
        lines += ["", "by the published script's arithmetic (IS over samples, threshold never tuned):"]
        lines += aligned([["", "N", "FID", "IS", "mIS", "AM"], *rows])
    heard = result.reference.facts.digits
    lines += ["", "heard as  " + "  ".join(f"{digit} {n}" for digit, n in zip(heard, result.heard, strict=True)), ""]
    lines += findings(result)
    lines += notes_in_short(result)[:NOTE_KINDS]
    lines += ["", f"{'report' if config.report else 'figures'}      {result.folder}"]
    return "\n".join(lines)


def aligned(rows: list[list[str]]) -> list[str]:
    """Columns of text, two blanks apart; numbers to the right of the first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
