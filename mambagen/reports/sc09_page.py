"""The page of eval-sc09: figures beside published ones, what was heard, and the clips themselves to listen to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mambagen.reports.page import Page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, GREY, RED = "#4878a8", "#9aa5b1", "#c8553d"
NOTES_SHOWN = 200


@dataclass(frozen=True)
class ShownClip:
    """A clip on the page."""

    samples: NDArray[np.float32]  # (n,)
    caption: str


@dataclass(frozen=True)
class Sc09Report:
    """All that the page says, as plain values."""

    title: str
    lead: str
    findings: Sequence[str]  # sentences about what is wrong with the clips, or that nothing is
    columns: Sequence[str]  # of the table of figures
    ours: Sequence[Sequence[str]]  # its rows: this evaluation and real data
    published: Sequence[Sequence[str]]
    table_note: str
    digits: Sequence[str]
    heard: NDArray[np.int64]  # (digits,) clips heard as each
    reference: NDArray[np.float64]  # (digits,) the share of each in the reference data
    confusion: NDArray[np.int64] | None  # (digits, digits) asked, heard
    confidence: NDArray[np.float64]  # (N,) probability of the digit that was heard
    log_likelihood: NDArray[np.float64] | None  # (N,) nats a sample, by the model
    clips: Mapping[str, Sequence[ShownClip]]  # by digit, in order of likelihood
    order: str  # what the clips are ordered by
    notes: Sequence[tuple[str, str]]  # file, what was done
    run: Sequence[tuple[str, str]]  # what was run: key, value
    command: str = ""
    extra: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]], str]] = field(default_factory=tuple)


def sc09_page(report: Sc09Report, rate: int = 16_000) -> Page:
    """The page, from top to bottom."""
    page = Page(report.title, report.lead)
    for finding in report.findings:
        page.text(finding)
    page.heading("Figures")
    page.table(report.columns, [*report.ours, *report.published], caption=report.table_note)
    for heading, columns, rows, caption in report.extra:
        page.heading(heading)
        page.table(columns, rows, caption=caption)
    page.heading("What was heard")
    page.figure(histogram(report), "Share of the clips heard as each digit, beside the reference data.")
    if report.confusion is not None:
        page.figure(confusion_figure(report), "Digit that was asked for (rows) and digit that was heard (columns).")
    page.figure(likelihood_figure(report), "How sure the judge is of the digit it heard, over all clips.")
    page.heading("Clips")
    page.text(f"By the digit that was heard; within a digit in order of {report.order}, the likeliest first.")
    for digit, clips in report.clips.items():
        count = int(report.heard[list(report.digits).index(digit)])
        shown = "" if len(clips) == count else f", {len(clips)} of them shown"
        page.heading(f"{digit}: {count:,} {'clip' if count == 1 else 'clips'}{shown}")
        for clip in clips:
            page.audio(clip.samples, rate, clip.caption)
    if report.notes:
        page.heading("Files that were not as expected")
        more = len(report.notes) - NOTES_SHOWN
        caption = f"{more:,} more are in metrics.json." if more > 0 else ""
        page.table(["file", "what was done"], report.notes[:NOTES_SHOWN], caption=caption, number_columns=())
    page.heading("What was run")
    page.table(["", ""], report.run, number_columns=())
    if report.command:
        page.code(report.command)
    return page


def histogram(report: Sc09Report) -> "Figure":
    """Clips a digit beside the reference's share."""
    figure, axes = _axes(6.4, 2.6)
    places = np.arange(len(report.digits))
    total = max(1, int(report.heard.sum()))
    axes.bar(places - 0.2, report.heard / total, 0.38, color=BLUE, label="these clips")
    axes.bar(places + 0.2, report.reference, 0.38, color=GREY, label="reference data")
    axes.set_xticks(places, report.digits)
    axes.set_ylabel("share")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.set_ylim(0, 1.18 * max(float((report.heard / total).max()), float(report.reference.max())))
    return figure


def confusion_figure(report: Sc09Report) -> "Figure":
    """Asked against heard, shares of each row coloured, counts written."""
    assert report.confusion is not None
    figure, axes = _axes(5.2, 4.6)
    shares = report.confusion / np.maximum(report.confusion.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(report.confusion):
        if count:
            colour = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=colour)
    places = np.arange(len(report.digits))
    axes.set_xticks(places, report.digits, rotation=45, fontsize=8)
    axes.set_yticks(places, report.digits, fontsize=8)
    axes.set_xlabel("heard")
    axes.set_ylabel("asked")
    axes.grid(False)
    return figure


def likelihood_figure(report: Sc09Report) -> "Figure":
    """Histograms of the judge's probability and, where a model made the clips, of its likelihood."""
    from matplotlib.figure import Figure

    panels = 1 if report.log_likelihood is None else 2
    figure = Figure(figsize=(3.4 * panels + 0.4, 2.4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    axes[0].hist(report.confidence, bins=np.linspace(0, 1, 26), color=BLUE)
    axes[0].set_xlabel("probability of the digit heard")
    axes[0].set_ylabel("clips")
    if report.log_likelihood is not None:
        axes[1].hist(report.log_likelihood, bins=25, color=RED)
        axes[1].set_xlabel("model's log-likelihood, nats a sample")
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _axes(width: float, height: float) -> "tuple[Figure, Any]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
