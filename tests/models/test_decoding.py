"""The decoder of a language model: against the model itself, step by step and as a whole."""

import math

import pytest
import torch

from mambagen.errors import UsageError
from mambagen.models import MambaConfig, MambaLM, generate
from mambagen.models.decoding import Decoder
from tests.models.mixer_cases import randomise

BACKENDS = ["cpu", "reference"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=32, n_layer=3), seed=0)
    randomise(model)
    return model


@pytest.fixture
def prompt():
    return torch.randint(7, 11, (3, 40), generator=torch.Generator().manual_seed(0))


def begun(model, prompt, backend="cpu"):
    decoder = Decoder(model, len(prompt), backend)
    decoder.prefill(prompt)
    return decoder


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_steps_are_those_of_the_model(model, prompt, backend, batch):
    decoder, state = Decoder(model, batch, backend), model.allocate_state(batch)
    for token in prompt[:batch].unbind(1):
        with torch.no_grad():
            expected, state = model.step(token, state)
        torch.testing.assert_close(decoder.step(token), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    for ours, theirs in zip(decoder.state, state, strict=True):
        torch.testing.assert_close(ours.ssm, theirs.ssm, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.conv, theirs.conv, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [5, 40])
def test_a_prompt_is_read_as_the_model_reads_it(model, prompt, length):
    with torch.no_grad():
        expected, _ = model(prompt)
    decoder = Decoder(model, 3, "cpu")
    decoder.prefill(prompt[:, :length])
    if length < 40:
        torch.testing.assert_close(decoder.logits, expected[:, length - 1], rtol=1e-4, atol=1e-5)
        decoder.prefill(prompt[:, length:])
    assert decoder.position == 40
    torch.testing.assert_close(decoder.logits, expected[:, -1], rtol=1e-4, atol=1e-5)
    again = Decoder(model, 3, "cpu")
    torch.testing.assert_close(again.read(prompt), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_tokens_are_those_of_plain_generation(model, prompt, backend):
    expected = torch.stack(list(generate(model, prompt, 30, temperature=0)), 1)
    assert torch.equal(begun(model, prompt, backend).generate(30, temperature=0), expected)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 3}, {"top_p": 0.5, "seed": 9}])
def test_tokens_do_not_depend_on_calls_or_on_the_batch(model, prompt, options):
    whole = begun(model, prompt).generate(24, **options)
    pieces = begun(model, prompt)
    assert torch.equal(torch.cat([pieces.generate(n, **options) for n in (1, 7, 16)], 1), whole)
    for row in range(3):
        alone = begun(model, prompt[row : row + 1])
        assert torch.equal(alone.generate(24, streams=[row], **options)[0], whole[row])
    assert not torch.equal(begun(model, prompt).generate(24, **{**options, "seed": 10}), whole)


def test_samples_follow_the_models_distribution(model):
    count = 4000
    decoder = Decoder(model, count, "cpu")
    logits = decoder.step(torch.full((count,), 7))[0]
    expected = (logits[:12] / 0.5).softmax(-1)
    share = torch.bincount(decoder.generate(1, temperature=0.5)[:, 0], minlength=12) / count
    assert len(share) == 12
    assert (share - expected).abs().max() < 4 * 0.5 / math.sqrt(count)


def test_only_allowed_tokens_are_drawn_and_never_the_padding(model, prompt):
    decoder = begun(model, prompt)
    assert set(decoder.generate(100, temperature=50.0).unique().tolist()) == set(range(12))
    assert set(decoder.generate(100, temperature=50.0, allowed=(7, 8, 9, 10)).unique().tolist()) == {7, 8, 9, 10}


def test_a_state_goes_to_the_model_and_back(model, prompt):
    decoder = begun(model, prompt)
    expected = decoder.generate(10, temperature=0)
    with torch.no_grad():
        logits, state = model(prompt, model.allocate_state(3))
    other = Decoder(model, 3, "cpu")
    other.load_state(state, logits[:, -1], position=40)
    assert torch.equal(other.generate(10, temperature=0), expected)
    other.reset()
    assert other.position == 0
    torch.testing.assert_close(other.prefill(prompt), logits[:, -1], rtol=1e-4, atol=1e-5)


def test_training_afterwards_is_not_seen(model, prompt):
    copy = MambaLM(model.config, seed=1)
    decoder = Decoder(copy, 3, "cpu")
    before = decoder.read(prompt[:, :4])
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(1)
    decoder.reset()
    assert torch.equal(decoder.read(prompt[:, :4]), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.generate(1), "read a token first"),
        (lambda d: d.step(torch.tensor([1, 2])), "batch of 3"),
        (lambda d: d.prefill(torch.zeros(3, 0, dtype=torch.long)), r"needs \(batch, length\)"),
        (lambda d: d.step(torch.tensor([1, 2, 16])), "outside the vocabulary of 16"),
        (lambda d: d.step(torch.tensor([1, 2, -1])), "outside the vocabulary"),
    ],
)
def test_what_a_decoder_cannot_read_is_refused(model, call, message):
    with pytest.raises(UsageError, match=message):
        call(Decoder(model, 3, "cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"steps": 0}, "steps"),
        ({"allowed": [12]}, "allowed: 12 is outside"),
        ({"allowed": []}, "no token is left"),
        ({"streams": [1]}, "needs 3 numbers"),
        ({"streams": [1, 2, 1 << 32]}, "needs 3 numbers"),
    ],
)
def test_options_out_of_range_are_refused(model, prompt, options, message):
    with pytest.raises(UsageError, match=message):
        begun(model, prompt).generate(**{"steps": 1, **options})


def test_a_backend_that_cannot_run_here_is_refused(model):
    with pytest.raises(UsageError, match="the weights are on cpu"):
        Decoder(model, 1, "cuda")
