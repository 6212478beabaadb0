"""Mamba sequence models for DNA and raw audio.

model, tokenizer = mambagen.load("runs/my-run")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__version__ = "0.1.0"


def load(folder: Path | str, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """The model of a folder, or a built-in one by its name, in evaluation mode on `device`, and its tokenizer (a
    `mambagen.data.dna_tokens.DnaTokenizer`; of a model of sound its `mambagen.data.quantise.Quantiser`).

    Raises:
        ModelError: the folder is missing, damaged, or of a kind or version that this mambagen does not know.
    """
    from pydantic import ValidationError

    from mambagen.data.dna_tokens import DnaTokenizer
    from mambagen.errors import ModelError
    from mambagen.models.builtin import find_model
    from mambagen.models.files import first_fault
    from mambagen.models.saving import CONFIG, load_model

    model, config = load_model(folder, device)
    where = find_model(folder) / CONFIG
    if "quantiser" in config:
        from mambagen.data.quantise import load_quantiser

        try:
            return model, load_quantiser(config["quantiser"])
        except ValidationError as error:
            raise ModelError(f"{where}: quantiser: {first_fault(error)}") from None
    if config["kind"] == "digit-classifier":
        raise ModelError(f"{where}: holds a judge of sounds; open it with mambagen.pipelines.sc09_judge.DigitJudge")
    try:
        tokenizer = DnaTokenizer.model_validate(config["tokenizer"])
    except ValidationError as error:
        raise ModelError(f"{where}: tokenizer: {first_fault(error)}") from None
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ModelError(f"{where}: {tokenizer.vocab_size} tokens, but a model of {model.config.vocab_size}")
    return model, tokenizer
