"""What the reports of all trainings have in common: what was run, its curves, its settings, how to repeat it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mambagen.reports.page import Page
from mambagen.reports.training_plots import loss_curves, validation_curves

REPORT = "report.html"
MOST_ROWS = 5000  # of steps that a curve is drawn through


def begin(title: str, lead: str, facts: Mapping[str, object]) -> Page:
    """A page that begins with the facts of a run, name -> value."""
    page = Page(title, lead)
    page.table(["", ""], [[name, _shown(value)] for name, value in facts.items()], number_columns=())
    return page


def add_curves(
    page: Page,
    rows: Sequence[Mapping[str, Any]],
    lines: Mapping[str, float] | None = None,
    names: Mapping[str, str] | None = None,
) -> None:
    """The loss, and further figures on validation data (key of metrics.jsonl -> name)."""
    page.heading("Curves")
    steps = [row for row in rows if "loss" in row]
    every = -(-len(steps) // MOST_ROWS) if steps else 1
    kept = [*steps[::every], *(row for row in rows if "loss" not in row)]
    page.figure(loss_curves(kept, lines), "Loss in training (a batch each, and smoothed) and on validation data.")
    if names and any(key in row for row in rows for key in names):
        page.figure(validation_curves(rows, names), "On validation data, as training went on.")


def finish(page: Page, run: Path, command: str, settings: Mapping[str, Any]) -> Path:
    """Settings and how to repeat; writes RUN/report.html and returns its path."""
    page.heading("How to repeat")
    page.text(
        "The settings below are those of config.toml in the folder of the run, which --config takes. A run in steps "
        "on a CPU gives the same numbers again; on a GPU the last digits differ."
    )
    page.code(command)
    page.table(
        ["setting", "value"],
        [[name, json.dumps(value)] for name, value in settings.items() if value is not None],
        number_columns=(),
    )
    place = run / REPORT
    page.write(place)
    return place


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
