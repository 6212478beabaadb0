"""Training at up to a million bases of context on a GPU: tokens a second and peak memory, activations kept or not.

    python -m benchmarks.context [--sizes 1.4m 7m] [--out context.json]

A step is forward, cross entropy, backward and fused AdamW under bfloat16 autocast, at 2^20 tokens in flight whatever
the length; "recompute": a layer keeps its input alone and computes the rest again in the backward.
"""

import argparse
from typing import Any

import torch

from benchmarks.common import print_table, write_json
from benchmarks.train import measure
from mambagen.models import MAMBA_SIZES, MambaLM
from mambagen.pipelines.pretrain_dna import choose_recompute

TOKENS = 1 << 20
LENGTHS = (1 << 10, 1 << 14, 1 << 17, 1 << 20)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1.4m", "7m"], choices=list(MAMBA_SIZES))
    parser.add_argument("--out", help="write the rows as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.context: needs a GPU")
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        model = MambaLM(MAMBA_SIZES[size], seed=0).cuda()
        for recompute in ("never", "always"):
            choose_recompute(model, recompute)
            for length in LENGTHS:
                row = measure(size, model, TOKENS // length, length)
                del row["graph"]
                rows.append({"size": row.pop("model"), "recompute": recompute, **row})
                print(rows[-1], flush=True)
        del model
        torch.cuda.empty_cache()
    print_table(rows, f"{TOKENS:,} tokens in flight, {torch.cuda.get_device_name()}")
    write_json(options.out, "context", rows)


if __name__ == "__main__":
    main()
