"""What the looks of a run say of its end; the figures of the rows are those of a run on ten minutes of piano."""

from typing import Any

import numpy as np
import pytest

from mambagen.training.looks import best_look, end_is_worse, look_loss, rose, training_loss_fell

LOOKS = [(412, 2.4815), (991, 5.6917), (1171, 2.9228), (2794, 20.2798), (3200, 2.3694), (3605, 5.4559)]
PIANO: list[dict[str, Any]] = [{"step": step, "valid_loss": loss} for step, loss in LOOKS]


def test_the_best_look_is_found_by_what_all_looks_measured() -> None:
    assert best_look([]) is None
    assert best_look([{"step": 1, "loss": 0.1}]) is None
    assert best_look(PIANO) == PIANO[4]
    end = {"step": 4010, "valid_loss": 2.30, "valid_look_loss": 2.40}  # all held-out data were easier than the part
    assert best_look([*PIANO, end]) == PIANO[4]
    end = {"step": 4010, "valid_loss": 2.50, "valid_look_loss": 2.35}
    assert best_look([*PIANO, end]) == end
    assert look_loss(end) == 2.35
    same = [{"step": 1, "valid_loss": 1.0}, {"step": 2, "valid_loss": 1.0}]  # the folder is written at the first
    assert best_look(same) == same[0]


def test_a_training_loss_that_rose_with_the_held_out_one_is_not_learning_by_heart() -> None:
    rows = [{"step": step, "loss": 3.0 - step / 100 + (step % 2)} for step in range(1, 201)]
    assert training_loss_fell(rows, 100)
    rows += [{"step": step, "loss": 2.9 + (step % 2)} for step in range(201, 221)]
    assert not training_loss_fell(rows, 100)
    assert training_loss_fell(rows, 1)
    assert not training_loss_fell([{"step": 1, "loss": None}], 1)


@pytest.mark.parametrize(
    ("shift", "spread", "expected"),
    [(5.0, 0.5, True), (0.005, 0.0, False), (-5.0, 0.5, False), (0.1, 2.0, False), (0.1, 0.1, True)],
    ids=["clear", "below the margin", "fell", "noise", "small and sure"],
)
def test_a_rise_is_more_than_the_windows_differ(shift: float, spread: float, expected: bool) -> None:
    """Twenty windows of 100 samples; two standard errors of the mean are 2 spread / sqrt(20) nats a sample."""
    deviations = np.tile([-1.0, 1.0], 10) * spread * np.sqrt(19 / 20)  # of deviation `spread` with ddof = 1
    before = np.linspace(200, 300, 20)
    assert rose(before, before + 100 * (shift + deviations), np.full(20, 100)) is expected


def test_a_single_window_has_no_deviation() -> None:
    assert rose(np.array([200.0]), np.array([202.0]), np.array([100]))
    assert not rose(np.array([200.0]), np.array([200.5]), np.array([100]))


def test_windows_of_other_lengths_are_not_noise() -> None:
    """Five seconds of a trumpet: a whole window and a short one, both 9 nats a sample worse, or one of them alone."""
    targets = np.array([533, 8000])
    assert rose(7.0 * targets, 16.0 * targets, targets)
    assert rose(7.0 * targets, np.array([15.5, 16.0]) * targets, targets)
    alike = np.array([400, 400])
    assert not rose(7.0 * alike, np.array([7.0, 16.0]) * alike, alike)


def test_where_no_weights_are_kept_few_targets_say_little() -> None:
    assert end_is_worse(PIANO, {}) is None
    assert end_is_worse([], {"look_loss": 9.0, "look_targets": 100}) is None
    assert end_is_worse(PIANO, {"look_loss": 7.7, "look_targets": 504_059}) == PIANO[4]
    assert end_is_worse(PIANO, {"look_loss": 2.41, "look_targets": 504_059}) == PIANO[4]
    assert end_is_worse(PIANO, {"look_loss": 2.374, "look_targets": 504_059}) is None  # below the margin
    assert end_is_worse(PIANO, {"look_loss": 2.41, "look_targets": 400}) is None  # two errors are 0.1 nats
