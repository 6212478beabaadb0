"""Whole sequence, chunks with a carried state, single steps and packed documents give the same numbers."""

import pytest
import torch

from tests.models.mixer_cases import CASES, leaves, randomise

BATCH, LENGTH = 2, 23
CHUNKS = [[23], [22, 1], [1, 22], [1, 2, 1, 3, 16], [7, 9, 7]]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def mixer(case):
    torch.manual_seed(0)
    module = case.build()
    randomise(module)
    return module


@pytest.fixture
def x(case):
    torch.manual_seed(1)
    return case.draw(BATCH, LENGTH)


def in_chunks(mixer, x, lengths, resets=None):
    state, ys = mixer.allocate_state(len(x)), []
    marks = [None] * len(lengths) if resets is None else resets.split(lengths, 1)
    for chunk, mark in zip(x.split(lengths, 1), marks, strict=True):
        y, state = mixer(chunk, state, mark)
        ys.append(y)
    return torch.cat(ys, 1), state


def assert_states_equal(a, b):
    torch.testing.assert_close(leaves(a), leaves(b))


@pytest.mark.parametrize("lengths", CHUNKS, ids=str)
def test_chunks_with_a_carried_state_give_the_whole_sequence(mixer, x, lengths):
    whole, _ = mixer(x)
    chunked, _ = in_chunks(mixer, x, lengths)
    torch.testing.assert_close(chunked, whole)


def test_single_steps_give_the_whole_sequence_and_its_state(mixer, x):
    whole, after = mixer(x, mixer.allocate_state(BATCH))
    state, ys = mixer.allocate_state(BATCH), []
    for t in range(LENGTH):
        y, state = mixer.step(x[:, t], state)
        ys.append(y)
    torch.testing.assert_close(torch.stack(ys, 1), whole)
    assert_states_equal(state, after)


def test_steps_may_follow_a_chunk_and_a_chunk_steps(mixer, x):
    whole, _ = mixer(x)
    first, state = mixer(x[:, :9], mixer.allocate_state(BATCH))
    middle, state = mixer.step(x[:, 9], state)
    last, _ = mixer(x[:, 10:], state)
    torch.testing.assert_close(torch.cat([first, middle[:, None], last], 1), whole)


def test_gradients_flow_through_the_carried_state(mixer, x):
    weight = torch.randn(mixer(x)[0].shape)
    gradients = []
    for lengths in ([LENGTH], [5, 2, 16]):
        mixer.zero_grad()
        (in_chunks(mixer, x, lengths)[0] * weight).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in mixer.named_parameters()})
    mixer.zero_grad()
    (mixer(x)[0] * weight).sum().backward()
    for name, parameter in mixer.named_parameters():
        for chunked in gradients:
            torch.testing.assert_close(chunked[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


def test_packed_documents_equal_the_documents_alone(mixer, case):
    lengths = [6, 1, 2, 14]  # shorter ones than the convolution is wide among them
    torch.manual_seed(2)
    documents = [case.draw(BATCH, n) for n in lengths]
    packed = torch.cat(documents, 1)
    resets = torch.zeros(BATCH, sum(lengths), dtype=torch.bool)
    resets[:, [0, 6, 7, 9]] = True
    alone = torch.cat([mixer(document)[0] for document in documents], 1)
    torch.testing.assert_close(mixer(packed, None, resets)[0], alone)
    chunked, state = in_chunks(
        mixer, packed, [4, 2, 4, 13], resets
    )  # a border at a chunk's first position, others inside
    torch.testing.assert_close(chunked, alone)
    _, last = mixer(documents[-1], mixer.allocate_state(BATCH))
    assert_states_equal(state, last)


def test_documents_may_end_at_other_places_in_each_row(mixer, x):
    resets = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    resets[0, 5] = resets[1, 17] = True
    y, _ = mixer(x, None, resets)
    torch.testing.assert_close(y[0, 5:], mixer(x[:1, 5:])[0][0])
    torch.testing.assert_close(y[1, 17:], mixer(x[1:, 17:])[0][0])


def test_nothing_is_seen_ahead_and_rows_do_not_mix(mixer, case, x):
    whole, _ = mixer(x)
    other = x.clone()
    other[0, 12:] = case.draw(1, LENGTH - 12)[0]
    changed, _ = mixer(other)
    torch.testing.assert_close(changed[0, :12], whole[0, :12], rtol=0, atol=1e-6)
    torch.testing.assert_close(changed[1], whole[1], rtol=0, atol=1e-6)
    assert not torch.allclose(changed[0, 12:], whole[0, 12:])


def test_no_state_in_means_no_state_out(mixer, x):
    assert mixer(x)[1] is None


def test_a_given_state_is_left_as_it_was(mixer, x):
    _, state = mixer(x, mixer.allocate_state(BATCH))
    before = [leaf.clone() for leaf in leaves(state)]
    mixer(x, state)
    mixer.step(x[:, 0], state)
    assert all(map(torch.equal, before, leaves(state)))


def test_every_parameter_receives_a_gradient(mixer, x):
    y, _ = mixer(x)
    (y * torch.randn_like(y)).sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_autocast_stays_near_full_precision_and_streams(mixer, x):
    whole, _ = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = mixer(x)
        chunked, state = in_chunks(mixer, x, [5, 2, 16])
        stepped = mixer.step(x[:, 0], mixer.allocate_state(BATCH))[0]
    scale = whole.abs().max().item()
    for y in (low, chunked):
        assert (y.float() - whole).abs().max() < 0.03 * scale
    assert (stepped.float() - whole[:, 0]).abs().max() < 0.03 * scale
    wide = [leaf.dtype for leaf in leaves(state)][1::2]
    assert set(wide) == {torch.float32}  # the scan's states, whatever the precision around them
