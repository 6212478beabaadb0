"""Layers, blocks, backbones and heads; configuration; weights in and out.

The names below are imported when they are first used, so that a command can read `MAMBA_SIZES` or verify a folder
without waiting for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambagen.models.audio_unet import AudioUNet, AudioUNetConfig
    from mambagen.models.config import MAMBA_SIZES, MambaConfig
    from mambagen.models.generation import generate
    from mambagen.models.initialisation import init_weights
    from mambagen.models.mamba_block import MambaBlock, RMSNorm
    from mambagen.models.mamba_lm import MambaLM, MambaStack
    from mambagen.models.mamba_mixer import MambaMixer, MambaState
    from mambagen.models.optimiser_groups import parameter_groups
    from mambagen.models.published import load_published, to_published
    from mambagen.models.saving import load_model, model_card, model_writers, save_model

_HOME = {
    "AudioUNet": "audio_unet",
    "AudioUNetConfig": "audio_unet",
    "MAMBA_SIZES": "config",
    "MambaConfig": "config",
    "generate": "generation",
    "init_weights": "initialisation",
    "MambaBlock": "mamba_block",
    "RMSNorm": "mamba_block",
    "MambaLM": "mamba_lm",
    "MambaStack": "mamba_lm",
    "MambaMixer": "mamba_mixer",
    "MambaState": "mamba_mixer",
    "parameter_groups": "optimiser_groups",
    "load_published": "published",
    "to_published": "published",
    "load_model": "saving",
    "model_card": "saving",
    "model_writers": "saving",
    "save_model": "saving",
}

__all__ = [
    "MAMBA_SIZES",
    "AudioUNet",
    "AudioUNetConfig",
    "MambaBlock",
    "MambaConfig",
    "MambaLM",
    "MambaMixer",
    "MambaStack",
    "MambaState",
    "RMSNorm",
    "generate",
    "init_weights",
    "load_model",
    "load_published",
    "model_card",
    "model_writers",
    "parameter_groups",
    "save_model",
    "to_published",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
