"""Held-out perplexity against parameters and against context, on real genomes: one run of some minutes on a GPU.

    python -m benchmarks.dna_scaling --data genomes/*.fa.gz --splits splits.bed --runs scaling --out scaling.json \\
        --figure scaling.png [--tokens 134217728] [--device cuda]
    python -m benchmarks.dna_scaling ... --branch-tokens 268435456          # the contexts, all from one trained model
    python -m benchmarks.dna_scaling ... --sizes --tokens 536870912         # the contexts alone

Two series through `pretrain_dna`, each model on the same number of tokens: the sizes 250k to 7m at a context of 1,024,
then the 1.4m model at growing contexts with sequence-length warmup from 1,024. Short runs from scratch differ by their
luck more than by their context; with --branch-tokens the second series begins with the weights of the first one's 1.4m
model and goes on with so many tokens at each context, 1,024 among them, with the learning rate --branch-lr. The runs
stay in `--runs`, each with its checkpoint; a run that is there is resumed.

After its training every model is measured on the same held-out bases, whatever its context: in windows of its context
side by side, each read alone ("perplexity"), and with the state carried from end to end of each held-out stretch
("carried"). The Markov chain of order 8 is fitted on the same training part and measured on the same bases too.
"""

import argparse
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.build_dna import mean_loss
from benchmarks.common import print_table, write_json
from mambagen.data.genome import Stretches
from mambagen.data.markov import MarkovModel
from mambagen.data.sequence_store import SequenceStore
from mambagen.pipelines.genomes import open_genome, split_rows
from mambagen.pipelines.likelihood import LanguageModel, Span
from mambagen.pipelines.pretrain_dna import (
    BASELINE_BASES,
    PretrainDnaConfig,
    PretrainDnaResult,
    pretrain_dna,
    resume_pretrain_dna,
)

SIZES = ("250k", "700k", "1.4m", "7m")
CONTEXTS = (1 << 10, 1 << 13, 1 << 16, 1 << 19)
FIRST = 1 << 10
MIDDLE = "1.4m"  # the size of the second series
OWN_LOOK = 1 << 18  # held-out bases of a run's own curve; what is compared is measured after it
ORDER = 8  # of the Markov chain


@dataclass(frozen=True)
class HeldOut:
    """The bases that every model is measured on, and what the chain makes of them."""

    stretches: Stretches
    markov: float  # perplexity

    @classmethod
    def of(cls, data: Sequence[str], splits: str | None, seed: int, bases: int, piece: int) -> "HeldOut":
        """What `pretrain_dna` holds out of these data, or about so many ``bases`` of it in pieces evenly spread."""
        genome = open_genome(data)
        train, valid = genome.hold_out(0.1, seed=seed, intervals=split_rows(data, genome, splits))
        chain = MarkovModel(ORDER, both_strands=True).fit(train.some(BASELINE_BASES))
        measured = valid.some(bases, piece)
        return cls(measured, chain.perplexity(measured))

    def measure(self, model: LanguageModel, context: int) -> dict[str, float]:
        """Perplexities of a model and the number of bases, which does not depend on the context.

        Every base but the first of a stretch is predicted once; a window reads the base before its first one too.
        """
        found: dict[str, float] = {}
        with SequenceStore(model.tokenizer) as store:
            ids = sorted({record for record, _, _ in self.stretches})
            stored = {i: store.put(self.stretches.records[i].id, self.stretches.records[i].tokens) for i in ids}
            for name, length in (("perplexity", context), ("carried", None)):
                spans = [
                    Span(stored[record], at, min(at + (length or end), end), lead=1)
                    for record, start, end in self.stretches
                    for at in range(start + 1, end, length or end)
                ]
                loss, bases = mean_loss(model, store, spans)
                found |= {name: math.exp(loss), "held-out bases": bases}
        return found


def one(options: argparse.Namespace, name: str, tokens: int, **settings: Any) -> PretrainDnaResult:
    """A run of this name: begun, or gone on with where it is there."""
    folder = Path(options.runs) / name
    if (folder / "config.toml").exists():
        before = tomllib.loads((folder / "config.toml").read_text())
        budget = before["steps"] * before["batch_tokens"]
        if abs(budget - tokens) >= before["batch_tokens"]:
            raise SystemExit(f"{folder}: a run of {budget:,} tokens, not {tokens:,}; give another --runs")
        return resume_pretrain_dna(folder, {})
    if options.lr is not None:
        settings = {"lr": options.lr, **settings}
    config = PretrainDnaConfig(
        data=tuple(options.data), splits=options.splits, tokens=tokens, valid_tokens=OWN_LOOK,
        reverse_complement=True, device=options.device, seed=options.seed, save_every="60m", **settings,
    )  # fmt: skip
    return pretrain_dna(config, folder)


def row_of(
    series: str, size: str, context: int, result: PretrainDnaResult, measured: dict[str, float]
) -> dict[str, Any]:
    """What is compared."""
    return {
        "series": series,
        "size": size,
        "parameters": result.parameters,
        "context": context,
        "tokens": result.tokens,
        "steps": result.steps,
        **measured,
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
        for column, form, name in (("perplexity", "-o", "windows of the context"), ("carried", "--s", "state carried")):
            axis.plot([row[key] for row in mine], [row[column] for row in mine], form, label=f"Mamba, {name}")
        axis.axhline(mine[0]["Markov 8"], color="grey", linestyle=":", label="Markov chain of order 8")
        axis.set(xscale="log", xlabel=label)
        names = [row["size"] if series == "size" else f"{row['context']:,}" for row in mine]
        axis.set_xticks([row[key] for row in mine], names)
        axis.minorticks_off()
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
    parser.add_argument("--lr", type=float, help="of models that begin from scratch; default: pretrain-dna's")
    parser.add_argument("--branch-tokens", type=int, default=0, help="of the second series, from the first one's 1.4m")
    parser.add_argument("--branch-lr", type=float, default=2e-3, help="of the second series with --branch-tokens")
    parser.add_argument("--valid-tokens", type=int, default=1 << 24, help="held-out bases measured on, at most")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--contexts", nargs="*", type=int, default=list(CONTEXTS))
    parser.add_argument("--size-batch", type=int, default=1 << 17, help="tokens a step of the first series")
    parser.add_argument("--context-batch", type=int, default=1 << 19, help="tokens a step of the second series")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the rows as JSON")
    parser.add_argument("--figure", help="draw both series")
    options = parser.parse_args()
    longest = max([FIRST, *options.contexts])
    held_out = HeldOut.of(options.data, options.splits, options.seed, options.valid_tokens, longest)
    rows: list[dict[str, Any]] = []

    def add(series: str, size: str, context: int, tokens: int, **settings: Any) -> None:
        name = f"size-{size}" if series == "size" else f"context-{context}"
        result = one(options, name, tokens, size=size, context=context, **settings)
        measured = held_out.measure(LanguageModel(result.checkpoint, options.device), context)
        rows.append(row_of(series, size, context, result, measured | {"Markov 8": held_out.markov}))
        print_table(rows[-1:])
        write_json(options.out, "dna_scaling", rows)  # after each, as a lent machine may go any time

    first: dict[str, Any] = {"context": FIRST, "batch_tokens": options.size_batch}
    for size in options.sizes:
        add("size", size, tokens=options.tokens, **first)
    begin: dict[str, Any] = {}
    if options.branch_tokens and options.contexts:
        trunk = one(options, f"size-{MIDDLE}", options.tokens, size=MIDDLE, **first)
        begin = {"start_from": str(trunk.checkpoint), "lr": options.branch_lr}
    for context in options.contexts:
        more = begin or ({"length_warmup": FIRST} if context > FIRST else {})
        batch = max(options.context_batch, context)
        add("context", MIDDLE, context, options.branch_tokens or options.tokens, batch_tokens=batch, **more)
    print_table(rows, "held-out perplexity")
    if options.figure and {row["series"] for row in rows} == {"size", "context"}:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
