"""What the looks at held-out data say of a finished run: which was the best, and whether the end is worse than it.

Looks on the way are at a part of the held-out data and the last one is at all of it, so a job that is to be judged
measures its last weights on the looks' part too, and writes that as `valid_look_loss` in the last row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MARGIN = 0.01  # nats a target: what is less is not worth a word
STANDARD_ERRORS = 2.0
RECENT = 0.02  # share of a run's steps over which its training loss is averaged

Row = Mapping[str, Any]


def look_loss(row: Row) -> float:
    """Nats a target on the part of the held-out data that all looks share."""
    return float(row.get("valid_look_loss", row["valid_loss"]))


def best_look(rows: Sequence[Row]) -> Row | None:
    """The row of the first look than which none is better; None where there was none."""
    return min((row for row in rows if "valid_loss" in row), key=look_loss, default=None)


def end_is_worse(rows: Sequence[Row], at_end: Mapping[str, float]) -> Row | None:
    """The row of the best look where the last weights are worse on the looks' part by more than noise, else None.

    For jobs that keep no weights of the best look and so cannot compare window by window: the difference of two
    models' losses on one target is taken to deviate by a nat, which is more than it does.

    Args:
        at_end: figures of the last weights, `look_loss` and `look_targets` among them.
    """
    best = best_look(rows)
    if best is None or not at_end:
        return None
    noise = STANDARD_ERRORS / np.sqrt(at_end["look_targets"])
    return best if at_end["look_loss"] - look_loss(best) > max(MARGIN, noise) else None


def training_loss_fell(rows: Sequence[Row], since: int) -> bool:
    """Whether the training loss is lower at the end than it was at the step `since`, both in the mean of some steps."""
    steps = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    if not steps:
        return False
    last = steps[-1][0]
    span = max(1, round(RECENT * last))

    def mean(end: int) -> float:
        near = [loss for step, loss in steps if end - span < step <= end]
        return float(np.mean(near)) if near else float("nan")

    return mean(last) < mean(since)


def rose(before: NDArray[np.float64], after: NDArray[np.float64], targets: NDArray[np.int64]) -> bool:
    """Whether a loss is higher after than before by more than noise.

    That is by more than `MARGIN`, and by more than `STANDARD_ERRORS` of the rise, a ratio of two sums over windows
    (Cochran, Sampling Techniques, eq. 6.13): the windows' rises beside what their numbers of targets make of it.

    Args:
        before, after: (windows,) loss of each held-out window, summed over its targets, in nats.
        targets: (windows,) of each.
    """
    difference, count = after - before, len(targets)
    rise = float(difference.sum() / targets.sum())
    squares = float(np.square(difference - rise * targets).sum())
    error = np.sqrt(squares * count / (count - 1)) / targets.sum() if count > 1 else 0.0
    return bool(rise > max(MARGIN, STANDARD_ERRORS * error))
