"""The training loop, the same for every job: `train(model, task, config, run, checkpoint)`.

One step: take the batch that a thread has made ready, send it through the model in `accumulate` pieces, clip the
gradient, update. The GPU is never waited for inside a step: losses and gradient norms stay on the device and are read
together now and then. A loss or norm that is not finite sets a flag on the device which holds back this update and all
later ones, so when the host reads it the weights are still those from before the step.
"""

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mambagen.errors import InterruptedRun, UsageError
from mambagen.models.files import Writer
from mambagen.training.batches import Batch, Prefetcher, Task, pieces
from mambagen.training.checkpoint import Checkpoint, Position, clear_the_way, restore_checkpoint, save_checkpoint
from mambagen.training.config import TrainConfig
from mambagen.training.cuda_graph import GraphedPass, record
from mambagen.training.divergence import diverged_error, examine, weights_are_finite
from mambagen.training.optimizer import build_optimizer, set_learning_rate
from mambagen.training.progress import Progress
from mambagen.training.run_folder import Metrics, RunFolder
from mambagen.training.schedule import Budget, EvaluationPlan, learning_rate
from mambagen.training.signals import stop_signals
from mambagen.training.step_log import DivergedStep, Step, StepLog


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves: the last evaluation, the last checkpoint, how far it came and how fast."""

    held_out: dict[str, float]
    checkpoint: Path
    position: Position
    tokens_per_second: float  # of training alone; 0 where nothing was left to train


def train(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    run: RunFolder,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train until the budget is used; save on the way, at the end, and when asked to stop.

    Args:
        model: on any device; its weights are those of `checkpoint` where one is given.
        task: gives batches, the loss and the evaluation.
        checkpoint: where to go on from; the rows of later steps are dropped from the run's metrics.

    Raises:
        InterruptedRun: Ctrl-C or SIGTERM; the step at hand was finished and a checkpoint written.
        DivergedError: a loss or gradient norm was not finite; the update was not made, the state before it is saved.
        ResourceError: a checkpoint could not be written; earlier ones are whole.
    """
    config = config.with_budget()
    budget = Budget(config.steps, config.minutes)
    device = choose_device(config.device)
    autocast = Autocast(device, config.precision)
    progress = progress or Progress()
    progress.total_steps = config.steps
    torch.manual_seed(config.seed)
    model = model.to(device).train()
    optimizer = build_optimizer(model, config.weight_decay)
    begun = position = checkpoint.position if checkpoint else Position()
    if checkpoint:
        restore_checkpoint(checkpoint, model, optimizer)
        clear_the_way(run.checkpoints, position.step)
    bad = torch.zeros((), device=device)  # becomes 1 at the first loss or norm that is not finite, and stays
    metrics = Metrics(run, position.step)
    log = StepLog(metrics, device)
    batches = Prefetcher(task.batch, position.step, pin=device.type == "cuda")

    def read() -> None:
        diverged = log.read()
        if diverged:
            raise_diverged(diverged)

    def raise_diverged(diverged: DivergedStep) -> None:
        progress.state("the loss is not finite: saving, and looking for the windows ...")
        last = diverged.step.position
        before = replace(last, step=last.step - 1, tokens=last.tokens - task.tokens_per_step)
        usable = weights_are_finite(model)  # what is not must not be what --resume goes on from
        saved = save(before, keep=None, name=None if usable else f"diverged-{before.step:08d}")
        windows = list(examine(model, lambda tensors: autocast.loss(task, model, tensors), diverged.step.batch))
        raise diverged_error(diverged, windows, saved, run.path / "diverged.json")

    def evaluate(quick: bool) -> dict[str, float]:
        progress.state("looking at the held-out data ...")
        model.eval()
        with torch.no_grad(), autocast.context():
            figures = task.evaluate(model, quick)
        model.train()
        again = position.step == begun.step and metrics.evaluated_at == position.step  # a finished run, resumed
        if figures and not again:
            metrics.write({"step": position.step} | {f"valid_{name}": value for name, value in figures.items()})
        return figures

    def save(where: Position, keep: int | None = config.keep, name: str | None = None) -> Path:
        progress.state("saving ...")
        metrics.flush(to_disk=True)
        files = task.model_files(model)
        return save_checkpoint(run.checkpoints, where, task.identity, model, optimizer, files, keep=keep, name=name)

    with contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        stack.callback(metrics.close)
        stack.callback(batches.close)
        stop = stack.enter_context(stop_signals())

        saved: Path | None = checkpoint.path if checkpoint else None
        saved_at = position
        graph: GraphedPass | None = None
        used = budget.progress(position.step, position.seconds)
        stage = stage_of(task, position.step)
        if used < 1:
            progress.state("preparing: the first batch goes through once (kernels may be compiled) ...")
            graph = rehearse(model, task, batches, config.accumulate, autocast)
        if saved is None:  # so that a run can be gone on with from its first moment, and a full disk shows now
            saved = save(position)
        plan = EvaluationPlan(budget, position.step, position.seconds)
        clock_began = time.monotonic() - position.seconds
        step_seconds = 0.0
        log.restart_clock()

        while not stop.signal:
            step_began = time.monotonic()
            used = budget.progress(position.step, position.seconds, step_seconds)
            if used >= 1:
                break
            lr = learning_rate(config.lr, config.warmup, used)
            set_learning_rate(optimizer, lr)
            if stage_of(task, position.step) != stage:
                stage = stage_of(task, position.step)
                if device.type == "cuda":
                    read()
                    graph = None  # its memory is needed for the next
                    progress.state("preparing for longer windows ...")
                    graph = rehearse(model, task, batches, config.accumulate, autocast)
                    log.restart_clock()
            batch = batches.next()
            loss, norm = train_step(model, task, batch, optimizer, bad, config, autocast, graph)
            seconds = time.monotonic() - clock_began
            position = Position(position.step + 1, position.tokens + task.tokens_per_step, seconds)
            log.add(Step(position, lr, loss, norm, batch), task.tokens_per_step)

            speed = log.tokens_per_second
            evaluation_due = plan.due(used, position.step, seconds, task.quick_tokens, speed)
            save_due = due_for_saving(config, position, saved_at)
            if log.due() or evaluation_due or save_due:
                read()
            step_seconds = time.monotonic() - step_began
            left = budget.seconds_left(position.step, position.seconds, step_seconds)
            progress.update(position.step, log.loss, log.tokens_per_second, left)
            if evaluation_due:
                began = time.monotonic()
                evaluate(quick=True)
                plan.made(used, seconds, time.monotonic() - began)
            if save_due:
                saved, saved_at = save(position), position
            if evaluation_due or save_due:
                log.restart_clock()
            if evaluation_due and getattr(task, "done", False):
                break

        read()
        if stop.signal:
            if saved_at != position:
                saved = save(position)
            progress.close()
            raise InterruptedRun(
                f"stopped by {stop.signal.name} after step {position.step}; saved {saved}; "
                f"go on with --resume {run.path}",
                stop.exit_code,
            )
        if saved_at != position:
            saved = save(position)  # before the evaluation, which may be long
        held_out = evaluate(quick=False)
        renew_card(saved, task.model_files(model))
    return TrainResult(held_out, saved, position, log.mean_tokens_per_second())


def renew_card(checkpoint: Path, files: Mapping[str, Writer]) -> None:
    """Write the README again, which says what was measured; it is the one file that the manifest does not list."""
    if "README.md" in files:
        partial = checkpoint.parent / f".{checkpoint.name}.README.partial"
        files["README.md"](partial)
        os.replace(partial, checkpoint / "README.md")


def train_step(
    model: nn.Module,
    task: Task,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    bad: Tensor,
    config: TrainConfig,
    autocast: "Autocast",
    graph: GraphedPass | None = None,
) -> tuple[Tensor, Tensor]:
    """One update. Returns the batch's loss (sum of nats) and the gradient's norm before clipping, on the device.

    A batch without targets changes nothing. Where either figure is not finite `bad` becomes 1, and while it is 1 the
    fused optimiser leaves weights and moments as they are.
    """
    if batch.targets == 0:
        return torch.zeros_like(bad), torch.zeros_like(bad)
    parts = pieces(batch, config.accumulate, bad.device)
    loss = forward_backward(model, task, parts, batch.targets, autocast, graph)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    bad.logical_or_(~(torch.isfinite(loss) & torch.isfinite(norm)))
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def forward_backward(
    model: nn.Module,
    task: Task,
    parts: list[dict[str, Tensor]],
    targets: int,
    autocast: "Autocast",
    graph: GraphedPass | None = None,
) -> Tensor:
    """Add the gradient of the mean loss over all `targets` of the parts; returns the sum of the loss."""
    total: Tensor | None = None
    for part in parts:
        if graph and graph.fits(part):
            loss = graph(part, targets)
        else:
            loss = autocast.loss(task, model, part)
            (loss / targets).backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def rehearse(
    model: nn.Module, task: Task, batches: Prefetcher, accumulate: int, autocast: "Autocast"
) -> GraphedPass | None:
    """Send the first batch's first piece forward and back without an update: kernels are compiled, memory is tried.

    On a GPU, pieces that are small enough for it are recorded as a CUDA graph, which is returned.
    """
    batch = batches.peek()
    graph = None
    if batch.targets:
        first = pieces(batch, accumulate, autocast.device)[:1]
        with torch.random.fork_rng([autocast.device] if autocast.device.type == "cuda" else []):
            forward_backward(model, task, first, batch.targets, autocast)
            graph = record(model, lambda tensors: autocast.loss(task, model, tensors), first[0])
    model.zero_grad(set_to_none=True)
    return graph


def stage_of(task: Task, step: int) -> int:
    """The stage of a step's batch; 0 for a task that has none."""
    stage = getattr(task, "stage", None)
    return 0 if stage is None else int(stage(step))


def due_for_saving(config: TrainConfig, position: Position, saved_at: Position) -> bool:
    """Whether the interval between checkpoints is over."""
    steps, minutes = config.save_interval()
    if steps is not None:
        return position.step % steps == 0
    return position.seconds - saved_at.seconds >= 60 * minutes


class Autocast:
    """The precision of a run on its device: "auto" is bfloat16 on a GPU that has it, float32 elsewhere."""

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device = device
        auto = precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.dtype = torch.bfloat16 if precision == "bf16" or auto else torch.float32

    def context(self) -> contextlib.AbstractContextManager[None]:
        """Autocast to bfloat16, or nothing."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def loss(self, task: Task, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """The task's loss in this precision."""
        with self.context():
            return task.loss(model, tensors)


def choose_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:N" as a device; UsageError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: torch sees no CUDA device here; use --device cpu (see mambagen doctor)")
        device = torch.device(name)
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
        return device
    return torch.device("cpu")


def set_threads(count: int) -> None:
    """Use `count` CPU threads, in torch and in the CPU kernels, which run on torch's threads."""
    torch.set_num_threads(count)
