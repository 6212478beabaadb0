"""Whether a model gives the other strand of DNA the other strand's answer, by trying it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mambagen.data.dna_tokens import PAD, A, N
from mambagen.errors import ModelError
from mambagen.models import load_model
from mambagen.models.heads import MaskedLM, SequenceClassifier
from mambagen.models.reverse_complement import permutation, rc_average, reverse_complement, turn
from mambagen.training.loop import choose_device

TOLERANCE = 1e-5
ROWS = 4
LENGTHS = (1, 2, 65, 512)


@dataclass(frozen=True)
class RcCheck:
    """One try: sequences of some length, and the largest deviation between the two strands' probabilities."""

    length: int
    padded: bool
    deviation: float
    largest_logit: float
    tolerance: float

    @property
    def result(self) -> str:
        """PASS or FAIL."""
        return "PASS" if self.deviation <= self.tolerance else "FAIL"


@torch.no_grad()
def check_rc(
    folder: Path | str,
    lengths: Sequence[int] = LENGTHS,
    device: str = "auto",
    average: bool = False,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> Iterator[RcCheck]:
    """Random sequences of each length, alone in their batch and padded to unequal ones, against their other strands.

    A masked model's probabilities at each position must be those of the complement at the mirrored position; a
    classifier's must be the same.

    Args:
        average: try the average over both strands (what `classify --average-strands` does) instead of the model alone.

    Raises:
        ModelError: the folder holds no masked model and no classifier, or one whose tokens have no complement.
    """
    model, _ = load_model(folder, choose_device(device), kinds=[MaskedLM.kind, SequenceClassifier.kind])
    if not model.config.complement:
        raise ModelError(f"{folder}: the model's tokens have no complement, so there is no other strand to try")
    per_position = isinstance(model, MaskedLM)

    def answer(tokens: Tensor, mask: Tensor | None) -> Tensor:
        if average:
            return rc_average(model, tokens, mask, model.complement, per_position)
        out: Tensor = model(tokens, mask)
        return out

    generator = np.random.default_rng(seed)
    where = next(model.parameters()).device
    for length in lengths:
        for padded in (False, True) if length > 1 else (False,):
            ids = generator.integers(A, N + 1, (ROWS, length)).astype(np.uint8)
            real = np.arange(length) < np.linspace(1, length, ROWS).round()[:, None]
            mask = torch.from_numpy(real).to(where) if padded else None
            tokens = torch.from_numpy(np.where(real, ids, PAD) if padded else ids).to(where)
            here = answer(tokens, mask)
            there = answer(reverse_complement(tokens, mask, model.complement), mask)
            if per_position:
                there = turn(there, mask)[..., permutation(model.complement, there.shape[-1], where)]
            difference = (here.double().softmax(-1) - there.double().softmax(-1)).abs()
            if per_position and mask is not None:
                difference = difference[mask]
            yield RcCheck(length, padded, difference.max().item(), here.abs().max().item(), tolerance)
