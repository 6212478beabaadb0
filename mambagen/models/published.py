"""Published Mamba weights in and out: state dicts of mamba_ssm and of transformers' MambaForCausalLM."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from mambagen.errors import ModelError
from mambagen.models.config import MambaConfig
from mambagen.models.files import first_fault
from mambagen.models.mamba_lm import MambaLM
from mambagen.models.saving import assign_tensors

OURS, TRANSFORMERS = "backbone.embedding.weight", "backbone.embeddings.weight"
HEAD = "lm_head.weight"
ORIGIN = "published weights"


def load_published(
    state_dict: Mapping[str, Tensor], vocab_size: int | None = None, norm_epsilon: float = 1e-5
) -> MambaLM:
    """A `MambaLM` from the tensors of a published Mamba language model; its shape is read off the tensors'.

    Args:
        state_dict: names as mamba_ssm's (`backbone.embedding.weight`, ...) or transformers'
            (`backbone.embeddings.weight`, ...). The head may be missing where it is tied. Any real dtype.
        vocab_size: tokens that exist, where the embedding was padded to more rows (default: all rows).
        norm_epsilon: of the norms; no tensor tells it (1e-5 in all published models).

    Raises:
        ModelError: a tensor is missing, unknown, or does not fit the others.
    """
    tensors = {name: tensor for name, tensor in state_dict.items() if name != TRANSFORMERS}
    if TRANSFORMERS in state_dict:
        tensors[OURS] = state_dict[TRANSFORMERS]
    config = published_config(tensors, vocab_size, norm_epsilon)
    if config.tie_embeddings:
        tensors.pop(HEAD, None)
    with torch.random.fork_rng(devices=[]):
        model = MambaLM(config)
    assign_tensors(model, tensors, ORIGIN)
    return model.eval()


def to_published(model: MambaLM, style: Literal["mamba_ssm", "transformers"] = "mamba_ssm") -> dict[str, Tensor]:
    """The tensors of a model under the published names, the head included also where it is tied."""
    tensors = dict(model.state_dict())
    if style == "transformers":
        return {TRANSFORMERS if name == OURS else name: tensor for name, tensor in tensors.items()}
    return tensors


def published_config(
    tensors: Mapping[str, Tensor], vocab_size: int | None = None, norm_epsilon: float = 1e-5
) -> MambaConfig:
    """The config that the shapes of published tensors (with our name for the embedding) imply."""

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in tensors:
            raise ModelError(f"{ORIGIN}: the tensor {name} is missing")
        if tensors[name].dim() != dimensions:
            raise ModelError(f"{ORIGIN}: the tensor {name} is {tuple(tensors[name].shape)}")
        return tensors[name].shape

    rows, d_model = shape(OURS, 2)
    mixer = "backbone.layers.0.mixer."
    d_inner, d_state = shape(mixer + "A_log", 2)
    if d_inner % d_model:
        raise ModelError(f"{ORIGIN}: {d_inner} inner channels are no multiple of d_model {d_model}")
    if vocab_size is not None and not 1 <= vocab_size <= rows:
        raise ModelError(f"{ORIGIN}: the embedding has {rows} rows, which do not fit {vocab_size} tokens")
    try:
        return MambaConfig(
            d_model=d_model,
            n_layer=len({name.split(".")[2] for name in tensors if name.startswith("backbone.layers.")}),
            vocab_size=vocab_size or rows,
            pad_vocab_size_multiple=rows if vocab_size else 1,
            tie_embeddings=HEAD not in tensors or torch.equal(tensors[HEAD], tensors[OURS]),
            d_state=d_state,
            d_conv=shape(mixer + "conv1d.weight", 3)[2],
            expand=d_inner // d_model,
            dt_rank=shape(mixer + "dt_proj.weight", 2)[1],
            norm_epsilon=norm_epsilon,
        )
    except ValidationError as error:
        raise ModelError(f"{ORIGIN}: {first_fault(error)}") from None
