"""report.html of a pretraining on DNA and of a classifier of sequences: what was measured, and what is to be beaten."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambagen.pipelines.sequence_classification import Figures
from mambagen.reports.training_page import add_curves, begin, finish
from mambagen.reports.training_plots import confusion

if TYPE_CHECKING:
    from mambagen.pipelines.pretrain_dna import PretrainDnaResult
    from mambagen.pipelines.train_classifier import TrainClassifierResult


def report_pretraining(
    result: "PretrainDnaResult",
    title: str,
    lines: Mapping[str, float],
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> Path:
    """Perplexity beside chains or counts, curves, settings; `lines`: name -> loss in nats, as in the loss plot."""
    page = begin(
        title,
        "A language model of DNA." if result.objective == "ar" else "A model that fills in masked bases of DNA.",
        {
            "parameters": result.parameters,
            "steps": result.steps,
            "tokens": result.tokens,
            "seconds": result.seconds,
            "tokens a second": result.tokens_per_second or "-",
            "held out": result.held_out,
            "checkpoint": result.checkpoint.name,
        },
    )
    if result.warning:
        page.text(f"Warning: {result.warning}.")
    page.heading("On held-out bases")
    if result.loss is None:
        page.text("Nothing is held out, so nothing is measured.")
    else:
        page.table(
            ["", "perplexity", "bits a base"],
            [
                [name, f"{math.exp(loss):.4f}", f"{loss / math.log(2):.4f}"]
                for name, loss in {result.name: result.loss, **lines}.items()
            ],
            caption="The model beside what counting gives on the same bases.",
        )
        if result.accuracy is not None:
            page.text(f"{result.accuracy:.2%} of the masked bases are guessed right.")
    add_curves(page, rows, lines)
    return finish(page, result.run, _again("pretrain-dna", result.run), settings)


def report_classifier(
    result: "TrainClassifierResult", rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> Path:
    """Figures beside the k-mer regression, confusions, curves, settings."""
    page = begin(
        f"{result.name}: {len(result.classes)} classes",
        "A classifier of DNA sequences; the best of a run on its validation data.",
        {
            "parameters": result.parameters,
            "sequences to train on": result.train_rows,
            "classes": ", ".join(result.classes),
            "steps": result.steps,
            "seconds": result.seconds,
            "stopped early": "yes" if result.stopped_early else "no",
        },
    )
    measured = [
        (result.name, "validation", result.valid),
        ("5-mer logistic regression", "validation", result.baseline_valid),
        (result.name, "test", result.test),
        ("5-mer logistic regression", "test", result.baseline_test),
    ]
    page.heading("Figures")
    page.table(
        ["", "data", "sequences", "accuracy", "F1", "MCC", "loss"],
        [_figures_row(name, data, figures) for name, data, figures in measured if figures is not None],
        caption="F1 is the mean over the classes; the model and the regression's strength were chosen on validation.",
    )
    page.heading("Confusions")
    shown, data = (result.test, "test") if result.test else (result.valid, "validation")
    page.figure(confusion(result.classes, shown.confusion), f"On {data} data: a row a true class, shades its shares.")
    names = {"valid_accuracy": "accuracy", "valid_f1": "F1", "valid_mcc": "MCC"}
    add_curves(page, rows, names=names)
    return finish(page, result.run, _again("train-classifier", result.run), settings)


def _figures_row(name: str, data: str, figures: Figures) -> list[object]:
    numbers = (figures.accuracy, figures.f1, figures.mcc, figures.loss)
    return [name, data, f"{figures.rows:,}", *(f"{number:.4f}" for number in numbers)]


def _again(command: str, run: Path) -> str:
    return f"mambagen {command} --config {run / 'config.toml'} --out NEW"
