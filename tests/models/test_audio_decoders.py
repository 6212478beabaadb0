"""Decoders of U-Nets with any mixer: in place and as graphs against the model's own step, and what a graph may hold."""

import pytest
import torch

from mambagen.kernels.s4 import s4_kernel
from mambagen.kernels.unet_decode import Sampling, graph
from mambagen.models.audio_decoders import BlockDecoder, EagerDecoder, GraphedBlocks, step_matrix
from mambagen.models.audio_unet import AudioUNet, AudioUNetConfig
from mambagen.models.s4_mixer import S4, S4Config
from mambagen.models.s4d_mixer import S4D, S4DConfig
from tests.capturable import assert_capturable, run_uncaptured
from tests.models.mixer_cases import randomise

MODELS = {
    "s4": {"outer": "s4+mlp", "centre": "s4+mlp"},
    "s4d, three stages": {"outer": "s4d", "centre": "s4d+mlp", "stages": 3},
    "s4 and mamba": {"outer": "s4+mlp", "centre": "mamba", "pool": (2, 3)},
    "mamba and attention": {"outer": "mamba", "centre": "attention+mlp", "attention_window": 3, "head_width": 16},
}


def build(name):
    sizes = {"d_model": 8, "n_layer": 2, "d_state": 4, "ssm_state": 3, "pool": (4, 2), "classes": 2}
    model = AudioUNet(AudioUNetConfig(**sizes | MODELS[name]), seed=0)
    torch.manual_seed(0)
    randomise(model)
    return model.eval()


@pytest.fixture
def graphs(monkeypatch):
    return run_uncaptured(monkeypatch)


def decoders(name, batch=4):
    model = build(name)
    vectors = torch.randn(batch, sum(model.config.class_sizes), generator=torch.Generator().manual_seed(1))
    made = [kind(model, batch) for kind in (EagerDecoder, BlockDecoder, GraphedBlocks)]
    for decoder in made:
        decoder.condition(vectors)
    return made


@pytest.mark.parametrize("guidance", [None, 2.0], ids=["unguided", "guided"])
@pytest.mark.parametrize("name", MODELS)
def test_steps_in_place_are_the_models_own(graphs, name, guidance):
    tokens = torch.randint(0, 256, (4, 13), generator=torch.Generator().manual_seed(0))
    seeds, made = torch.tensor([4, 4, 5, 5]), []
    for decoder in decoders(name):
        read = decoder.read(tokens)
        drawn = [decoder.draw(n, Sampling(), seeds, guidance) for n in (3, 22, 1)]
        made.append((read, torch.cat(drawn, 1), decoder.logits.clone()))
    for read, drawn, logits in made[1:]:
        torch.testing.assert_close(read, made[0][0], rtol=1e-4, atol=1e-5)
        assert torch.equal(drawn, made[0][1])
        torch.testing.assert_close(logits, made[0][2], rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 3 + 4  # depths to read, depths and a whole cycle to draw


@pytest.mark.parametrize("name", MODELS)
def test_states_go_from_one_to_another(graphs, name):
    tokens = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    for position in (1, 7, 12):
        eager, *others = decoders(name)
        expected = eager.read(tokens)[:, position:]
        for one in others:
            before, _, after = decoders(name)
            before.read(tokens[:, :position])
            one.load_state(before.state())
            torch.testing.assert_close(one.read(tokens[:, position:]), expected, rtol=1e-4, atol=1e-5)
            one.load_state(before.state())
            state = one.state()
            one.read(tokens)  # does not reach what was given
            after.load_state(state)
            torch.testing.assert_close(after.read(tokens[:, position:]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_steps_can_be_captured_and_leave_every_tensor_in_its_place(monkeypatch, name):
    *_, decoder = decoders(name)
    runs = []
    monkeypatch.setattr(graph, "capture", lambda run, device: runs.append(run) or run)
    decoder.read(torch.zeros(4, 9, dtype=torch.int64))
    decoder.draw(40, Sampling(0.9, top_p=0.95), torch.arange(4))
    places = [v.data_ptr() for v in decoder.held()]
    for run in runs:
        with torch.no_grad():
            assert_capturable(run)
    assert [v.data_ptr() for v in decoder.held()] == places


@pytest.mark.parametrize("ssms", [1, 4])
def test_the_matrix_of_a_step_answers_an_impulse_with_the_kernel(ssms):
    torch.manual_seed(0)
    system = S4(S4Config(d_model=4, d_state=5, n_ssm=ssms)).double()
    randomise(system)
    with torch.no_grad():
        dt, Lambda, P, B, C, D = system.system()
        expected = s4_kernel(dt, Lambda, P, B, C, 40, "cauchy").repeat_interleave(4 // ssms, 0)
        expected[:, 0] += D
        matrix = step_matrix(system, 5)
    assert matrix.shape == (4, 12, 12)
    row, found = torch.zeros(4, 1, 12, dtype=torch.float64), []
    row[..., -1] = 1
    for _ in range(40):
        row = row @ matrix
        found.append(row[:, 0, -1].clone())
        row[..., -1] = 0
    torch.testing.assert_close(torch.stack(found, 1), expected, rtol=1e-9, atol=1e-12)


def test_a_real_systems_matrix_is_its_decay():
    system = S4D(S4DConfig(d_model=2, d_state=3, n_ssm=1, init="real"))
    matrix = step_matrix(system, 3)
    dt, A, *_ = (v.detach().double() for v in system.system())
    torch.testing.assert_close(matrix[0, :3, :3], torch.diag(torch.exp(dt * A)[0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(matrix[0, -1, :3], (torch.expm1(dt * A) / A)[0], rtol=1e-6, atol=0)
