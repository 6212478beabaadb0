"""Accuracy against context for sets of species, beside regressions on k-mers: all at once, or each half on its machine.

    python -m benchmarks.species --data genomes/ --splits splits.bed --set five-mammals --run runs/five --out five.json

The same command goes on with a run that was stopped. A GPU has nothing to do in the regressions, which take a minute of
one core, so the halves can be apart:

    python -m benchmarks.species ... --set primates --baselines-only --out cpu.json
    python -m benchmarks.species ... --set primates --no-baselines --control --run runs/primates --out gpu.json
    python -m benchmarks.species --set primates --join cpu.json gpu.json --out primates.json --figure primates.png

Where the file of `--out` is there already, what is new is joined to it. Halves are only joined where their hashes say
that they were measured on the same windows. Printed is the table of all that the file then has.

With --control a second model is trained on labels drawn at random, a tenth as long, which must not be better than
guessing. Sets: five-mammals, primates, eight-far, or names with commas between them. `--quoted` fits only the 5-mer
regressions at 1, 10 and 32 kb that others have quoted, on windows of their own.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.build_species import RECIPE, trained
from benchmarks.common import facts
from mambagen.data.species import SpeciesParts
from mambagen.data.species_windows import draw_evaluation
from mambagen.pipelines.species_figures import baselines
from mambagen.pipelines.train_species import TrainSpeciesConfig, TrainSpeciesResult, fit_baselines, read_data
from mambagen.training.progress import Progress

SETS = {
    "five-mammals": ("human", "mouse", "dog", "cow", "opossum"),
    "primates": ("human", "chimp", "macaque", "marmoset", "galago"),
    "eight-far": ("human", "fly", "worm", "arabidopsis", "yeast", "ecoli", "chicken", "xenopus"),
}
QUOTED = (1000, 10_000, 32_000)
SAME = ("set", "species", "windows")  # what two halves have to share
DRAWN = ("6-mers", "5-mers", "4-mers", "composition")  # of the regressions, in the figure
MODEL, SHUFFLED = "model", "model of shuffled labels"

Found = dict[str, Any]  # what --out holds: SAME, and any of "model", "control", "baselines", "quoted", each with facts


def main() -> None:
    """Train and measure, fit, or join; then write, print, draw."""
    options = parsed()
    species = SETS.get(options.set, tuple(options.set.split(",")))
    found: Found = {"benchmark": "species", "set": options.set, "species": list(species)}
    if options.join:
        for path in options.join:
            found = joined(found, read(path), path)
    if options.out and options.out.exists():
        found = joined(read(options.out), found, options.out)
    if not options.join:
        measure(options, species, found)
    keep(found, options.out)
    print("\n".join(table(found)))
    if options.figure:
        draw(found, options.figure)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of genomes")
    parser.add_argument("--splits", help="BED file")
    parser.add_argument("--set", required=True, help=f"{', '.join(SETS)}, or names of species")
    parser.add_argument("--run", type=Path, help="folder of the work")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--control", action="store_true", help="train on shuffled labels too")
    half = parser.add_mutually_exclusive_group()
    half.add_argument("--no-baselines", action="store_true", help="train and measure, without the regressions")
    half.add_argument("--baselines-only", action="store_true", help="only the regressions, on the same windows")
    half.add_argument("--quoted", action="store_true", help="only the regressions at 1, 10 and 32 kb")
    half.add_argument("--join", type=Path, nargs="+", metavar="JSON", help="measure nothing, join what was written")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON, or add them to those that are there")
    parser.add_argument("--figure", type=Path, help="draw accuracy against length")
    options = parser.parse_args()
    if not options.join and not (options.data and options.splits):
        parser.error("--data and --splits are needed: the genomes and their division")
    alone = options.baselines_only or options.quoted or options.join
    if options.run is None and not alone:
        parser.error("--run is needed: the folder of the work")
    if options.control and alone:
        parser.error("--control is of a run that trains; leave it out here")
    for path in (options.out, options.figure):
        if path and not path.parent.is_dir():
            parser.error(f"{path}: no such folder")
    return options


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, species: tuple[str, ...], found: Found) -> None:
    """Add to `found` what the options ask for; it is written after each part, as a lent machine may go any time."""
    config = TrainSpeciesConfig(
        data=(options.data,),
        splits=options.splits,
        species=species,
        steps=options.steps,
        device=options.device,
        threads=options.threads,
        baselines=not (options.no_baselines or options.baselines_only),
        **RECIPE,
    )
    with Progress() as progress:
        parts = read_data(config, progress)
        if options.quoted:
            rows = baselines(parts, None, QUOTED, 400, 200, 0, ks=(5,), say=progress.state)
            found["quoted"] = {"facts": facts(), "rows": [row.row() for row in rows]}
            return
        windows = hashes(config, parts)
        if found.setdefault("windows", windows) != windows:
            raise SystemExit(f"{options.out}: not the windows of these data: {found['windows']} and {windows}")
        if options.baselines_only:
            rows = fit_baselines(config, parts, progress)
            found["baselines"] = {"facts": facts(), "rows": [row.row() for row in rows]}
            return
    result = trained(config, options.run / "train")
    found["model"] = of_training(result)
    if config.baselines:
        found["baselines"] = {"facts": facts(), "rows": [row.row() for row in result.baselines]}
    if options.control:
        keep(found, options.out)
        less = {"shuffled": True, "baselines": False, "steps": max(1, options.steps // 10)}
        found["control"] = of_training(trained(config.model_copy(update=less), options.run / "control"))


def hashes(config: TrainSpeciesConfig, parts: SpeciesParts) -> dict[str, str]:
    """Length -> digits of the test windows, by which the figures of two machines are known to be of the same bases."""
    drawn = [draw_evaluation(parts.test, length, config.test_windows, config.seed) for length in config.lengths]
    return {str(windows.length): windows.digest() for windows in drawn if len(windows)}


def of_training(result: TrainSpeciesResult) -> Found:
    """What is kept of a run."""
    assert result.test is not None
    kept = ("parameters", "train_bases", "steps", "tokens", "seconds", "tokens_per_second", "stopped_early")
    return {"facts": facts(), **{name: getattr(result, name) for name in kept}, "test": asdict(result.test)}


# ---- joining --------------------------------------------------------------------------------------------------------


def read(path: Path) -> Found:
    """What an earlier call left; SystemExit for any other file."""
    try:
        found: Found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("benchmark") != "species":
        raise SystemExit(f"{path} is none of the files that this benchmark writes")
    return found


def joined(into: Found, more: Found, path: Path) -> Found:
    """Both, `more` where both have a part; SystemExit, naming `path`, where they are not of the same windows."""
    for what in SAME:
        if what in into and what in more and into[what] != more[what]:
            raise SystemExit(f"{path}: not the same {what}, so it is not joined: {into[what]} and {more[what]}")
    return into | more


def keep(found: Found, path: Path | None) -> None:
    """Write it, after every row has been held against the windows' hashes."""
    for part in ("model", "control", "baselines"):
        for row in rows_of(found, part):
            if row["windows"] != found.get("windows", {}).get(str(row["length"])):
                raise SystemExit(f"{part} at {row['length']:,} bases was measured on other windows: {row['windows']}")
    if path:
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written to {path}", file=sys.stderr)


def rows_of(found: Found, part: str) -> list[dict[str, Any]]:
    """The accuracies of a part, as `Accuracy` has them; none where it was not measured."""
    if part not in found:
        return []
    rows: list[dict[str, Any]] = found[part]["rows"] if "rows" in found[part] else found[part]["test"]["by_length"]
    return rows


# ---- showing --------------------------------------------------------------------------------------------------------


def table(found: Found) -> list[str]:
    """Lines of Markdown: what was trained, a column a length, and where a control was better than guessing."""
    lines = []
    for part, name in (("model", MODEL), ("control", SHUFFLED)):
        if part in found:
            run = found[part]
            lines.append(
                f"{name}: {run['parameters']:,} parameters, {run['steps']:,} steps, {run['tokens']:,} bases in "
                f"{run['seconds']:.0f} s on {run['facts']['gpu'] or run['facts']['cpu']}"
            )
    if "windows" in found:
        lines += ["", *accuracies(found), ""]
    for row in rows_of(found, "control"):
        if row["low"] > 1 / row["species"]:
            lines.append(f"{SHUFFLED}: BETTER THAN GUESSING at {row['length']:,} bases")
    for row in rows_of(found, "quoted"):
        lines.append(
            f"{row['name']:<24}{row['length']:>8,}  {row['accuracy']:.3f}  "
            f"({row['low']:.3f} to {row['high']:.3f}, {row['rows']} windows)"
        )
    return lines


def accuracies(found: Found) -> list[str]:
    """The table itself, a row a model or regression."""
    cells: dict[str, dict[str, str]] = {}  # name -> length -> text
    for part, name in (("model", MODEL), ("control", SHUFFLED), ("baselines", "")):
        for row in rows_of(found, part):
            length = str(row["length"])
            cells.setdefault(name or row["name"], {})[length] = f"{row['accuracy']:.3f}"
            if part == "model":
                cells.setdefault("95 % interval", {})[length] = f"{row['low']:.3f} to {row['high']:.3f}"
            if "chance" in row:
                cells.setdefault("guessing, at most", {})[length] = f"{row['chance'][1]:.3f}"
            if "shuffled" not in row.get("name", ""):  # which counts its shuffles as what is independent
                cells.setdefault("windows (independent)", {})[length] = f"{row['rows']} ({row['independent']})"
                cells.setdefault("species", {})[length] = str(row["species"])
    last = [SHUFFLED, "guessing, at most", "windows (independent)", "species"]
    names = [name for name in cells if name not in last] + [name for name in last if name in cells]
    lengths = sorted(found["windows"], key=int)
    head = "| bases | " + " | ".join(f"{int(length):,}" for length in lengths) + " |"
    rows = ["| " + " | ".join([name, *(cells[name].get(length, "-") for length in lengths)]) + " |" for name in names]
    return [head, "|-" * (len(lengths) + 1) + "|", *rows]


def draw(found: Found, path: Path) -> None:
    """Accuracy against length: the model with its intervals, the regressions, guessing."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
    rows = rows_of(found, "baselines")
    for name in DRAWN:
        mine = [row for row in rows if row["name"] == name]
        if mine:
            axis.plot([row["length"] for row in mine], [row["accuracy"] for row in mine], "--", marker=".", label=name)
    for part, name, form in (("model", MODEL, "-o"), ("control", SHUFFLED, "x")):
        mine = rows_of(found, part)
        if mine:
            spread = [  # an interval of what is always right may end a rounding error below 1
                [max(0.0, row["accuracy"] - row["low"]) for row in mine],
                [max(0.0, row["high"] - row["accuracy"]) for row in mine],
            ]
            axis.errorbar(
                [row["length"] for row in mine], [row["accuracy"] for row in mine],
                yerr=spread, fmt=form, color="black", capsize=3, markersize=4, label=name,
            )  # fmt: skip
    axis.axhline(1 / len(found["species"]), color="grey", linestyle=":", label="guessing")
    axis.set(xscale="log", ylim=(0, 1.02), xlabel="bases of the record", ylabel="accuracy", title=found["set"])
    lengths = sorted(map(int, found.get("windows", {})))
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.minorticks_off()
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    print(f"drawn: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
