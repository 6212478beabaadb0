"""The WaveNet baseline: its size, that it sees nothing ahead, and that its steps are its forward pass."""

import torch

from benchmarks.wavenet import WaveNet, WaveNetStepper
from mambagen.kernels.mamba_decode.reference import uniform
from mambagen.pipelines.audio_language_model import shifted
from tests.capturable import assert_capturable


def test_the_baseline_has_the_published_size() -> None:
    assert 4.1e6 < sum(p.numel() for p in WaveNet().parameters()) < 4.3e6


def test_samples_are_drawn_from_the_forward_passes_own_distribution() -> None:
    model = WaveNet(channels=16, skips=12, stacks=2, layers=4, seed=1).eval()
    made = model.generate(3, 70, seed=5)
    with torch.no_grad():
        logits, _ = model(shifted(made))
    seeds = 5 * 1_000_003 + torch.arange(3)
    for step in range(70):
        numbers = uniform(seeds, torch.full_like(seeds, step), torch.zeros_like(seeds))
        passed = logits[:, step].double().softmax(-1).cumsum(-1)
        assert torch.equal((passed > numbers[:, None]).int().argmax(-1), made[:, step].long()), step


@torch.no_grad()
def test_steps_give_the_logits_of_the_forward_pass() -> None:
    model = WaveNet(channels=12, skips=10, stacks=2, layers=5, seed=1).eval()
    tokens = torch.randint(256, (2, 90))
    expected, _ = model(shifted(tokens))
    stepper = WaveNetStepper(model, 2)
    stepper.begin()
    for step, token in enumerate(tokens.T):
        torch.testing.assert_close(stepper.logits, expected[:, step], rtol=1e-4, atol=1e-5)
        stepper.advance(token)


def test_what_is_captured_for_a_gpu_are_the_steps_themselves() -> None:
    """The captured function runs first to set up libraries; clips begin anew after it, in the same tensors."""
    model = WaveNet(channels=12, skips=10, stacks=2, layers=4, seed=1).eval()
    stepper = WaveNetStepper(model, 3, seed=2)
    held = {name: v.data_ptr() for name, v in vars(stepper).items() if isinstance(v, torch.Tensor)}
    with torch.no_grad():
        stepper.run()
        stepper.begin()
        drawn = []
        for _ in range(3):
            assert_capturable(stepper.run)
            drawn.append(stepper.drawn.clone())
    assert torch.equal(torch.cat(drawn).T, model.generate(3, 48, seed=2).long())
    assert held == {name: v.data_ptr() for name, v in vars(stepper).items() if isinstance(v, torch.Tensor)}


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
