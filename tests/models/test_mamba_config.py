"""Sizes, parameter counts and names against the published ones."""

import pytest
import torch
from pydantic import ValidationError

from mambagen.models import MAMBA_SIZES, MambaConfig, MambaLM, MambaMixer, parameter_groups

# name, d_model, blocks as the paper names them (two layers each), parameters with the head tied
PUBLISHED = [
    ("250k", 64, 4, 262_720),
    ("700k", 96, 5, 684_192),
    ("1.4m", 128, 6, 1_401_472),
    ("3.5m", 192, 7, 3_527_232),
    ("7m", 256, 8, 7_012_608),
    ("19m", 384, 10, 19_291_008),
    ("41m", 512, 12, 40_694_272),
]


@pytest.mark.parametrize(("name", "d_model", "blocks", "parameters"), PUBLISHED)
def test_sizes_have_the_published_parameter_counts(name, d_model, blocks, parameters):
    config = MAMBA_SIZES[name]
    assert (config.d_model, config.n_layer) == (d_model, 2 * blocks)
    with torch.device("meta"):
        model = MambaLM(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_no_size_is_without_a_published_count():
    assert list(MAMBA_SIZES) == [name for name, *_ in PUBLISHED]


def test_parameters_have_the_published_names_and_shapes():
    model = MambaLM(MambaConfig(d_model=32, n_layer=2))
    layer = {
        "norm.weight": (32,),
        "mixer.A_log": (64, 16),
        "mixer.D": (64,),
        "mixer.in_proj.weight": (128, 32),
        "mixer.conv1d.weight": (64, 1, 4),
        "mixer.conv1d.bias": (64,),
        "mixer.x_proj.weight": (2 + 32, 64),
        "mixer.dt_proj.weight": (64, 2),
        "mixer.dt_proj.bias": (64,),
        "mixer.out_proj.weight": (32, 64),
    }
    expected = {"backbone.embedding.weight": (16, 32), "backbone.norm_f.weight": (32,), "lm_head.weight": (16, 32)}
    expected |= {f"backbone.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    assert {name: tuple(v.shape) for name, v in model.state_dict().items()} == expected


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"d_model": 0}, "d_model"),
        ({"n_layer": -1}, "n_layer"),
        ({"d_state": 257}, "d_state"),
        ({"d_conv": 9}, "d_conv"),
        ({"dt_rank": "all"}, "dt_rank"),
        ({"dt_min": 0.2}, "dt_min 0.2 is larger than dt_max 0.1"),
        ({"dt_max": float("inf")}, "dt_max"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_impossible_configs_are_refused_by_name(fields, named):
    with pytest.raises(ValidationError, match=named):
        MambaConfig(**{"d_model": 64, "n_layer": 2, **fields})


def test_derived_sizes():
    config = MambaConfig(d_model=40, n_layer=1, vocab_size=17, expand=3)
    assert (config.d_inner, config.rank, config.padded_vocab_size) == (120, 3, 24)
    assert MambaConfig(d_model=40, n_layer=1, dt_rank=7).rank == 7


def test_decay_spares_a_log_d_biases_and_norms_and_counts_a_tied_head_once():
    model = MambaLM(MambaConfig(d_model=32, n_layer=2))
    decayed, spared = sorted(model.parameter_groups(0.1), key=lambda group: -group["weight_decay"])
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    kinds = {".".join(name.split(".")[-2:]) for name in spared["names"]}
    assert kinds == {"norm.weight", "norm_f.weight", "mixer.A_log", "mixer.D", "conv1d.bias", "dt_proj.bias"}
    kinds = {".".join(name.split(".")[-2:]) for name in decayed["names"]}
    matrices = {f"{name}.weight" for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")}
    assert kinds == {"embedding.weight", *matrices}
    assert sum(p.numel() for group in (decayed, spared) for p in group["params"]) == sum(
        p.numel() for p in model.parameters()
    )


def test_marked_parameters_get_their_own_group():
    mixer = MambaMixer(MambaConfig(d_model=16, n_layer=1))
    mixer.dt_proj.weight._no_weight_decay = True
    mixer.dt_proj.weight._lr_scale = 0.1
    mixer.out_proj.weight.requires_grad_(False)
    groups = {(g["weight_decay"], g["lr_scale"]): g["names"] for g in parameter_groups(mixer, 0.1)}
    assert groups[0.0, 0.1] == ["dt_proj.weight"]
    assert not any("out_proj.weight" in names for names in groups.values())
