"""The language model around its blocks: precisions, compilation, training."""

import pytest
import torch
import torch.nn.functional as F

from mambagen.models import MambaConfig, MambaLM, RMSNorm
from tests.models.mixer_cases import randomise

CONFIG = MambaConfig(d_model=32, n_layer=2)


@pytest.fixture
def tokens():
    return torch.randint(0, 12, (2, 33), generator=torch.Generator().manual_seed(0))


def loss_of(model, tokens):
    logits, _ = model(tokens)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def test_the_norm_is_its_formula_and_keeps_its_statistics_in_float32():
    x = torch.randn(3, 5, 64)
    norm = RMSNorm(64, 1e-3)
    torch.nn.init.normal_(norm.weight)
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), expected)
    small = torch.full((1, 64), 2.0**-14, dtype=torch.float16)  # its square is no float16
    torch.testing.assert_close(RMSNorm(64, 1e-12)(small), torch.ones(1, 64), rtol=1e-3, atol=0)


def test_logits_are_one_row_of_the_padded_vocabulary_a_token(tokens):
    model = MambaLM(CONFIG, seed=0)
    logits, state = model(tokens)
    assert (logits.shape, logits.dtype, state) == ((2, 33, 16), torch.float32, None)
    logits, state = model.step(tokens[:, 0], model.allocate_state(2))
    assert logits.shape == (2, 16)
    assert [(s.conv.shape, s.ssm.shape) for s in state] == [((2, 3, 64), (2, 64, 16))] * 2


def test_tokens_may_be_of_any_integer_type(tokens):
    model = MambaLM(CONFIG, seed=0)
    expected = model(tokens)[0]
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(model(tokens.to(dtype))[0], expected)


def test_the_first_loss_is_that_of_a_uniform_guess(tokens):
    assert loss_of(MambaLM(CONFIG, seed=0), tokens).item() == pytest.approx(torch.tensor(16.0).log().item(), abs=0.1)


@pytest.mark.parametrize("low", ["autocast", "cast"])
def test_the_residual_stream_is_float32_in_low_precision(tokens, low):
    model = MambaLM(CONFIG, seed=0)
    if low == "cast":
        model = model.bfloat16()
    seen = []
    for layer in model.backbone.layers:
        layer.register_forward_hook(lambda module, args, out: seen.extend([args[0].dtype, out[0].dtype]))
    with torch.autocast("cpu", torch.bfloat16, enabled=low == "autocast"):
        logits, _ = model(tokens)
    assert set(seen) == {torch.float32}
    assert logits.dtype == torch.float32


def test_autocast_gives_near_the_same_loss_and_gradients(tokens):
    model = MambaLM(CONFIG, seed=0)
    randomise(model)
    loss = loss_of(model, tokens)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        low = loss_of(model, tokens)
    assert low.item() == pytest.approx(loss.item(), abs=0.01)
    for (name, p), g, exact in zip(
        model.named_parameters(), torch.autograd.grad(low, list(model.parameters())), gradients, strict=True
    ):
        assert (g.dtype, p.dtype) == (torch.float32, torch.float32), name
        assert F.cosine_similarity(g.flatten(), exact.flatten(), dim=0) > 0.99, name


def test_a_model_in_bfloat16_runs_and_streams(tokens):
    model = MambaLM(CONFIG, seed=0)
    expected = model(tokens)[0]
    model = model.bfloat16()
    logits, state = model(tokens, model.allocate_state(2))
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    assert (state[0].conv.dtype, state[0].ssm.dtype) == (torch.bfloat16, torch.float32)
    assert model.step(tokens[:, 0], state)[0].dtype == torch.float32


def test_float64_is_kept_throughout(tokens):
    model = MambaLM(CONFIG, seed=0)
    low = model(tokens)[0]
    logits, state = model.double()(tokens, model.allocate_state(2))
    assert {logits.dtype, *(leaf.dtype for layer in state for leaf in layer)} == {torch.float64}
    torch.testing.assert_close(low.double(), logits, rtol=1e-4, atol=1e-6)


def test_some_steps_of_training_learn_a_repeating_sequence():
    model = MambaLM(CONFIG, seed=0)
    tokens = torch.tensor([7, 8, 9, 10, 7, 7, 10]).repeat(5)[None]
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3


def test_the_model_compiles_to_one_graph_with_the_same_numbers(tokens):
    torch.compiler.reset()
    model, tokens = MambaLM(CONFIG, seed=0), tokens[:, :7]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss_of(model, tokens), list(model.parameters()))
    got = torch.autograd.grad(loss_of(compiled, tokens), list(model.parameters()))
    torch.testing.assert_close(got, expected)
