"""The loss plot: a finished picture of any run, and its smoothing."""

import math
from pathlib import Path

import numpy as np
import pytest

from mambagen.reports.loss_plot import draw_loss, smoothed, window


def rows(count: int) -> list[dict[str, float]]:
    made: list[dict[str, float]] = []
    for step in range(1, count + 1):
        made.append({"step": step, "loss": 1.3 + math.exp(-step / 5), "tokens": 1000 * step})
        if step % 10 == 0:
            made.append({"step": step, "valid_loss": 1.31 + math.exp(-step / 5)})
    return made


@pytest.mark.parametrize("count", [0, 1, 100])
def test_a_picture_of_any_run_is_written_whole(tmp_path: Path, count: int) -> None:
    from matplotlib.image import imread

    file = tmp_path / "loss.png"
    baselines = {"order-0 Markov": 1.34, "uniform": math.log(4)}
    draw_loss(file, rows(count), baselines, "Mamba on demo")
    picture = imread(file)
    assert picture.shape[:2] == (675, 1125)
    assert picture[..., :3].std() > 0.02  # something is drawn
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_a_row_without_a_loss_is_left_out(tmp_path: Path) -> None:
    draw_loss(tmp_path / "loss.svg", [{"step": 1, "loss": None, "tokens": 5}, *rows(20)], {}, "a title & more")
    text = (tmp_path / "loss.svg").read_text()
    assert "</svg>" in text


def test_the_axis_shows_the_baselines_and_the_end_of_the_run() -> None:
    losses = [9.0] * 10 + [1.3] * 90
    low, high = window(losses, [1.35, 1.32], [1.34, 1.386])
    assert low < 1.3
    assert 1.386 < high < 1.5
    assert window([], [], []) == pytest.approx((-0.06, 1.06))


def test_smoothing_keeps_a_constant_and_follows_a_change() -> None:
    assert smoothed(np.full(50, 2.0)) == pytest.approx(np.full(50, 2.0))
    change = smoothed(np.concatenate([np.zeros(100), np.ones(100)]))
    assert change[99] == pytest.approx(0.0)
    assert 0.2 < change[100] < 0.3  # an average over about a fiftieth of 200 values
    assert change[-1] == pytest.approx(1.0, abs=1e-6)
