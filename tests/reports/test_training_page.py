"""Reports of trainings: what stands in them comes from the run, and they open without a network."""

import base64
import re
from pathlib import Path

import numpy as np
import pytest

from mambagen.reports.training_page import MOST_ROWS, add_curves, begin, finish
from mambagen.reports.training_plots import accuracy_by_length, confusion, loss_curves, reliability, validation_curves


def some_rows(steps: int) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        rows.append({"step": step, "loss": 1.5 - 0.5 * step / steps, "tokens": 10 * step})
        if step % max(1, steps // 4) == 0:
            rows.append({"step": step, "valid_loss": 1.4 - 0.3 * step / steps, "valid_accuracy": step / steps})
    return rows


@pytest.mark.parametrize("steps", [0, 1, 40])
def test_a_report_of_any_run_is_one_file_with_its_curves_and_settings(steps: int, tmp_path: Path) -> None:
    page = begin("A <run>", "what & why", {"steps": steps, "seconds": 1.23456, "data": "x.fa"})
    add_curves(page, some_rows(steps), {"order-3 chain": 1.35}, {"valid_accuracy": "accuracy"})
    path = finish(page, tmp_path, "mambagen train --config c", {"lr": 0.1, "data": ("a", "b"), "none": None})
    text = path.read_text("utf-8")
    assert path == tmp_path / "report.html"
    assert "A &lt;run&gt;" in text
    assert "what &amp; why" in text
    assert "<td>1.235</td>" in text
    assert "mambagen train --config c" in text
    assert "[&#34;a&#34;, &#34;b&#34;]" in text
    assert "none" not in re.findall(r"<td[^>]*>(\w+)</td>", text)
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert len(pictures) == (2 if steps else 1)
    assert all(base64.b64decode(picture).lstrip().startswith(b"<?xml") for picture in pictures)
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_curves_of_long_runs_are_thinned_and_keep_every_evaluation() -> None:
    class Page:
        figures: list[object] = []  # noqa: RUF012 (of this test alone)

        def heading(self, text: str) -> None: ...

        def figure(self, figure: object, caption: str) -> None:
            self.figures.append(figure)

    page = Page()
    add_curves(page, some_rows(4 * MOST_ROWS), names={"valid_accuracy": "accuracy"})  # type: ignore[arg-type]
    loss = page.figures[0].axes[0].lines  # type: ignore[attr-defined]
    assert len(loss[0].get_xdata()) == MOST_ROWS
    assert len(loss[2].get_xdata()) == 4


def test_a_confusion_matrix_shows_counts_and_shares() -> None:
    axes = confusion(("a", "b"), ((8, 2), (0, 5))).axes[0]
    assert {text.get_text() for text in axes.texts} == {"8", "2", "5"}
    assert np.asarray(axes.images[0].get_array()).tolist() == [[0.8, 0.2], [0.0, 1.0]]
    many = [[int(i == j) * 3 + int(i == j + 1) for j in range(20)] for i in range(20)]
    assert len(confusion([f"s{i}" for i in range(20)], many).axes[0].texts) == 20  # the diagonal alone


def test_lengths_bins_and_lines_are_those_that_were_given() -> None:
    series = {"model": [(1024, 0.5, 0.4, 0.6), (4096, 0.8, 0.7, 0.9)], "5-mers": [(1024, 0.4, 0.3, 0.5)]}
    axes = accuracy_by_length(series, 0.2).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1K", "4K"]
    assert axes.lines[0].get_ydata().tolist() == [0.5, 0.8]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"model", "5-mers", "chance"}
    one = ((0, 4, 6), (0.0, 0.5, 0.9), (0.0, 0.25, 1.0))
    axes = reliability(one, one).axes[0]
    assert axes.lines[1].get_xdata().tolist() == [0.5, 0.9]  # the empty bin is not there
    assert loss_curves([], {"chain": 1.0}).axes[0].lines[0].get_label() == "chain"
    assert not validation_curves([], {"x": "y"}).axes[0].lines
