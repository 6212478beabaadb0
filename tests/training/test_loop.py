"""The loop's arithmetic: updates, accumulation, clipping, schedule, budgets, and what stops it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mambagen.errors import DivergedError, InterruptedRun, UsageError
from mambagen.models.files import list_checkpoints
from mambagen.training.batches import Prefetcher
from mambagen.training.checkpoint import newest_checkpoint
from mambagen.training.loop import choose_device
from mambagen.training.run_folder import read_metrics
from mambagen.training.schedule import Budget, EvaluationPlan, learning_rate
from mambagen.training.step_log import StepLog
from tests.training.standin import LENGTH, ROWS, CountingTask, SmallModel, run_standin


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def test_the_losses_are_those_of_a_plain_loop_written_out(tmp_path: Path) -> None:
    settings = {"steps": 8, "lr": 0.01, "warmup": 0.25, "weight_decay": 0.1, "clip": 0.5}
    task = CountingTask()
    model = SmallModel()
    model.dropout.p = 0.0
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=0.0, betas=(0.9, 0.95))
    expected = []
    for step in range(8):
        along = (step + 0.5) / 8
        rate = 0.01 * (along / 0.25 if along < 0.25 else 0.5 * (1 + math.cos(math.pi * (along - 0.25) / 0.75)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = task.batch(step)
        logits = model(batch.tensors["inputs"])
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 8), batch.tensors["targets"].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters()))
        for parameter in model.parameters():
            parameter.grad.mul_(min(1.0, 0.5 / norm))
        optimizer.step()
        expected.append((loss.item(), rate, norm))

    class NoDropout(CountingTask):
        def loss(self, model, tensors):  # type: ignore[no-untyped-def]
            model.dropout.p = 0.0
            return super().loss(model, tensors)

    run_standin(tmp_path / "a", resume=False, task=NoDropout(), **settings)
    rows = [row for row in read_metrics(tmp_path / "a" / "metrics.jsonl") if "loss" in row]
    found = [(row["loss"], row["lr"], row["grad_norm"]) for row in rows]
    assert found == [pytest.approx(values, rel=2e-5) for values in expected]
    assert [row["tokens"] for row in rows] == [ROWS * LENGTH * (step + 1) for step in range(8)]


def test_accumulation_changes_memory_and_not_the_losses(tmp_path: Path) -> None:
    class NoDropout(CountingTask):
        def loss(self, model, tensors):  # type: ignore[no-untyped-def]
            model.dropout.p = 0.0
            sizes.append(len(tensors["inputs"]))
            return super().loss(model, tensors)

    sizes: list[int] = []
    run_standin(tmp_path / "a", resume=False, steps=5, task=NoDropout())
    assert set(sizes) == {ROWS}
    sizes.clear()
    run_standin(tmp_path / "b", resume=False, steps=5, accumulate=4, task=NoDropout())
    assert set(sizes) == {2, 1, ROWS}  # pieces of 2, 2, 1, 1 windows; the evaluation takes all
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-5)


def test_a_batch_without_targets_changes_nothing(tmp_path: Path) -> None:
    result = run_standin(tmp_path / "a", resume=False, steps=3, save_every="1", task=CountingTask(empty_step=1))
    assert [loss is None for loss in losses(tmp_path / "a")] == [False, True, False]
    one, two = (tmp_path / "a" / "checkpoints" / f"step-0000000{n}" / "model.safetensors" for n in (1, 2))
    assert one.read_bytes() == two.read_bytes()
    assert math.isfinite(result.held_out["loss"])


@pytest.mark.parametrize("read_late", [False, True])
def test_a_loss_that_is_not_finite_stops_before_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_late: bool
) -> None:
    if read_late:  # as on a GPU, where losses are read some steps later
        monkeypatch.setattr(StepLog, "due", lambda self: len(self._pending) >= 7)
    with pytest.raises(DivergedError) as diverged:
        run_standin(tmp_path / "a", resume=False, steps=20, save_every="1000", task=CountingTask(poison=(9, 4)))
    message = str(diverged.value)
    assert diverged.value.exit_code == 7
    assert "at step 10:" in message
    assert "record9 at 401 (+)" in message
    assert message.count("record9") == 1
    checkpoint = newest_checkpoint(tmp_path / "a" / "checkpoints")
    assert checkpoint.position.step == 9
    assert checkpoint.position.tokens == 9 * ROWS * LENGTH
    run_standin(tmp_path / "b", resume=False, steps=20, save_every="9", keep=9, task=CountingTask())
    same = tmp_path / "b" / "checkpoints" / "step-00000009"
    for name in ("optimizer.safetensors", "model.safetensors"):
        assert (checkpoint.path / name).read_bytes() == (same / name).read_bytes()
    report = json.loads((tmp_path / "a" / "diverged.json").read_text())
    assert report["step"] == 10
    assert [window["finite"] for window in report["windows"]] == [True, True, True, True, False, True]
    assert len(losses(tmp_path / "a")) == 9


def test_broken_weights_are_told_from_broken_data_and_never_resumed_from(tmp_path: Path) -> None:
    class Breaking(CountingTask):
        def loss(self, model, tensors):  # type: ignore[no-untyped-def]
            calls.extend([1] if model.training else [])
            if len(calls) == 6:  # in the fifth step
                with torch.no_grad():
                    model.head.bias[0] = torch.nan
            return super().loss(model, tensors)

    calls: list[int] = []
    with pytest.raises(DivergedError, match="it is the weights, not the data"):
        run_standin(tmp_path / "a", resume=False, steps=20, save_every="2", task=Breaking())
    assert list_checkpoints(tmp_path / "a" / "checkpoints")[0][0] == 4
    assert (tmp_path / "a" / "checkpoints" / "diverged-00000004").is_dir()


def test_minutes_are_kept_and_the_schedule_follows_them(tmp_path: Path) -> None:
    result = run_standin(tmp_path / "a", resume=False, minutes=0.02)
    rows = [row for row in read_metrics(tmp_path / "a" / "metrics.jsonl") if "loss" in row]
    assert 1.1 < result.position.seconds < 2.5
    assert rows[0]["lr"] < 0.2 * 3e-3
    assert max(row["lr"] for row in rows) > 0.8 * 3e-3
    assert rows[-1]["lr"] < 0.1 * 3e-3
    for row in rows[1:]:  # a step's rate is that of the budget's share in its middle, so it lies between two ends
        assert row["lr"] <= 3e-3


def test_steps_are_made_exactly(tmp_path: Path) -> None:
    result = run_standin(tmp_path / "a", resume=False, steps=11)
    assert (result.position.step, result.position.tokens) == (11, 11 * ROWS * LENGTH)


def test_held_out_data_are_looked_at_ten_times_and_last(tmp_path: Path) -> None:
    run_standin(tmp_path / "a", resume=False, steps=100)
    seen = [row["step"] for row in read_metrics(tmp_path / "a" / "metrics.jsonl") if "valid_loss" in row]
    assert seen == [11, 21, 31, 41, 51, 61, 71, 81, 91, 100]


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    assert learning_rate(2.0, 0.1, 0.05) == pytest.approx(1.0)
    assert learning_rate(2.0, 0.1, 0.1) == pytest.approx(2.0)
    assert learning_rate(2.0, 0.1, 0.55) == pytest.approx(1.0)
    assert learning_rate(2.0, 0.1, 1.0) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(2.0, 0.0, 0.0) == pytest.approx(2.0)
    assert Budget(None, 2.0).progress(5, 60.0, 6.0) == pytest.approx(63 / 120)
    assert Budget(10, None).progress(10, 1.0) == 1.0


def test_evaluations_come_ten_times_and_take_no_more_than_a_tenth_of_a_run_in_minutes() -> None:
    plan = EvaluationPlan(Budget(None, 1.0), step=0, seconds=0.0)
    facts = {"tokens": 9000, "tokens_per_second": 1000.0}  # a guess of 3 s: not within the first 30 s
    assert not plan.due(0.2, 20, 12.0, **facts)
    assert plan.due(0.6, 60, 36.0, **facts)
    plan.made(0.6, 36.0, took=0.5)
    assert not plan.due(0.65, 65, 39.0, **facts)
    assert not plan.due(0.7, 66, 40.0, tokens=9000, tokens_per_second=1000.0)
    assert plan.due(0.75, 75, 45.0, **facts)
    in_steps = EvaluationPlan(Budget(20, None), step=0, seconds=0.0)
    assert not in_steps.due(0.09, 1, 1.0, **facts)
    assert in_steps.due(0.11, 2, 1.0, **facts)
    assert not in_steps.due(0.99, 20, 99.0, **facts)  # the last one is made anyway


def test_a_run_in_minutes_goes_on_where_its_clock_stood(tmp_path: Path) -> None:
    class Stopping(CountingTask):
        def loss(self, model, tensors):  # type: ignore[no-untyped-def]
            calls.extend([1] if model.training else [])
            if model.training and len(calls) == 30:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(model, tensors)

    calls: list[int] = []
    with pytest.raises(InterruptedRun):
        run_standin(tmp_path / "a", resume=False, minutes=0.05, save_every="10m", task=Stopping())
    time.sleep(1)
    result = run_standin(tmp_path / "a", resume=True, minutes=0.05, save_every="10m")
    assert 2.9 < result.position.seconds < 4
    rows = [row for row in read_metrics(tmp_path / "a" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, result.position.step + 1))
    gaps = [after["seconds"] - before["seconds"] for before, after in pairwise(rows)]
    assert max(gaps) < 0.9  # the second of the pause is not on the clock


def test_batches_come_in_order_and_an_error_of_the_thread_is_raised() -> None:
    def make(step: int):  # type: ignore[no-untyped-def]
        if step == 5:
            raise ValueError("no batch 5")
        return CountingTask().batch(step)

    batches = Prefetcher(make, first=3, pin=False)
    try:
        assert batches.peek().where == batches.next().where == CountingTask().batch(3).where
        assert batches.next().where == CountingTask().batch(4).where
        with pytest.raises(ValueError, match="no batch 5"):
            batches.next()
    finally:
        batches.close()


def test_a_device_that_is_not_there_is_a_usage_error() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--device cuda: torch sees no CUDA device"):
            choose_device("cuda")
    assert choose_device("cpu").type == "cpu"


def test_the_number_of_threads_is_kept(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", "from mambagen.training.loop import set_threads, torch\n"
         "set_threads(1); print(torch.get_num_threads())"], capture_output=True, text=True, check=True
    )  # fmt: skip
    assert process.stdout.strip() == "1"


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    run_standin(tmp_path / "a", resume=False, steps=4)
    files = list((tmp_path / "a" / "tensorboard").iterdir())
    assert len(files) == 1
    found = {}
    for event in loader.EventFileLoader(str(files[0])).Load():
        for value in event.summary.value:
            if value.tag == "loss":
                found[event.step] = value.tensor.float_val[0]
    assert list(found) == [1, 2, 3, 4]
    assert list(found.values()) == pytest.approx(losses(tmp_path / "a"), rel=1e-6)
