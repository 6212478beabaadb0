"""Log-mel pictures beside librosa's, by both ways to compute them."""

import builtins
from typing import Any

import librosa
import numpy as np
import pytest
import torch

from mambagen.data.mel import Backend, LogMel, MelSettings, torchaudio_loads

SECONDS = np.arange(16_000) / 16_000
RANDOM = np.random.default_rng(0)
SOUNDS = {
    "noise": 0.1 * RANDOM.normal(size=16_000),
    "tone": 0.9 * np.sin(2 * np.pi * 440 * SECONDS),
    "chirp": np.sin(2 * np.pi * (100 * SECONDS + 3000 * SECONDS**2)),
    "click": np.eye(1, 16_000, 8_000)[0],
    "silence": np.zeros(16_000),
    "quiet": 1e-5 * RANDOM.normal(size=16_000),
    "offset": np.full(16_000, 0.5),
    "decay": np.sin(2 * np.pi * 200 * SECONDS) * np.exp(-8 * SECONDS),
}


def by_librosa(sound: np.ndarray, **settings: Any) -> np.ndarray:
    asked = {"sr": 16_000, "n_fft": 2048, "hop_length": 512, "n_mels": 32, "power": 2.0} | settings
    return librosa.power_to_db(librosa.feature.melspectrogram(y=sound, **asked), ref=np.max, top_db=80)


@pytest.mark.parametrize("backend", ["torchaudio", "torch"])
@pytest.mark.parametrize("name", SOUNDS)
def test_pictures_are_librosas_within_a_thousandth_of_a_decibel(name: str, backend: Backend) -> None:
    sound = SOUNDS[name].astype(np.float32)
    picture = LogMel(backend=backend)(torch.from_numpy(sound)[None])
    assert picture.shape == (1, 32, 32)
    assert picture.max() == 0
    assert picture.min() >= -80
    assert np.abs(picture[0].double().numpy() - by_librosa(sound.astype(np.float64))).max() < 1e-3


@pytest.mark.parametrize("length", [15_999, 16_384, 700])
def test_both_ways_agree_on_a_batch_at_other_settings(length: int) -> None:
    settings = MelSettings(rate=8000, n_fft=512, hop=160, n_mels=40, floor_db=60)
    sounds = torch.from_numpy(RANDOM.normal(size=(3, length)))
    one, other = LogMel(settings, "torchaudio")(sounds), LogMel(settings, "torch")(sounds)
    assert one.shape == (3, 40, settings.frames(length))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    expected = librosa.power_to_db(
        librosa.feature.melspectrogram(y=sounds[1].numpy(), sr=8000, n_fft=512, hop_length=160, n_mels=40),
        ref=np.max,
        top_db=60,
    )
    assert np.abs(other[1].numpy() - expected).max() < 1e-3


def test_a_clip_has_its_own_maximum_whatever_is_beside_it() -> None:
    loud, soft = torch.randn(16_000), 1e-3 * torch.randn(16_000)
    both = LogMel()(torch.stack([loud, soft]))
    torch.testing.assert_close(both[1], LogMel()(soft[None])[0])


def test_without_torchaudio_the_other_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "torchaudio":
            raise OSError("libcudart.so.13: cannot open shared object file")
        return real(name, *rest)

    torchaudio_loads.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    try:
        assert LogMel().backend == "torch"
        picture = LogMel()(torch.from_numpy(SOUNDS["chirp"])[None])
    finally:
        monkeypatch.undo()
        torchaudio_loads.cache_clear()
    assert np.abs(picture[0].numpy() - by_librosa(SOUNDS["chirp"])).max() < 1e-3
    assert LogMel().backend == "torchaudio"
