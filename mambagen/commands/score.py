"""`mambagen score`: the likelihood of every base of a genome."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import click

from mambagen.commands.inputs import check_inputs, model_option, running_options
from mambagen.commands.options import CONTEXT_SETTINGS, debug_option
from mambagen.errors import UsageError

FORMATS = ("tsv", "bedgraph", "bigwig")
SUFFIXES = {".tsv": "tsv", ".txt": "tsv", ".bedgraph": "bedgraph", ".bg": "bedgraph", ".bw": "bigwig",
            ".bigwig": "bigwig"}  # fmt: skip
COLUMNS = ("record", "start", "end", "name", "scored", "log_likelihood", "mean", "perplexity")

EPILOG = """\b
Examples:
  mambagen score genome.fa.gz --out genome.bw
  mambagen score --regions exons.bed --both-strands genome.fa --out exons.bedgraph.gz
  mambagen score --summary --model runs/my-run/model contigs.fa > perplexity.tsv
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
    "--context", type=click.IntRange(min=0), default=8192, show_default=True, metavar="N",
    help="Bases in front of a region that the model reads first.",
)  # fmt: skip
@click.option("--unit", type=click.Choice(["nats", "bits"]), default="nats", show_default=True, help="Of the values.")
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
    if form == "bigwig" and (out is None or out == "-"):
        raise UsageError("a bigWig cannot be written to stdout; add --out FILE.bw")

    from mambagen.data.sequence_store import SequenceStore
    from mambagen.data.whole_file import byte_output, whole_file
    from mambagen.pipelines.likelihood import LanguageModel
    from mambagen.pipelines.score import spans_of, summarise, write_track
    from mambagen.pipelines.score_tracks import BedGraphTrack, BigWigTrack, TsvTrack, check_bigwig
    from mambagen.training.progress import Progress

    if form == "bigwig":
        check_bigwig()
    asked = LanguageModel(model, device, batch_tokens, precision)
    scale = 1.0 if unit == "nats" else 1 / math.log(2)
    with Progress() as progress, SequenceStore.from_files(fasta, asked.tokenizer) as store:
        spans = spans_of(store, regions, context, apart=summary)
        total = sum(map(len, spans))
        quiet = sys.stdout.isatty() and (out is None or out == "-")  # the rows are to be seen there

        def said(done: int) -> None:
            if not quiet:
                progress.state(f"{done:,} of {total:,} bases")

        if not store.records:
            store.raise_failures()
        if summary:
            with byte_output(out) as stream:
                if not as_json:
                    stream.write(("\t".join(COLUMNS) + "\n").encode())
                for row in summarise(asked, store, spans, both_strands, said):
                    values = [row.total, row.mean]
                    sums = [None if value is None else value * scale for value in values]
                    fields = [row.record, row.start, row.end, row.name or row.record, row.scored, *sums, row.perplexity]
                    stream.write(_summary_line(fields, row.path if as_json else None))
        elif form == "bigwig":
            assert out is not None
            with whole_file(out) as partial, BigWigTrack(partial, store.records) as track:
                write_track(asked, store, spans, track, both_strands, scale, said)
        else:
            how = "natural log" if unit == "nats" else "log2"
            strands = "mean of both strands" if both_strands else "plus strand"
            description = f"log-likelihood of each base, {how}, {strands}, model {model}"
            with byte_output(out) as stream:
                rows = (
                    TsvTrack(stream, f"log_likelihood_{unit}") if form == "tsv" else BedGraphTrack(stream, description)
                )
                write_track(asked, store, spans, rows, both_strands, scale, said)
        progress.close()
        store.raise_failures()


def _format_of(out: str | None) -> str:
    suffixes = [suffix.lower() for suffix in Path(out or "-").suffixes if suffix != ".gz"]
    return SUFFIXES.get(suffixes[-1] if suffixes else "", "tsv")


def _summary_line(values: list[Any], path: str | None) -> bytes:
    if path is not None:
        return (json.dumps({"file": path, **dict(zip(COLUMNS, values, strict=True))}) + "\n").encode()
    shown = ["NA" if v is None else f"{v:.6f}" if isinstance(v, float) else str(v) for v in values]
    return ("\t".join(shown) + "\n").encode()
