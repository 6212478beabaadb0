"""Checkpoints that are whole or not there: a folder a step, which is a model folder and the state of its training.

    checkpoints/step-00001200/
        config.json, model.safetensors, README.md   the model as `mambagen.load` reads it
        optimizer.safetensors                       AdamW's moments by parameter name
        rng.safetensors                             the state of torch's generators
        state.json                                  step, tokens, seconds, what a process must share to go on
        manifest.json                               size and sha256 of the other files

Written by the recipe of `mambagen.models.files`: a folder with a temporary name, every file flushed to the disk, the
rename last; older checkpoints go only after that. The reader checks every sha256. Nothing is pickled.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from mambagen.errors import ModelError
from mambagen.models.files import (
    Writer,
    list_checkpoints,
    remove_partial_folders,
    verify_folder,
    write_folder_atomically,
)
from mambagen.training.optimizer import optimizer_tensors, restore_optimizer

log = logging.getLogger("mambagen")

FORMAT = 1
OPTIMIZER, RNG, STATE = "optimizer.safetensors", "rng.safetensors", "state.json"


@dataclass(frozen=True)
class Position:
    """How far a run has come: updates made, tokens seen, seconds on its clock."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were all found to be what was written."""

    path: Path
    position: Position
    identity: dict[str, Any]


def save_checkpoint(
    folder: Path,
    position: Position,
    identity: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    model_files: Mapping[str, Writer],
    keep: int | None = None,
    name: str | None = None,
) -> Path:
    """Write `folder/step-XXXXXXXX` (or `folder/name`) and remove all but the newest `keep` checkpoints.

    Args:
        model_files: the writers of the model folder's files.

    Raises:
        ResourceError: the disk is full or refuses; nothing is left under the final name, earlier checkpoints stay.
    """
    final = folder / (name or f"step-{position.step:08d}")
    state = {"format": FORMAT, **asdict(position), "identity": dict(identity), "torch": str(torch.__version__)}
    files = {
        **model_files,
        OPTIMIZER: lambda path: _write_tensors(path, optimizer_tensors(model, optimizer)),
        RNG: lambda path: _write_tensors(path, _rng_state()),
        STATE: lambda path: _write_json(path, state),
    }
    write_folder_atomically(final, files, unlisted=["README.md"], replace=True)
    if keep is not None:
        for _, old in list_checkpoints(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def newest_checkpoint(folder: Path) -> Checkpoint:
    """The newest checkpoint that is whole; the log is warned of each newer one that is not.

    Raises:
        ModelError: there is none.
    """
    candidates = list_checkpoints(folder)
    for _, path in candidates:
        try:
            return verify_checkpoint(path)
        except ModelError as error:
            log.warning("%s -- trying the checkpoint before it", error)
    if candidates:
        raise ModelError(f"{folder}: none of the {len(candidates)} checkpoints is whole; begin a new run")
    raise ModelError(f"{folder}: holds no checkpoint to go on from; begin a new run")


def verify_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, all of its files compared with its manifest.

    Raises:
        ModelError: names the first file that is damaged or missing, or says that this is no checkpoint.
    """
    manifest = verify_folder(path)
    for name in (OPTIMIZER, RNG, STATE):
        if name not in manifest.files:
            raise ModelError(f"{path}: is no checkpoint of a training run: it has no {name}")
    state = json.loads((path / STATE).read_text("utf-8"))
    if state["format"] != FORMAT:
        raise ModelError(f"{path}: has format {state['format']}, this version of mambagen reads {FORMAT}")
    return Checkpoint(path, Position(state["step"], state["tokens"], state["seconds"]), state["identity"])


def restore_checkpoint(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put optimiser and random generators back; the model's weights are read by whoever builds the model."""
    restore_optimizer(model, optimizer, _read_tensors(checkpoint.path / OPTIMIZER))
    rng = _read_tensors(checkpoint.path / RNG)
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


def clear_the_way(folder: Path, step: int) -> None:
    """Before a run goes on from `step`: remove what killed writers left, rename later checkpoints (damaged ones,
    as the run goes on from the newest whole one) to damaged-step-..., so that nobody takes them for new.
    """
    remove_partial_folders(folder)
    for later, path in list_checkpoints(folder):
        if later > step:
            aside = folder / f"damaged-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)


def _rng_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.write_bytes(tensors_to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    return tensors_from_bytes(path.read_bytes())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
