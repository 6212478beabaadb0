"""Small models of DNA with random weights that say something, as folders and in transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.models import MambaConfig, MambaLM, save_model, to_published

CONFIG = MambaConfig(d_model=24, n_layer=3, d_state=8)


def small_model(seed: int = 0, config: MambaConfig = CONFIG) -> MambaLM:
    """A model whose likelihoods differ from base to base and depend on bases far before."""
    model = MambaLM(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("in_proj.weight", "x_proj.weight", "out_proj.weight")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            if name.endswith("embedding.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.eval()


def small_folder(folder: Path, seed: int = 0, tokenizer: DnaTokenizer | None = None) -> Path:
    """The same on disk."""
    save_model(small_model(seed), folder, (tokenizer or DnaTokenizer()).model_dump(mode="json"), "# small\n")
    return folder


def in_transformers(model: MambaLM) -> Any:
    """The same weights in transformers' MambaForCausalLM."""
    import transformers

    config = model.config
    theirs = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layer,
            state_size=config.d_state,
            time_step_rank=config.rank,
            tie_word_embeddings=True,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    theirs.load_state_dict(to_published(model, "transformers"))
    return theirs.eval()


@torch.no_grad()
def likelihoods_by_transformers(theirs: Any, text: str) -> NDArray[np.float64]:
    """(length,) log-likelihoods of the bases of a text among A, C, G, T; NaN at the first one and where it is none."""
    ids = torch.tensor(["ACGTN".index(letter) + 7 for letter in text])[None]
    chances = theirs(ids).logits[0, :, 7:11].double().log_softmax(-1).numpy()
    out = np.full(len(text), np.nan)
    for at in range(1, len(text)):
        if text[at] != "N":
            out[at] = chances[at - 1, "ACGT".index(text[at])]
    return out


def other_strand(text: str) -> str:
    """By Biopython."""
    from Bio.Seq import Seq

    return str(Seq(text).reverse_complement())
