"""Quantisers beside torchaudio, closed forms and the published formulas."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mambagen.data.quantise import SILENCE, Linear, MinMax, MuLaw, Quantiser, load_quantiser

ALL = [MuLaw(256), Linear(256), MinMax(), MinMax(companding="linear")]
IDS = ["mu-law", "linear", "min-max", "min-max-linear"]


def sounds() -> np.ndarray:
    """Every 16-bit sample, a million uniform ones, and a million quiet ones."""
    rng = np.random.default_rng(0)
    sixteen_bits = np.arange(-32768, 32768) / 32768
    return np.concatenate(
        [sixteen_bits, rng.uniform(-1, 1, 1_000_000), rng.normal(0, 0.01, 1_000_000).clip(-1, 1)]
    ).astype(np.float32)


def test_mu_law_equals_torchaudio_bit_for_bit() -> None:
    functional = pytest.importorskip("torchaudio.functional")
    x = sounds()
    np.testing.assert_array_equal(MuLaw(256).encode(x), functional.mu_law_encoding(torch.from_numpy(x), 256).numpy())
    tokens = torch.arange(256)
    np.testing.assert_array_equal(
        MuLaw(256).decode(tokens.numpy()).view(np.int32),
        functional.mu_law_decoding(tokens, 256).numpy().view(np.int32),
    )


def test_mu_law_is_its_closed_form_in_float64() -> None:
    x = sounds().astype(np.float64)
    y = ((np.sign(x) * np.log1p(255 * np.abs(x)) / np.log(256) + 1) / 2 * 255 + 0.5).astype(int)
    off = np.abs(MuLaw().encode(x).astype(int) - y)
    assert off.max() <= 1
    assert (off > 0).mean() < 1e-4  # at the very edge between two tokens only


@pytest.mark.parametrize("quantiser", [MuLaw(), Linear()], ids=IDS[:2])
def test_all_tokens_survive_a_round_trip(quantiser: Quantiser) -> None:
    tokens = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(quantiser.encode(quantiser.decode(tokens)), tokens)


@pytest.mark.parametrize("quantiser", [MuLaw(), Linear()], ids=IDS[:2])
def test_silence_is_token_128_and_ends_are_kept(quantiser: Quantiser) -> None:
    assert quantiser.encode([0.0, -1.0, 1.0, -7.0, 7.0]).tolist() == [SILENCE, 0, 255, 0, 255]
    assert abs(quantiser.decode([SILENCE])[0]) < 4e-3


def test_linear_is_never_off_by_more_than_half_a_step() -> None:
    x = sounds()
    assert np.abs(Linear().decode(Linear().encode(x)) - x).max() <= 1 / 255 + 1e-6


def test_mu_law_keeps_quiet_sound_better_than_linear() -> None:
    x = (0.01 * np.sin(np.arange(16000) * 0.05)).astype(np.float32)
    error = {q.kind: np.sqrt(np.mean((q.decode(q.encode(x)) - x) ** 2)) for q in (MuLaw(), Linear())}
    assert error["mu-law"] < error["linear"] / 10


def test_min_max_is_the_published_formula_in_float64() -> None:
    x = 0.3 * np.random.default_rng(1).normal(size=20_000) + 0.1
    scaled = (x - x.min()) / (x.max() - x.min() + 1e-6)
    linear = (scaled * (256 - 0.01) + 0.005).astype(int)
    both = 2 * scaled - 1
    mu = np.sign(both) * np.log1p(255 * np.abs(both + 1e-8)) / np.log(256)
    mu_law = ((mu + 1) / 2 * (256 - 0.01) + 0.005).astype(int)
    for quantiser, expected in ((MinMax(companding="linear"), linear), (MinMax(), mu_law)):
        off = np.abs(quantiser.encode(x).astype(int) - expected)
        assert off.max() <= 1
        assert (off > 0).mean() < 1e-3
        assert {quantiser.encode(x).min(), quantiser.encode(x).max()} == {0, 255}
    assert MinMax(companding="linear").decode([0, 128, 192]).tolist() == [-1.0, 0.0, 0.5]
    assert MinMax().decode([0, 128]).tolist() == [-1.0, 0.0]
    assert MinMax().decode([192])[0] == pytest.approx((256**0.5 - 1) / 255)


@pytest.mark.parametrize("quantiser", ALL, ids=IDS)
def test_a_quantiser_comes_back_from_json_values(quantiser: Quantiser) -> None:
    again = load_quantiser(quantiser.model_dump(mode="json"))
    assert again == quantiser
    assert type(again) is type(quantiser)
    named = quantiser.model_copy(update={"classes": ("zero", "one"), "rate": 8000})
    assert load_quantiser(json.loads(named.model_dump_json())) == named


def test_other_levels_and_kinds_are_refused() -> None:
    with pytest.raises(ValidationError):
        MuLaw(128)
    with pytest.raises(ValidationError):
        load_quantiser({"kind": "a-law", "levels": 256})


@pytest.mark.parametrize("quantiser", [MuLaw(), Linear()], ids=IDS[:2])
def test_edges_are_where_the_token_changes(quantiser: Quantiser) -> None:
    edges = quantiser.edges
    assert edges.shape == (257,)
    assert (np.diff(edges) > 0).all()
    inside = edges[:-1] + np.random.default_rng(2).uniform(0.01, 0.99, 256) * np.diff(edges)
    np.testing.assert_array_equal(quantiser.encode(inside), np.arange(256))


@pytest.mark.parametrize("quantiser", ALL, ids=IDS)
def test_no_samples_are_no_tokens(quantiser: Quantiser) -> None:
    assert quantiser.encode(np.zeros(0)).shape == (0,)
    assert quantiser.encode(np.zeros(3)).dtype == np.uint8
