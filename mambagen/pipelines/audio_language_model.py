"""Predicting the next sample of sound: the job as the training loop sees it."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mambagen.data.audio_shards import AudioShards
from mambagen.data.audio_windows import Augmentation, HeldOutWindows, TrainingWindows, classes_of
from mambagen.data.quantise import SILENCE, Quantiser
from mambagen.models.audio_unet import AudioUNet
from mambagen.models.files import Writer, write_folder_atomically
from mambagen.models.saving import CARD, model_writers
from mambagen.pipelines.dna_language_model import QUICK_SHARE
from mambagen.pipelines.model_cards import ModelCard
from mambagen.training.batches import Batch

IGNORED = -100
QUICK_SAMPLES = 1 << 19  # of held-out sound at most, for an evaluation in the course of training
BITS = 1 / math.log(2)


class AudioTask:
    """Batches of windows, cross entropy over the next sample, held-out loss; a `mambagen.training.batches.Task`.

    With several `lengths` the run goes through them in equal parts of its steps, at `rows` windows each.
    """

    def __init__(
        self,
        shards: AudioShards,
        quantiser: Quantiser,
        lengths: Sequence[int],
        rows: Sequence[int],
        seed: int,
        identity: Mapping[str, Any],
        card: ModelCard,
        steps: int | None = None,
        pad: str = "ignore",
        augmentation: Augmentation | None = None,
        unconditional: float = 0.0,
        class_contrast: float = 0.0,
        valid_samples: int = 1 << 22,
        rows_at_once: int | None = None,
        evaluated: Callable[[AudioUNet, bool], None] | None = None,
        best: Path | None = None,
        best_loss: float = math.inf,
    ) -> None:
        """`evaluated(model, quick)` is called after each evaluation, outside of autocast.

        `best` is the folder of the model that did best in the looks, the one at the end among them, written again when
        one is better than `best_loss`, that of the looks before. All looks are compared on the windows of the quick
        ones, which are a part of the held-out windows.
        """
        self.quantiser, self.identity, self.card = quantiser, dict(identity), card
        train, valid = shards["train"], shards["valid"]
        classes: NDArray[np.int64] | None = None
        valid_classes: NDArray[np.int64] | None = None
        if quantiser.classes:
            classes = classes_of(train, shards.labels, quantiser.classes)
            valid_classes = classes_of(valid, shards.labels, quantiser.classes)
        self.windows = [
            TrainingWindows(train, length, count, seed + i, quantiser, pad, augmentation, classes, unconditional)
            for i, (length, count) in enumerate(zip(lengths, rows, strict=True))
        ]
        self._contrast = class_contrast if quantiser.classes else 0.0
        self._steps, self._seed = steps, seed
        self.tokens_per_step = round(sum(n * r for n, r in zip(lengths, rows, strict=True)) / len(lengths))
        longest, at_once = lengths[-1], rows_at_once or rows[-1]
        none = len(quantiser.classes)

        def held_out(at_most: int) -> HeldOutWindows:
            return HeldOutWindows(valid, longest, at_once, valid_classes, none, at_most)

        share = self.tokens_per_step * steps // QUICK_SHARE if steps else QUICK_SAMPLES
        self.held_out = held_out(valid_samples)
        self.held_out_quick = held_out(min(valid_samples, QUICK_SAMPLES, max(1, share)))
        self.quick_tokens = self.held_out_quick.targets
        self.last_evaluation: dict[str, float] = {}
        self.last_losses: NDArray[np.float64] = np.zeros(0)  # of each held-out window, of the last whole evaluation
        self._evaluated = evaluated
        self._best, self.best_loss = best, best_loss

    def batch(self, step: int) -> Batch:
        """The windows of a step, as bytes: the rest is made on the device."""
        windows = self.windows[self.stage(step)].batch(step)
        tensors = {"tokens": torch.from_numpy(windows.tokens), "counted": torch.from_numpy(windows.counted)}
        if self.quantiser.classes:
            tensors["classes"] = torch.from_numpy(windows.classes)
            if self._contrast:
                others = other_classes(self._seed, step, windows.classes, len(self.quantiser.classes))
                tensors["others"] = torch.from_numpy(others)
        return Batch(tensors, int(windows.counted.sum()), windows.where)

    def stage(self, step: int) -> int:
        """Which of the lengths a step has."""
        if self._steps is None or len(self.windows) == 1:
            return 0
        return min(step * len(self.windows) // self._steps, len(self.windows) - 1)

    def epochs(self, steps: int) -> float:
        """How many times so many steps go through the training clips."""
        stages = Counter(map(self.stage, range(steps))) if len(self.windows) > 1 else {0: steps}
        return sum(count * self.windows[i].rows / self.windows[i].units for i, count in stages.items())

    def loss(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        """Sum of the cross entropy in nats over the samples that count, and of `class_contrast`'s part."""
        tokens, counted, classes = tensors["tokens"], tensors["counted"], tensors.get("classes")
        if "others" not in tensors:
            return audio_loss(model, tokens, counted, classes)
        assert classes is not None
        return contrasted_loss(model, tokens, counted, classes, tensors["others"], self._contrast)

    def evaluate(self, model: nn.Module, quick: bool) -> dict[str, float]:
        """Mean loss in nats a sample and bits per byte over the held-out windows (a part of them if `quick`).

        If not quick, also `look_loss` and `look_targets`: the same on the windows of the quick ones.
        """
        windows = self.held_out_quick if quick else self.held_out
        figures = {}
        if windows.targets:
            each = self.window_losses(model, windows)
            loss = look = float(each.sum()) / windows.targets
            figures = {"loss": loss, "bits_per_byte": loss * BITS, "targets": windows.targets}
            if not quick:
                self.last_losses = each
                part = self.held_out_quick
                if part.targets != windows.targets:
                    look = float(self.window_losses(model, part).sum()) / part.targets
                figures |= {"look_loss": look, "look_targets": part.targets}
            self.last_evaluation = figures
            if self._best and look < self.best_loss:
                self.best_loss = look
                write_folder_atomically(self._best, self.model_files(model), unlisted=[CARD], replace=True)
        if self._evaluated:
            assert isinstance(model, AudioUNet)
            with torch.autocast(next(model.parameters()).device.type, enabled=False):
                self._evaluated(model, quick)
        return figures

    def window_losses(self, model: nn.Module, windows: HeldOutWindows) -> NDArray[np.float64]:
        """(windows,) cross entropy of each window in nats, summed over its samples."""
        device = next(model.parameters()).device
        found = []
        for batch in windows:
            classes = torch.from_numpy(batch.classes).to(device) if self.quantiser.classes else None
            tokens, counted = torch.from_numpy(batch.tokens).to(device), torch.from_numpy(batch.counted).to(device)
            found.append(losses(model, tokens, counted, classes, "none").sum(1, dtype=torch.float64))
        return torch.cat(found).cpu().numpy() if found else np.zeros(0)

    def model_files(self, model: nn.Module) -> dict[str, Writer]:
        """The files of the model folder."""
        assert isinstance(model, AudioUNet)
        quality = "not measured yet"
        if self.last_evaluation:
            figures = self.last_evaluation
            quality = (
                f"Held-out sound: {figures['loss']:.4f} nats a sample ({figures['bits_per_byte']:.4f} bits a byte) "
                f"over {figures['targets']:,.0f} samples of clips that were not trained on."
            )
        return dict(model_writers(model, self.quantiser.model_dump(mode="json"), self.card.text(model, quality)))


def other_classes(seed: int, step: int, classes: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """For each row one of `count` classes that it does not have, any of them alike; -1 where it has none."""
    if count < 2:
        return np.full_like(classes, -1)
    random = np.random.Generator(np.random.Philox(key=[seed, (3 << 62) + step]))
    others = (classes + random.integers(1, count, len(classes))) % count
    return np.where(classes < count, others, -1)


def audio_loss(model: nn.Module, tokens: Tensor, counted: Tensor, classes: Tensor | None = None) -> Tensor:
    """Sum of the cross entropy in nats of tokens (batch, length), of which each row's first `counted` count.

    The model is fed the same one position later, with silence in front.
    """
    return losses(model, tokens, counted, classes, "sum")


def contrasted_loss(
    model: nn.Module, tokens: Tensor, counted: Tensor, classes: Tensor, others: Tensor, weight: float
) -> Tensor:
    """`audio_loss` and, weighted, what it takes to tell each row's class from another one, in nats.

    A class says at most log(classes) nats about a whole clip, so a likelihood alone hardly teaches a model to heed it.
    The second part is -log of the probability that the model gives a clip's own class against one other by Bayes'
    rule, both as likely before. It is taken of the first half of the rows, as each costs another pass.

    Args:
        others: (batch,) a class that the row does not have, -1 for rows that have none at all.
    """
    half = (len(tokens) + 1) // 2
    rows = losses(
        model,
        torch.cat([tokens, tokens[:half]]),
        torch.cat([counted, counted[:half]]),
        torch.cat([classes, others[:half].clamp(min=0)]),
        "none",
    ).sum(1)
    own, other = rows[: len(tokens)], rows[len(tokens) :]
    told = F.softplus(own[:half] - other) * (others[:half] >= 0)
    return own.sum() + weight * told.sum()


def losses(model: nn.Module, tokens: Tensor, counted: Tensor, classes: Tensor | None, reduction: str) -> Tensor:
    """Cross entropy in nats: a sum, or with "none" (batch, length)."""
    logits, _ = model(shifted(tokens), classes=classes)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    targets = tokens.long().masked_fill(places >= counted[:, None], IGNORED)
    found = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction=reduction)
    return found if reduction == "sum" else found.view(tokens.shape)


def shifted(tokens: Tensor) -> Tensor:
    """What a model is fed to predict tokens (batch, length): silence, then all but the last."""
    return F.pad(tokens[:, :-1], (1, 0), value=SILENCE)
