"""The budget of a run, in steps or minutes, and the learning rate that follows it."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """How long to train: an exact number of steps, or minutes on the clock.

    The clock of a run in minutes starts after the first batch went through the model once (so that compiling kernels
    costs nothing) and runs through evaluations and checkpoints; it stands still while the run is stopped. Learning
    rate and end follow the share of it that is used, so a run in minutes on another machine makes another number of
    steps but passes through the same schedule. Only a run in steps can be repeated bit for bit.
    """

    steps: int | None
    minutes: float | None

    def progress(self, step: int, seconds: float, last_step_seconds: float = 0.0) -> float:
        """The share of the budget that is used in the middle of the step that follows; 1 or more: do not begin it."""
        if self.steps is not None:
            return 1.0 if step >= self.steps else (step + 0.5) / self.steps
        assert self.minutes is not None
        return (seconds + 0.5 * last_step_seconds) / (60 * self.minutes)

    def seconds_left(self, step: int, seconds: float, seconds_per_step: float) -> float:
        """An estimate for the progress line."""
        if self.steps is not None:
            return (self.steps - step) * seconds_per_step
        assert self.minutes is not None
        return max(0.0, 60 * self.minutes - seconds)

    def __str__(self) -> str:
        return f"{self.steps:,} steps" if self.steps is not None else f"{self.minutes:g} min"


def learning_rate(peak: float, warmup: float, progress: float) -> float:
    """Linear from 0 to the peak over the first `warmup` share of the budget, then half a cosine to 0 at its end."""
    if progress < warmup:
        return peak * progress / warmup
    along = min(1.0, (progress - warmup) / (1.0 - warmup))
    return peak * 0.5 * (1.0 + math.cos(math.pi * along))


class EvaluationPlan:
    """When to look at held-out data: ten times, evenly over the budget.

    In a run in steps the evaluations depend on the step alone, so that every machine makes the same rows. In a run in
    minutes one that would take more than a tenth of the time since the last is put off.
    """

    COUNT = 10
    SHARE = 0.1
    FORWARD_SPEED = 3.0  # of the forward pass against training: a guess before the first evaluation is made

    def __init__(self, budget: Budget, step: int, seconds: float) -> None:
        self._budget = budget
        self._passed = max(0, math.floor(self.COUNT * budget.progress(step - 1, seconds)))
        self._at = seconds
        self._took: float | None = None

    def due(self, used: float, step: int, seconds: float, tokens: int, tokens_per_second: float) -> bool:
        """Whether to make one after `step`, where it looks at `tokens` (the one at the very end is made anyway)."""
        if math.floor(self.COUNT * used) <= self._passed or step == self._budget.steps:
            return False
        if self._budget.steps is not None:
            return True
        took = self._took
        if took is None:
            took = tokens / (self.FORWARD_SPEED * tokens_per_second) if tokens_per_second else math.inf
        return took <= self.SHARE * (seconds - self._at)

    def made(self, used: float, seconds: float, took: float) -> None:
        """One was made, in so many seconds."""
        self._passed, self._at, self._took = math.floor(self.COUNT * used), seconds, took
