"""`mambagen classify`: tell the class of each record of a FASTA."""

import json
from pathlib import Path

import click

from mambagen.commands.inputs import check_inputs, rna_option
from mambagen.commands.options import CONTEXT_SETTINGS, DEVICES, debug_option

EPILOG = """\b
Examples:
  mambagen classify runs/promoters/model new.fa.gz > classes.tsv
  zcat reads.fa.gz | mambagen classify runs/promoters/model -
"""


@click.command(name="classify", context_settings=CONTEXT_SETTINGS, epilog=EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("fasta", nargs=-1, required=True)
@click.option("--average-strands", is_flag=True, help="Answer for a record and its reverse complement together.")
@rna_option
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
    rna: bool,
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
    check_inputs(fasta, device)

    from mambagen.pipelines.classify import Classifier, each_file
    from mambagen.pipelines.row_output import row_output

    classifier = Classifier(model, device, batch_tokens, average_strands, rna)
    columns = ["record", "length", "class", *(f"p_{name}" for name in classifier.classes)]
    with row_output(out, "" if as_json else "\t".join(columns) + "\n") as write:
        for row in each_file(classifier.file, fasta):
            if as_json:
                chances = row.probabilities and dict(zip(classifier.classes, row.probabilities, strict=True))
                fields = {"file": row.path, "record": row.record, "length": row.length, "class": row.predicted}
                write(json.dumps(fields | {"probabilities": chances}) + "\n")
            else:
                values = [f"{value:.6f}" for value in row.probabilities or ()] or [""] * len(classifier.classes)
                write("\t".join([row.record, str(row.length), row.predicted, *values]) + "\n")
