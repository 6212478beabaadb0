"""The first weights against the published distributions."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from mambagen.models import MambaBlock, MambaConfig, MambaLM, MambaMixer, init_weights

CONFIG = MambaConfig(d_model=256, n_layer=4)


@pytest.fixture(scope="module")
def weights():
    return {name: p.detach() for name, p in MambaLM(CONFIG, seed=0).named_parameters()}


def mixer(weights, name):
    return torch.stack([weights[f"backbone.layers.{i}.mixer.{name}"] for i in range(CONFIG.n_layer)])


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("in_proj.weight", 256**-0.5),
        ("conv1d.weight", 4**-0.5),
        ("conv1d.bias", 4**-0.5),
        ("x_proj.weight", 512**-0.5),
        ("dt_proj.weight", 16**-0.5),
        ("out_proj.weight", 512**-0.5 / 4**0.5),
    ],
)
def test_projections_are_uniform(weights, name, bound):
    draws = mixer(weights, name).flatten().numpy()[:20_000]
    assert stats.kstest(draws, stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3
    assert abs(draws).max() <= bound


def test_step_sizes_are_log_uniform_through_the_softplus(weights):
    dt = np.logaddexp(0, mixer(weights, "dt_proj.bias").double().flatten().numpy())
    assert stats.kstest(dt, stats.loguniform(1e-3, 1e-1).cdf).pvalue > 1e-3


def test_constants_and_embedding(weights):
    assert torch.equal(mixer(weights, "D"), torch.ones(4, 512))
    logarithms = torch.tensor([math.log(n) for n in range(1, 17)]).expand(4, 512, 16)
    torch.testing.assert_close(mixer(weights, "A_log"), logarithms)
    assert torch.equal(weights["backbone.layers.3.norm.weight"], torch.ones(256))
    assert torch.equal(weights["backbone.norm_f.weight"], torch.ones(256))
    assert stats.kstest(weights["backbone.embedding.weight"].flatten().numpy(), stats.norm(0, 0.02).cdf).pvalue > 1e-3


def test_an_untied_head_has_weights_of_its_own():
    model = MambaLM(CONFIG.model_copy(update={"tie_embeddings": False}), seed=0)
    head = model.lm_head.weight.detach().flatten().numpy()
    assert stats.kstest(head, stats.uniform(-1 / 16, 1 / 8).cdf).pvalue > 1e-3


def test_a_seed_gives_the_same_weights_and_leaves_the_global_generator_out_of_it():
    small = MambaConfig(d_model=16, n_layer=2)
    torch.manual_seed(1)
    first = MambaLM(small, seed=7).state_dict()
    torch.manual_seed(2)
    again, other = MambaLM(small, seed=7).state_dict(), MambaLM(small, seed=8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    unseeded = []
    for _ in range(2):
        torch.manual_seed(3)
        unseeded.append(MambaLM(small).lm_head.weight)
    assert torch.equal(*unseeded)


def test_layers_differ_from_each_other(weights):
    first, second = (weights[f"backbone.layers.{i}.mixer.in_proj.weight"] for i in (0, 1))
    assert not torch.equal(first, second)


def test_parts_alone_are_initialised_too():
    for part in (MambaMixer(CONFIG), MambaBlock(CONFIG)):
        for name, parameter in part.named_parameters():
            assert 0 < parameter.abs().max() < 8, name


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"no rule for the parameter 'weight'"):
        init_weights(nn.Linear(2, 2), CONFIG)
