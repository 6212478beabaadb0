"""Encoders by name: every one maps (batch, length) ids to (batch, length, d_model) hidden vectors, either side seen.

    encoder = build_encoder("bimamba", {"d_model": 128, "n_layer": 6})
    hidden = encoder(tokens, mask)          # mask (batch, length) bool, true at real positions, or None: all are real

The contract: real positions stand in one run a row; what stands at padded ones changes nothing elsewhere, and their own
outputs are finite and mean nothing. `encoder.config` has d_model, n_layer, vocab_size and padded_vocab_size;
`encoder.embedding` is the nn.Embedding that a head may be tied to. No encoder has a longest length.

A further encoder is a line in `ENCODERS`.
"""

import importlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn


class EncoderConfig(Protocol):
    """What every encoder's config has."""

    @property
    def d_model(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def padded_vocab_size(self) -> int: ...
    def model_dump(self) -> dict[str, Any]: ...


class Encoder(Protocol):
    """What every encoder has beside being an nn.Module."""

    config: EncoderConfig
    embedding: nn.Embedding

    def __call__(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class _Entry:
    """Where an encoder lives, what its name says about its config, and how deep a model of some width is."""

    module: str
    config: str
    encoder: str
    width_by_layer: float  # d_model / n_layer at which sizes are chosen
    width_step: int = 16
    implied: Mapping[str, Any] = field(default_factory=dict)
    sees_both_sides: bool = True


ENCODERS: dict[str, _Entry] = {
    "bigs": _Entry("bigs", "BigsConfig", "BigsEncoder", 32, implied={"architecture": "gated"}),
    "bigs-stack": _Entry("bigs", "BigsConfig", "BigsEncoder", 32, implied={"architecture": "stack"}),
    "bimamba": _Entry("bimamba", "BimambaConfig", "BimambaEncoder", 16),
    "bert": _Entry("bert", "BertConfig", "BertEncoder", 32, width_step=8),
    "mamba": _Entry("mamba_encoder", "MambaConfig", "MambaEncoder", 16, sees_both_sides=False),
}


def encoder_config(name: str, shape: Mapping[str, Any]) -> EncoderConfig:
    """The config of the encoder `name` with these fields, the others at their defaults.

    Raises:
        ValueError: no such encoder (pydantic.ValidationError, which is one, for unknown or impossible fields).
    """
    if name not in ENCODERS:
        raise ValueError(f"no encoder {name!r}; there are {', '.join(ENCODERS)}")
    entry = ENCODERS[name]
    for key, value in entry.implied.items():
        if shape.get(key, value) != value:
            raise ValueError(f"{key} is {shape[key]!r}; the encoder {name} has {value!r}")
    config_class = getattr(importlib.import_module(f"mambagen.models.{entry.module}"), entry.config)
    return cast(EncoderConfig, config_class(**{**entry.implied, **shape}))


def build_encoder(name: str, shape: Mapping[str, Any]) -> Encoder:
    """A new encoder with weights drawn from torch's global generator; errors as `encoder_config`."""
    config = encoder_config(name, shape)
    entry = ENCODERS[name]
    module = importlib.import_module(f"mambagen.models.{entry.module}")
    return cast(Encoder, getattr(module, entry.encoder)(config))


def count_parameters(name: str, shape: Mapping[str, Any]) -> int:
    """Parameters of the encoder, its embedding included, without making it: layers are alike, so two tell the rest."""
    n_layer = encoder_config(name, shape).n_layer
    one, two = (_count(name, {**shape, "n_layer": layers}) for layers in (1, 2))
    return one + (n_layer - 1) * (two - one)


def match_parameters(
    name: str, parameters: int, tolerance: float = 0.03, fixed: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """d_model and n_layer of an encoder with about `parameters` parameters, for comparisons at one size.

    Of all shapes within the tolerance it takes the one whose width by depth is nearest to what that encoder is
    usually built with, half of the tolerance off counting as much as a factor of 1.2 in shape.

    Args:
        tolerance: the largest share by which the count may differ.
        fixed: further fields of the config, such as d_state.

    Raises:
        ValueError: no shape comes that near, or `fixed` does not fit the encoder.
    """
    entry = ENCODERS[name]
    given = dict(fixed or {})
    chosen: tuple[float, dict[str, Any]] | None = None
    for d_model, one, layer in _counts_by_width(name, given, parameters * (1 + tolerance)):
        n_layer = max(1, 1 + round((parameters - one) / layer))
        error = abs(one + (n_layer - 1) * layer - parameters) / parameters
        if error <= tolerance:
            unusual = abs(math.log(d_model / n_layer / entry.width_by_layer))
            score = unusual / math.log(1.2) + error / (tolerance / 2)
            if chosen is None or score < chosen[0]:
                chosen = score, {"d_model": d_model, "n_layer": n_layer}
    if chosen is None:
        raise ValueError(f"no {name} encoder has {parameters:,} parameters within {tolerance:.0%}")
    return chosen[1]


def _counts_by_width(name: str, given: dict[str, Any], limit: float) -> Iterator[tuple[int, int, int]]:
    """(d_model, parameters with one layer, parameters of a further layer) while one layer is within the limit.

    At multiples of an encoder's step of widths its counts are polynomials of second degree in the width: three small
    models tell them exactly.
    """
    step = ENCODERS[name].width_step
    at = [[_count(name, {**given, "d_model": k * step, "n_layer": n}) for n in (1, 2)] for k in (1, 2, 3)]
    one, layer = [a for a, _ in at], [b - a for a, b in at]

    def through(v: list[int], k: int) -> int:  # Newton's forward differences
        return v[0] + (k - 1) * (v[1] - v[0]) + (k - 1) * (k - 2) // 2 * (v[2] - 2 * v[1] + v[0])

    for k in itertools.count(1):
        if through(one, k) > limit:
            return
        yield k * step, through(one, k), through(layer, k)


def _count(name: str, shape: Mapping[str, Any]) -> int:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        encoder = build_encoder(name, shape)
    return sum(parameter.numel() for parameter in cast(nn.Module, encoder).parameters())
