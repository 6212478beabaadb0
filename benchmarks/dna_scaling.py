"""Held-out perplexity against parameters and against context, on real genomes: one run of some minutes on a GPU.

    python -m benchmarks.dna_scaling --data genomes/*.fa.gz --splits splits.bed --runs scaling --out scaling.json \\
        --figure scaling.png [--tokens 134217728] [--device cuda]

Two series through `pretrain_dna`, each model on the same number of tokens: the sizes 250k to 7m at a context of 1,024,
then the 1.4m model at growing contexts with sequence-length warmup from 1,024. Every model is measured on all held-out
bases, so that figures compare. The runs stay in `--runs`, each with its checkpoint; a run that is there is resumed.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, write_json
from mambagen.pipelines.pretrain_dna import PretrainDnaConfig, PretrainDnaResult, pretrain_dna, resume_pretrain_dna

SIZES = ("250k", "700k", "1.4m", "7m")
CONTEXTS = (1 << 10, 1 << 13, 1 << 16, 1 << 19)
FIRST = 1 << 10


def one(options: argparse.Namespace, name: str, **settings: Any) -> PretrainDnaResult:
    """A run of this name: begun, or gone on with where it is there."""
    folder = Path(options.runs) / name
    if (folder / "config.toml").exists():
        return resume_pretrain_dna(folder, {})
    config = PretrainDnaConfig(
        data=tuple(options.data), splits=options.splits, tokens=options.tokens, valid_tokens=options.valid_tokens,
        reverse_complement=True, device=options.device, seed=options.seed, save_every="60m", **settings,
    )  # fmt: skip
    return pretrain_dna(config, folder)


def row_of(series: str, size: str, context: int, result: PretrainDnaResult) -> dict[str, Any]:
    """What is compared."""
    assert result.loss is not None
    return {
        "series": series,
        "size": size,
        "parameters": result.parameters,
        "context": context,
        "tokens": result.tokens,
        "perplexity": math.exp(result.loss),
        "Markov 8": math.exp(result.baselines[8]),
        "held-out bases": result.targets,
        "Mtok/s": result.tokens_per_second / 1e6,
        "seconds": result.seconds,
    }


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Perplexity against parameters and against context."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, series, key, label in zip(
        axes, ("size", "context"), ("parameters", "context"), ("parameters", "context, bases"), strict=True
    ):
        mine = [row for row in rows if row["series"] == series]
        axis.plot([row[key] for row in mine], [row["perplexity"] for row in mine], marker="o", label="Mamba")
        axis.axhline(mine[0]["Markov 8"], color="grey", linestyle="--", label="Markov chain of order 8")
        axis.set(xscale="log", xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out perplexity")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    print(f"drawn: {path}")


def main() -> None:
    """Train, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--splits")
    parser.add_argument("--runs", required=True, help="folder of the runs")
    parser.add_argument("--tokens", type=int, default=1 << 27)
    parser.add_argument("--valid-tokens", type=int, default=1 << 24)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--contexts", nargs="*", type=int, default=list(CONTEXTS))
    parser.add_argument("--size-batch", type=int, default=1 << 17, help="tokens a step of the first series")
    parser.add_argument("--context-batch", type=int, default=1 << 19, help="tokens a step of the second series")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the rows as JSON")
    parser.add_argument("--figure", help="draw both series")
    options = parser.parse_args()
    rows = []
    for size in options.sizes:
        result = one(options, f"size-{size}", size=size, context=FIRST, batch_tokens=options.size_batch)
        rows.append(row_of("size", size, FIRST, result))
        print_table(rows[-1:])
    for context in options.contexts:
        warmup = {"length_warmup": FIRST} if context > FIRST else {}
        batch = max(options.context_batch, context)
        result = one(options, f"context-{context}", size="1.4m", context=context, batch_tokens=batch, **warmup)
        rows.append(row_of("context", "1.4m", context, result))
        print_table(rows[-1:])
    print_table(rows, f"{options.tokens:,} tokens each")
    write_json(options.out, "dna_scaling", rows)
    if options.figure and {row["series"] for row in rows} == {"size", "context"}:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
