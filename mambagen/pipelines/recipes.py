"""Published settings of DNA pretraining by name: `mambagen pretrain-dna --recipe NAME`.

From Mamba (arXiv 2312.00752, section 4.3 and appendix E.3). A recipe is a set of defaults: a configuration file and
options win over it. What is not as published, for all of them: windows never touch the held-out intervals
(`--no-strict-split` gives the published windows), and a step's batch goes through one GPU in pieces.
"""

from typing import Any, NamedTuple

DOUBLING_FROM = 1024


class Recipe(NamedTuple):
    """A line about it, and its settings."""

    about: str
    settings: dict[str, Any]


def _length(exponent: int) -> Recipe:
    """Length scaling at a context of 2^exponent.

    The length doubles every two epochs. Up to 2^17, the length of the data set's rows, an epoch has the same number of
    tokens; where windows are longer than the rows, the lengths 2^18, 2^19 and 2^20 get 4, 8 and 16 times as many. These
    shares, 36 of 532 steps in all, are what makes the published 20,000 steps up to 2^20.
    """
    context = 1 << exponent
    shares = tuple(float({18: 4, 19: 8, 20: 16}.get(e, 1)) for e in range(10, exponent + 1))
    warmup = {"length_warmup": DOUBLING_FROM, "length_shares": shares} if exponent > 10 else {}
    return Recipe(
        f"Length scaling at {context:,} bases: 1.4M parameters, 2^24 tokens a step, 20,000 steps",
        {
            "data": ("hg38",),
            "windows": "intervals",
            "size": "1.4m",
            "context": context,
            "batch_tokens": 1 << 24,
            "accumulate": 16,
            "steps": 20_000,
            "lr": 8e-3,
            "warmup": 0.1,
            "weight_decay": 0.1,
            "valid_tokens": 1 << 23,
            **warmup,
        },
    )


RECIPES: dict[str, Recipe] = {
    "scaling": Recipe(
        "Size scaling at 1,024 bases: any --size, 2^20 tokens a step, 10,000 steps",
        {
            "data": ("hg38",),
            "windows": "intervals",
            "context": 1024,
            "batch_tokens": 1 << 20,
            "accumulate": 4,
            "steps": 10_000,
            "lr": 8e-3,
            "warmup": 0.1,
            "weight_decay": 0.1,
            "valid_tokens": 1 << 23,
        },
    ),
    "length-1k": _length(10),
    "length-4k": _length(12),
    "length-16k": _length(14),
    "length-64k": _length(16),
    "length-256k": _length(18),
    "length-1m": _length(20),
}
