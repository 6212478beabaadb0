"""Accuracy against context for sets of species, beside regressions: one command a set, printed and in its report.

    python -m benchmarks.species --data genomes/ --splits splits.bed --set five-mammals --run runs/five --steps 3000
    python -m benchmarks.species --data genomes/ --splits splits.bed --set primates --run runs/primates --control

The same command goes on with a run that was stopped. With --control a second model is trained on labels drawn at
random, a tenth as long, which must not be told from guessing. Sets: five-mammals, primates, eight-far, or names with
commas between them. `--quoted` fits only the 5-mer regressions at 1, 10 and 32 kb that others have quoted.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.build_species import RECIPE, trained
from benchmarks.common import facts
from mambagen.commands.train_species import as_table
from mambagen.pipelines.species_data import SpeciesSource
from mambagen.pipelines.species_figures import baselines
from mambagen.pipelines.train_species import TrainSpeciesConfig

SETS = {
    "five-mammals": ("human", "mouse", "dog", "cow", "opossum"),
    "primates": ("human", "chimp", "macaque", "marmoset", "galago"),
    "eight-far": ("human", "fly", "worm", "arabidopsis", "yeast", "ecoli", "chicken", "xenopus"),
}
QUOTED = (1000, 10_000, 32_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of genomes")
    parser.add_argument("--splits", required=True, help="BED file")
    parser.add_argument("--set", required=True, help=f"{', '.join(SETS)}, or names of species")
    parser.add_argument("--run", type=Path, help="folder of the work")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--control", action="store_true", help="train on shuffled labels too")
    parser.add_argument("--quoted", action="store_true", help="only the regressions at 1, 10 and 32 kb")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    species = SETS.get(options.set, tuple(options.set.split(",")))
    found: dict[str, object] = {"facts": facts(), "set": options.set, "species": species}
    if options.quoted:
        parts = SpeciesSource(data=(options.data,), splits=options.splits, species=species).read()
        rows = baselines(parts, None, QUOTED, 400, 200, 0, ks=(5,))
        for row in rows:
            at = row.accuracy
            print(
                f"{row.name:<24}{at.length:>8,}  {at.accuracy:.3f}  ({at.low:.3f} to {at.high:.3f}, {at.rows} windows)"
            )
        found["quoted"] = [row.row() for row in rows]
    else:
        if options.run is None:
            parser.error("--run is needed: the folder of the work")
        config = TrainSpeciesConfig(
            data=(options.data,),
            splits=options.splits,
            species=species,
            steps=options.steps,
            device=options.device,
            threads=options.threads,
            baselines=True,
            **RECIPE,
        )
        result = trained(config, options.run / "train")
        print(as_table(result))
        found |= {"test": result.test, "baselines": [row.row() for row in result.baselines]}
        if options.control:
            less = {"shuffled": True, "baselines": False, "steps": max(1, options.steps // 10)}
            control = trained(config.model_copy(update=less), options.run / "control")
            assert control.test is not None
            print("\ntrained on shuffled labels:")
            for at in control.test.by_length:
                told = "" if at.low <= 1 / at.species <= at.high else "   TOLD FROM GUESSING"
                print(f"{at.length:>10,}  {at.accuracy:.4f}  ({at.low:.3f} to {at.high:.3f}){told}")
            found["control"] = control.test
    if options.out:
        options.out.write_text(json.dumps(found, default=lambda value: vars(value), indent=1) + "\n")
        print(f"written to {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
