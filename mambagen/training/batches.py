"""What a job gives to the loop, and the thread that prepares it ahead of time."""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """One step's batch, on the CPU: the whole step, which the loop cuts into `accumulate` pieces along axis 0."""

    tensors: dict[str, Tensor]  # each (batch, ...)
    targets: int  # how many positions the loss counts; 0 is allowed, the step then changes nothing
    where: Sequence[tuple[str, int, str]]  # one a row: record, 0-based start, strand; for messages

    def rows(self) -> int:
        return len(self.where)


class Task(Protocol):
    """A job as the loop sees it. `batch` must be a function of the step alone: that is what makes resuming exact.

    A task may have an attribute `done`, which ends training where it is true after an evaluation on the way, and a
    method `stage(step)`: batches of another stage have other shapes, and the loop prepares for them when they come.
    """

    identity: dict[str, Any]  # JSON values that a checkpoint has to share to be gone on from
    tokens_per_step: int
    quick_tokens: int  # that a quick evaluation looks at

    def batch(self, step: int) -> Batch: ...

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """The sum of the loss in nats over the targets in `tensors` (on the model's device), a float32 scalar."""
        ...

    def evaluate(self, model: nn.Module, quick: bool) -> dict[str, float]:
        """Figures on held-out data, "loss" (nats a target) among them; `quick` may look at a part of it."""
        ...

    def model_files(self, model: nn.Module) -> dict[str, Callable[[Path], None]]:
        """The files of the model folder (config.json, model.safetensors, README.md) as writers."""
        ...


class Prefetcher:
    """Makes the batches of steps `first`, `first + 1`, ... on a thread, some ahead; pins them where a GPU waits."""

    def __init__(self, make: Callable[[int], Batch], first: int, pin: bool, ahead: int = 3) -> None:
        self._make, self._pin = make, pin
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._peeked: Batch | None = None
        self._thread = threading.Thread(target=self._work, args=(first,), name="batches", daemon=True)
        self._thread.start()

    def next(self) -> Batch:
        """The next step's batch; an error of the thread is raised here."""
        if self._peeked is not None:
            batch, self._peeked = self._peeked, None
            return batch
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def peek(self) -> Batch:
        """The next step's batch, which `next` will give once more."""
        self._peeked = self.next()
        return self._peeked

    def close(self) -> None:
        """Stop the thread; batches made but not taken are dropped."""
        self._closed.set()
        self._thread.join(timeout=10)

    def _work(self, step: int) -> None:
        while not self._closed.is_set():
            try:
                batch = self._make(step)
                if self._pin:
                    batch = Batch(
                        {name: tensor.pin_memory() for name, tensor in batch.tensors.items()},
                        batch.targets,
                        batch.where,
                    )
            except BaseException as error:
                self._offer(error)
                return
            self._offer(batch)
            step += 1

    def _offer(self, item: Batch | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def pieces(batch: Batch, count: int, device: torch.device) -> list[dict[str, Tensor]]:
    """The batch on the device, cut into at most `count` pieces of nearly equal size."""
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.tensors.items()}
    count = min(count, batch.rows())
    cut = {name: tensor.tensor_split(count) for name, tensor in moved.items()}
    return [{name: parts[i] for name, parts in cut.items()} for i in range(count)]
