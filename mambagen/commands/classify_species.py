"""`mambagen classify-species`: tell the species of each record of a FASTA."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mambagen.commands.inputs import check_inputs, rna_option
from mambagen.commands.options import CONTEXT_SETTINGS, DEVICES, debug_option
from mambagen.errors import UsageError

if TYPE_CHECKING:
    from mambagen.pipelines.classify_species import SpeciesRow, WindowRow

COLUMNS = (*("record", "length", "species", "probability", "runner_up", "runner_up_probability", "windows", "share_n"),)
EPILOG = """\b
Examples:
  mambagen classify-species contigs.fa.gz > species.tsv
  zcat assembly.fa.gz | mambagen classify-species --min-confidence 0.9 -
  mambagen classify-species genome.fa --all-windows --per-window windows.tsv
  mambagen classify-species --model runs/my-species/model new.fa
"""


@click.command(name="classify-species", context_settings=CONTEXT_SETTINGS, epilog=EPILOG)
@click.argument("fasta", nargs=-1, required=True)
@click.option(
    "--model", default="species", show_default=True, metavar="MODEL",
    help="The built-in model, or the folder `model` of a run of train-species.",
)  # fmt: skip
@click.option(
    "--min-confidence", type=float, default=0.0, metavar="P",
    help="Say 'unknown' where the best probability is below P.  [default: 0, never]",
)  # fmt: skip
@click.option(
    "--max-windows", type=click.IntRange(min=1), metavar="N",
    help="Read at most N windows of a record, evenly spread.  [default: 256]",
)  # fmt: skip
@click.option("--all-windows", is_flag=True, help="Read every window of every record.")
@click.option(
    "--per-window", type=click.Path(path_type=Path), metavar="FILE",
    help="Write the answer for each window that is read here: record, start, end, species, probability.",
)  # fmt: skip
@rna_option
@click.option(
    "--batch-tokens", type=click.IntRange(min=1), default=1 << 16, show_default=True, metavar="N",
    help="Bases that go through the model at once.",
)  # fmt: skip
@click.option("--device", default="auto", show_default=True, metavar="|".join(DEVICES), help="Where to compute.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write here instead of to stdout.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line instead of TSV.")
@debug_option
def classify_species(
    fasta: tuple[str, ...],
    model: str,
    min_confidence: float,
    max_windows: int | None,
    all_windows: bool,
    per_window: Path | None,
    rna: bool,
    batch_tokens: int,
    device: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Tell the species of each record of a FASTA.

    Prints a row a record: the likeliest species and its probability, the runner-up and its, how many windows were read
    and which share of the record is N. The probabilities are among the species that the model knows, each taken for
    equally likely beforehand. FASTA may be several files of any size, gzip, bgzip, GenBank, or - for stdin.
    """
    check_inputs(fasta, device)
    if not 0 <= min_confidence <= 1:
        raise UsageError(f"--min-confidence {min_confidence:g}: a probability is from 0 to 1")
    if all_windows and max_windows:
        raise UsageError("--all-windows and --max-windows do not go together")
    if per_window is not None and (out or Path("-")).absolute() == per_window.absolute():
        raise UsageError(f"--out and --per-window are both {per_window}; give them two files")

    from mambagen.pipelines.classify_species import MAX_WINDOWS, SpeciesReader
    from mambagen.pipelines.row_output import row_output

    at_most = None if all_windows else max_windows or MAX_WINDOWS
    reader = SpeciesReader(model, device, batch_tokens, at_most, min_confidence, rna)
    with contextlib.ExitStack() as stack:
        write = stack.enter_context(row_output(out, "" if as_json else "\t".join(COLUMNS) + "\n"))
        if per_window is not None:
            track = row_output(per_window, "record\tstart\tend\tspecies\tprobability\n")
            reader.track = window_writer(stack.enter_context(track))
        for row in reader.files(fasta):
            write(as_object(row, reader.classes) if as_json else as_line(row))


def window_writer(write: Callable[[str], None]) -> "Callable[[WindowRow], None]":
    """Writes rows of the track."""

    def line(row: "WindowRow") -> None:
        write(f"{row.record}\t{row.start}\t{row.end}\t{row.species}\t{row.probability:.6f}\n")

    return line


def as_line(row: "SpeciesRow") -> str:
    """A row of the table; NA where there is nothing to say."""

    def number(value: float | None) -> str:
        return "NA" if value is None else f"{value:.6f}"

    cells = (
        *(row.record, row.length, row.species, number(row.probability)),
        *(row.runner_up or "NA", number(row.runner_up_probability), row.windows, number(row.share_n)),
    )
    return "\t".join(map(str, cells)) + "\n"


def as_object(row: "SpeciesRow", classes: tuple[str, ...]) -> str:
    """A JSON object with everything that is known of the record."""
    fields: dict[str, Any] = {"file": row.path} | {name: getattr(row, name) for name in COLUMNS}
    fields["best"] = row.best(classes)
    chances = row.probabilities
    fields["probabilities"] = None if chances is None else dict(zip(classes, chances, strict=True))
    return json.dumps(fields) + "\n"
