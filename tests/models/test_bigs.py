"""BiGS: the layers as the formulas say, padding that changes nothing, any length, counts of parameters."""

import math

import pytest
import torch
from pydantic import ValidationError

from mambagen.kernels.s4d import s4d_reference
from mambagen.models.bigs import BIGS_SIZES, BIGS_STACK_SIZES, AddNorm, BigsConfig, BigsEncoder, GatedLayer, StackLayer
from tests.models.mixer_cases import randomise

SHAPE = {"d_model": 16, "n_layer": 2, "d_state": 4}
ARCHITECTURES = ["gated", "stack"]
pytestmark = pytest.mark.usefixtures("one_thread")


def encoder(**options):
    torch.manual_seed(0)
    model = BigsEncoder(BigsConfig(**{**SHAPE, **options}))
    randomise(model)
    return model


def tokens(batch=2, length=21):
    return torch.randint(7, 12, (batch, length), generator=torch.Generator().manual_seed(1))


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(x, layer):
    return x @ layer.weight.double().T + layer.bias.double()


def norm(x, layer):
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt()
    return centred / scale * layer.weight.double() + layer.bias.double()


def system(x, ssm):
    dt, A, C, D = (v.to(torch.complex128 if v.is_complex() else torch.float64) for v in ssm.system())
    return s4d_reference(x, dt, A, C, D)[0]


@pytest.mark.parametrize("n_ssm", [1, 4, "channels"])
def test_the_gated_layer_is_its_formula(n_ssm):
    torch.manual_seed(0)
    layer = GatedLayer(BigsConfig(**SHAPE, n_ssm=n_ssm))
    randomise(layer)
    h = torch.randn(2, 19, 16)
    X = norm(h.double(), layer.norm)
    V = gelu(linear(X, layer.v_proj))
    F = gelu(linear(X, layer.f_proj))
    G = gelu(linear(X.flip(1), layer.b_proj))
    F = linear(system(F, layer.forwards), layer.uf_proj)
    G = linear(system(G, layer.backwards), layer.ub_proj).flip(1)
    exact = h + linear(gelu(linear(F * G, layer.u_proj)) * V, layer.o_proj)
    after = AddNorm(16, 1e-5)
    randomise(after)
    h, x = layer(*layer.norm(h), None, after)
    torch.testing.assert_close(h, exact.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x, norm(exact, after).float(), rtol=1e-5, atol=1e-5)


def test_the_stack_layer_is_its_formula():
    torch.manual_seed(0)
    layer = StackLayer(BigsConfig(**SHAPE, architecture="stack"))
    randomise(layer)
    h = torch.randn(2, 19, 16)

    def s4d_layer(x, mixer):
        a, b = linear(gelu(system(x, mixer.ssm)), mixer.out_proj).chunk(2, -1)
        return a * torch.sigmoid(b)

    x = s4d_layer(norm(h.double(), layer.norm), layer.forwards)
    after = h + s4d_layer(x.flip(1), layer.backwards).flip(1)
    exact = after + linear(gelu(linear(norm(after, layer.norm_ff), layer.up_proj)), layer.down_proj)
    after = AddNorm(16, 1e-5)
    randomise(after)
    h, x = layer(*layer.norm(h), None, after)
    torch.testing.assert_close(h, exact.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x, norm(exact, after).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sequence_alone_and_padded_in_a_batch_give_the_same(architecture):
    model = encoder(architecture=architecture)
    lengths, total = [1, 13, 21, 4], 21
    rows = tokens(4, total)
    for side in ("right", "left", "both"):
        first = {"right": [0] * 4, "left": [total - n for n in lengths], "both": [(total - n) // 2 for n in lengths]}
        mask = torch.zeros(4, total, dtype=torch.bool)
        for row, start, n in zip(mask, first[side], lengths, strict=True):
            row[start : start + n] = True
        hidden = model(rows, mask)
        assert torch.isfinite(hidden).all()
        for b, (start, n) in enumerate(zip(first[side], lengths, strict=True)):
            alone = model(rows[b : b + 1, start : start + n])[0]
            torch.testing.assert_close(hidden[b, start : start + n], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_gets_no_gradient_and_gives_none(architecture):
    model = encoder(architecture=architecture)
    mask = torch.ones(1, 21, dtype=torch.bool)
    mask[0, 15:] = False
    gradients = []
    for row, m in ((tokens(1), mask), (tokens(1)[:, :15], None)):
        model.zero_grad()
        hidden = model(row, m)[:, :15]
        (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name in gradients[0]:
        torch.testing.assert_close(
            gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_position_sees_both_sides(architecture):
    model = encoder(architecture=architecture)
    row = tokens(1)
    other = row.clone()
    other[0, 10] = (row[0, 10] - 7 + 1) % 4 + 7
    change = (model(row) - model(other))[0].abs().amax(-1)
    assert (change > 1e-5).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mask_of_ones_is_no_mask_and_ids_may_be_bytes(architecture):
    model = encoder(architecture=architecture)
    row = tokens()
    whole = model(row)
    assert torch.equal(model(row, torch.ones_like(row, dtype=torch.bool)), whole)
    assert torch.equal(model(row.to(torch.uint8)), whole)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_length_runs_and_every_parameter_learns(architecture):
    model = encoder(architecture=architecture)
    for length in (1, 2, 100, 3001):
        assert model(tokens(1, length)).shape == (1, length, 16)
    hidden = model(tokens())
    (hidden * torch.randn_like(hidden)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_stays_near_and_the_residual_stream_is_float32(architecture):
    model = encoder(architecture=architecture)
    whole = model(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        low = model(tokens())
    assert low.dtype == torch.float32
    assert (low - whole).norm() < 0.05 * whole.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_the_fused_passes_in_triton_change_nothing_but_roundings(architecture, low, monkeypatch):
    pytest.importorskip("triton")
    model = encoder(architecture=architecture)
    row = tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = mask[1, 7:] = False
    found = []
    for backend in ("torch", "triton"):
        monkeypatch.setattr("mambagen.models.bigs._sums_later", lambda x, fused=backend == "triton": fused)
        for op in ("gelu", "layer_norm"):
            monkeypatch.setattr(f"mambagen.kernels.{op}.triton_or_torch", lambda *_, chosen=backend: chosen)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            hidden = model(row, mask)
        assert hidden.dtype == torch.float32
        (hidden[mask] * torch.linspace(-1, 1, 16)).sum().backward()
        found.append([hidden[mask].detach(), *(p.grad.clone() for p in model.parameters())])
        if low:  # gradients of single numbers are sums that cancel: all of them together
            found[-1][1:] = [torch.cat([g.flatten() for g in found[-1][1:]])]
    for plain, fused in zip(*found, strict=True):
        assert (fused - plain).norm() <= (0.03 if low else 1e-4) * plain.norm()


def test_it_learns_a_rule_that_needs_both_sides():
    """Each base is the sum of its neighbours' numbers: neither direction alone can know it."""
    torch.manual_seed(0)
    model = BigsEncoder(BigsConfig(d_model=32, n_layer=2, d_state=8))
    head = torch.nn.Linear(32, 4)
    slow = [{**group, "lr": 3e-3 * group["lr_scale"]} for group in model.parameter_groups(0.0)]
    optimiser = torch.optim.AdamW([*slow, {"params": head.parameters()}], lr=3e-3)
    accuracy = 0.0
    for _ in range(150):
        bases = torch.randint(0, 4, (16, 24))
        target = (bases.roll(1, 1) + bases.roll(-1, 1)) % 4
        logits = head(model(bases + 7))[:, 1:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target[:, 1:-1].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        accuracy = (logits.argmax(-1) == target[:, 1:-1]).float().mean().item()
    assert accuracy > 0.9


def closed_form(config):
    """The parameters of an encoder by hand: weights and biases of the projections, norms, systems, embedding."""
    d, f, N = config.d_model, config.feed_forward, config.d_state
    ssm = 1 + 4 * N + d  # dt, A and C (complex), D
    if config.architecture == "gated":
        layer = 3 * d * f + 4 * d * d + (2 * f + 5 * d) + 2 * d + 2 * ssm
    else:
        layer = 4 * d * d + 2 * d * f + (4 * d + f + d) + 4 * d + 2 * ssm
    return config.n_layer * layer + 2 * d + config.padded_vocab_size * d


@pytest.mark.parametrize(
    ("sizes", "size", "count"),
    [
        (BIGS_SIZES, "tiny", 1_294_860),
        (BIGS_SIZES, "base", 84_491_030),
        (BIGS_SIZES, "large", 313_907_758),
        (BIGS_STACK_SIZES, "tiny", 1_196_556),
        (BIGS_STACK_SIZES, "base", 85_092_888),
        (BIGS_STACK_SIZES, "large", 302_389_296),
    ],
)
def test_sizes_have_the_documented_counts(sizes, size, count):
    with torch.device("meta"):
        model = BigsEncoder(sizes[size])
    assert sum(p.numel() for p in model.parameters()) == closed_form(sizes[size]) == count


def test_large_with_berts_vocabulary_is_the_papers_size():
    large = BIGS_SIZES["large"].model_copy(update={"vocab_size": 30_522, "pad_vocab_size_multiple": 1})
    assert closed_form(large) == 345_145_902
    assert 344e6 < closed_form(large) < 346e6


def test_first_weights_come_from_the_global_generator_at_the_published_size():
    model = BigsEncoder(BigsConfig(d_model=256, n_layer=1))
    assert model.layers[0].v_proj.weight.std().item() == pytest.approx(0.04, rel=0.02)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    torch.manual_seed(3)
    first = BigsEncoder(BigsConfig(**SHAPE)).state_dict()
    torch.manual_seed(3)
    again = BigsEncoder(BigsConfig(**SHAPE)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.0.forwards.C"], first["layers.1.forwards.C"])


def test_impossible_configs_are_refused():
    for change in ({"n_ssm": 3}, {"dt_min": 2.0}, {"architecture": "tower"}, {"width": 1}, {"d_ff": 0}):
        with pytest.raises(ValidationError):
            BigsConfig(**{**SHAPE, **change})
