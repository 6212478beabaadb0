"""A trained classifier of simulated species beside the ideal one: accuracy against length and divergence.

    python -m benchmarks.simulated_species --runs runs/simulated --out simulated.json --figure simulated.png

For each divergence, genomes are simulated, `train_species` is run on them, and its test accuracy by length stands
beside what a classifier that knows the model and where each repeat came from reaches on the same chromosomes. The runs
stay in `--runs`; one that is there is gone on with. Some minutes on a GPU.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, write_json
from mambagen.data.simulate import simulate_species
from mambagen.data.simulate_ideal import ideal_accuracy
from mambagen.pipelines.train_species import TrainSpeciesConfig, resume_train_species, train_species

DIVERGENCES = (0.01, 0.03, 0.1)
LENGTHS = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18)


def rows_of(options: argparse.Namespace, divergence: float) -> list[dict[str, Any]]:
    """Train, or go on, at one divergence; a row a length."""
    folder = Path(options.runs) / f"divergence-{divergence:g}"
    if (folder / "config.toml").exists():
        result = resume_train_species(folder, {})
    else:
        config = TrainSpeciesConfig.model_validate(
            {
                "simulated_species": options.species,
                "simulated_length": options.length,
                "divergence": divergence,
                "steps": options.steps,
                "context": options.context,
                "lengths": LENGTHS,
                "device": options.device,
                "seed": options.seed,
                "save_every": "60m",
            }
        )
        result = train_species(config, folder)
    made = simulate_species(options.species, divergence, options.length, options.seed)
    rows = []
    for accuracy in result.test.by_length if result.test else ():
        ideal = ideal_accuracy(made, accuracy.length, windows=1000)
        rows.append(
            {
                "divergence": divergence,
                "length": accuracy.length,
                "accuracy": accuracy.accuracy,
                "low": accuracy.low,
                "high": accuracy.high,
                "ideal": ideal.accuracy,
                "ideal's error": ideal.error,
                "chance": 1 / options.species,
            }
        )
    print_table(rows)
    return rows


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Trained as points with intervals, ideal as lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for divergence in sorted({row["divergence"] for row in rows}):
        mine = [row for row in rows if row["divergence"] == divergence]
        lengths = [row["length"] for row in mine]
        (line,) = axis.plot(lengths, [row["ideal"] for row in mine], label=f"{divergence:g}")
        spread = [[row["accuracy"] - row["low"] for row in mine], [row["high"] - row["accuracy"] for row in mine]]
        axis.errorbar(lengths, [row["accuracy"] for row in mine], yerr=spread, fmt="o", color=line.get_color())
    axis.axhline(rows[0]["chance"], color="grey", linestyle="--")
    axis.set(xscale="log", ylim=(0, 1.02), xlabel="window, bases", ylabel="accuracy: trained (points), ideal (lines)")
    axis.legend(title="substitutions a site")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    print(f"drawn: {path}")


def main() -> None:
    """Train, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, help="folder of the runs")
    parser.add_argument("--divergences", nargs="+", type=float, default=list(DIVERGENCES))
    parser.add_argument("--species", type=int, default=5)
    parser.add_argument("--length", type=int, default=20_000_000, help="bases a species")
    parser.add_argument("--context", type=int, default=4096, help="of the model's windows")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the rows as JSON")
    parser.add_argument("--figure", help="draw accuracy against length")
    options = parser.parse_args()
    rows = [row for divergence in options.divergences for row in rows_of(options, divergence)]
    write_json(options.out, "simulated_species", rows)
    if options.figure and rows:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
