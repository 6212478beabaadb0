"""The audio U-Net: sizes as published, any length, chunks and steps, packed clips, classes, folders."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from mambagen.errors import ModelError, UsageError
from mambagen.models import load_model, save_model
from mambagen.models.audio_unet import MIDDLE, AudioUNet, AudioUNetConfig
from mambagen.models.unet_blocks import BLOCK_KINDS
from tests.models.mixer_cases import leaves, randomise
from tests.models.test_saving import rewrite

SMALL = {"d_model": 8, "n_layer": 2, "d_state": 4, "ssm_state": 4, "head_width": 4, "attention_window": 5}
KINDS = {
    "mamba": {},
    "s4 and feed-forward": {"outer": "s4+mlp", "centre": "s4+mlp"},
    "attention in the centre": {"outer": "mamba", "centre": "attention+mlp"},
    "three stages": {"stages": 3, "outer": "s4d", "centre": "mamba"},
    "three pools": {"pool": (2, 3, 2), "n_layer": 1, "outer": "s4d+mlp", "centre": "s4"},
    "one pool, no wider": {"pool": (5,), "expand_pool": 1},
    "conditional": {"classes": 3},
}
CLASSES = torch.tensor([2, 3])


@pytest.fixture(params=KINDS)
def model(request):
    return build(**KINDS[request.param])


def build(**fields):
    torch.manual_seed(0)
    model = AudioUNet(AudioUNetConfig(**{**SMALL, **fields}))
    randomise(model)
    return model.eval()


def draw(length, batch=2):
    torch.manual_seed(1)
    return torch.randint(0, 256, (batch, length))


def classes_for(model):
    return CLASSES if model.config.classes else None


def in_chunks(model, tokens, lengths, resets=None):
    state, out = model.allocate_state(len(tokens)), []
    marks = [None] * len(lengths) if resets is None else resets.split(lengths, 1)
    for chunk, mark in zip(tokens.split(lengths, 1), marks, strict=True):
        logits, state = model(chunk, state, classes_for(model), mark)
        out.append(logits)
    return torch.cat(out, 1), state


def in_steps(model, tokens):
    state, out = model.allocate_state(len(tokens)), []
    for token in tokens.unbind(1):
        logits, state = model.step(token, state, classes_for(model))
        out.append(logits)
    return torch.stack(out, 1), state


def parameters(**fields):
    with torch.device("meta"):
        return sum(p.numel() for p in AudioUNet(AudioUNetConfig(**fields)).parameters())


def test_sizes_are_the_published_ones():
    assert parameters() == 6_255_040
    assert parameters(d_model=96, n_layer=15) == 24_850_912
    assert parameters(n_layer=3, pool=(16, 16)) == 3_557_184
    assert parameters(outer="s4+mlp", centre="s4+mlp") == 5_855_168  # published: 5.8M


def test_the_count_is_that_of_its_parts():
    D, N, taps = 64, 16, 4  # a Mamba layer of width D: norm, in, conv, x, dt, A, D, out

    def layer(D):
        E, R = 2 * D, -(-D // 16)
        return D + 2 * D * E + (taps + 1) * E + E * (R + 2 * N) + (R + 1) * E + E * N + E + E * D

    stages = 16 * layer(64) + 16 * layer(128) + 8 * layer(256)
    pools = sum((a + 1) * b for a, b in ((256, 128), (512, 256), (256, 512), (128, 256)))
    assert parameters() == stages + pools + 256 * D + D + (D + 1) * 256


@pytest.mark.parametrize("outer", BLOCK_KINDS)
@pytest.mark.parametrize("centre", BLOCK_KINDS)
def test_every_row_of_the_ablation_can_be_built(outer, centre):
    model = build(outer=outer, centre=centre, n_layer=1)
    assert model(draw(7))[0].shape == (2, 7, 256)


@torch.no_grad()
def test_chunks_and_steps_give_the_whole_sequence(model):
    tokens = draw(83)
    whole, none = model(tokens, None, classes_for(model))
    assert none is None
    for lengths in ([83], [1, 82], [82, 1], [3, 2, 11, 16, 1, 32, 18]):
        chunked, state = in_chunks(model, tokens, lengths)
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=2e-5)
    stepped, after = in_steps(model, tokens)
    torch.testing.assert_close(stepped, whole, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(leaves(after), leaves(state), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_steps_stay_with_the_forward_for_thousands_of_samples():
    model = build(n_layer=1)
    tokens = draw(4_000, batch=1)
    whole, _ = model(tokens)
    stepped, _ = in_steps(model, tokens)
    assert (stepped - whole).abs().max() < 1e-4


@torch.no_grad()
def test_any_length_gives_the_beginning_of_a_longer_one(model):
    tokens = draw(49)
    whole, _ = model(tokens, None, classes_for(model))
    for length in (1, 2, 15, 16, 17, 31, 33, 48):
        torch.testing.assert_close(model(tokens[:, :length], None, classes_for(model))[0], whole[:, :length])


@torch.no_grad()
def test_the_last_token_is_used_and_none_is_seen_ahead(model):
    """At every place of a cycle: another token changes the logits there, and none before."""
    tokens = draw(40)
    whole, _ = model(tokens, None, classes_for(model))
    for place in range(16, 33):
        other = tokens.clone()
        other[0, place] = (other[0, place] + 99) % 256
        changed, _ = model(other, None, classes_for(model))
        torch.testing.assert_close(changed[0, :place], whole[0, :place], rtol=0, atol=1e-5)
        torch.testing.assert_close(changed[1], whole[1], rtol=0, atol=1e-5)
        assert (changed[0, place] - whole[0, place]).abs().max() > 1e-4


@torch.no_grad()
def test_the_layout_is_that_of_its_definition():
    """Written out for two pools: pools by loops over positions, a skip around every layer."""
    model = build(d_model=4, n_layer=1, classes=2).double()
    tokens = draw(32, batch=1)
    row = model.class_embedding.weight[1]  # of the classes: where levels 0, 1 and the centre begin, where 0 and 1 turn
    assert model.config.class_sizes == [4, 8, 16, 4, 8]
    v0, v1, v2, t0, t1 = row[:4], row[4:12], row[12:28], row[28:32], row[32:]
    x0 = model.embedding(tokens) + v0

    def down_pool(x, layer, s):
        return torch.stack([F.linear(x[:, s * i : s * i + s].reshape(1, -1), layer.weight, layer.bias)
                            for i in range(x.shape[1] // s)], 1)  # fmt: skip

    def up_pool(x, layer, s):
        y = F.linear(x, layer.weight, layer.bias)
        frames = [torch.zeros_like(y[:, 0]), *y.unbind(1)[:-1]]  # one pooled frame late
        width = y.shape[-1] // s
        return torch.stack([frames[t // s][:, t % s * width : (t % s + 1) * width] for t in range(x.shape[1] * s)], 1)

    b0 = model.down[0][0](x0)[0]
    p0 = down_pool(b0, model.down_pool[0], 4) + v1
    b1 = model.down[1][0](p0)[0]
    p1 = down_pool(b1, model.down_pool[1], 4) + v2
    c = model.centre[0](p1)[0] + p1
    u1 = up_pool(c, model.up_pool[1], 4) + b1 + t1
    u1 = model.up[1][0](u1)[0] + p0
    u0 = up_pool(u1, model.up_pool[0], 4) + b0 + t0
    u0 = model.up[0][0](u0)[0] + x0
    logits, _ = model(tokens, None, torch.tensor([1]))
    torch.testing.assert_close(logits, model.lm_head(model.norm_f(u0)))


@torch.no_grad()
def test_packed_clips_equal_the_clips_alone(model):
    cycle = model.config.cycle
    tokens = draw(6 * cycle + 5)
    starts = [0, cycle, 3 * cycle, 4 * cycle]
    resets = torch.zeros(tokens.shape, dtype=torch.bool)
    resets[:, starts] = True
    ends = [*starts[1:], tokens.shape[1]]
    classes = classes_for(model)
    alone = torch.cat([model(tokens[:, a:b], None, classes)[0] for a, b in zip(starts, ends, strict=True)], 1)
    torch.testing.assert_close(model(tokens, None, classes, resets)[0], alone, rtol=1e-4, atol=2e-5)
    for cut in (
        1,
        cycle - 1,
        cycle,
        cycle + 1,
        3 * cycle + 1,
    ):  # a clip's first frame begun in one chunk, full in another
        chunked, _ = in_chunks(model, tokens, [cut, 2, tokens.shape[1] - cut - 2], resets)
        torch.testing.assert_close(chunked, alone, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_a_clip_may_begin_in_one_row_only():
    model, tokens = build(), draw(48)
    resets = torch.zeros(2, 48, dtype=torch.bool)
    resets[1, 16] = True
    whole, _ = model(tokens)
    packed, _ = model(tokens, None, None, resets)
    torch.testing.assert_close(packed[0], whole[0])
    torch.testing.assert_close(packed[1, 16:], model(tokens[1:, 16:])[0][0])


def test_a_clip_that_begins_inside_a_frame_is_refused():
    model, tokens = build(), draw(40)
    resets = torch.zeros(2, 40, dtype=torch.bool)
    resets[0, 20] = True
    with pytest.raises(UsageError, match="multiples of 16 samples"):
        model(tokens, None, None, resets)
    _, state = model(tokens[:, :12], model.allocate_state(2))
    resets = torch.zeros(2, 28, dtype=torch.bool)
    resets[0, 4] = True  # 4 after 12 is at 16
    model(tokens[:, 12:], state, None, resets)
    resets[1, 8] = True
    with pytest.raises(UsageError, match="inside a pooled frame"):
        model(tokens[:, 12:], state, None, resets)


@torch.no_grad()
def test_a_given_state_is_left_as_it_was(model):
    tokens = draw(21)
    _, state = model(tokens, model.allocate_state(2), classes_for(model))
    before = [leaf.clone() for leaf in leaves(state)]
    model(tokens, state, classes_for(model))
    for token in tokens.unbind(1):
        model.step(token, state, classes_for(model))
    assert all(map(torch.equal, before, leaves(state)))


def test_gradients_reach_every_parameter_and_flow_through_the_state(model):
    tokens = draw(3 * model.config.cycle)
    weight = torch.randn(2, tokens.shape[1], 256)
    gradients = []
    for run in (
        lambda: model(tokens, None, classes_for(model))[0],
        lambda: in_chunks(model, tokens, [7, tokens.shape[1] - 7])[0],
    ):
        model.zero_grad()
        (run() * weight).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        near = 1e-3 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=near, msg=lambda m, n=name: n + m)


@torch.no_grad()
def test_classes_are_told_apart_and_the_last_is_none_of_them():
    model, tokens = build(classes=3), draw(20, batch=1)
    given = [model(tokens, None, torch.tensor([c]))[0] for c in range(4)]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(given, 2))
    torch.testing.assert_close(model(tokens)[0], given[3])
    with pytest.raises(UsageError, match="not conditional"):
        build()(tokens, None, torch.tensor([0]))


@torch.no_grad()
def test_autocast_and_bfloat16_weights_stay_near_full_precision():
    model, tokens = build(), draw(64)
    whole, _ = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = model(tokens)
        stepped, state = in_steps(model, tokens[:, :20])
    cast = build().bfloat16()(tokens)[0]
    for logits in (low, cast):
        assert logits.dtype == torch.float32
        assert (logits - whole).abs().max() < 0.05 * whole.abs().max()
    assert (stepped - whole[:, :20]).abs().max() < 0.05 * whole.abs().max()
    assert state.buffer.dtype == torch.float32


def test_a_seed_gives_the_same_weights():
    config = AudioUNetConfig(**SMALL, classes=2)
    a, b, c = (AudioUNet(config, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
    assert a["embedding.weight"].std() == pytest.approx(1.0, rel=0.1)
    assert a["lm_head.weight"].abs().max() <= config.d_model**-0.5
    assert (a["norm_f.weight"] == 1).all()


def test_a_folder_gives_back_the_model_and_its_quantiser(tmp_path, model):
    quantiser = {"kind": "mu-law", "bins": 256}
    save_model(model, tmp_path / "m", quantiser, "# A card\n")
    loaded, fields = load_model(tmp_path / "m")
    assert fields["quantiser"] == quantiser
    assert "tokenizer" not in fields
    assert loaded.config == model.config
    tokens = draw(20)
    torch.testing.assert_close(loaded(tokens)[0], model(tokens)[0], rtol=0, atol=0)


def test_a_folder_without_a_quantiser_is_refused(tmp_path):
    save_model(build(), tmp_path / "m", {"kind": "mu-law"}, "card")
    fields = json.loads((tmp_path / "m" / "config.json").read_text())
    del fields["quantiser"]
    rewrite(tmp_path / "m", config_json=json.dumps(fields).encode())
    with pytest.raises(ModelError, match="quantiser: Field required"):
        load_model(tmp_path / "m")


def test_decay_spares_what_it_should():
    groups = build(outer="s4+mlp").parameter_groups(0.1)
    spared = {name for group in groups if group["weight_decay"] == 0 for name in group["names"]}
    slow = {name for group in groups if group["lr_scale"] < 1 for name in group["names"]}
    assert {"norm_f.weight", "lm_head.bias", "centre.0.mixer.A_log", "down.0.0.mixer.ssm.log_dt"} <= spared
    assert "down_pool.0.weight" not in spared
    assert "down.0.0.mixer.ssm.P" in slow


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"pool": ()}, "at least 1"),
        ({"pool": (1, 4)}, "greater than or equal to 2"),
        ({"stages": 4}, "3 or 5"),
        ({"outer": "lstm"}, "'mamba', 's4'"),
        ({"centre": "attention+mlp", "d_model": 12, "head_width": 32}, "does not divide"),
        ({"widht": 3}, "Extra inputs"),
    ],
    ids=["no pool", "pool of one", "four stages", "unknown mixer", "heads", "unknown key"],
)
def test_impossible_shapes_are_refused(fields, fault):
    with pytest.raises(ValidationError, match=fault):
        AudioUNetConfig(**fields)


def test_the_first_token_is_silence_in_the_middle_of_the_range():
    assert MIDDLE == 128
