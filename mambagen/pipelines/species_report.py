"""The report of a species classifier and the sentences of its card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambagen.data.species import SpeciesParts
from mambagen.models.saving import model_card
from mambagen.models.species_classifier import SpeciesClassifier
from mambagen.pipelines.model_cards import LICENCE
from mambagen.pipelines.species_figures import Accuracy, Baseline, TestFigures
from mambagen.reports.page import Page
from mambagen.reports.training_page import add_curves, begin, finish
from mambagen.reports.training_plots import accuracy_by_length, confusion, reliability
from mambagen.training.checkpoint import Position

if TYPE_CHECKING:
    from mambagen.pipelines.train_species import TrainSpeciesConfig

SHORTCUTS = ("share of N", "share of lower case", "composition")


def write_report(
    run: Path,
    title: str,
    model: SpeciesClassifier,
    parts: SpeciesParts,
    figures: TestFigures | None,
    found: Sequence[Baseline],
    rows: Sequence[Mapping[str, Any]],
    position: Position,
    settings: Mapping[str, Any],
) -> Path:
    """RUN/report.html; returns its path."""
    config = model.config
    page = begin(
        title,
        f"A classifier of {len(parts.species)} species: {config.description}.",
        {
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "steps": position.step,
            "bases seen in training": position.tokens,
            "seconds": position.seconds,
            "temperature": config.calibration.temperature,
            "exponent within a window": config.calibration.within,
            "exponent across windows": config.calibration.across,
        },
    )
    page.table(
        ["species", "training, Mb", "validation, Mb", "test, Mb"],
        [
            [name, *(f"{part[i].bases / 1e6:.3f}" for part in (parts.train, parts.valid, parts.test))]
            for i, name in enumerate(parts.species)
        ],
        caption="What each species has; a test stretch shares no base with the others.",
    )
    if figures is not None:
        _add_test(page, config.classes, figures, found)
    lengths = sorted(int(key.rsplit("_", 1)[1]) for key in _keys(rows))
    add_curves(page, rows, names={f"valid_accuracy_{length}": f"accuracy, {length:,} bases" for length in lengths})
    return finish(page, run, f"mambagen train-species --config {run / 'config.toml'} --out NEW", settings)


def _keys(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    return {key for row in rows for key in row if key.startswith("valid_accuracy_")}


def _add_test(page: Page, classes: Sequence[str], figures: TestFigures, found: Sequence[Baseline]) -> None:
    page.heading("On test sequence")
    page.table(
        ["bases", "windows", "independent", "species", "accuracy", "95 % interval", "windows' digits"],
        [_accuracy_row(row) for row in figures.by_length],
        caption="Records of each length, put to the model as classify-species does. Every species counts alike; the "
        "interval (Wilson) counts windows that overlap once; the digits are a hash of the windows, drawn once.",
    )
    for length, names in figures.missing.items():
        page.text(f"No test window of {length:,} bases: {', '.join(names)}.")
    series = {"model": [(row.length, row.accuracy, row.low, row.high) for row in figures.by_length]}
    for baseline in found:
        if "shuffled" not in baseline.name and baseline.name not in SHORTCUTS[:2]:
            at = baseline.accuracy
            series.setdefault(baseline.name, []).append((at.length, at.accuracy, at.low, at.high))
    chance = 1 / len(classes)
    page.figure(accuracy_by_length(series, chance), "Accuracy against the length of a record, with the interval.")
    if found:
        page.heading("To be held against")
        page.table(
            ["regression on", "bases", "accuracy", "95 % interval", "interval of guessing", "remark"],
            [_baseline_row(baseline) for baseline in found],
            caption="Logistic regressions, fitted on training windows, their strength chosen on validation windows, "
            "measured on the same test windows; of long windows there are few to fit on. The interval of shuffled "
            "labels is that of the mean over ten shuffles, at 99 %. The model sees neither N (unknown bases are left "
            "out of its windows) nor case.",
        )
    page.heading("Confusions")
    page.figure(
        confusion(classes, figures.confusion),
        f"Records of {figures.confusion_length:,} bases: a row a true species, shades its shares.",
    )
    page.heading("Calibration")
    page.text(
        f"Over records of all lengths the expected calibration error is {figures.after.error:.3f} "
        f"({figures.before.error:.3f} with windows as if independent), the loss {figures.after.loss:.3f} nats "
        f"({figures.before.loss:.3f})."
    )
    page.figure(
        reliability(*((which.counts, which.probability, which.right) for which in (figures.before, figures.after))),
        "Probability given against share right, in tenths; the size of a dot is its share of the records.",
    )


def _accuracy_row(row: Accuracy) -> list[object]:
    interval = f"{row.low:.3f} to {row.high:.3f}"
    return [f"{row.length:,}", row.rows, row.independent, row.species, f"{row.accuracy:.4f}", interval, row.windows]


def _baseline_row(baseline: Baseline) -> list[object]:
    at, (low, high) = baseline.accuracy, baseline.chance
    remark = ""
    if "shuffled" in baseline.name:
        even = at.low <= 1 / at.species <= at.high
        remark = "not told from guessing, as it must be" if even else "told from guessing"
    elif baseline.name in SHORTCUTS:
        remark = "tells species apart" if at.low > high else "tells nothing"
    interval = f"{at.low:.3f} to {at.high:.3f}"
    return [baseline.name, f"{at.length:,}", f"{at.accuracy:.4f}", interval, f"{low:.3f} to {high:.3f}", remark]


def card_quality(figures: TestFigures | None, model: SpeciesClassifier) -> str:
    """What a model card says of the measurements."""
    if figures is None:
        return "Not measured: nothing is held out for test."
    rows = [
        f"| {row.length:,} | {row.rows} | {row.species} | {row.accuracy:.3f} | {row.low:.3f} to {row.high:.3f} |"
        for row in figures.by_length
    ]
    missing = [f"No test window of {length:,} bases: {', '.join(names)}." for length, names in figures.missing.items()]
    table = ["| bases | windows | species | accuracy | 95 % interval |", "|-|-|-|-|-|", *rows]
    calibration = (
        f"Expected calibration error {figures.after.error:.3f} over records of all these lengths "
        f"({figures.before.error:.3f} before calibration)."
    )
    lines = [
        f"Of {len(model.classes)} species, on test stretches (drawn once; chance is {1 / len(model.classes):.3f}):",
        "",
        *table,
        "",
        *missing,
        calibration,
    ]
    return "\n".join(lines)


def species_card(
    config: "TrainSpeciesConfig", parts: SpeciesParts, model: SpeciesClassifier, title: str, quality: str
) -> str:
    """The text of the model's README."""
    sizes = ", ".join(
        f"{name} {stretches.bases / 1e6:.2f} Mb" for name, stretches in zip(parts.species, parts.train, strict=True)
    )
    begun = f"from {Path(config.start_from).name}" if config.start_from else "from scratch"
    budget = f"{config.steps:,} steps" if config.steps else f"{config.minutes:g} minutes"
    recipe = (
        f"`mambagen train-species` {begun}: species drawn uniformly, windows of "
        f"{min(config.shortest, config.context)} to {config.context} bases, {config.batch_tokens:,} bases a step, "
        f"{budget}, AdamW with peak learning rate "
        f"{config.lr:g}, warmup {config.warmup:g} of the budget, cosine to zero, weight decay "
        f"{config.weight_decay:g}, dropout {config.dropout:g}, seed {config.seed}; the best on validation of ten "
        f"looks, calibrated on validation."
    )
    return model_card(
        model,
        title=title,
        data=f"{config.source().title()}. Training sequence: {sizes}.",
        licence=LICENCE,
        recipe=recipe,
        quality=quality,
        extra=(
            "\n## Use\nProbabilities are among these species alone, each as likely beforehand; sequence of any other "
            "species is given to one of them.\n"
        ),
    )
