"""The judge's network: its published shape, what it gives, how it is kept."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from mambagen.models import load_model, save_model
from mambagen.models.digit_classifier import DigitClassifier, DigitClassifierConfig, digit_log_probabilities

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def pictures(count: int, frames: int = 32) -> torch.Tensor:
    return -80 * torch.rand(count, 32, frames, generator=torch.Generator().manual_seed(0))


def test_resnext29_has_the_published_shape() -> None:
    """ResNeXt-29 8x64d with one input channel and 10 classes: counted from the paper's table, norms included."""

    def conv_and_norm(inputs: int, outputs: int, size: int, groups: int = 1) -> int:
        return inputs // groups * outputs * size**2 + 2 * outputs

    expected, inputs = conv_and_norm(1, 64, 3), 64
    for outputs, width in ((256, 512), (512, 1024), (1024, 2048)):
        for block in range(3):
            expected += conv_and_norm(inputs, width, 1) + conv_and_norm(width, width, 3, 8)
            expected += conv_and_norm(width, outputs, 1) + (0 if block else conv_and_norm(inputs, outputs, 1))
            inputs = outputs
    expected += 1024 * 10 + 10
    with torch.device("meta"):
        model = DigitClassifier(DigitClassifierConfig(arch="resnext29", classes=DIGITS))
    assert sum(p.numel() for p in model.parameters()) == expected == 34_425_546
    assert model.config.feature_size == 1024
    assert model.head.in_features == 1024


def test_scores_and_features_do_not_depend_on_the_batch() -> None:
    model = DigitClassifier(DigitClassifierConfig(classes=(*DIGITS, "_silence_"), widths=(8, 16), blocks=1), seed=3)
    model.train()(pictures(16))  # the norms have seen something
    model.eval()
    many = pictures(5)
    with torch.no_grad():
        features, scores = model.features(many), model(many)
        assert features.shape == (5, 16)
        assert scores.shape == (5, 11)
        for row in range(5):
            torch.testing.assert_close(model.features(many[row : row + 1])[0], features[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.scores(features), scores)


def test_weights_are_a_function_of_the_seed() -> None:
    config = DigitClassifierConfig(classes=DIGITS, widths=(8,), blocks=1)
    before = torch.get_rng_state()
    one, same, other = (DigitClassifier(config, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_probabilities_are_of_digits_and_of_being_one() -> None:
    scores = torch.randn(4, 13, dtype=torch.float64)
    log_p, is_digit = digit_log_probabilities(scores, 10)
    p = scores.softmax(-1)
    torch.testing.assert_close(is_digit, p[:, :10].sum(-1))
    torch.testing.assert_close(log_p.exp(), p[:, :10] / p[:, :10].sum(-1, keepdim=True))
    torch.testing.assert_close(digit_log_probabilities(scores[:, :10], 10)[1], torch.ones(4, dtype=torch.float64))


def test_a_saved_judge_gives_the_same_scores(tmp_path: Path) -> None:
    model = DigitClassifier(DigitClassifierConfig(classes=DIGITS, widths=(8, 16), blocks=2), seed=0)
    model.train()(pictures(8))
    model.eval()
    save_model(model, tmp_path / "judge", {"kind": "log-mel"}, "a judge")
    again, fields = load_model(tmp_path / "judge", kinds=[DigitClassifier.kind])
    assert fields["tokenizer"] == {"kind": "log-mel"}
    with torch.no_grad():
        torch.testing.assert_close(again(pictures(3)), model(pictures(3)), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"classes": ("a", "a", *DIGITS)}, "two classes have the same name"),
        ({"classes": ("a", "b")}, "fewer than the 10"),
        ({"classes": DIGITS, "arch": "vgg"}, "'small' or 'resnext29'"),
        ({"classes": DIGITS, "width": 3}, "Extra inputs"),
    ],
    ids=["names", "few", "arch", "key"],
)
def test_impossible_shapes_are_refused(fields: dict, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        DigitClassifierConfig(**fields)
