"""`mambagen generate-dna`: new DNA out of a trained model."""

import click

from mambagen.commands.inputs import check_inputs
from mambagen.commands.options import BASES, CONTEXT_SETTINGS, DEVICES, debug_option

EPILOG = """\b
Examples:
  mambagen generate-dna --length 5000 -n 10 --seed 1 > new.fa
  mambagen generate-dna runs/my-run --prompt promoters.fa --length 200 --temperature 0.8 --out next.fa
  mambagen generate-dna --prompt TATAAAGGC --with-prompt --length 60
"""


@click.command(name="generate-dna", context_settings=CONTEXT_SETTINGS, epilog=EPILOG)
@click.argument("model", default="dna")
@click.option("--prompt", metavar="FASTA|SEQ", help="Go on from this sequence, or from each record of a file.")
@click.option("--with-prompt", is_flag=True, help="Write the prompt in front of what is made.")
@click.option("--length", type=BASES, default=1000, show_default=True, help="New bases a sequence, as 5000 or 10k.")
@click.option("-n", "count", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences a prompt.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0 takes the likeliest base.")
@click.option("--top-k", type=int, metavar="K", help="Draw from the K likeliest bases.")
@click.option(
    "--top-p", type=float, default=1.0, show_default=True,
    help="Draw from the fewest bases that together have this probability.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed, the same DNA.")
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Sequences that are made at once.")
@click.option("--device", default="auto", show_default=True, metavar="|".join(DEVICES), help="Where to compute.")
@click.option("--out", metavar="FILE", help="Write here, not to stdout; .gz is bgzip.")
@debug_option
def generate_dna(
    model: str,
    prompt: str | None,
    with_prompt: bool,
    length: int,
    count: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int,
    batch: int | None,
    device: str,
    out: str | None,
) -> None:
    """Make DNA with a trained model, as FASTA.

    MODEL is a model's folder, or a built-in one (default: dna). A sequence depends on the seed and its number alone:
    more of them, or another batch, changes none.
    """
    check_inputs([prompt or ""], device)

    from mambagen.pipelines import generate_dna as pipeline

    prompts = pipeline.read_prompts(prompt)
    made = pipeline.generate_dna(model, prompts, length, count, temperature, top_k, top_p, seed, device, batch)
    limits = "".join([f" top_k={top_k}"] * (top_k is not None) + [f" top_p={top_p:g}"] * (top_p < 1))
    pipeline.write_fasta(made, out, f"seed={seed} temperature={temperature:g}{limits} model={model}", with_prompt)
