"""The loss of a run as a figure: training, held-out data, and the baselines to beat."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TRAINING, HELD_OUT, GREY = "#4878a8", "#c8553d", "#666666"


def draw_loss(
    file: Path, rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, float], title: str, unit: str = "base"
) -> None:
    """Write a PNG (or what the name's ending says) of the metrics of a run, whole or not at all.

    Args:
        rows: of metrics.jsonl.
        baselines: name -> loss in nats a target, drawn as horizontal lines.
        unit: what a target is.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FormatStrFormatter

    steps = [row for row in rows if row.get("loss") is not None]
    tokens_at = {row["step"]: row["tokens"] for row in rows if "tokens" in row}
    held_out = [row for row in rows if "valid_loss" in row and row["step"] in tokens_at]

    figure = Figure(figsize=(7.5, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if steps:
        tokens = np.array([row["tokens"] for row in steps], dtype=float)
        losses = np.array([row["loss"] for row in steps], dtype=float)
        axes.plot(tokens, losses, color=TRAINING, alpha=0.25, linewidth=0.8)
        axes.plot(tokens, smoothed(losses), color=TRAINING, linewidth=1.6, label="training (smoothed)")
    if held_out:
        axes.plot(
            [tokens_at[row["step"]] for row in held_out],
            [row["valid_loss"] for row in held_out],
            color=HELD_OUT, marker="o", markersize=4, linewidth=1.6, label="held out",
        )  # fmt: skip
    for (name, loss), style in zip(baselines.items(), ("--", "-.", ":", (0, (1, 3))) * len(baselines), strict=False):
        axes.axhline(loss, color=GREY, linestyle=style, linewidth=1, label=f"{name} (perplexity {math.exp(loss):.3f})")

    low, high = window([row["loss"] for row in steps], [row["valid_loss"] for row in held_out], [*baselines.values()])
    axes.set_ylim(low, high)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("tokens seen in training")
    axes.set_ylabel(f"loss (nats a {unit})")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.margins(x=0.01)
    perplexity = axes.secondary_yaxis("right", functions=(_exp, _log))
    perplexity.set_ylabel("perplexity")
    perplexity.yaxis.set_major_formatter(FormatStrFormatter("%.2f"))
    perplexity.spines["right"].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)

    partial = file.with_name(f".{file.stem}.partial{file.suffix}")
    try:
        figure.savefig(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def window(training: Sequence[float], held_out: Sequence[float], baselines: Sequence[float]) -> tuple[float, float]:
    """Limits of the axis that show the end of a run well: its steep beginning runs out at the top."""
    settled = sorted(training[len(training) // 5 :])
    inner = [settled[int(0.01 * len(settled))], settled[int(0.98 * len(settled))]] if settled else []
    values = [*inner, *held_out[len(held_out) // 5 :], *baselines] or [0.0, 1.0]
    low, high = min(values), max(values)
    margin = 0.06 * max(high - low, 0.02)
    return low - margin, high + margin


def smoothed(losses: NDArray[np.float64], share: float = 0.02) -> NDArray[np.float64]:
    """An exponential average over about a `share` of the run, without the bias of its beginning."""
    keep = 1 - 1 / max(1.0, share * len(losses))
    average, weight = 0.0, 0.0
    out = np.empty_like(losses)
    for i, loss in enumerate(losses):
        average = keep * average + (1 - keep) * loss
        weight = keep * weight + (1 - keep)
        out[i] = average / weight
    return out


def _exp(values: Any) -> Any:
    return np.exp(values)


def _log(values: Any) -> Any:
    return np.log(np.maximum(values, 1e-9))
