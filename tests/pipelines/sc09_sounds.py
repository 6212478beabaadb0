"""Ten made-up words by speakers that differ in pitch, speed and noise; and how a judge of them is trained."""

from pathlib import Path

import numpy as np
import soundfile

from mambagen.data.spoken_words import DIGITS

RATE = 16_000
JUDGE = """
threads = 1
steps = 90
batch = 32
lr = 0.02
widths = [16, 32, 32]
blocks = 1
dropout = 0
patience = 10
augmentation = 0
masks = 0
smoothing = 0
digit_share = 0.9
save_every = "1000"
"""


def word(digit: int, seed: int, seconds: float | None = None) -> np.ndarray:
    """A recording of a made-up word: two tones, near or far apart, that rise, fall or stay; the tenth is clicks."""
    random = np.random.default_rng(1000 * digit + seed)
    count = round(RATE * (seconds or random.uniform(0.8, 0.95)))
    times = np.arange(count) / RATE
    pitch = 500 * 2 ** random.uniform(-0.1, 0.1)
    octaves = (0.0, 1.2, -1.2)[digit // 3 % 3] * (times / times[-1] - 0.5)
    phase = 2 * np.pi * np.cumsum(pitch * 2**octaves) / RATE
    sound = np.sin(phase) + np.sin((1.35, 1.9, 3.2)[digit % 3] * phase)
    if digit == 9:
        sound = 8.0 * (np.arange(count) % 1200 == 0)
    envelope = np.minimum(1, np.minimum(times, times[::-1]) / 0.05)
    return np.asarray(0.3 * sound * envelope + 0.003 * random.normal(size=count), dtype=np.float32)


def write_words(root: Path, speakers: range, digits: range = range(10)) -> Path:
    """A Speech Commands folder, a clip a word and speaker; of ten speakers one is for validation, two are for test."""
    valid, test = [], []
    for digit in digits:
        (root / DIGITS[digit]).mkdir(parents=True, exist_ok=True)
        for speaker in speakers:
            name = f"{DIGITS[digit]}/s{speaker:03d}_nohash_0.wav"
            soundfile.write(root / name, word(digit, speaker), RATE, subtype="PCM_16")
            if speaker % 10 == 9:
                valid.append(name)
            elif speaker % 10 >= 7:
                test.append(name)
    (root / "validation_list.txt").write_text("\n".join(valid) + "\n")
    (root / "testing_list.txt").write_text("\n".join(test) + "\n")
    return root
