"""What to tell about a step whose loss or gradient was not finite: which windows of its batch, or the weights."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambagen.errors import DivergedError
from mambagen.training.batches import Batch
from mambagen.training.step_log import DivergedStep

EXAMINED = 256  # windows that are looked at one by one
NAMED = 3  # windows that the message names; the others are in diverged.json


def place(where: tuple[str, int, str]) -> str:
    """A window's place in words: the record, its first base counted from 1, the strand."""
    record, start, strand = where
    return f"{record} at {start + 1:,} ({strand})"


def weights_are_finite(model: nn.Module) -> bool:
    """Whether every parameter is."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def examine(model: nn.Module, loss_of: Callable[[dict[str, Tensor]], Tensor], batch: Batch) -> Iterator[dict[str, Any]]:
    """Each of the first windows by itself: its loss in nats, the norm of its gradient, and where it came from."""
    device = next(model.parameters()).device
    for row in range(min(batch.rows(), EXAMINED)):
        model.zero_grad(set_to_none=True)
        loss = loss_of({name: tensor[row : row + 1].to(device) for name, tensor in batch.tensors.items()})
        loss.backward()
        norms = [torch.linalg.vector_norm(p.grad.float()) for p in model.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(norms)).item() if norms else 0.0
        finite = math.isfinite(loss.item()) and math.isfinite(norm)
        record, start, strand = batch.where[row]
        yield {"record": record, "start": start, "strand": strand, "loss": loss.item(), "grad_norm": norm} | {
            "finite": finite
        }
    model.zero_grad(set_to_none=True)


def diverged_error(diverged: DivergedStep, windows: list[dict[str, Any]], saved: Path, report: Path) -> DivergedError:
    """Write `report` (diverged.json) and make the error that names the step and its offending windows."""
    step, batch = diverged.step, diverged.step.batch
    facts = {
        "step": step.position.step,
        "loss": diverged.loss,
        "grad_norm": diverged.grad_norm,
        "lr": step.lr,
        "checkpoint": str(saved),
        "windows": windows,
    }
    report.write_text(json.dumps(_strict(facts), indent=1) + "\n", "utf-8")
    bad = [(w["record"], w["start"], w["strand"]) for w in windows if not w["finite"]]
    if not bad:
        origin = "no window of the batch does it alone"
        advice = "lower --lr or raise --warmup"
    elif len(bad) == len(windows) and batch.rows() > 1:
        origin = f"all windows of the batch do it ({place(bad[0])} is the first), so it is the weights, not the data"
        advice = "lower --lr or raise --warmup"
    else:
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        origin = f"from {', '.join(place(where) for where in bad[:NAMED])}{more}"
        advice = "look at those records, or lower --lr"
    return DivergedError(
        f"training diverged at step {step.position.step}: loss {diverged.loss:g}, gradient norm "
        f"{diverged.grad_norm:g}; {origin}; the update was not made; the state before it is {saved}, "
        f"the details are in {report}; {advice}"
    )


def _strict(value: Any) -> Any:
    """NaN and infinities as text, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
