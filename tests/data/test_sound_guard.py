"""The guard against runaway sound, on sound that ran away and sound that did not."""

import numpy as np
import pytest

from mambagen.data.quantise import MuLaw
from mambagen.data.sound_guard import Guard, flatness

RATE = 16_000
GUARD = Guard(RATE)
RNG = np.random.default_rng(0)


def vowel(seconds: float) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return sum(0.3 / k * np.sin(2 * np.pi * 120 * k * time) for k in range(1, 20)).astype(np.float32)


def consonant(seconds: float) -> np.ndarray:
    """An s: noise above 4 kHz, at the loudness of speech."""
    noise = np.fft.rfft(RNG.normal(0, 1, round(seconds * RATE)))
    noise[: int(0.5 * len(noise))] = 0
    sound = np.fft.irfft(noise)
    return (0.1 * sound / sound.std()).astype(np.float32)


def test_uniform_tokens_are_noise() -> None:
    tokens = RNG.integers(0, 256, 8000).astype(np.uint8)
    assert GUARD.fault(MuLaw().decode(tokens)) == "noise"
    assert flatness(RNG.normal(0, 0.2, 4000).astype(np.float32)) > 0.9


def test_full_scale_is_noticed() -> None:
    square = np.sign(vowel(0.5)).astype(np.float32)
    assert GUARD.fault(square) == "full scale"
    assert GUARD.fault((1.2 * vowel(0.5)).clip(-1, 1)) is None


def test_speech_is_left_alone() -> None:
    for sound in (vowel(0.5), consonant(0.3), np.concatenate((consonant(0.2), vowel(0.4), consonant(0.2)))):
        for end in range(600, len(sound), 400):
            assert GUARD.fault(sound[:end]) is None
    assert GUARD.fault(RNG.normal(0, 0.05, 8000).astype(np.float32)) is None  # a quiet hiss


def test_silence_counts_from_the_start_at_once_and_later_after_long() -> None:
    silence = np.full(RATE, 1e-4, np.float32)
    assert GUARD.fault(silence[: round(0.7 * RATE)]) is None
    assert GUARD.fault(silence[: round(0.8 * RATE)]) == "silence"
    assert GUARD.fault(silence, begun=True) is None
    word = np.concatenate((silence[:2000], vowel(0.3), np.tile(silence, 2)))
    assert GUARD.fault(word) is None
    assert GUARD.fault(np.concatenate((word, silence))) == "silence"
    assert GUARD.fault(np.tile(silence, 4), begun=True) == "silence"


def test_the_last_seconds_are_enough_of_a_long_sound() -> None:
    silence = np.full(RATE, 1e-4, np.float32)
    for end in (vowel(2.0), np.tile(silence, 2), np.tile(silence, 4), RNG.normal(0, 0.3, RATE).astype(np.float32)):
        sound = np.concatenate((vowel(4.0), end))
        assert GUARD.fault(sound[-GUARD.memory :], begun=True) == GUARD.fault(sound)


@pytest.mark.parametrize("quiet", [3.0, 3.5])
def test_it_goes_back_to_before_the_fault(quiet: float) -> None:
    sound = np.concatenate((vowel(1.0), np.zeros(round(quiet * RATE), np.float32)))
    kept = GUARD.go_back_to(len(sound), "silence", sound)
    assert 0.85 * RATE < kept <= 0.9 * RATE
    assert GUARD.go_back_to(RATE, "noise", vowel(1.0)) == RATE - 4000 - 1600
    assert GUARD.go_back_to(4000, "noise", vowel(0.25)) == 0
    assert GUARD.go_back_to(RATE, "silence", np.zeros(RATE, np.float32)) == 0
