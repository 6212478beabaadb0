"""The other strand: turning with padding, and exact equivariance of models of either kind."""

from typing import Any

import numpy as np
import pytest
import torch
from Bio.Seq import Seq

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.models.encoders import ENCODERS
from mambagen.models.heads import POOLINGS, ClassifierConfig, EncoderModelConfig, MaskedLM, SequenceClassifier
from mambagen.models.reverse_complement import permutation, rc_average, reverse_complement, turn
from tests.models.mixer_cases import randomise
from tests.models.test_encoders import COMPLEMENT, SMALL, bases

LENGTHS = (25, 9, 40, 1)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mask = torch.arange(40) < torch.tensor(LENGTHS)[:, None]
    return torch.where(mask, bases(4, 40), 4), mask


def test_the_other_strand_is_biopythons_and_padding_stays() -> None:
    tokens, mask = batch()
    tokenizer = DnaTokenizer()
    other = reverse_complement(tokens, mask, COMPLEMENT)
    for row, length in enumerate(LENGTHS):
        expected = str(Seq(tokenizer.decode(tokens[row, :length].tolist())).reverse_complement())
        assert tokenizer.decode(other[row, :length].tolist()) == expected
        assert (other[row, length:] == 4).all()
    assert torch.equal(reverse_complement(other, mask, COMPLEMENT), tokens)
    whole = bases(2, 30).to(torch.uint8)
    assert np.array_equal(
        reverse_complement(whole, None, COMPLEMENT).numpy(), tokenizer.reverse_complement(whole.numpy())
    )


def test_turning_leaves_padding_on_either_side() -> None:
    x = torch.tensor([[0, 1, 2, 3, 4, 5]])
    mask = torch.tensor([[False, True, True, True, False, False]])
    assert turn(x, mask).tolist() == [[0, 3, 2, 1, 4, 5]]
    assert turn(x[..., None].expand(1, 6, 2), mask)[0, :, 1].tolist() == [0, 3, 2, 1, 4, 5]


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("padded", [False, True])
def test_an_equivariant_language_model_answers_the_other_strand_with_the_other_strand(name: str, padded: bool) -> None:
    tokens, mask = batch()
    if not padded:
        tokens, mask = bases(3, 31), None  # type: ignore[assignment]
    settings: dict[str, Any] = {"encoder": name, "encoder_config": SMALL, "complement": COMPLEMENT}
    deviations = []
    for equivariant in (True, False):
        model = MaskedLM(EncoderModelConfig(**settings, equivariant=equivariant), seed=0).eval()
        randomise(model)
        there = model(reverse_complement(tokens, mask, COMPLEMENT), mask)
        back = turn(there, mask)[..., permutation(COMPLEMENT, there.shape[-1], there.device)]
        difference = (back - model(tokens, mask)).abs()
        deviations.append((difference if mask is None else difference[mask]).max().item())
    assert deviations[0] < 1e-5 < 1e-2 < deviations[1]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", ENCODERS)
def test_an_equivariant_classifier_says_the_same_of_both_strands(name: str, pooling: str) -> None:
    tokens, mask = batch()
    deviations = []
    for equivariant in (True, False):
        config = ClassifierConfig(
            encoder=name, encoder_config=SMALL, complement=COMPLEMENT, equivariant=equivariant, classes=("a", "b"),
            pooling=pooling,  # type: ignore[arg-type]
        )  # fmt: skip
        model = SequenceClassifier(config, seed=0).eval()
        randomise(model)
        other = model(reverse_complement(tokens, mask, COMPLEMENT), mask)
        deviations.append((other - model(tokens, mask)).abs().max().item())
    assert deviations[0] < 1e-5 < 1e-3 < deviations[1]


def test_averaging_at_inference_makes_any_model_equivariant() -> None:
    tokens, mask = batch()
    config = EncoderModelConfig(encoder="bimamba", encoder_config=SMALL, complement=COMPLEMENT)
    model = MaskedLM(config, seed=0).eval()
    here = rc_average(model, tokens, mask, COMPLEMENT, per_position=True)
    there = rc_average(model, reverse_complement(tokens, mask, COMPLEMENT), mask, COMPLEMENT, per_position=True)
    back = turn(there, mask)[..., permutation(COMPLEMENT, 16, there.device)]
    assert (back - here)[mask].abs().max() < 1e-5
    one = (model(tokens, mask) + turn(model(reverse_complement(tokens, mask, COMPLEMENT), mask), mask)[
        ..., permutation(COMPLEMENT, 16, there.device)]) / 2  # fmt: skip
    torch.testing.assert_close(here[mask], one[mask], atol=1e-5, rtol=0)
