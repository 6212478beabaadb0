"""Models on disk: a folder of config.json, model.safetensors, README.md (the model card) and manifest.json.

config.json: {"format": 1, "kind": "mamba-lm", "model": {MambaConfig}, "tokenizer": {...}}; the kinds are in `KINDS`. An
audio model has a "quantiser" in place of the tokenizer. Nothing is ever unpickled.
"""

import errno
import json
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from torch import Tensor, nn

from mambagen import __version__
from mambagen.errors import ModelError
from mambagen.models.audio_unet import AudioUNet, AudioUNetConfig
from mambagen.models.builtin import find_model
from mambagen.models.config import MambaConfig
from mambagen.models.digit_classifier import DigitClassifier, DigitClassifierConfig
from mambagen.models.files import Writer, first_fault, read_json, verify_folder, write_folder_atomically
from mambagen.models.heads import ClassifierConfig, EncoderModelConfig, MaskedLM, SequenceClassifier
from mambagen.models.mamba_lm import MambaLM
from mambagen.models.species_classifier import SpeciesClassifier, SpeciesConfig

FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

# kind -> (config, model); a further head or backbone adds its line.
KINDS: dict[str, tuple[type[BaseModel], type[nn.Module]]] = {
    MambaLM.kind: (MambaConfig, MambaLM),
    MaskedLM.kind: (EncoderModelConfig, MaskedLM),
    SequenceClassifier.kind: (ClassifierConfig, SequenceClassifier),
    SpeciesClassifier.kind: (SpeciesConfig, SpeciesClassifier),
    AudioUNet.kind: (AudioUNetConfig, AudioUNet),
    DigitClassifier.kind: (DigitClassifierConfig, DigitClassifier),
}

# A model of one of the kinds: an nn.Module with `kind` and `config`.
Model = Any


class Generation(BaseModel):
    """What is best made with a model, where nobody asks for anything else."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    guidance: Annotated[float, Field(ge=0, le=100)] = 1.0  # of a conditional model of sound


class ModelFile(BaseModel):
    """What config.json holds; `model` is checked further by the kind's own config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    kind: Annotated[str, StringConstraints(min_length=1)]
    model: dict[str, Any]
    tokenizer: dict[str, Any] | None = None
    quantiser: dict[str, Any] | None = None  # in place of the tokenizer, for the kinds whose `input_policy` it is
    generation: Generation | None = None


def save_model(
    model: Model, folder: Path | str, tokenizer: Mapping[str, Any], card: str, replace: bool = False
) -> None:
    """Write a model folder; it appears whole under its name or not at all.

    Args:
        model: the model itself, not a wrapper of it (DDP, compiled); tensors on any device.
        folder: must not exist yet (with `replace` it may be an earlier model folder).
        tokenizer: what the input policy needs to be built again, as JSON values: a tokenizer, or the quantiser of an
            audio model.
        card: the text of README.md; see `model_card`.

    Raises:
        UsageError, ResourceError: see `write_folder_atomically`.
    """
    write_folder_atomically(folder, model_writers(model, tokenizer, card), unlisted=[CARD], replace=replace)


def model_writers(
    model: Model, tokenizer: Mapping[str, Any], card: str, generation: Generation | None = None
) -> dict[str, Writer]:
    """The files of a model folder as writers, for a folder that holds more than the model (a checkpoint)."""
    policy = _input_policy(type(model))
    fields = {"format": FORMAT, "kind": model.kind, "model": model.config.model_dump(), policy: dict(tokenizer)}
    if generation is not None:
        fields["generation"] = generation.model_dump()
    config = json.dumps(fields, indent=2, allow_nan=False) + "\n"
    return {
        CONFIG: lambda path: _write_text(path, config),
        WEIGHTS: lambda path: write_tensors(path, stored_tensors(model)),
        CARD: lambda path: _write_text(path, card.rstrip("\n") + "\n"),
    }


def load_model(
    folder: Path | str, device: torch.device | str = "cpu", kinds: Sequence[str] | None = None
) -> tuple[Model, dict[str, Any]]:
    """The model of a folder (or a built-in one by its name), in evaluation mode and float32 on `device`, and its
    config.json as a dictionary.

    The folder is verified against its manifest first, so a cut-off file or a flipped bit is found. Training
    checkpoints, which are model folders with more in them, load too. `kinds` are those that the caller can use.

    Raises:
        ModelError: names the file that is missing, damaged, or of a version or kind that this mambagen does not know.
    """
    folder = find_model(folder)
    verify_folder(folder, [CONFIG, WEIGHTS])
    fields = read_json(folder / CONFIG)
    kind, config = _checked_config(folder / CONFIG, fields)
    if kinds is not None and kind not in kinds:
        raise ModelError(f"{folder}: holds a model of kind {kind}; what is needed here is {' or '.join(kinds)}")
    tensors = read_tensors(folder / WEIGHTS)
    with torch.random.fork_rng(devices=[]):  # the first weights are drawn in vain; the caller's numbers stay
        model = KINDS[kind][1](config)
    assign_tensors(model, tensors, folder / WEIGHTS)
    return model.to(device).eval(), fields


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of tensors on any device; OSError where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(plain, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # it wraps the system's error in text
        raise OSError(errno.EIO, str(error)) from error
    path.chmod(mode)  # safetensors leaves a file that its owner alone may read, whatever the umask


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; ModelError where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; the folder is incomplete, take another copy") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged: {error}; take another copy") from error


def model_card(model: Model, title: str, data: str, licence: str, recipe: str, quality: str, extra: str = "") -> str:
    """The text of a model's README.md.

    Args:
        title: one line. data: what it was trained on and where that is from. licence: of the weights.
        recipe: the command or settings that trained it. quality: measured, with what it was measured on.
        extra: further Markdown for the end.
    """
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    if isinstance(config, MambaConfig):
        shape = f"{config.n_layer} layers, d_model {config.d_model}, d_state {config.d_state}"
        what = "Mamba model"
    else:
        shape, what = config.description, "model"
    return (
        f"""# {title}

A {what} ({model.kind}) with {parameters:,} parameters: {shape}; written by mambagen {__version__}.

```python
import mambagen

model, tokenizer = mambagen.load("path/to/this/folder")
```

## Data
{data}

## Licence
{licence}

## Recipe
{recipe}

## Quality
{quality}
{extra}""".rstrip()
        + "\n"
    )


def stored_tensors(model: Model) -> dict[str, Tensor]:
    """The tensors that a file holds: all but a tied head, which is the embedding and there once."""
    tied = getattr(model.config, "tie_embeddings", False)
    return {name: v for name, v in model.state_dict().items() if not (name == "lm_head.weight" and tied)}


def assign_tensors(model: Model, tensors: Mapping[str, Tensor], origin: object) -> None:
    """Copy tensors of any real dtype into a model; ModelError (naming `origin`) unless they are exactly its own."""
    expected = stored_tensors(model)
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    for names, what in ((missing, "is missing"), (unknown, "is none of the model's")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ModelError(f"{origin}: the tensor {names[0]}{more} {what}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not tensor.is_floating_point():
            raise ModelError(
                f"{origin}: the tensor {name} is {tensor.dtype} {tuple(tensor.shape)}; the model's is a real "
                f"{tuple(expected[name].shape)}"
            )
    model.load_state_dict(dict(tensors), strict=False)  # the names are checked above; a tied head is not among them


def _checked_config(path: Path, fields: dict[str, object]) -> tuple[str, BaseModel]:
    if fields.get("format") != FORMAT:
        found = fields.get("format")
        raise ModelError(f"{path}: format {found!r} is not known to this mambagen ({FORMAT}); upgrade mambagen")
    try:
        file = ModelFile.model_validate(fields)
        if file.kind not in KINDS:
            known = ", ".join(KINDS)
            raise ModelError(f"{path}: a model of kind {file.kind!r}; this mambagen knows {known}: upgrade mambagen")
        config_class, model_class = KINDS[file.kind]
        policy = _input_policy(model_class)
        if getattr(file, policy) is None:
            raise ModelError(f"{path}: {policy}: Field required; this is no config that this mambagen wrote")
        return file.kind, config_class.model_validate(file.model)
    except ValidationError as error:
        raise ModelError(f"{path}: {first_fault(error)}; this is no config that this mambagen wrote") from None


def _input_policy(model_class: type) -> str:
    """What config.json calls the way from data to the model's input."""
    return str(getattr(model_class, "input_policy", "tokenizer"))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
