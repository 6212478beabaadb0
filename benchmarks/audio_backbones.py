"""Backbones of raw sound at equal time on the same clips: held-out nats a sample of Mamba, S4 + MLP and mixtures.

    python -m benchmarks.audio_backbones --data runs/digits/prepared/real --minutes 1.2 [--out FILE]

Each row is a run of `pretrain-audio` with its own clock, so that equal minutes on one machine are equal cost; the model
of a row has the published layout, 8 layers a stage unless --n-layer is given. A row that is in FILE already is not run
again, so the same command goes on where it stopped. The last look is at all held-out clips.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, write_json
from mambagen.pipelines.pretrain_audio import pretrain_audio, with_recipe
from mambagen.training.progress import Progress

# Outer / centre blocks, as in the published ablation.
ROWS = (
    ("mamba", "mamba"),
    ("s4+mlp", "s4+mlp"),
    ("mamba", "s4+mlp"),
    ("s4+mlp", "mamba"),
    ("mamba", "attention+mlp"),
    ("s4+mlp", "attention+mlp"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--minutes", type=float, default=1.2)
    parser.add_argument("--n-layer", type=int, default=8)
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--length", type=int, default=16_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, default=len(ROWS), help="the first so many")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    rows: list[dict[str, Any]] = []
    if arguments.out and arguments.out.exists():
        rows = json.loads(arguments.out.read_text("utf-8"))["rows"]
    for outer, centre in ROWS[: arguments.rows]:
        name = f"{outer} / {centre}"
        if all(row["outer / centre"] != name for row in rows):
            rows.append({"outer / centre": name, **measure(arguments, outer, centre)})
            write_json(arguments.out, f"audio backbones, {arguments.minutes:g} minutes each", rows)
    print_table(rows)


def measure(arguments: argparse.Namespace, outer: str, centre: str) -> dict[str, Any]:
    """One row: train for the minutes, measure on all held-out clips."""
    settings = {
        "data": tuple(arguments.data),
        "minutes": arguments.minutes,
        "outer": outer,
        "centre": centre,
        "n_layer": arguments.n_layer,
        "d_model": arguments.d_model,
        "lengths": (arguments.length,),
        "batch": arguments.batch,
        "lr": arguments.lr,
        "device": arguments.device,
        "samples": 0,
        "keep": 1,
    }
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        result = pretrain_audio(with_recipe(None, settings), Path(scratch) / "run", progress)
    return {
        "parameters": result.parameters,
        "steps": result.steps,
        "samples/s": round(result.samples_per_second),
        "nats/sample": result.loss,
        "bits/byte": result.bits_per_byte,
    }


if __name__ == "__main__":
    main()
