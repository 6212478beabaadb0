"""Sampling: against the model's own distribution, and what options are refused."""

import math

import pytest
import torch

from mambagen.errors import UsageError
from mambagen.models import MambaConfig, MambaLM, generate, generation
from mambagen.models.generation import draw
from tests.models.mixer_cases import randomise

BASES = (7, 8, 9, 10)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=16, n_layer=2), seed=0)
    randomise(model)
    return model


@pytest.fixture
def prompt():
    return torch.randint(7, 11, (3, 8), generator=torch.Generator().manual_seed(0))


def drawn(*arguments, **options):
    return torch.stack(list(generate(*arguments, **options)), 1)


def test_greedy_tokens_are_the_likeliest_of_the_whole_sequence_read_anew(model, prompt):
    tokens = drawn(model, prompt, 12, temperature=0)
    assert tokens.shape == (3, 12)
    with torch.no_grad():
        logits, _ = model(torch.cat([prompt, tokens], 1))
    assert torch.equal(logits[:, 7:-1, :12].argmax(-1), tokens)


def test_a_seed_repeats_and_another_differs(model, prompt):
    assert torch.equal(drawn(model, prompt, 20, seed=1), drawn(model, prompt, 20, seed=1))
    assert not torch.equal(drawn(model, prompt, 20, seed=1), drawn(model, prompt, 20, seed=2))


def test_a_row_is_read_whole_whatever_the_prompts_chunks(model, prompt, monkeypatch):
    whole = drawn(model, prompt, 6, temperature=0)
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 3)
    assert torch.equal(drawn(model, prompt, 6, temperature=0), whole)


def test_samples_follow_the_models_distribution(model):
    prompt = torch.full((4000, 1), 7)
    tokens = drawn(model, prompt, 1, temperature=0.5)[:, 0]
    with torch.no_grad():
        expected = (model(prompt[:1])[0][0, -1, :12] / 0.5).softmax(-1)
    share = torch.bincount(tokens, minlength=12) / 4000
    assert tokens.max() < 12
    assert (share - expected).abs().max() < 4 * 0.5 / math.sqrt(4000)


def test_only_allowed_tokens_are_drawn_and_never_the_padding(model, prompt):
    assert set(drawn(model, prompt, 50, temperature=50.0).unique().tolist()) == set(range(12))
    assert set(drawn(model, prompt, 50, temperature=50.0, allowed=BASES).unique().tolist()) == set(BASES)


def shares(logits, **options):
    options = {"temperature": 1.0, "top_k": None, "top_p": 1.0} | options
    tokens = draw(logits.expand(8_000, -1), **options, generator=torch.Generator().manual_seed(0))
    return torch.bincount(tokens, minlength=logits.shape[-1]) / 8_000


def test_top_k_and_top_p_cut_the_tail():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    near = {"rtol": 0, "atol": 0.03}
    torch.testing.assert_close(shares(logits), logits.exp(), **near)
    torch.testing.assert_close(shares(logits, top_k=2), torch.tensor([0, 4 / 7, 0, 3 / 7]), **near)
    torch.testing.assert_close(shares(logits, top_k=99), logits.exp(), **near)
    torch.testing.assert_close(shares(logits, top_p=0.65), torch.tensor([0, 4 / 7, 0, 3 / 7]), **near)
    torch.testing.assert_close(shares(logits, top_p=0.75), torch.tensor([0, 4 / 9, 2 / 9, 3 / 9]), **near)
    torch.testing.assert_close(shares(logits, top_p=1e-9), torch.tensor([0.0, 1, 0, 0]), **near)
    torch.testing.assert_close(shares(logits, top_k=2, top_p=0.5), torch.tensor([0.0, 1, 0, 0]), **near)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_tiny_temperature_takes_the_likeliest(temperature):
    logits = torch.tensor([1.0, 3.0, 2.9, -math.inf])
    assert shares(logits, temperature=temperature)[1] == 1


def test_top_k_keeps_exactly_k_of_equal_tokens():
    assert (shares(torch.zeros(8), top_k=3) > 0).sum() == 3


def test_one_prompt_may_come_without_a_batch_and_no_steps_give_nothing(model):
    assert drawn(model, torch.tensor([7, 8]), 3).shape == (1, 3)
    assert list(generate(model, torch.tensor([7, 8]), 0)) == []


def test_the_callers_grad_mode_is_left_alone(model, prompt):
    for _ in generate(model, prompt, 2):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"steps": -1}, "steps"),
        ({"allowed": [12]}, "allowed: 12 is outside"),
        ({"allowed": []}, "no token is left"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.long)}, "needs one token"),
        ({"prompt": torch.tensor([12])}, "outside the vocabulary of 12"),
        ({"prompt": torch.tensor([-1])}, "outside the vocabulary"),
    ],
)
def test_options_out_of_range_are_refused_at_the_call(model, prompt, options, message):
    with pytest.raises(UsageError, match=message):
        generate(model, **{"prompt": prompt, "steps": 1, **options})
