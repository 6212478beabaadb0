"""Every encoder behind the interface: what padding and the batch must not do, sizes, and saved models."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mambagen.errors import ModelError
from mambagen.models import load_model, save_model
from mambagen.models.bert import BertConfig, rotary, rotate
from mambagen.models.bimamba import BimambaConfig, BimambaMixer
from mambagen.models.encoders import ENCODERS, build_encoder, count_parameters, encoder_config, match_parameters
from mambagen.models.heads import (
    POOLINGS,
    ClassifierConfig,
    EncoderModelConfig,
    MaskedLM,
    SequenceClassifier,
    copy_encoder,
    pool,
)
from mambagen.models.mamba_lm import MambaLM
from tests.models.mixer_cases import randomise

SMALL = {"d_model": 16, "n_layer": 2}
SHAPES: list[tuple[str, dict[str, Any]]] = [(name, SMALL) for name in ENCODERS]
SHAPES += [("bimamba", {**SMALL, "tie_projections": False}), ("bert", {**SMALL, "n_head": 4})]
COMPLEMENT = (0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11)


def encoder(name: str, shape: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    module = cast(nn.Module, build_encoder(name, shape))
    randomise(module)
    return module.eval()


def bases(batch: int, length: int) -> Tensor:
    return torch.randint(7, 12, (batch, length))


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_a_sequence_alone_and_padded_in_a_batch_give_the_same(name: str, shape: dict[str, Any]) -> None:
    module = encoder(name, shape)
    sequence = bases(1, 37)
    alone = module(sequence)
    tokens, mask = bases(4, 70), torch.zeros(4, 70, dtype=torch.bool)  # padded positions hold bases: worse than PAD
    starts = (0, 11, 33, 0)  # padding on the right, on both sides, on the left, on the right
    for row, start in enumerate(starts):
        tokens[row, start : start + 37] = sequence
        mask[row, start : start + 37] = True
    padded = module(tokens, mask)
    assert padded.isfinite().all()
    for row, start in enumerate(starts):
        torch.testing.assert_close(padded[row, start : start + 37], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_without_a_mask_padding_would_leak(name: str, shape: dict[str, Any]) -> None:
    """The test above can fail: a reader of both sides sees what stands behind."""
    module = encoder(name, shape)
    tokens = bases(1, 60)
    changed = tokens.clone()
    changed[:, 40:] = bases(1, 20)
    difference = (module(tokens) - module(changed))[:, :40].abs().max()
    assert (difference > 1e-3) == ENCODERS[name].sees_both_sides


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_gradients_of_padded_positions_are_zero(name: str, shape: dict[str, Any]) -> None:
    module = encoder(name, shape)
    inputs: list[Tensor] = []
    embedding = cast(nn.Embedding, module.embedding)
    embedding.register_forward_hook(lambda _, __, out: inputs.append(out.retain_grad() or out))  # type: ignore[func-returns-value]
    mask = torch.arange(20)[None] < torch.tensor([[20], [13]])
    (module(bases(2, 20), mask) * mask[..., None]).square().sum().backward()
    assert inputs[0].grad is not None
    assert inputs[0].grad[1, 13:].abs().max() == 0
    assert inputs[0].grad[1, :13].abs().min() > 0


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("parameters", [262_720, 1_401_472, 7_012_608])
def test_shapes_of_a_wanted_size_have_it_within_three_percent(name: str, parameters: int) -> None:
    shape = match_parameters(name, parameters)
    assert abs(count_parameters(name, shape) / parameters - 1) <= 0.03


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_counts_are_those_of_the_model(name: str, shape: dict[str, Any]) -> None:
    shape = {**shape, "d_model": 48, "n_layer": 3}
    assert count_parameters(name, shape) == sum(p.numel() for p in encoder(name, shape).parameters())


def test_unknown_names_and_fields_are_named() -> None:
    with pytest.raises(ValueError, match="no encoder 'elmo'; there are"):
        encoder_config("elmo", SMALL)
    with pytest.raises(ValueError, match="d_modell"):
        encoder_config("bert", {**SMALL, "d_modell": 1})
    with pytest.raises(ValueError, match="no bert encoder has 10 parameters within 3%"):
        match_parameters("bert", 10)


def test_the_reverse_direction_is_the_forward_one_of_the_flipped_sequence() -> None:
    """Two directions with the same weights: flipping the input flips the output; and each direction is causal."""
    torch.manual_seed(0)
    for tied in (True, False):
        mixer = BimambaMixer(BimambaConfig(**SMALL, tie_projections=tied))
        randomise(mixer)
        mixer.backwards.load_state_dict(mixer.forwards.state_dict())
        if not tied:
            with torch.no_grad():
                mixer.in_proj.weight[64:] = mixer.in_proj.weight[:64]
                mixer.out_proj.weight[:, 32:] = mixer.out_proj.weight[:, :32]
        x = torch.randn(2, 33, 16)
        torch.testing.assert_close(mixer(x.flip(1)), mixer(x).flip(1), atol=1e-5, rtol=1e-5)


def test_rotary_positions_are_complex_turns_and_only_distance_counts() -> None:
    q, k = torch.randn(2, 1, 1, 6, 8, dtype=torch.float64)
    rotation = rotary(6, 8, 10_000.0, torch.device("cpu"))
    turned = rotate(q, rotation)
    for t in range(6):
        for i in range(4):
            z = complex(q[0, 0, t, i], q[0, 0, t, i + 4]) * torch.exp(torch.tensor(1j * t * 10_000.0 ** (-i / 4)))
            assert turned[0, 0, t, i].item() == pytest.approx(z.real.item(), abs=1e-6)
            assert turned[0, 0, t, i + 4].item() == pytest.approx(z.imag.item(), abs=1e-6)
    same = q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k)
    scores = rotate(same[0], rotation) @ rotate(same[1], rotation).transpose(-1, -2)
    assert scores[0, 0, 5, 3].item() == pytest.approx(scores[0, 0, 3, 1].item(), abs=1e-6)


def test_heads_of_attention_are_about_64_wide() -> None:
    assert [BertConfig(d_model=d, n_layer=1).heads for d in (16, 64, 128, 256, 1024)] == [1, 1, 2, 4, 16]
    with pytest.raises(ValueError, match="does not divide into 3 heads"):
        BertConfig(d_model=16, n_layer=1, n_head=3)


def test_pooling_counts_real_positions_only() -> None:
    hidden = torch.tensor([[[1.0], [4.0], [-2.0], [9.0]], [[-3.0], [-5.0], [7.0], [8.0]]])
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    expected = {"mean": [1.0, -4.0], "first": [1.0, -3.0], "last": [-2.0, -5.0], "max": [4.0, -3.0]}
    for how in POOLINGS:
        assert pool(hidden, mask, how)[:, 0].tolist() == expected[how]
        assert pool(hidden[:1, :3], None, how)[:, 0].tolist() == expected[how][:1]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_a_classification_does_not_depend_on_the_batch(name: str, shape: dict[str, Any], pooling: str) -> None:
    config = ClassifierConfig(encoder=name, encoder_config=shape, classes=("a", "b", "c"), pooling=pooling)  # type: ignore[arg-type]
    model = SequenceClassifier(config, seed=1).eval()
    randomise(model)
    sequences = [bases(1, length) for length in (3, 17, 40, 28)]
    mask = torch.zeros(4, 40, dtype=torch.bool)
    tokens = torch.full((4, 40), 4)
    for row, sequence in enumerate(sequences):
        tokens[row, : sequence.shape[1]] = sequence
        mask[row, : sequence.shape[1]] = True
    alone = torch.cat([model(sequence) for sequence in sequences]).softmax(-1)
    torch.testing.assert_close(model(tokens, mask).softmax(-1), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ENCODERS)
def test_models_on_an_encoder_come_back_from_disk_as_they_were(name: str, tmp_path: Path) -> None:
    tokens = bases(2, 20)
    masked = MaskedLM(EncoderModelConfig(encoder=name, encoder_config=SMALL, complement=COMPLEMENT), seed=3).eval()
    classifier = SequenceClassifier(
        ClassifierConfig(encoder=name, encoder_config=SMALL, classes=("x", "y"), pooling="last"), seed=4
    ).eval()
    for model, folder in ((masked, tmp_path / "m"), (classifier, tmp_path / "c")):
        save_model(model, folder, {"kind": "dna"}, "card")
        loaded, fields = load_model(folder)
        assert fields["kind"] == model.kind
        assert loaded.config == model.config
        assert torch.equal(loaded(tokens), model(tokens))
    with pytest.raises(ModelError, match="holds a model of kind masked-lm; what is needed here is sequence-classifier"):
        load_model(tmp_path / "m", kinds=["sequence-classifier"])
    copy_encoder(masked, classifier)
    assert torch.equal(classifier.encoder(tokens), masked.encoder(tokens))


def test_a_seed_gives_the_weights_and_leaves_torchs_generator_alone() -> None:
    config = EncoderModelConfig(encoder="bert", encoder_config=SMALL)
    before = torch.get_rng_state()
    one, two, other = (MaskedLM(config, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    tokens = bases(1, 9)
    assert torch.equal(one(tokens), two(tokens))
    assert not torch.allclose(one(tokens), other(tokens))


def test_a_classifier_begins_from_a_language_models_backbone_or_says_why_not() -> None:
    from mambagen.models import MambaConfig

    language = MambaLM(MambaConfig(**SMALL), seed=1)
    config = ClassifierConfig(encoder="mamba", encoder_config=SMALL, classes=("a", "b"))
    classifier = SequenceClassifier(config, seed=2)
    copy_encoder(language, classifier)
    tokens = bases(2, 15)
    assert torch.equal(classifier.encoder(tokens), language.backbone(tokens)[0])
    wider = MambaLM(MambaConfig(d_model=32, n_layer=2), seed=1)
    with pytest.raises(ModelError, match="d_model is 32 there, 16 here"):
        copy_encoder(wider, classifier)


def test_impossible_models_are_refused() -> None:
    with pytest.raises(ValueError, match="two classes have the same name"):
        ClassifierConfig(encoder="bert", encoder_config=SMALL, classes=("a", "a"))
    with pytest.raises(ValueError, match="needs the complement"):
        EncoderModelConfig(encoder="bert", encoder_config=SMALL, equivariant=True)
    with pytest.raises(ValueError, match="must pair the 12 token ids"):
        EncoderModelConfig(encoder="bert", encoder_config=SMALL, complement=tuple(range(1, 13)))
    with pytest.raises(ValueError, match=r"encoder_config\.n_layer"):
        EncoderModelConfig(encoder="bert", encoder_config={"d_model": 16, "n_layer": 0})
