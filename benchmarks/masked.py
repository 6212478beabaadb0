"""Encoders that predict masked bases, of one size and on the same bases: perplexity, accuracy and speed, over seeds.

    python -m benchmarks.masked --data genome.fa.gz [--encoders bigs bigs-stack bimamba bert] [--seeds 0 1 2]
        [--size 3.5m] [--context 512] [--tokens 33554432] [--learning-rates 1e-3 2e-3 4e-3] [--out masked.json]

The windows, masks and held-out bases are the same for all. Where several learning rates are given, each encoder takes
the one whose held-out loss is the lowest after a quarter of the tokens with seed 1000, which no reported run has. Runs
that --out holds already are not done again, so a comparison can be made in parts.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, write_json

SELECTION_SEED = 1000


def one_run(args: argparse.Namespace, encoder: str, seed: int, lr: float | None, tokens: int) -> dict[str, Any]:
    """Train and measure one model."""
    from mambagen.pipelines.pretrain_dna import PretrainDnaConfig, pretrain_dna

    settings: dict[str, Any] = {
        "data": tuple(args.data), "objective": "mlm", "encoder": encoder, "size": args.size, "context": args.context,
        "batch_tokens": args.batch_tokens, "steps": max(1, tokens // args.batch_tokens), "seed": seed,
        "valid_tokens": args.valid_tokens, "device": args.device, "reverse_complement": True, "save_every": "1000m",
    }  # fmt: skip
    if lr is not None:
        settings["lr"] = lr
    with tempfile.TemporaryDirectory() as folder:
        result = pretrain_dna(PretrainDnaConfig(**settings), Path(folder) / "run")
    assert result.loss is not None, "nothing was held out"
    return {
        "encoder": encoder, "seed": seed, "lr": lr, "parameters": result.parameters, "tokens": result.tokens,
        "perplexity": math.exp(result.loss), "accuracy": result.accuracy, "Mtok/s": result.tokens_per_second / 1e6,
        "counts of neighbours": {str(order): math.exp(loss) for order, loss in result.baselines.items()},
    }  # fmt: skip


def chosen_rate(args: argparse.Namespace, rows: list[dict[str, Any]], encoder: str) -> float | None:
    """The learning rate of an encoder; runs that choose it are added to the rows."""
    if len(args.learning_rates) < 2:
        return args.learning_rates[0] if args.learning_rates else None
    tried = {}
    for lr in args.learning_rates:
        row = found(rows, encoder, SELECTION_SEED, lr)
        if row is None:
            row = one_run(args, encoder, SELECTION_SEED, lr, args.tokens // 4)
            rows.append(row)
            write_json(args.out, "masked", rows)
        tried[lr] = row["perplexity"]
    return min(tried, key=lambda lr: tried[lr])


def found(rows: list[dict[str, Any]], encoder: str, seed: int, lr: float | None) -> dict[str, Any] | None:
    """The row of a run that was done."""
    keys = (encoder, seed, lr)
    return next((row for row in rows if (row["encoder"], row["seed"], row["lr"]) == keys), None)


def summary(rows: list[dict[str, Any]], encoders: list[str]) -> list[dict[str, Any]]:
    """A row an encoder: mean and standard deviation over seeds."""
    lines = []
    for encoder in encoders:
        own = [row for row in rows if row["encoder"] == encoder and row["seed"] != SELECTION_SEED]
        if not own:
            continue
        line: dict[str, Any] = {"encoder": encoder, "parameters": own[0]["parameters"], "lr": own[0]["lr"]}
        for name in ("perplexity", "accuracy"):
            values = [row[name] for row in own]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            line[name] = f"{statistics.mean(values):.4f}{spread}"
        lines.append({**line, "runs": len(own), "Mtok/s": statistics.median(row["Mtok/s"] for row in own)})
    return lines


def main() -> None:
    """Run what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["demo"])
    parser.add_argument("--encoders", nargs="+", default=["bigs", "bigs-stack", "bimamba", "bert"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--size", default="3.5m")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--tokens", type=int, default=1 << 25)
    parser.add_argument("--valid-tokens", type=int, default=1 << 20)
    parser.add_argument("--learning-rates", nargs="*", type=float, default=[])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    rows = json.loads(args.out.read_text())["rows"] if args.out and args.out.exists() else []
    rates = {encoder: chosen_rate(args, rows, encoder) for encoder in args.encoders}
    for seed in args.seeds:
        for encoder, lr in rates.items():
            if found(rows, encoder, seed, lr) is None:
                rows.append(one_run(args, encoder, seed, lr, args.tokens))
                write_json(args.out, "masked", rows)
    print_table(summary(rows, args.encoders), f"masked bases, {args.tokens:,} tokens, context {args.context}")
    if rows:
        print("perplexity from counts of the bases on either side:", rows[-1]["counts of neighbours"])


if __name__ == "__main__":
    main()
