"""What an ideal classifier can reach on simulated species, by length and divergence; no model is trained.

    python -m benchmarks.species_ideal [--species 5] [--tree star] [--figure ideal.png] [--out ideal.json]

Beside the expected accuracy the table has that on simulated genomes (`--simulate` bases a species), window by window.
"""

import argparse
from typing import Any

from benchmarks.common import print_table, write_json
from mambagen.data.simulate import SpeciesModel, simulate_species
from mambagen.data.simulate_ideal import expected_ideal_accuracy, ideal_accuracy

LENGTHS = [1 << k for k in range(10, 21)]
DIVERGENCES = (0.003, 0.01, 0.03, 0.1)


def draw(rows: list[dict[str, Any]], chance: float, path: str) -> None:
    """Accuracy against length, a line a divergence."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for divergence in sorted({row["divergence"] for row in rows}):
        mine = [row for row in rows if row["divergence"] == divergence]
        axis.plot([row["length"] for row in mine], [row["expected"] for row in mine], label=f"{divergence:g}")
        found = [row for row in mine if row["simulated"] is not None]
        axis.errorbar(
            [row["length"] for row in found], [row["simulated"] for row in found],
            yerr=[2 * row["error"] for row in found], fmt="o", markersize=3, color=axis.lines[-1].get_color(),
        )  # fmt: skip
    axis.axhline(chance, color="grey", linestyle="--")
    axis.set(xscale="log", ylim=(0, 1.02), xlabel="window, bases", ylabel="accuracy of the ideal classifier")
    axis.legend(title="substitutions a site")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    print(f"drawn: {path}")


def main() -> None:
    """Compute, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--species", type=int, default=5)
    parser.add_argument("--tree", default="yule")
    parser.add_argument("--divergences", nargs="+", type=float, default=list(DIVERGENCES))
    parser.add_argument("--simulate", type=int, default=10_000_000, help="bases a species; 0: none")
    parser.add_argument("--out", help="write the rows as JSON")
    parser.add_argument("--figure", help="draw accuracy against length")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for divergence in options.divergences:
        model = SpeciesModel.model_validate(
            {"species": options.species, "divergence": divergence, "tree": options.tree}
        )
        made = None
        if options.simulate:
            made = simulate_species(
                options.species, divergence, options.simulate, tree=options.tree, chromosomes=2, out=None
            )
        for length in LENGTHS:
            found = ideal_accuracy(made, length, windows=1000) if made else None
            rows.append(
                {
                    "divergence": divergence,
                    "length": length,
                    "expected": expected_ideal_accuracy(model, length),
                    "simulated": found.accuracy if found else None,
                    "error": found.error if found else None,
                }
            )
    print_table(rows)
    write_json(options.out, "species_ideal", rows)
    if options.figure:
        draw(rows, 1 / options.species, options.figure)


if __name__ == "__main__":
    main()
