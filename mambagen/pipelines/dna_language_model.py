"""Predicting the next base: the job as the training loop sees it, and the Markov chains that it is measured by."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambagen.data.dna_tokens import IGNORED
from mambagen.data.genome import Stretches
from mambagen.data.markov import MarkovModel
from mambagen.data.windows import FixedWindows, StagedSampler, WindowSampler, fixed_windows
from mambagen.models.files import Writer
from mambagen.models.mamba_lm import MambaLM
from mambagen.models.saving import model_writers
from mambagen.pipelines.model_cards import ModelCard
from mambagen.training.batches import Batch

QUICK_TOKENS = 1 << 16  # of held-out data at most, for an evaluation in the course of training
QUICK_SHARE = 30  # ... and at most a thirtieth of what a run in steps trains on, as ten of them are made
UNGRADED_TOKENS = 1 << 14  # go through the model at once in an evaluation, even where a step's piece is smaller
BASELINE_ORDERS = (0, 3, 8)


class DnaLanguageTask:
    """Batches of windows, cross entropy over the next base, held-out loss; a `mambagen.training.batches.Task`."""

    def __init__(
        self,
        train: Stretches,
        valid: Stretches,
        context: int,
        rows: int,
        seed: int,
        reverse_complement: bool,
        valid_tokens: int,
        identity: Mapping[str, Any],
        card: ModelCard,
        rows_at_once: int | None = None,
        steps: int | None = None,
        sampler: WindowSampler | StagedSampler | None = None,
    ) -> None:
        """`rows` windows a step, of which `rows_at_once` fit through the model; `valid_tokens` at most are measured.

        `sampler` draws training windows in another way; its steps have as many tokens. A run of few `steps` looks at
        few held-out bases on its way.
        """
        self.sampler = sampler or WindowSampler(train, context, rows, seed, reverse_complement)
        self.tokens_per_step = rows * context
        self.tokenizer = train.tokenizer
        self.identity = dict(identity)
        self.card = card
        at_once = max(rows_at_once or rows, UNGRADED_TOKENS // context)
        self.held_out = _windows(valid, context, at_once, valid_tokens)
        quick = min(valid_tokens, QUICK_TOKENS, self.tokens_per_step * steps // QUICK_SHARE if steps else QUICK_TOKENS)
        self.held_out_quick = _windows(valid, context, at_once, quick)
        self.quick_tokens = self.held_out_quick.targets
        self.last_evaluation: dict[str, float] = {}

    def batch(self, step: int) -> Batch:
        """The windows of a step."""
        windows = self.sampler.batch(step)
        tensors = {"inputs": torch.from_numpy(windows.inputs), "targets": torch.from_numpy(windows.targets)}
        return Batch(tensors, int((windows.targets != IGNORED).sum()), windows.where)

    def stage(self, step: int) -> int:
        """Batches of one stage have one length."""
        return self.sampler.stage(step)

    def loss(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        """Sum of the cross entropy in nats over the targets."""
        logits, _ = model(tensors["inputs"])
        return F.cross_entropy(
            logits.flatten(0, 1).float(), tensors["targets"].flatten().long(), ignore_index=IGNORED, reduction="sum"
        )

    def evaluate(self, model: nn.Module, quick: bool) -> dict[str, float]:
        """Mean loss in nats a base and perplexity over the held-out windows (a part of them if `quick`).

        If not quick, also `look_loss` and `look_targets`: the same on the windows of the quick ones.
        """
        windows = self.held_out_quick if quick else self.held_out
        if not windows.targets:
            return {}
        loss = self._mean_loss(model, windows)
        self.last_evaluation = {"loss": loss, "perplexity": math.exp(loss), "targets": windows.targets}
        if quick:
            return self.last_evaluation
        part = self.held_out_quick
        look = loss if part.targets == windows.targets else self._mean_loss(model, part)
        return self.last_evaluation | {"look_loss": look, "look_targets": part.targets}

    def _mean_loss(self, model: nn.Module, windows: FixedWindows) -> float:
        device = next(model.parameters()).device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for batch in windows:
            tensors = {"inputs": torch.from_numpy(batch.inputs), "targets": torch.from_numpy(batch.targets)}
            total += self.loss(model, {name: tensor.to(device) for name, tensor in tensors.items()}).double()
        return total.item() / windows.targets

    def model_files(self, model: nn.Module) -> dict[str, Writer]:
        """The files of the model folder."""
        assert isinstance(model, MambaLM)
        quality = "not measured yet"
        if self.last_evaluation:
            figures = self.last_evaluation
            quality = (
                f"Held-out perplexity {figures['perplexity']:.4f} ({figures['loss']:.4f} nats a base) over "
                f"{figures['targets']:,.0f} bases that were not trained on."
            )
        return dict(model_writers(model, self.tokenizer.model_dump(mode="json"), self.card.text(model, quality)))


def fit_baselines(
    train: Stretches, windows: FixedWindows, orders: Sequence[int] = BASELINE_ORDERS, both_strands: bool = False
) -> dict[int, float]:
    """Order -> mean held-out loss in nats of the Markov chain of that order, on the very targets of the model."""
    if not windows.targets:
        return {}
    chain = MarkovModel(max(orders), both_strands).fit(train)
    losses = {}
    for order in orders:
        total, count = chain.loss(_each(windows), order)
        losses[order] = total / count
    return losses


def _each(windows: FixedWindows) -> Iterable[Any]:
    return iter(windows)


def _windows(valid: Stretches, context: int, rows: int, tokens: int) -> FixedWindows:
    return fixed_windows(valid, context, rows, bases=tokens, trim=True)
