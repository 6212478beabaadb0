"""Figures of a training for its report: curves, confusions, accuracy against length, reliability."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mambagen.reports.loss_plot import GREY, HELD_OUT, TRAINING, smoothed, window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#4878a8", "#c8553d", "#5a9367", "#8a6bbe", "#c9962b", "#3f9aa5", "#9a5b3f", "#666666")
WRITTEN = 14  # classes up to which every cell of a confusion matrix bears its number


def loss_curves(rows: Sequence[Mapping[str, Any]], lines: Mapping[str, float] | None = None) -> "Figure":
    """Training and held-out loss against steps; `rows` of metrics.jsonl, `lines` name -> loss to be held against."""
    figure, axes = _figure(7.5, 3.6)
    steps = [row for row in rows if row.get("loss") is not None]
    held_out = [row for row in rows if "valid_loss" in row]
    if steps:
        at = [row["step"] for row in steps]
        losses = np.array([row["loss"] for row in steps], dtype=float)
        axes.plot(at, losses, color=TRAINING, alpha=0.25, linewidth=0.8)
        axes.plot(at, smoothed(losses), color=TRAINING, linewidth=1.6, label="training (smoothed)")
    if held_out:
        axes.plot(
            [row["step"] for row in held_out], [row["valid_loss"] for row in held_out],
            color=HELD_OUT, marker="o", markersize=4, linewidth=1.6, label="validation",
        )  # fmt: skip
    known = dict(lines or {})
    for (name, loss), style in zip(known.items(), ("--", "-.", ":") * len(known), strict=False):
        axes.axhline(loss, color=GREY, linestyle=style, linewidth=1, label=name)
    if steps or held_out:
        values = [row["loss"] for row in steps], [row["valid_loss"] for row in held_out], [*known.values()]
        axes.set_ylim(*window(*values))
    _finish(axes, "step", "loss (nats)")
    return figure


def validation_curves(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> "Figure":
    """Figures on validation data against steps; `names`: key of metrics.jsonl -> what it is called."""
    figure, axes = _figure(7.5, 3.2)
    for (key, name), colour in zip(names.items(), COLOURS * len(names), strict=False):
        found = [row for row in rows if key in row]
        if found:
            at, values = [row["step"] for row in found], [row[key] for row in found]
            axes.plot(at, values, color=colour, marker="o", markersize=3.5, linewidth=1.5, label=name)
    _finish(axes, "step", "on validation data")
    return figure


def confusion(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> "Figure":
    """A confusion matrix: a row a true class, its shares as shades and, where there is room, its counts."""
    size = max(3.6, 0.36 * len(classes) + 1.8)
    figure, axes = _figure(size, size)
    table = np.asarray(counts, dtype=float)
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    places = range(len(classes))
    axes.set_xticks(places, classes, rotation=90, fontsize=8)
    axes.set_yticks(places, classes, fontsize=8)
    axes.set_xlabel("said")
    axes.set_ylabel("true")
    for i in places:
        for j in places:
            if table[i, j] and (len(classes) <= WRITTEN or i == j):
                text = f"{int(table[i, j])}"
                axes.text(
                    j, i, text, ha="center", va="center", fontsize=7, color="white" if shares[i, j] > 0.6 else "black"
                )
    return figure


def accuracy_by_length(series: Mapping[str, Sequence[tuple[int, float, float, float]]], chance: float) -> "Figure":
    """Accuracy against the length of a record; name -> (bases, share, low, high) rows, the first with its interval."""
    figure, axes = _figure(7.5, 4.2)
    for i, ((name, rows), colour) in enumerate(zip(series.items(), COLOURS * len(series), strict=False)):
        if not rows:
            continue
        lengths, share, low, high = (list(column) for column in zip(*rows, strict=True))
        axes.plot(
            lengths, share, color=colour, marker="o", markersize=4, linewidth=2 if i == 0 else 1.2,
            linestyle="-" if i == 0 else "--", label=name,
        )  # fmt: skip
        if i == 0:
            axes.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(chance, color=GREY, linestyle=":", linewidth=1, label="chance")
    axes.set_xscale("log", base=2)
    every = sorted({row[0] for rows in series.values() for row in rows})
    axes.set_xticks(every, [_bases(length) for length in every])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    _finish(axes, "bases of a record", "accuracy")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def reliability(
    before: tuple[Sequence[int], Sequence[float], Sequence[float]],
    after: tuple[Sequence[int], Sequence[float], Sequence[float]],
) -> "Figure":
    """A reliability diagram: (counts, mean probability, share right) of each bin, before calibration and after."""
    figure, axes = _figure(4.6, 4.4)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":")
    for (counts, probability, right), colour, name in (
        (before, "#b8bec5", "before calibration"),
        (after, TRAINING, "after"),
    ):
        kept = [i for i, count in enumerate(counts) if count]
        sizes = 12 + 140 * np.sqrt([counts[i] / max(1, sum(counts)) for i in kept])
        at, share = [probability[i] for i in kept], [right[i] for i in kept]
        axes.plot(at, share, color=colour, linewidth=1.2)
        axes.scatter(at, share, s=sizes, color=colour, label=name, zorder=3)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    _finish(axes, "probability given", "share right")
    return figure


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _finish(axes: "Axes", across: str, up: str) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)


def _bases(length: int) -> str:
    for size, suffix in ((1 << 20, "M"), (1 << 10, "K")):
        if length >= size and length % size == 0:
            return f"{length // size}{suffix}"
    return f"{length:,}"
