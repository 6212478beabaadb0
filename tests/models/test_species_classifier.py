"""The species classifier: patches of k-mers, padding, calibration, and its folder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.models.saving import load_model, model_card, save_model
from mambagen.models.species_classifier import (
    Calibration,
    PatchStem,
    SpeciesClassifier,
    SpeciesConfig,
    canonical_kmers,
)
from mambagen.pipelines.dna_masked_model import DNA_COMPLEMENT
from tests.data.helpers import random_dna

ENCODERS = {
    "patches": {"encoder": "bimamba", "encoder_config": {"d_model": 16, "n_layer": 2}, "patch": 8, "k": 3},
    "equivariant": {
        "encoder": "bimamba",
        "encoder_config": {"d_model": 16, "n_layer": 1},
        "patch": 8,
        "k": 3,
        "equivariant": True,
    },
    "bases": {"encoder": "bimamba", "encoder_config": {"d_model": 16, "n_layer": 1}},
    "bigs": {"encoder": "bigs", "encoder_config": {"d_model": 16, "n_layer": 1}},
    "last": {"encoder": "mamba", "encoder_config": {"d_model": 16, "n_layer": 1}, "pooling": "last"},
}


def a_model(kind: str = "patches", **settings: object) -> SpeciesClassifier:
    fields = {"classes": ("a", "b", "c"), "window": 128, "complement": DNA_COMPLEMENT, **ENCODERS[kind], **settings}
    return SpeciesClassifier(SpeciesConfig(**fields), seed=0).eval()  # type: ignore[arg-type]


def tokens(text: str) -> torch.Tensor:
    return torch.from_numpy(DnaTokenizer().encode(text.encode()).copy())


def test_a_kmer_and_its_reverse_complement_share_a_row() -> None:
    rows, count = canonical_kmers(4)
    letters = "ACGT"
    texts = ["".join(letters[i >> (2 * (3 - p)) & 3] for p in range(4)) for i in range(256)]
    other = [t.translate(str.maketrans("ACGT", "TGCA"))[::-1] for t in texts]
    assert count == len({min(t, o) for t, o in zip(texts, other, strict=True)}) == 136
    for i, text in enumerate(other):
        assert rows[i] == rows[texts.index(text)]
    assert canonical_kmers(7)[1] == 4**7 // 2


@pytest.mark.parametrize("length", [1, 2, 3, 8, 21, 32], ids=str)
def test_a_patch_is_the_mean_of_its_kmers_vectors(length: int) -> None:
    stem = a_model().stem
    assert isinstance(stem, PatchStem)
    text = random_dna(length, 3)
    found, real = stem(tokens(text)[None], None)
    assert real is None
    assert found.shape == (1, -(-length // 8), 16)
    rows, _ = canonical_kmers(3)
    for patch in range(found.shape[1]):
        kmers = [text[i : i + 3] for i in range(patch * 8, patch * 8 + 8) if i + 3 <= length]
        codes = [sum("ACGT".index(c) * 4 ** (2 - p) for p, c in enumerate(kmer)) for kmer in kmers]
        vectors = [stem.table.weight[rows[code]] for code in codes] or [torch.zeros(16)]
        expected = torch.stack(vectors).mean(0) * 8**0.5
        torch.testing.assert_close(found[0, patch], expected)


@pytest.mark.parametrize("kind", ENCODERS)
def test_batch_and_padding_never_change_an_answer(kind: str) -> None:
    model = a_model(kind)
    texts = [random_dna(length, length) for length in (1, 2, 7, 8, 9, 40, 100, 128)]
    with torch.no_grad():
        alone = torch.cat([model(tokens(text)[None]) for text in texts])
        padded = torch.full((len(texts), 150), 4, dtype=torch.uint8)
        mask = torch.zeros(padded.shape, dtype=torch.bool)
        for row, text in enumerate(texts):
            padded[row, : len(text)] = tokens(text)
            mask[row, : len(text)] = True
        together = model(padded, mask)
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
        padded[~mask] = 9  # what stands in the padding is nothing to it
        torch.testing.assert_close(model(padded, mask), together, atol=1e-6, rtol=0)
    assert (alone.argmax(1) >= 0).all()
    assert alone.std(0).min() > 0


def test_both_strands_have_one_answer_where_that_is_asked_for() -> None:
    text = random_dna(100, 5)
    other = text.translate(str.maketrans("ACGT", "TGCA"))[::-1]
    for kind, same in (("equivariant", True), ("patches", False)):
        model = a_model(kind)
        with torch.no_grad():
            one, two = model(tokens(text)[None]), model(tokens(other)[None])
        assert torch.allclose(one, two, atol=1e-6) == same


def test_the_table_of_patches_is_trained_and_an_unread_embedding_is_not() -> None:
    model = a_model().train()
    model(tokens(random_dna(64, 1))[None]).square().sum().backward()
    assert model.stem is not None
    gradient = model.stem.table.weight.grad
    assert gradient is not None
    assert (gradient.abs().sum(1) > 0).sum() > 10
    assert (gradient[-1] == 0).all()  # the row of no k-mer
    names = [name for group in model.parameter_groups(0.1) for name in group["names"]]
    assert "stem.table.weight" in names
    assert "encoder.embedding.weight" not in names


def test_the_calibration_is_its_formula() -> None:
    generator = np.random.default_rng(0)
    mean = np.log(generator.dirichlet((1, 1, 1), 4))
    bases = np.array([64.0, 128.0, 512.0, 12_800.0])
    calibration = Calibration(temperature=2.0, within=0.25, across=0.5)
    scale = [0.5**0.25 / 2, 1 / 2, 4**0.5 / 2, 100**0.5 / 2]
    expected = np.stack([m * s - np.log(np.exp(m * s).sum()) for m, s in zip(mean, scale, strict=True)])
    assert calibration.log_probabilities(mean, bases, 128) == pytest.approx(expected)
    assert np.exp(calibration.log_probabilities(mean * 1e5, bases, 128)).sum(1) == pytest.approx(1)


def test_a_model_comes_back_from_its_folder_with_its_calibration(tmp_path: Path) -> None:
    model = a_model()
    model.calibrated(Calibration(temperature=1.5, within=0.1, across=0.3))
    card = model_card(model, title="t", data="d", licence="l", recipe="r", quality="q")
    assert "3-mers over patches of 8" in card
    save_model(model, tmp_path / "m", DnaTokenizer().model_dump(mode="json"), card)
    again, _ = load_model(tmp_path / "m", kinds=["species-classifier"])
    assert again.config == model.config
    x = tokens(random_dna(100, 0))[None]
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"encoder": "bigs", "patch": 4}, "patches are read by a bimamba"),
        ({"calibration": {"temperature": 0}}, "temperature"),
        ({"classes": ("a", "a")}, "two classes have the same name"),
        ({"colour": 1}, "colour"),
    ],
    ids=["patches of bigs", "temperature", "names", "unknown key"],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], told: str) -> None:
    fields = {"classes": ("a", "b"), "encoder": "bimamba", "encoder_config": {"d_model": 16, "n_layer": 1}}
    with pytest.raises(ValidationError, match=told):
        SpeciesConfig(**{**fields, **settings})  # type: ignore[arg-type]
