"""`mambagen score`: the likelihood of every base of a genome."""

import sys
from pathlib import Path

import click

from mambagen.commands.inputs import check_inputs, model_option, rna_option, running_options
from mambagen.commands.options import CONTEXT_SETTINGS, Bases, debug_option
from mambagen.errors import UsageError

FORMATS = ("tsv", "bedgraph", "bigwig")
SUFFIXES = {".tsv": "tsv", ".txt": "tsv", ".bedgraph": "bedgraph", ".bg": "bedgraph", ".bw": "bigwig",
            ".bigwig": "bigwig"}  # fmt: skip

EPILOG = """\b
Examples:
  mambagen score genome.fa.gz --out genome.bw
  mambagen score --regions exons.bed --both-strands genome.fa --out exons.bedgraph.gz
  mambagen score --summary --model runs/my-run contigs.fa > perplexity.tsv
"""


@click.command(name="score", context_settings=CONTEXT_SETTINGS, epilog=EPILOG)
@click.argument("fasta", nargs=-1, required=True)
@model_option
@click.option(
    "--format", "form", type=click.Choice(FORMATS), help="Of the values [default: by the suffix of --out, else tsv]."
)
@click.option("--summary", is_flag=True, help="A row a record (or region) with its perplexity, not a value a base.")
@click.option("--both-strands", is_flag=True, help="The mean of what a base has on either strand.")
@click.option("--regions", metavar="BED", help="Score these only.")
@click.option(
    "--context", type=Bases(least=0), default=8192, show_default=True, metavar="N",
    help="Bases in front of a region that the model reads first.",
)  # fmt: skip
@click.option("--unit", type=click.Choice(["nats", "bits"]), default="nats", show_default=True, help="Of the values.")
@rna_option
@running_options
@click.option("--out", metavar="FILE", help="Write here, not to stdout; .gz is bgzip.")
@click.option("--json", "as_json", is_flag=True, help="With --summary: a JSON object a line.")
@debug_option
def score(
    fasta: tuple[str, ...],
    model: str,
    form: str | None,
    summary: bool,
    both_strands: bool,
    regions: str | None,
    context: int,
    unit: str,
    rna: bool,
    batch_tokens: int | None,
    precision: str,
    device: str,
    out: str | None,
    as_json: bool,
) -> None:
    """Give the log-likelihood of every base of a genome.

    A value is the logarithm of the probability that the model gives the base after all bases before it in its record,
    natural unless --unit bits. FASTA may be several files, gzip, GenBank, or - for stdin. Records of any length are
    read in chunks with the carried state.
    """
    check_inputs([*fasta, *([regions] if regions else [])], device)
    form = form or _format_of(out)
    if summary and form == "bigwig":
        raise UsageError("--summary writes rows, not a track: leave out --format bigwig, or give --out another suffix")
    if as_json and not summary:
        raise UsageError("--json goes with --summary")
    if form == "bigwig" and out in (None, "-"):
        raise UsageError("a bigWig cannot be written to stdout; add --out FILE.bw")

    from mambagen.pipelines.likelihood import LanguageModel
    from mambagen.pipelines.score import write_scores, write_summaries
    from mambagen.training.progress import Progress

    asked = LanguageModel(model, device, batch_tokens, precision)
    with Progress() as progress:
        seen = sys.stdout.isatty() and out in (None, "-")  # then the rows show how far it is

        def said(done: int, total: int) -> None:
            if not seen:
                progress.state(f"{done:,} of {total:,} bases")

        if summary:
            write_summaries(asked, fasta, out, regions, context, both_strands, unit, as_json, said, rna)
        else:
            write_scores(asked, fasta, out, form, regions, context, both_strands, unit, model, said, rna)


def _format_of(out: str | None) -> str:
    suffixes = [suffix.lower() for suffix in Path(out or "-").suffixes if suffix != ".gz"]
    return SUFFIXES.get(suffixes[-1] if suffixes else "", "tsv")
