"""A small model and job that stand in for Mamba and DNA: the loop knows neither."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the optimiser would import it (in seconds): here it is there for all forks of a test
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mambagen.training.batches import Batch
from mambagen.training.checkpoint import newest_checkpoint
from mambagen.training.config import TrainConfig
from mambagen.training.loop import set_threads, train
from mambagen.training.run_folder import RunFolder

LETTERS, LENGTH, ROWS = 8, 12, 6


class SmallModel(nn.Module):
    """A recurrent next-letter model with dropout, so that the random generator's state matters too."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(LETTERS, 8)
        self.recurrent = nn.GRU(8, 16, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(16, LETTERS)

    def forward(self, letters: Tensor) -> Tensor:
        return self.head(self.dropout(self.recurrent(self.embedding(letters))[0]))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim == 1]
        return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


class CountingTask:
    """Sequences that count upwards modulo LETTERS with some noise; `poison` makes one window of one step infinite."""

    tokens_per_step = ROWS * LENGTH
    quick_tokens = ROWS * LENGTH

    def __init__(self, poison: tuple[int, int] | None = None, empty_step: int | None = None) -> None:
        self.identity = {"job": "counting"}
        self.poison, self.empty_step = poison, empty_step

    def batch(self, step: int) -> Batch:
        random = np.random.default_rng((7, step))
        starts = random.integers(LETTERS, size=ROWS)
        sequences = (starts[:, None] + np.arange(LENGTH + 1)) % LETTERS
        noise = random.random(sequences.shape) < 0.1
        sequences[noise] = random.integers(LETTERS, size=int(noise.sum()))
        letters = torch.from_numpy(sequences)
        scale = torch.ones(ROWS)
        targets = letters[:, 1:].clone()
        if self.poison and step == self.poison[0]:
            scale[self.poison[1]] = torch.inf
        if step == self.empty_step:
            targets[:] = -100
        tensors = {"inputs": letters[:, :-1], "targets": targets, "scale": scale}
        where = [(f"record{step}", 100 * row, "+") for row in range(ROWS)]
        return Batch(tensors, int((targets != -100).sum()), where)

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        logits = model(tensors["inputs"])
        each = nn.functional.cross_entropy(logits.transpose(1, 2), tensors["targets"], reduction="none")
        return (each.sum(1) * tensors["scale"]).sum()

    def evaluate(self, model: nn.Module, quick: bool) -> dict[str, float]:
        batch = self.batch(10**6)
        return {"loss": self.loss(model, batch.tensors).item() / batch.targets}

    def model_files(self, model: nn.Module) -> dict[str, Any]:
        return {"model.safetensors": lambda path: path.write_bytes(save(model.state_dict()))}


def run_standin(folder: Path, resume: bool, **settings: Any) -> Any:
    """Train in `folder`, or go on with what is there."""
    set_threads(1)
    model, checkpoint = SmallModel(), None
    run = RunFolder.open(folder) if resume else RunFolder.create(folder)
    run.config_file.touch()
    if resume:
        checkpoint = newest_checkpoint(run.checkpoints)
        model.load_state_dict(load_file(checkpoint.path / "model.safetensors"))
    task = settings.pop("task", None) or CountingTask()
    config = TrainConfig(**({"device": "cpu", "lr": 3e-3, "save_every": "3"} | settings))
    return train(model, task, config, run, checkpoint)
