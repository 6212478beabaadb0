"""The same weights in transformers' MambaForCausalLM and here: logits, gradients, cached generation."""

import pytest
import torch

from mambagen.errors import ModelError
from mambagen.models import MambaConfig, MambaLM, generate, load_published, to_published
from tests.models.mixer_cases import randomise

transformers = pytest.importorskip("transformers")

VOCAB, D_MODEL, LAYERS, D_STATE = 24, 40, 3, 12  # d_model is no multiple of 16, so dt_rank is rounded up


@pytest.fixture(scope="module", params=["tied", "untied"])
def theirs(request):
    config = transformers.MambaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        num_hidden_layers=LAYERS,
        state_size=D_STATE,
        tie_word_embeddings=request.param == "tied",
        use_mambapy=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config)
    randomise(model)
    return model.eval()


@pytest.fixture(scope="module")
def ours(theirs):
    return load_published(theirs.state_dict())


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, VOCAB, (2, 37), generator=torch.Generator().manual_seed(1))


def test_the_shape_is_read_off_the_tensors(theirs, ours):
    tied = theirs.config.tie_word_embeddings
    assert ours.config == MambaConfig(
        d_model=D_MODEL,
        n_layer=LAYERS,
        vocab_size=VOCAB,
        pad_vocab_size_multiple=1,
        tie_embeddings=tied,
        d_state=D_STATE,
        dt_rank=3,
    )
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_logits_agree(theirs, ours, tokens):
    with torch.no_grad():
        expected, got = theirs(tokens).logits, ours(tokens)[0]
    assert expected.abs().max() > 1  # random weights that say something
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_gradients_agree(theirs, ours, tokens):
    for model, logits in ((theirs, theirs(tokens).logits), (ours, ours(tokens)[0])):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = {name.replace("embeddings", "embedding"): p.grad for name, p in theirs.named_parameters()}
    got = {name: p.grad for name, p in ours.named_parameters()}
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_cached_generation_agrees(theirs, ours, tokens):
    expected = theirs.generate(tokens[:, :9], max_new_tokens=20, do_sample=False, use_cache=True)[:, 9:]
    got = torch.stack(list(generate(ours, tokens[:, :9], 20, temperature=0)), 1)
    assert torch.equal(got, expected)


def test_cached_steps_give_their_logits(theirs, ours, tokens):
    state = ours.allocate_state(2)
    with torch.no_grad():
        out = theirs(tokens[:, :9], use_cache=True)
        logits, state = ours(tokens[:, :9], state)
        torch.testing.assert_close(logits[:, -1], out.logits[:, -1], rtol=0, atol=1e-4)
        for t in range(9, 15):
            out = theirs(tokens[:, t : t + 1], cache_params=out.cache_params, use_cache=True)
            logits, state = ours.step(tokens[:, t], state)
            torch.testing.assert_close(logits, out.logits[:, 0], rtol=0, atol=1e-4)


def test_weights_survive_the_round_trip_into_transformers(theirs, ours, tokens):
    back = transformers.MambaForCausalLM(theirs.config)
    back.load_state_dict(to_published(ours, "transformers"), strict=True)
    with torch.no_grad():
        assert torch.equal(back.eval()(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_survive_the_round_trip_through_both_namings(tied):
    model = MambaLM(MambaConfig(d_model=16, n_layer=2, tie_embeddings=tied), seed=0)
    for style in ("mamba_ssm", "transformers"):
        again = load_published(to_published(model, style), vocab_size=12)
        assert again.config.tie_embeddings is tied
        assert (again.config.vocab_size, again.config.padded_vocab_size) == (12, 16)
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name


def test_low_precision_and_a_left_out_head_are_taken():
    model = MambaLM(MambaConfig(d_model=16, n_layer=1), seed=0)
    tensors = {name: v.bfloat16() for name, v in to_published(model).items() if name != "lm_head.weight"}
    again = load_published(tensors)
    assert again.config.tie_embeddings
    assert again.lm_head.weight is again.backbone.embedding.weight
    assert torch.equal(again.backbone.layers[0].mixer.A_log, model.backbone.layers[0].mixer.A_log.bfloat16().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("backbone.embedding.weight"), "backbone.embedding.weight is missing"),
        (lambda t: t.pop("backbone.layers.0.mixer.D"), r"backbone.layers.0.mixer.D is missing"),
        (lambda t: t.update({"backbone.layers.0.mixer.in_proj.bias": torch.zeros(64)}), "in_proj.bias is none of the"),
        (lambda t: t.update({"backbone.layers.0.mixer.D": torch.zeros(31)}), r"mixer.D is torch.float32 \(31,\)"),
        (lambda t: t.update({"backbone.layers.0.mixer.A_log": torch.zeros(31, 16)}), "31 inner channels"),
        (lambda t: t.update({"backbone.layers.0.mixer.A_log": torch.zeros(32, 999)}), "d_state"),
        (lambda t: t.update({"backbone.layers.0.mixer.A_log": torch.zeros(32)}), r"A_log is \(32,\)"),
    ],
)
def test_weights_of_something_else_are_refused_by_name(change, message):
    tensors = to_published(MambaLM(MambaConfig(d_model=16, n_layer=1), seed=0))
    change(tensors)
    with pytest.raises(ModelError, match=message):
        load_published(tensors)


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(ModelError, match="16 rows, which do not fit 17 tokens"):
        load_published(to_published(MambaLM(MambaConfig(d_model=16, n_layer=1), seed=0)), vocab_size=17)
