"""A model of sound as those who make sound with it need it: with its quantiser, and its guidance."""

from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError

from mambagen.data.quantise import Quantiser, load_quantiser
from mambagen.errors import ModelError
from mambagen.models.audio_unet import AudioUNet
from mambagen.models.builtin import find_model
from mambagen.models.files import first_fault
from mambagen.models.saving import CONFIG, Generation, load_model


class SoundModel(NamedTuple):
    """What a model folder holds."""

    model: AudioUNet
    quantiser: Quantiser
    guidance: float  # 1 where the folder names none, and for a model without classes


def open_sound_model(folder: Path | str, device: torch.device) -> SoundModel:
    """The audio model of a folder, or the built-in one of that name; ModelError where it is none."""
    model, fields = load_model(folder, device, kinds=[AudioUNet.kind])
    try:
        quantiser = load_quantiser(fields["quantiser"])
    except ValidationError as error:
        raise ModelError(f"{find_model(folder) / CONFIG}: quantiser: {first_fault(error)}") from None
    own = Generation(**(fields.get("generation") or {}))
    assert isinstance(model, AudioUNet)
    return SoundModel(model, quantiser, own.guidance if quantiser.classes else 1.0)
