"""`mambagen score-variants`: how likely a model finds the alternate alleles of a VCF."""

import click

from mambagen.commands.inputs import check_inputs, model_option, running_options
from mambagen.commands.options import CONTEXT_SETTINGS, Bases, debug_option
from mambagen.errors import UsageError

EPILOG = """\b
Examples:
  mambagen score-variants variants.vcf.gz --fasta hg38.fa.gz --out scored.vcf.gz
  bcftools view -r chr20 all.bcf | mambagen score-variants - --fasta chr20.fa > scored.vcf
"""


@click.command(name="score-variants", context_settings=CONTEXT_SETTINGS, epilog=EPILOG)
@click.argument("vcf")
@click.option("--fasta", multiple=True, required=True, metavar="FASTA", help="The reference; several may be given.")
@model_option
@click.option(
    "--context", type=Bases(least=1), default=1024, show_default=True, metavar="N",
    help="Bases before a site that the model reads, at least; up to twice as many.",
)  # fmt: skip
@click.option(
    "--after", type=Bases(least=0), default=256, show_default=True, metavar="N",
    help="Bases behind the allele whose likelihood counts too.",
)  # fmt: skip
@running_options
@click.option("--out", metavar="FILE", help="Write here, not to stdout; .gz is bgzip.")
@debug_option
def score_variants(
    vcf: str,
    fasta: tuple[str, ...],
    model: str,
    context: int,
    after: int,
    batch_tokens: int | None,
    precision: str,
    device: str,
    out: str | None,
) -> None:
    """Score the variants of a VCF by their log-likelihood ratios.

    Writes the VCF with INFO fields added: MAMBAGEN_LLR, the logarithm of how much likelier the model finds the sequence
    with ALT than with REF (mean of both strands), a value an ALT; MAMBAGEN_LLR_FWD and _REV, those of each strand;
    MAMBAGEN_SKIPPED where an ALT is not written out in bases. All lines are checked before the first is scored.
    """
    check_inputs([vcf, *fasta], device)
    if out and out.lower().endswith(".bcf"):
        raise UsageError("--out: BCF is not written here; pipe the VCF into bcftools view -Ob")

    from mambagen.pipelines.likelihood import LanguageModel
    from mambagen.pipelines.score_variants import write_scored_vcf
    from mambagen.pipelines.variant_likelihoods import VariantScorer
    from mambagen.training.progress import Progress

    scorer = VariantScorer(LanguageModel(model, device, batch_tokens, precision), context, after)
    with Progress() as progress:

        def said(done: int, total: int) -> None:
            progress.state(f"{done:,} of {total:,} lines")

        write_scored_vcf(vcf, fasta, scorer, out, model, said)
