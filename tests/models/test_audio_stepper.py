"""The stepper of the audio U-Net: against the model itself, its prompts, classes, guidance, snapshots and refusals."""

import pytest
import torch
import torch.nn.functional as F

from mambagen.errors import UsageError
from mambagen.models.audio_stepper import MIDDLE, Stepper
from mambagen.models.audio_unet import AudioUNet, AudioUNetConfig
from mambagen.models.cpu_linear import OneDnnLinear
from tests.models.mixer_cases import randomise

BACKENDS = ["cpu", "reference", "eager"]
CLASSES = [0, 2, 3]


def build(**fields):
    torch.manual_seed(0)
    model = AudioUNet(AudioUNetConfig(**{"d_model": 16, "n_layer": 2, "d_state": 8, "classes": 3, **fields}), seed=0)
    randomise(model)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def prompt():
    return torch.randint(0, 256, (3, 70), generator=torch.Generator().manual_seed(0))


def begun(model, prompt, backend="cpu", precision="float32", classes=CLASSES):
    stepper = Stepper(model, len(prompt), backend, precision)
    stepper.prefill(prompt, classes)
    return stepper


@torch.no_grad()
def logits_of(model, samples, classes=CLASSES):
    """(batch, length + 1, 256): those of every sample, and of the one after the last."""
    return model(F.pad(samples.long(), (1, 0), value=MIDDLE), None, torch.tensor(classes))[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_in_any_pieces_gives_the_logits_of_the_model(model, prompt, backend):
    expected = logits_of(model, prompt)
    stepper = Stepper(model, 3, backend, "float32")
    torch.testing.assert_close(stepper.prefill(None, CLASSES), expected[:, 0], rtol=1e-4, atol=1e-5)
    position = 0
    for length in (1, 15, 17, 3, 33, 1):  # by steps and by passes, from every phase of the cycle
        logits = stepper.prefill(prompt[:, position : position + length])
        position += length
        torch.testing.assert_close(logits, expected[:, position], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stepper.logits, logits)
    assert stepper.position == 70


@pytest.mark.parametrize("backend", BACKENDS)
def test_reading_by_steps_gives_the_logits_before_each_sample(model, prompt, backend):
    expected = logits_of(model, prompt)
    stepper = Stepper(model, 3, backend, "float32")
    stepper.prefill(None, CLASSES)
    pieces = [stepper.read(prompt[:, :33]), stepper.read(prompt[:, 33:])]
    torch.testing.assert_close(torch.cat(pieces, 1), expected[:, :-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stepper.logits, expected[:, -1], rtol=1e-4, atol=1e-5)
    assert torch.equal(stepper.generate(5, guidance=2.0), begun(model, prompt, backend).generate(5, guidance=2.0))


@pytest.mark.parametrize("bias", [True, False])
def test_products_by_onednn_are_those_of_torch(bias):
    x, layer = torch.randn(2, 40, 24), torch.nn.Linear(24, 36, bias=bias)
    with torch.no_grad():
        expected = layer(x)
        with OneDnnLinear():
            torch.testing.assert_close(layer(x), expected)
            assert torch.equal(layer(x[:1, :3]), layer(x[:1, :3]))
            assert layer.double()(x.double()).dtype == torch.float64
    layer.float()
    with OneDnnLinear():  # where gradients are wanted torch's own is used
        layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_samples_are_the_models_likeliest(model, prompt, backend):
    stepper = begun(model, prompt, backend)
    made = torch.cat([stepper.generate(n, temperature=0) for n in (5, 28)], 1)
    assert made.dtype == torch.uint8
    assert made.shape == (3, 33)
    logits = logits_of(model, torch.cat([prompt, made], 1))[:, 70:-1]
    assert (logits.gather(-1, made.long()[..., None])[..., 0] >= logits.amax(-1) - 1e-4).all()
    assert stepper.position == 103


@torch.no_grad()
def test_the_published_size_stays_with_the_forward_over_sixteen_thousand_samples():
    model = AudioUNet(AudioUNetConfig(), seed=0).eval()
    stepper = Stepper(model, 1, "cpu", "float32")
    made = stepper.generate(16_000, temperature=0.9, seeds=[4])
    last = stepper.logits
    tokens = F.pad(made.long(), (1, 0), value=MIDDLE)
    state, behind = model.allocate_state(1), None
    for chunk in tokens.split(4000, 1):
        behind, state = model.backbone(chunk, state)
    torch.testing.assert_close(last, model.head(behind[:, -1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_samples_do_not_depend_on_calls_or_on_the_batch(model, prompt, backend, guidance):
    options = {"temperature": 0.8, "top_p": 0.9, "guidance": guidance}
    whole = begun(model, prompt, backend).generate(24, seeds=[7, 8, 9], **options)
    pieces = begun(model, prompt, backend)
    assert torch.equal(torch.cat([pieces.generate(n, seeds=[7, 8, 9], **options) for n in (1, 7, 16)], 1), whole)
    for row in range(3):
        alone = begun(model, prompt[row : row + 1], backend, classes=CLASSES[row : row + 1])
        assert torch.equal(alone.generate(24, seeds=[7 + row], **options)[0], whole[row])
    assert not torch.equal(begun(model, prompt, backend).generate(24, seeds=[17, 18, 19], **options), whole)


def test_backends_make_the_same_samples(model, prompt):
    made = [begun(model, prompt, backend).generate(40, seeds=[1, 2, 3]) for backend in BACKENDS]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_bfloat16_matrices_stay_near(model, prompt):
    exact, near = (begun(model, prompt, precision=p).prefill(prompt[:, :16]) for p in ("float32", "bfloat16"))
    assert 1e-5 < (exact - near).abs().max() < 0.1


def test_guidance_moves_away_from_the_logits_without_a_class(model, prompt):
    """Greedy, with a strength so large that only the difference of the two counts."""
    made = begun(model, prompt).generate(1, temperature=0, guidance=100.0)[:2, 0]
    asked, free = (logits_of(model, prompt, classes)[:2, -1] for classes in (CLASSES, [3, 3, 3]))
    assert torch.equal(made.long(), (free + 100 * (asked - free)).argmax(-1))
    one = begun(model, prompt).generate(20, temperature=0, guidance=2.0)
    free = begun(model, prompt, classes=[3, 3, 3]).generate(20, temperature=0, guidance=2.0)
    assert torch.equal(one[2], free[2])  # the third has no class: guidance changes nothing
    assert torch.equal(one[2], begun(model, prompt).generate(20, temperature=0)[2])


def test_guidance_may_be_turned_on_before_the_first_sample_only(model, prompt):
    stepper = begun(model, prompt)
    stepper.generate(3)
    with pytest.raises(UsageError, match="from the first call"):
        stepper.generate(3, guidance=2.0)
    stepper.reset()
    assert stepper.position == 0
    stepper.prefill(prompt, CLASSES)
    assert torch.equal(stepper.generate(5, guidance=2.0), begun(model, prompt).generate(5, guidance=2.0))
    stepper.generate(5, guidance=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_snapshot_brings_the_streams_back(model, prompt, backend, guidance):
    stepper = begun(model, prompt, backend)
    stepper.generate(5, guidance=guidance)
    there = stepper.snapshot()
    expected = stepper.generate(20, guidance=guidance)
    assert not torch.equal(stepper.generate(20, guidance=guidance), expected)
    stepper.restore(there)
    assert stepper.position == 75
    assert torch.equal(stepper.generate(20, guidance=guidance), expected)
    stepper.reset()
    stepper.restore(there)
    assert torch.equal(stepper.generate(20, guidance=guidance), expected)
    stepper.restore(there)
    assert not torch.equal(stepper.generate(20, seeds=[5, 6, 7], guidance=guidance), expected)


@pytest.mark.parametrize("fields", [{}, {"outer": "s4+mlp", "ssm_state": 4}], ids=["mamba", "s4 outside"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_some_streams_of_a_snapshot_go_on_elsewhere(fields, prompt, guidance):
    model = build(**fields)
    stepper = begun(model, prompt, "auto")
    stepper.generate(6, guidance=guidance)
    there = stepper.snapshot().rows([2, 0])
    expected = stepper.generate(20, seeds=[4, 5, 6], guidance=guidance)
    other = Stepper(model, 2, precision="float32")
    other.restore(there)
    assert other.position == 76
    assert torch.equal(other.generate(20, seeds=[6, 4], guidance=guidance), expected[[2, 0]])


@pytest.mark.parametrize(
    "fields",
    [
        {"outer": "s4+mlp", "centre": "s4+mlp", "ssm_state": 4},
        {"outer": "s4d+mlp", "centre": "mamba", "ssm_state": 4},
        {"outer": "mamba", "centre": "attention+mlp", "attention_window": 3},
        {"stages": 3, "pool": (4, 3), "n_layer": 1, "d_model": 12},
    ],
    ids=["s4", "s4d outside", "attention in the centre", "three stages"],
)
def test_every_model_can_be_stepped(fields, prompt):
    model = build(**fields, classes=0)
    stepper = Stepper(model, 3)
    assert stepper.backend == ("cpu" if "stages" in fields else "reference")
    stepper = Stepper(model, 3, precision="float32")
    stepper.prefill(prompt)
    made = stepper.generate(20, temperature=0).long()
    with torch.no_grad():
        logits, _ = model(F.pad(torch.cat([prompt, made], 1), (1, 0), value=MIDDLE))
    logits = logits[:, 70:-1]
    assert (logits.gather(-1, made[..., None])[..., 0] >= logits.amax(-1) - 1e-4).all()


@pytest.mark.parametrize("fields", [{}, {"outer": "s4+mlp", "ssm_state": 4}], ids=["mamba", "s4 outside"])
def test_training_afterwards_is_not_seen(fields, prompt):
    copy = build(**fields)
    stepper = begun(copy, prompt, "auto")
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.mul_(1.5)
    assert torch.equal(stepper.generate(9), begun(build(**fields), prompt, "auto").generate(9))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.generate(0), "steps: 0"),
        (lambda s: s.generate(1, temperature=-1.0), "temperature"),
        (lambda s: s.generate(1, top_k=0), "top_k"),
        (lambda s: s.generate(1, top_p=0.0), "top_p"),
        (lambda s: s.generate(1, seeds=[1, 2]), "seeds: needs 3"),
        (lambda s: s.generate(1, guidance=-1.0), "guidance: -1.0 is outside"),
        (lambda s: s.generate(1, guidance=float("nan")), "guidance: nan is outside"),
        (lambda s: s.prefill(torch.zeros(2, 5)), "batch of 3"),
        (lambda s: s.prefill(torch.zeros(3, 0)), "needs .batch, length."),
        (lambda s: s.prefill(torch.full((3, 2), 256)), "outside the 256 levels"),
        (lambda s: s.prefill(None, [0, 1]), "classes: needs 3"),
        (lambda s: s.prefill(None, [0, 1, 4]), "are 0 to 2, or 3 for none"),
    ],
    ids=lambda v: v if isinstance(v, str) else "call",
)
def test_what_cannot_be_is_refused(model, call, message):
    with pytest.raises(UsageError, match=message):
        call(Stepper(model, 3))


def test_classes_of_a_model_without_them_are_refused():
    stepper = Stepper(build(classes=0), 2)
    with pytest.raises(UsageError, match="not conditional"):
        stepper.prefill(None, [0, 1])
    with pytest.raises(UsageError, match="not conditional"):
        stepper.generate(3, guidance=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch: 0"),
        ({"backend": "fpga"}, "backend: 'fpga' is not one of"),
        ({"backend": "graph"}, "the weights are on cpu"),
        ({"precision": "int4"}, "precision: 'int4'"),
    ],
    ids=["batch", "backend", "device", "precision"],
)
def test_a_stepper_that_cannot_be_made_is_refused(model, options, message):
    with pytest.raises(UsageError, match=message):
        Stepper(model, **options)


def test_a_compiled_backend_wants_mamba_everywhere():
    with pytest.raises(UsageError, match="Mamba layers only; this one is s4d outside"):
        Stepper(build(outer="s4d"), 1, "cpu")
    with pytest.raises(UsageError, match="'graph' cannot run this: the weights are on cpu"):
        Stepper(build(outer="s4d"), 1, "graph")
