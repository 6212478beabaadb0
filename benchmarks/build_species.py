"""Build the model `species` that comes with the package: choose species, train, calibrate, measure, write its folder.

    python -m benchmarks.build_species --data genomes/ --splits splits.bed --run runs/species --steps 6000
    python -m benchmarks.build_species ... --run runs/species          # the same again goes on where it stopped

The folder of genomes has a FASTA for each species; the splits are rows of record, start, end, split, species. Which
species: those with at least 0.7 Mb of training sequence and windows of 8,192 bases to validate and test on; then, as
long as a 5-mer regression takes two of them for one another in more than a tenth of their validation windows, of the
worst such pair the one with less training sequence is left out. What the model says of the species left out is measured
too: a probability of 0.9 or more for sequence of a species that it does not know.
"""

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.kmers import kmer_frequencies
from mambagen.data.species import SpeciesParts
from mambagen.data.species_windows import SpeciesSampler, draw_evaluation, window_starts
from mambagen.models import load_model
from mambagen.models.builtin import WEIGHTS_HOME
from mambagen.models.files import write_folder_atomically
from mambagen.models.saving import model_writers
from mambagen.models.species_classifier import SpeciesClassifier
from mambagen.pipelines.species_data import SpeciesSource
from mambagen.pipelines.species_figures import STREAM_OF_TRAINING, regression
from mambagen.pipelines.species_report import species_card
from mambagen.pipelines.species_task import ask
from mambagen.pipelines.train_species import (
    TrainSpeciesConfig,
    TrainSpeciesResult,
    resume_train_species,
    train_species,
)
from mambagen.training.progress import Progress

LEAST_TRAINING = 700_000  # bases
LENGTH, WINDOWS = 8192, 120  # of the regression that chooses
TOO_ALIKE = 0.1
SURE = 0.9

RECIPE: dict[str, Any] = {
    "model": {"d_model": 128, "n_layer": 3},
    "context": 4096,
    "shortest": 256,
    "batch_tokens": 131072,
    "dropout": 0.2,
    "lr": 3e-3,
    "weight_decay": 0.1,
    "valid_windows": 60,
    "test_windows": 150,
    "save_every": "1m",
    "seed": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of genomes")
    parser.add_argument("--splits", required=True, help="BED file")
    parser.add_argument("--run", type=Path, required=True, help="folder of the work, which a second call goes on with")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-baselines", action="store_true", help="leave out the regressions (minutes on a CPU)")
    parser.add_argument("--out", type=Path, default=WEIGHTS_HOME / "species")
    parser.add_argument("--licence", default=LICENCE)
    options = parser.parse_args()
    options.run.mkdir(parents=True, exist_ok=True)

    chosen = choose(options.data, options.splits, options.run / "chosen.json")
    print(f"{len(chosen)} species: {', '.join(chosen)}", file=sys.stderr)
    config = TrainSpeciesConfig(
        data=(options.data,),
        splits=options.splits,
        species=tuple(chosen),
        steps=options.steps,
        device=options.device,
        threads=options.threads,
        baselines=not options.no_baselines,
        **RECIPE,
    )
    result = trained(config, options.run / "train")
    strangers = measure_strangers(result, options.data, options.splits)
    write_weights(result, config, strangers, options.out, options.licence)
    shutil.copy(result.report, options.run / "report.html")
    print(json.dumps({"result": asdict(result), "strangers": strangers}, default=str, indent=1))
    print(f"written to {options.out}; report in {options.run / 'report.html'}", file=sys.stderr)


LICENCE = (
    "Weights: Apache-2.0, as mambagen. Trained on public genome sequence of the archives (INSDC, UCSC, sequencing "
    "centres), which state no claim on it."
)


def choose(data: str, splits: str, kept: Path) -> list[str]:
    """The species by the rule above; written to `kept`, and read from there where a run goes on."""
    if kept.exists():
        return list(json.loads(kept.read_text())["species"])
    parts = SpeciesSource(data=(data,), splits=splits).read()
    left_out: dict[str, str] = {}
    names = []
    for i, name in enumerate(parts.species):
        bases = parts.train[i].bases
        if bases < LEAST_TRAINING:
            left_out[name] = f"{bases:,} training bases"
        elif not all(len(window_starts(part[i], LENGTH)[0]) for part in (parts.train, parts.valid, parts.test)):
            left_out[name] = f"no window of {LENGTH:,} bases for validation or test"
        else:
            names.append(name)
    while True:
        share, one, other = most_alike(parts.only(names))
        print(f"{len(names)} species: {one} and {other} are mixed up in {share:.3f}", file=sys.stderr)
        if share <= TOO_ALIKE:
            break
        bases_of = dict(zip(parts.species, (part.bases for part in parts.train), strict=True))
        loser, winner = sorted((one, other), key=lambda name: bases_of[name])
        names.remove(loser)
        left_out[loser] = f"taken for {winner} or the reverse in {share:.1%} of the windows of {LENGTH:,} bases"
    kept.write_text(json.dumps({"species": names, "left_out": left_out}, indent=1) + "\n")
    return names


def most_alike(parts: SpeciesParts) -> tuple[float, str, str]:
    """The share of validation windows of two species that a regression takes for the other, and which two."""
    train = SpeciesSampler(parts.train, parts.species, 0, reverse_complement=False).draw(
        STREAM_OF_TRAINING, LENGTH, WINDOWS * len(parts.species)
    )
    valid = draw_evaluation(parts.valid, LENGTH, 60, 0)
    features = [kmer_frequencies(windows.sequences(), 5) for windows in (train, valid)]
    said = regression(features[0], train.label, features[1], valid.label, features[1], strengths=(1e-2,))
    count = len(parts.species)
    table = np.zeros((count, count), dtype=np.int64)
    np.add.at(table, (valid.label, said), 1)
    worst = (0.0, parts.species[0], parts.species[1])
    for i in range(count):
        for j in range(i):
            wrong, right = table[i, j] + table[j, i], table[i, i] + table[j, j]
            if wrong:
                worst = max(worst, (float(wrong / (wrong + right)), parts.species[i], parts.species[j]))
    return worst


def trained(config: TrainSpeciesConfig, run: Path) -> TrainSpeciesResult:
    """A new run, or the one that is there to its end."""
    with Progress() as progress:
        if (run / "config.toml").exists():
            more = {"steps": config.steps, "device": config.device, "baselines": config.baselines}
            return resume_train_species(run, more, None, progress)
        return train_species(config, run, progress)


def measure_strangers(result: TrainSpeciesResult, data: str, splits: str) -> dict[str, dict[str, Any]]:
    """What the model says of windows of species that it does not know: whom it names, and how often surely."""
    every = SpeciesSource(data=(data,), splits=splits).read()
    names = [name for name in every.species if name not in result.species]
    model, _ = load_model(result.model, kinds=[SpeciesClassifier.kind])
    config = model.config
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        part = every.only([name])
        drawn = draw_evaluation(part.train, config.window, 60, 0)
        if not len(drawn):
            continue
        given = ask(model, drawn, 1 << 16)
        chances = np.exp(config.calibration.log_probabilities(given.mean, given.bases, config.window))
        best = np.bincount(chances.argmax(1), minlength=len(config.classes))
        found[name] = {
            "windows": len(drawn),
            "sure": float((chances.max(1) >= SURE).mean()),
            "named": config.classes[int(best.argmax())],
            "share": float(best.max() / best.sum()),
        }
    return found


def write_weights(
    result: TrainSpeciesResult,
    config: TrainSpeciesConfig,
    strangers: dict[str, dict[str, Any]],
    folder: Path,
    licence: str,
) -> None:
    """The model's folder in the package, with a card that says what was measured."""
    model, _ = load_model(result.model, kinds=[SpeciesClassifier.kind])
    before = (result.model / "README.md").read_text("utf-8")
    quality = before.split("## Quality\n", 1)[1].split("\n## Use\n", 1)[0].strip()
    regressions = [
        f"| {row.name} | {row.accuracy.length:,} | {row.accuracy.accuracy:.3f} |"
        for row in result.baselines
        if row.name == "5-mers"
    ]
    if regressions:
        head = "Beside it, a logistic regression on the same windows:\n\n| regression on | bases | accuracy |\n|-|-|-|"
        quality = "\n".join([f"{quality}\n\n{head}", *regressions])
    if strangers:
        head = (
            f"Windows of {config.context:,} bases of species that it does not know: whom it names most, and how many "
            f"get a probability of {SURE} or more.\n\n| species | is called | surely |\n|-|-|-|"
        )
        rows = [
            f"| {name} | {row['named']} ({row['share']:.0%}) | {row['sure']:.0%} |" for name, row in strangers.items()
        ]
        quality = "\n".join([f"{quality}\n\n{head}", *rows])
    parts = config.source().read()
    text = species_card(config, parts, model, "Species: the model of classify-species", quality)
    text = text.replace(
        "That of the data above, where it says anything about models; otherwise the trainer's choice.", licence
    )
    text = text.replace('"path/to/this/folder"', '"species"')
    writers = model_writers(model, DnaTokenizer().model_dump(mode="json"), text)
    write_folder_atomically(folder, writers, unlisted=["README.md"], replace=True)
    for file in folder.iterdir():
        os.chmod(file, 0o644)


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
