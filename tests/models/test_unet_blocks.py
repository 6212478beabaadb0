"""Attention in a window, and the blocks around it, keep the contract of a mixer."""

import pytest
import torch
import torch.nn.functional as F

from mambagen.models.s4_mixer import S4, S4Config
from mambagen.models.unet_blocks import MLP, Attention, ResidualBlock, rotate
from tests.models.mixer_cases import leaves, randomise
from tests.models.test_mixer_contract import in_chunks

D, WINDOW, LENGTH = 16, 6, 23
BUILD = {
    "attention": lambda: Attention(D, 8, WINDOW),
    "residual attention": lambda: ResidualBlock(D, Attention(D, 4, WINDOW), 1e-5),
    "residual network": lambda: ResidualBlock(D, MLP(D, 2 * D), 1e-5),
}


@pytest.fixture(params=BUILD)
def mixer(request):
    torch.manual_seed(0)
    module = BUILD[request.param]()
    randomise(module)
    return module


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, LENGTH, D)


@torch.no_grad()
def test_attention_is_that_of_its_definition(x):
    """One query at a time, with complex rotations by absolute positions."""
    torch.manual_seed(0)
    mixer = Attention(D, 8, WINDOW).double()
    x = x.double()
    q, k, v = mixer.in_proj(x).chunk(3, -1)
    turns = 10_000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    out = torch.zeros_like(x)
    for head in (slice(0, 8), slice(8, 16)):
        angle = torch.polar(torch.ones(LENGTH, 4, dtype=torch.float64), torch.arange(LENGTH)[:, None] * turns)
        a, b = (torch.complex(t[..., head][..., :4], t[..., head][..., 4:]) * angle for t in (q, k))
        for t in range(LENGTH):
            seen = slice(max(0, t - WINDOW + 1), t + 1)
            scores = (a[:, t, None] * b[:, seen].conj()).real.sum(-1) / 8**0.5
            out[:, t, head] = (F.softmax(scores, -1)[..., None] * v[:, seen, head]).sum(1)
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(out), rtol=1e-5, atol=1e-6)  # angles are in float32


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[23], [1, 22], [5, 1, 6, 2, 9]], ids=str)
def test_chunks_and_steps_give_the_whole_sequence(mixer, x, lengths):
    whole, _ = mixer(x)
    chunked, state = in_chunks(mixer, x, lengths)
    torch.testing.assert_close(chunked, whole)
    steps, after = in_chunks(mixer, x, [1] * LENGTH)
    torch.testing.assert_close(steps, whole)
    torch.testing.assert_close(leaves(after), leaves(state))


@torch.no_grad()
def test_packed_documents_equal_the_documents_alone(mixer, x):
    resets = torch.zeros(2, LENGTH, dtype=torch.bool)
    resets[:, [0, 6, 7, 9]] = True
    alone = torch.cat([mixer(document)[0] for document in x.split([6, 1, 2, 14], 1)], 1)
    torch.testing.assert_close(mixer(x, None, resets)[0], alone)
    torch.testing.assert_close(in_chunks(mixer, x, [4, 2, 4, 13], resets)[0], alone)


@torch.no_grad()
def test_a_state_does_not_grow(x):
    mixer = Attention(D, 8, WINDOW)
    sizes = {tuple(leaf.shape) for n in (1, 3, 23) for leaf in leaves(mixer(x[:, :n], mixer.allocate_state(2))[1])}
    assert sizes == {(2, WINDOW - 1, 2, 8), (2, WINDOW - 1)}


def test_rotations_depend_on_differences_only():
    q, k = torch.randn(2, 1, 1, 1, 8)
    near, far = ((rotate(q, 3 + at) * rotate(k, 1 + at)).sum() for at in (0, 90))
    torch.testing.assert_close(near, far)


def test_gradients_reach_every_parameter(mixer, x):
    (mixer(x)[0] * torch.randn_like(x)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in mixer.parameters())


def test_a_shared_s4_system_is_that_of_equal_ones(x):
    torch.manual_seed(0)
    shared, own = (S4(S4Config(d_model=D, d_state=4, share_system=share)) for share in (True, False))
    randomise(shared)
    assert shared.P.shape == (1, 4, 2)
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            parameter.copy_(shared.get_parameter(name).expand(parameter.shape))
    torch.testing.assert_close(shared(x)[0], own(x)[0])
    assert shared.log_dt.shape == (D,)
