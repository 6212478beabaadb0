"""`mambagen classify`: tell the class of each record of a FASTA."""

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import click

from mambagen.commands.options import CONTEXT_SETTINGS, DEVICES, debug_option
from mambagen.errors import MambagenError, UsageError

EPILOG = """\b
Examples:
  mambagen classify runs/promoters/model new.fa.gz > classes.tsv
  zcat reads.fa.gz | mambagen classify runs/promoters/model -
"""


@click.command(name="classify", context_settings=CONTEXT_SETTINGS, epilog=EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("fasta", nargs=-1, required=True)
@click.option("--average-strands", is_flag=True, help="Answer for a record and its reverse complement together.")
@click.option(
    "--batch-tokens", type=click.IntRange(min=1), default=1 << 16, show_default=True, metavar="N",
    help="Bases that go through the model at once.",
)  # fmt: skip
@click.option("--device", default="auto", show_default=True, metavar="|".join(DEVICES), help="Where to compute.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write here instead of to stdout.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line instead of TSV.")
@debug_option
def classify(
    model: Path,
    fasta: tuple[str, ...],
    average_strands: bool,
    batch_tokens: int,
    device: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Tell the class of each record of a FASTA.

    MODEL is the folder `model` of a run of train-classifier. Prints a row a record: its name, its length, the likeliest
    class, and the probability of each class; "unknown" for a record without bases. FASTA may be several files, gzip,
    GenBank, or - for stdin.
    """
    if "-" in fasta and sys.stdin.isatty():
        raise UsageError("- reads from stdin, which is a terminal here; give a file or pipe one in")
    if device not in DEVICES and not device.startswith("cuda:"):
        raise UsageError(f"--device {device}: it must be {', '.join(DEVICES)} or cuda:N")

    from mambagen.pipelines.classify import Classifier, each_file

    classifier = Classifier(model, device, batch_tokens, average_strands)
    with output(out) as stream:
        if not as_json:
            stream.write("\t".join(["record", "length", "class", *(f"p_{name}" for name in classifier.classes)]) + "\n")
        for row in each_file(classifier, fasta):
            if as_json:
                chances = row.probabilities and dict(zip(classifier.classes, row.probabilities, strict=True))
                fields = {"file": row.path, "record": row.record, "length": row.length, "class": row.predicted}
                stream.write(json.dumps(fields | {"probabilities": chances}) + "\n")
            else:
                values = [f"{value:.6f}" for value in row.probabilities or ()] or [""] * len(classifier.classes)
                stream.write("\t".join([row.record, str(row.length), row.predicted, *values]) + "\n")


@contextlib.contextmanager
def output(path: Path | None) -> Iterator[IO[str]]:
    """Stdout, or a file that gets its name when it is whole (also where some input was bad, which is then said)."""
    if path is None:
        yield sys.stdout
        return
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            failure: MambagenError | None = None
            try:
                yield stream
            except MambagenError as error:
                failure = error
        os.replace(partial, path)
        if failure is not None:
            raise failure
    finally:
        partial.unlink(missing_ok=True)
