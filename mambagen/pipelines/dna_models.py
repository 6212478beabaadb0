"""What jobs that ask a trained model of DNA have in common: the model, its tokenizer, device and precision."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.errors import ModelError, UsageError
from mambagen.models.files import first_fault
from mambagen.models.heads import EncoderModel
from mambagen.models.mamba_lm import MambaLM
from mambagen.models.saving import load_model

DEFAULT_MODEL = "dna"
BATCH_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 18}


def load_dna_model(model: Path | str, device: torch.device, kinds: Sequence[str]) -> tuple[Any, DnaTokenizer]:
    """A model of one of these kinds, from a folder or built in, in evaluation mode, and its tokenizer.

    Raises ModelError where there is no such model, or it is none of DNA.
    """
    loaded, fields = load_model(model, device, kinds)
    try:
        tokenizer = DnaTokenizer.model_validate(fields["tokenizer"])
    except ValidationError as error:
        raise ModelError(f"{model}: it is no model of DNA: tokenizer: {first_fault(error)}") from None
    assert isinstance(loaded, nn.Module)
    vocabulary = loaded.config.vocab_size if isinstance(loaded, MambaLM | EncoderModel) else tokenizer.vocab_size
    if vocabulary != tokenizer.vocab_size:
        raise ModelError(f"{model}: {tokenizer.vocab_size} tokens, but a model of {vocabulary}")
    return loaded, tokenizer


def choose_precision(precision: str, device: torch.device) -> str:
    """ "fp32" or "bf16", which is for a GPU; UsageError for anything else."""
    if precision not in ("fp32", "bf16"):
        raise UsageError(f"precision {precision!r}: it must be fp32 or bf16")
    if precision == "bf16" and device.type != "cuda":
        raise UsageError("precision bf16 is for a GPU; leave it out on a CPU")
    return precision


def mixed_precision(device: torch.device, precision: str) -> Any:
    """A context in which matrix products have this precision."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
