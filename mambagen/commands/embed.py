"""`mambagen embed`: vectors of DNA out of a trained model."""

import click

from mambagen.commands.inputs import check_inputs, model_option, rna_option, running_options
from mambagen.commands.options import CONTEXT_SETTINGS, Bases, debug_option

EPILOG = """\b
Examples:
  mambagen embed contigs.fa.gz --out contigs.npz
  mambagen embed --bed promoters.bed --pool last --layer 6 genome.fa --out promoters.parquet
  mambagen embed --pool none --model runs/bigs plasmid.gb --out plasmid.h5
"""


@click.command(name="embed", context_settings=CONTEXT_SETTINGS, epilog=EPILOG)
@click.argument("fasta", nargs=-1, required=True)
@click.option("--out", required=True, metavar="FILE", help="What to write: .npz, .h5 or .parquet.")
@model_option
@click.option("--bed", metavar="REGIONS", help="A vector of each of these regions, not of each record.")
@click.option(
    "--pool", type=click.Choice(["mean", "last", "none"]), default="mean", show_default=True,
    help="Over the bases of a record or region; none writes a vector a base.",
)  # fmt: skip
@click.option(
    "--layer", type=click.IntRange(min=0), metavar="N",
    help="Take what the first N layers put out [default: all, after the last norm].",
)  # fmt: skip
@click.option(
    "--window", type=Bases(least=1), default=32768, show_default=True, metavar="N",
    help="Bases that an encoder reads at once; longer sequences are read in such windows side by side.",
)  # fmt: skip
@rna_option
@running_options
@debug_option
def embed(
    fasta: tuple[str, ...],
    out: str,
    model: str,
    bed: str | None,
    pool: str,
    layer: int | None,
    window: int,
    rna: bool,
    batch_tokens: int | None,
    precision: str,
    device: str,
) -> None:
    """Write the vectors that a model gives records or regions.

    The model may be a causal language model, a masked one, or a classifier of sequences: its head is left away. A
    region is read by itself. FASTA may be several files, gzip, GenBank, or - for stdin.
    """
    check_inputs([*fasta, *([bed] if bed else [])], device)

    from mambagen.pipelines.embed import Embedder, embed_files
    from mambagen.pipelines.embedding_files import check_suffix
    from mambagen.training.progress import Progress

    check_suffix(out)
    asked = Embedder(model, layer, device, batch_tokens, precision, window)
    with Progress() as progress:

        def said(done: int, total: int) -> None:
            progress.state(f"{done:,} of {total:,} bases")

        embed_files(asked, fasta, out, bed, pool, model, said, rna)  # type: ignore[arg-type]
