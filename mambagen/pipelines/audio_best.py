"""The best model of an audio run beside its last one: a run that learnt its sound by heart has to say so."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mambagen.models import load_model
from mambagen.models.audio_unet import AudioUNet
from mambagen.pipelines.audio_language_model import AudioTask
from mambagen.training.config import TrainConfig
from mambagen.training.looks import MARGIN, best_look, look_loss, rose, training_loss_fell
from mambagen.training.loop import Autocast, TrainResult, choose_device
from mambagen.training.progress import Progress
from mambagen.training.run_folder import RunFolder, read_metrics

BEST = "best"  # the folder of a run that holds the model that did best in a look: small data are learnt by heart


@dataclass(frozen=True)
class BestModel:
    """The model of the look with the lowest loss. Looks are at a part of the held-out samples, the same part always."""

    path: Path
    step: int
    look_loss: float  # nats a sample on the looks' samples
    last_look_loss: float  # of the last weights, on the same samples
    look_targets: int
    loss: float | None  # on all held-out samples; None where the last weights are as good, and it was not measured


def best_row(best: BestModel | None, steps: int) -> dict[str, float]:
    """Name and loss on all held-out samples for tables, below the last weights' (those after so many steps)."""
    if best is None or best.loss is None or best.step == steps:
        return {}
    return {f"the same after step {best.step:,} (best)": best.loss}


def compare_best(
    config: TrainConfig,
    task: AudioTask,
    run: RunFolder,
    result: TrainResult,
    sound: str,
    epochs: float,
    progress: Progress,
) -> tuple[BestModel | None, str | None]:
    """The best model, and a warning where the last weights are worse than it by more than noise.

    Whether they may be is seen on the looks' samples. If so the best is measured on all held-out samples, window by
    window, which is what the warning is made of: the best look is the luckiest of ten, too.
    """
    rows, path = read_metrics(run.metrics_file), run.path / BEST
    look, at_end = best_look(rows), result.held_out
    if look is None or not at_end or not path.is_dir():
        return None, None
    step, last = look["step"], at_end["look_loss"]
    best = BestModel(path, step, look_loss(look), last, int(at_end["look_targets"]), None)
    if step == result.position.step:
        return replace(best, loss=at_end["loss"]), None
    if last - best.look_loss <= MARGIN:
        return best, None
    progress.state("measuring the best model on all held-out sound ...")
    each = _losses_of(path, config, task)
    best = replace(best, loss=float(each.sum()) / task.held_out.targets)
    if not rose(each, task.last_losses, task.held_out.sizes):
        return best, None
    fewer = "fewer --steps" if config.steps is not None else "fewer --minutes"
    why, advice = "and the training loss did not fall", "a lower --lr"
    if training_loss_fell(rows, step):
        why = f"while the training loss fell: {sound}, gone through {times(epochs)}, were learnt by heart"
        advice = f"{fewer}, a smaller --d-model or more sound"
    return best, (
        f"the held-out loss rose from {best.loss:.4f} nats a sample at step {step:,} to {at_end['loss']:.4f} at step "
        f"{result.position.step:,} {why}; use {path}, and next time {advice}"
    )


def _losses_of(path: Path, config: TrainConfig, task: AudioTask) -> NDArray[np.float64]:
    device = choose_device(config.device)
    model, _ = load_model(path, kinds=[AudioUNet.kind])
    model.to(device).eval()
    with torch.no_grad(), Autocast(device, config.precision).context():
        return task.window_losses(model, task.held_out)


def times(epochs: float) -> str:
    """How often a run went through its clips, in words."""
    return f"{epochs:,.0f} times" if epochs >= 10 else f"{epochs:.2g} times"
