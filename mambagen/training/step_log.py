"""The losses and gradient norms of the steps: kept on the device, read together, written as rows."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from mambagen.training.batches import Batch
from mambagen.training.checkpoint import Position
from mambagen.training.run_folder import Metrics

READ_EVERY = 0.5  # seconds between two readings from a GPU; on a CPU, where reading is free, every step


@dataclass(frozen=True)
class Step:
    """A step that was made: where it led, and its figures, still on the device."""

    position: Position
    lr: float
    loss: Tensor  # sum of nats over the batch's targets
    grad_norm: Tensor  # before clipping
    batch: Batch


@dataclass(frozen=True)
class DivergedStep:
    """The first step whose loss or gradient norm was not finite."""

    step: Step
    loss: float
    grad_norm: float


class StepLog:
    """Collects steps; `read` writes their rows and finds the first that is not finite."""

    def __init__(self, metrics: Metrics, device: torch.device) -> None:
        self._metrics = metrics
        self._every = READ_EVERY if device.type == "cuda" else 0.0
        self._pending: list[Step] = []
        self._began = time.monotonic()
        self._tokens = 0
        self._total_tokens, self._total_seconds = 0, 0.0
        self.loss: float | None = None  # of the last step read, nats a target
        self.tokens_per_second = 0.0  # over the last interval

    def add(self, step: Step, tokens: int) -> None:
        """Take in a step of so many tokens."""
        self._pending.append(step)
        self._tokens += tokens

    def due(self) -> bool:
        """Whether it is time to read."""
        return time.monotonic() - self._began >= self._every

    def read(self) -> DivergedStep | None:
        """Wait for the device, write the rows of the finite steps; the first that is not finite is returned instead."""
        if not self._pending:
            return None
        both = torch.stack([torch.stack([step.loss for step in self._pending]).float(),
                            torch.stack([step.grad_norm for step in self._pending]).float()])  # fmt: skip
        losses, norms = both.tolist()
        self._count_interval()
        for step, total, norm in zip(self._pending, losses, norms, strict=True):
            if not (math.isfinite(total) and math.isfinite(norm)):
                return DivergedStep(step, total / max(1, step.batch.targets), norm)
            self.loss = total / step.batch.targets if step.batch.targets else None
            self._metrics.write(
                {
                    "step": step.position.step,
                    "loss": self.loss,
                    "lr": step.lr,
                    "grad_norm": norm,
                    "tokens": step.position.tokens,
                    "seconds": round(step.position.seconds, 3),
                    "tokens_per_second": round(self.tokens_per_second, 1),
                }
            )
        self._pending.clear()
        self._metrics.flush()
        return None

    def restart_clock(self) -> None:
        """Begin an interval now: what came between (an evaluation, a checkpoint) is no training time."""
        self._began = time.monotonic()

    def mean_tokens_per_second(self) -> float:
        """Over all that was read in this process, without evaluations and checkpoints."""
        return self._total_tokens / self._total_seconds if self._total_seconds else 0.0

    def _count_interval(self) -> None:
        now = time.monotonic()
        seconds = max(1e-9, now - self._began)
        self.tokens_per_second = self._tokens / seconds
        self._total_tokens += self._tokens
        self._total_seconds += seconds
        self._began, self._tokens = now, 0
