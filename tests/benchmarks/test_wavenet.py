"""The WaveNet baseline: its size, that it sees nothing ahead, and that its steps are its forward pass."""

import torch

from benchmarks.wavenet import WaveNet
from mambagen.pipelines.audio_language_model import shifted


def test_the_baseline_has_the_published_size() -> None:
    assert 4.1e6 < sum(p.numel() for p in WaveNet().parameters()) < 4.3e6


def test_samples_are_drawn_from_the_forward_passes_own_distribution() -> None:
    model = WaveNet(channels=16, skips=12, stacks=2, layers=4, seed=1).eval()
    made = model.generate(3, 70, seed=5)
    with torch.no_grad():
        logits, _ = model(shifted(made))
    random = torch.Generator().manual_seed(5)
    for step in range(70):
        drawn = torch.multinomial(logits[:, step].softmax(-1), 1, generator=random)[:, 0]
        assert torch.equal(drawn, made[:, step].long()), step


def test_nothing_is_seen_ahead_and_everything_behind() -> None:
    model = WaveNet(channels=8, skips=8, stacks=1, layers=4, seed=0).eval()
    tokens = torch.randint(256, (1, 40))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 100) % 256
    with torch.no_grad():
        one, other = model(tokens)[0][0], model(changed)[0][0]
    differs = (one != other).any(-1)
    assert not differs[:20].any()
    assert differs[20:36].all()  # 1 + 2 + 4 + 8 positions back
    assert not differs[36:].any()
