"""Guessing masked bases from both sides: the job as the training loop sees it, and the counts it is measured by."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambagen.data.dna_tokens import IGNORED, VOCABULARY, reverse_complement
from mambagen.data.flanks import fit_flanks
from mambagen.data.genome import Stretches
from mambagen.data.masking import MaskedWindows, mask_bases
from mambagen.data.windows import StagedSampler, WindowSampler, fixed_windows
from mambagen.models.files import Writer
from mambagen.models.heads import MaskedLM
from mambagen.models.saving import model_writers
from mambagen.pipelines.dna_language_model import QUICK_SHARE, QUICK_TOKENS, UNGRADED_TOKENS
from mambagen.pipelines.model_cards import ModelCard
from mambagen.training.batches import Batch

FLANKS = (0, 2, 4)  # bases on either side that the counts to beat look at

# The complement of each token id, as the models take it.
DNA_COMPLEMENT: tuple[int, ...] = tuple(
    reverse_complement(torch.arange(len(VOCABULARY) - 1, -1, -1, dtype=torch.uint8).numpy()).tolist()
)


class MaskedDnaTask:
    """Batches of corrupted windows, cross entropy at the chosen bases; a `mambagen.training.batches.Task`.

    Windows come from the sampler that autoregressive training has, and their corruption from (seed, step, row). The
    held-out masks are fixed, so that figures of one run, and of several models, are of the same bases.
    """

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
        """`rows` windows a step, of which `rows_at_once` fit through the model; `valid_tokens` at most are read.

        `sampler` draws training windows in another way; its steps have as many tokens.
        """
        self.sampler = sampler or WindowSampler(train, context, rows, seed, reverse_complement)
        self.seed = seed
        self.tokens_per_step = rows * context
        self.tokenizer = train.tokenizer
        self.identity = {**identity, "objective": "mlm"}
        self.card = card
        at_once = max(rows_at_once or rows, UNGRADED_TOKENS // context)

        def held_out(tokens: int) -> MaskedWindows:
            return MaskedWindows(fixed_windows(valid, context, at_once, bases=tokens), seed=0)

        quick = min(valid_tokens, QUICK_TOKENS, self.tokens_per_step * steps // QUICK_SHARE if steps else QUICK_TOKENS)
        self.held_out, self.held_out_quick = held_out(valid_tokens), held_out(quick)
        self.quick_tokens = len(self.held_out_quick.windows) * context
        self.last_evaluation: dict[str, float] = {}

    def batch(self, step: int) -> Batch:
        """The windows of a step, corrupted."""
        windows = self.sampler.batch(step)
        inputs, targets = mask_bases(windows.inputs, self.seed, step)
        tensors = {"inputs": torch.from_numpy(inputs), "targets": torch.from_numpy(targets)}
        return Batch(tensors, int((targets != IGNORED).sum()), windows.where)

    def stage(self, step: int) -> int:
        """Batches of one stage have one length."""
        return self.sampler.stage(step)

    def loss(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        """Sum of the cross entropy in nats over the chosen bases."""
        return masked_loss(model(tensors["inputs"], tensors.get("real")), tensors["targets"])

    def evaluate(self, model: nn.Module, quick: bool) -> dict[str, float]:
        """Mean loss in nats a masked base, perplexity and accuracy on the held-out windows (a part of them if `quick`).

        Accuracy is the share of masked bases whose likeliest guess is right. If not quick, also `look_loss` and
        `look_targets`: the loss on the windows of the quick ones.
        """
        windows = self.held_out_quick if quick else self.held_out
        if not windows.targets:
            return {}
        loss, accuracy = self._measure(model, windows)
        figures = {"loss": loss, "perplexity": math.exp(loss), "accuracy": accuracy, "targets": windows.targets}
        self.last_evaluation = figures
        if quick:
            return figures
        part = self.held_out_quick
        look = loss if part.targets == windows.targets else self._measure(model, part)[0]
        return figures | {"look_loss": look, "look_targets": part.targets}

    def _measure(self, model: nn.Module, windows: MaskedWindows) -> tuple[float, float]:
        """Mean loss and accuracy."""
        device = next(model.parameters()).device
        total = torch.zeros((), dtype=torch.float64, device=device)
        right = torch.zeros((), dtype=torch.int64, device=device)
        for inputs, targets, real in windows:
            wanted = torch.from_numpy(targets).to(device)
            mask = None if real is None else torch.from_numpy(real).to(device)
            logits = model(torch.from_numpy(inputs).to(device), mask)
            total += masked_loss(logits, wanted).double()
            right += (logits.argmax(-1) == wanted).sum()
        return total.item() / windows.targets, right.item() / windows.targets

    def model_files(self, model: nn.Module) -> dict[str, Writer]:
        """The files of the model folder."""
        assert isinstance(model, MaskedLM)
        quality = "not measured yet"
        if self.last_evaluation:
            figures = self.last_evaluation
            quality = (
                f"Held-out masked bases: accuracy {figures['accuracy']:.4f}, perplexity {figures['perplexity']:.4f} "
                f"({figures['loss']:.4f} nats a base) over {figures['targets']:,.0f} masked bases of stretches that "
                f"were not trained on."
            )
        return dict(model_writers(model, self.tokenizer.model_dump(mode="json"), self.card.text(model, quality)))


def masked_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross entropy of logits (batch, length, ids) at the targets that are not ignored."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def fit_masked_baselines(train: Stretches, held_out: MaskedWindows, both_strands: bool = False) -> dict[int, float]:
    """k -> mean held-out loss in nats of guessing from k bases on either side, on the very targets of the model."""
    return fit_flanks(train, held_out, FLANKS, both_strands) if held_out.targets else {}
