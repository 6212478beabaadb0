"""Decoding of plain weights: backends against float64, draws against their definition, the CUDA kernel emulated."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.check_decode import rounded, to_double
from mambagen.kernels.mamba_decode import LayerWeights, Sampling, StackWeights, make_decoder, why_not
from mambagen.kernels.mamba_decode.cuda import CudaDecoder, Layout, fragments, source, unsupported_shape
from mambagen.kernels.mamba_decode.reference import ReferenceDecoder, draw_tokens, uniform
from tests.kernels.emulated_decoder import EmulatedDecoder
from tests.kernels.emulator import AVAILABLE
from tests.kernels.helpers import relative_error

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
needs_emulator = pytest.mark.skipif(not AVAILABLE, reason="needs a C++ compiler on x86-64 Linux")

GREEDY, PLAIN = Sampling(temperature=0), Sampling(seed=5)
TOP_K, NUCLEUS = Sampling(0.7, top_k=3, seed=1 << 40), Sampling(2.0, top_p=0.6)
BOTH = Sampling(1.5, top_k=5, top_p=0.8, seed=-3)
OPTIONS = {"greedy": GREEDY, "plain": PLAIN, "top k": TOP_K, "nucleus": NUCLEUS, "both": BOTH}


def draw_weights(
    width: int = 64, layers: int = 2, vocabulary: int = 16, states: int = 16, taps: int = 4, rank: int | None = None
) -> StackWeights:
    """Weights of the size that a trained model has, none of them at a one or a zero which would hide its use."""
    make = torch.Generator().manual_seed(0)
    inner, rank = 2 * width, rank or math.ceil(width / 16)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=make) * scale + mean

    def layer() -> LayerWeights:
        return LayerWeights(
            normal(width, scale=0.2, mean=1),
            normal(2 * inner, width, scale=width**-0.5),
            normal(inner, taps, scale=taps**-0.5),
            normal(inner, scale=0.1),
            normal(rank + 2 * states, inner, scale=inner**-0.5),
            normal(inner, rank, scale=rank**-0.5),
            normal(inner, mean=-3),
            torch.arange(1, states + 1).float().log() + normal(inner, states, scale=0.2),
            normal(inner, scale=0.2, mean=1),
            normal(width, inner, scale=(inner * layers) ** -0.5),
        )

    head = normal(vocabulary, width, scale=width**-0.5)
    layered = [layer() for _ in range(layers)]
    return StackWeights(normal(vocabulary, width, scale=0.5), layered, normal(width, scale=0.2, mean=1), head, 1e-5)


def random_tokens(batch: int, steps: int, vocabulary: int = 12) -> Tensor:
    return torch.randint(0, vocabulary, (batch, steps), generator=torch.Generator().manual_seed(1))


def allow(weights: StackWeights, count: int) -> Tensor:
    bias = torch.full((len(weights.head),), -math.inf)
    bias[:count] = 0
    return bias


def read_in_float64(weights: StackWeights, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits after each token, and the state after the last."""
    exact = ReferenceDecoder(to_double(weights), len(tokens))
    after = exact.read(tokens)
    conv, ssm = exact.state()
    return after, [*conv, *ssm]


# ---- the draw


def test_the_random_number_is_philox():
    """The generator's published known answer for a counter and key of zero, and numbers that use all its words."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert uniform(0, zero, zero).item() == (0x6627E8D5 >> 8) / 2**24
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1 << 32, 0, 0), (0, 1 << 32, 0), (-1, 5, 6)]
    found = {uniform(seed, zero + position, zero + stream).item() for seed, position, stream in places}
    assert len(found) == len(places)
    many = uniform(3, torch.arange(100_000), torch.zeros(100_000, dtype=torch.int64))
    assert many.min() >= 0
    assert many.max() < 1
    assert abs(many.mean().item() - 0.5) < 4 * 12**-0.5 / 100_000**0.5


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "greedy"])
def test_shares_of_drawn_tokens_follow_the_options(name):
    sampling, count = OPTIONS[name], 40_000
    logits = torch.tensor([0.3, 1.0, -0.5, 1.0, 0.9, -math.inf, 0.2, 1.5]).double()
    kept = logits / sampling.temperature
    if sampling.top_k is not None:  # the two ones are equal: the lower id stays
        kept[logits.sort(descending=True, stable=True).indices[sampling.top_k :]] = -math.inf
    expected = kept.softmax(-1)
    if sampling.top_p < 1:
        order = logits.sort(descending=True, stable=True).indices
        before = expected[order].cumsum(0) - expected[order]
        expected[order[before >= sampling.top_p]] = 0
        expected /= expected.sum()
    positions = torch.arange(count)
    tokens = draw_tokens(logits.expand(count, -1), sampling, positions, torch.full_like(positions, 7))
    share = torch.bincount(tokens, minlength=8) / count
    assert (share - expected).abs().max() < 4 * 0.5 / math.sqrt(count)
    assert (share[expected == 0] == 0).all()


class OneLayer:
    """A decoder whose logits are set from outside, for the draw alone."""

    def __init__(self, backend: type | str, vocabulary: int, batch: int) -> None:
        self.weights = draw_weights(16, 1, vocabulary)
        self.decoder = (
            make_decoder(self.weights, batch, backend) if isinstance(backend, str) else backend(self.weights, batch)
        )

    def draw(self, logits: Tensor, *arguments: object) -> Tensor:
        self.decoder.logits.copy_(logits)
        return self.decoder.draw(1, *arguments)[:, 0]


@pytest.mark.parametrize("vocabulary", [16, 300])
@pytest.mark.parametrize("backend", ["cpu", pytest.param("emulated", marks=needs_emulator)])
def test_compiled_draws_are_those_of_the_definition(backend, vocabulary):
    """Random logits with ties and forbidden ids; a float32 sum may take a neighbour once in thousands."""
    batch = 400 if backend == "cpu" else 16
    subject = OneLayer(EmulatedDecoder if backend == "emulated" else backend, vocabulary, batch)
    logits = torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(0)).mul(8).round() / 4
    streams, bias = torch.arange(batch) * 1_000_003, allow(subject.weights, vocabulary - 3)
    extremes = (Sampling(1e-30), Sampling(1, top_k=1), Sampling(1, top_p=1e-9), Sampling(3, 10_000))
    for sampling in (*OPTIONS.values(), *extremes):
        expected = draw_tokens((logits + bias).double(), sampling, torch.full_like(streams, (1 << 33) + 5), streams)
        found = subject.draw(logits, sampling, bias, (1 << 33) + 5, streams)
        assert (found != expected).float().mean() <= 2 / 400


# ---- steps


@pytest.mark.parametrize(
    ("batch", "options"),
    [
        (1, {}),
        (2, {"width": 16, "layers": 3}),
        (7, {"width": 72, "layers": 1, "vocabulary": 300}),
        (33, {"width": 24, "states": 5, "taps": 2}),
        (3, {"width": 40, "states": 1, "taps": 1, "rank": 7}),
    ],
)
def test_cpu_steps_agree_with_float64(batch, options):
    weights = draw_weights(**options)
    tokens = random_tokens(batch, 40)
    decoder = make_decoder(weights, batch, "cpu")
    after, state = read_in_float64(weights, tokens)
    assert relative_error(decoder.read(tokens), after) < 1e-5
    assert relative_error(decoder.logits, after[:, -1]) < 1e-5
    conv, ssm = decoder.state()
    for found, exact in zip([*conv, *ssm], state, strict=True):
        assert relative_error(found, exact) < 1e-5


@pytest.mark.parametrize("name", OPTIONS)
def test_cpu_loop_draws_what_step_by_step_would(name):
    weights = draw_weights(vocabulary=16)
    bias, streams = allow(weights, 12), torch.tensor([4, 9, 2])
    loops, steps = make_decoder(weights, 3, "cpu"), make_decoder(weights, 3, "cpu")
    for decoder in (loops, steps):
        decoder.read(random_tokens(3, 2))
    tokens = loops.draw(30, OPTIONS[name], bias, 100, streams)
    one_by_one = []
    for i in range(30):
        token = draw_tokens((steps.logits + bias).double(), OPTIONS[name], torch.full((3,), 100 + i), streams)
        steps.read(token[:, None])
        one_by_one.append(token)
    assert torch.equal(tokens, torch.stack(one_by_one, 1))
    assert torch.equal(loops.logits, steps.logits)


@pytest.mark.parametrize("backend", ["cpu", "reference", pytest.param("cuda", marks=needs_gpu)])
def test_a_state_put_back_goes_on_as_before(backend):
    weights = on_device(draw_weights(), backend)
    tokens = random_tokens(2, 12).to(weights.embedding.device)
    decoder, other = make_decoder(weights, 2, backend), make_decoder(weights, 2, backend)
    decoder.read(tokens[:, :5])
    other.load_state(*decoder.state())
    assert torch.equal(decoder.read(tokens[:, 5:]), other.read(tokens[:, 5:]))


def on_device(weights: StackWeights, backend: str) -> StackWeights:
    device = "cuda" if backend in ("cuda", "graph") else "cpu"
    layers = [LayerWeights(*(v.to(device) for v in layer)) for layer in weights.layers]
    embedding, norm_f, head = (v.to(device) for v in (weights.embedding, weights.norm_f, weights.head))
    return StackWeights(embedding, layers, norm_f, head, weights.epsilon)


# ---- the CUDA kernel, emulated: lengths of the ring, clusters, streams, divided heads


def emulate(weights: StackWeights, batch: int, shared_kb: int = 227, **options: object) -> EmulatedDecoder:
    subject = type("Emulated", (EmulatedDecoder,), {"shared_bytes": shared_kb << 10})
    decoder: EmulatedDecoder = subject(weights, batch, **options)
    return decoder


@needs_emulator
@pytest.mark.parametrize(
    ("batch", "options", "model"),
    [
        (1, {"cluster": 4, "streams": 1, "precision": "float32"}, {}),
        (5, {"cluster": 2, "streams": 4, "precision": "float32"}, {"layers": 1}),
        (2, {"cluster": 4, "streams": 1, "shared_kb": 72}, {"layers": 4}),  # a ring that is used again and again
        (8, {"cluster": 1, "streams": 8}, {"width": 40, "taps": 3, "rank": 7}),
        (2, {"cluster": 4, "streams": 2, "precision": "float32"}, {"vocabulary": 300}),  # the head in parts
    ],
)
def test_cuda_kernel_emulated_agrees_with_float64(batch, options, model):
    weights = draw_weights(**model)
    tokens = random_tokens(batch, 5)
    low = options.get("precision") != "float32"
    decoder = emulate(weights, batch, **options)
    assert decoder.layout.resident == ("shared_kb" not in options)
    after, state = read_in_float64(rounded(weights) if low else weights, tokens)
    assert relative_error(decoder.read(tokens), after) < 3e-5
    conv, ssm = decoder.state()
    for found, exact in zip([*conv, *ssm], state, strict=True):
        assert relative_error(found, exact) < 1e-4
    bias, streams = allow(weights, 12), torch.arange(batch)
    exact = ReferenceDecoder(weights, batch)
    exact.load_state(conv, ssm)
    exact.logits.copy_(decoder.logits)
    first = exact.draw(1, PLAIN, bias, 5, streams)
    assert torch.equal(decoder.draw(4, PLAIN, bias, 5, streams)[:, :1], first)


@needs_emulator
def test_cuda_kernel_emulated_does_not_depend_on_the_order_of_its_warps():
    weights, tokens = draw_weights(layers=4), random_tokens(2, 6)
    found = []
    for seed in range(3):
        decoder = emulate(weights, 2, cluster=4, streams=1, shared_kb=72)
        decoder.seed = seed
        found.append(decoder.read(tokens))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_emulator
def test_cuda_kernel_emulated_gives_a_stream_the_same_numbers_in_any_company():
    weights, tokens = draw_weights(layers=1), random_tokens(6, 4)
    alone = emulate(weights, 1, cluster=2, streams=1, precision="float32").read(tokens[4:5])
    together = emulate(weights, 6, cluster=2, streams=4, precision="float32").read(tokens)
    assert torch.equal(alone[0], together[4])


def test_fragments_are_what_the_lanes_of_a_product_hold():
    matrix = torch.arange(32 * 48).float().view(32, 48) % 256  # exact in bfloat16
    packed = fragments(matrix, 1)
    assert packed.shape == (3, 2, 1, 32, 8)
    for step, tile, lane in ((0, 0, 0), (2, 1, 31), (1, 0, 13)):
        g, q = lane // 4, lane % 4
        rows, columns = tile * 16 + 2 * g, step * 16 + 4 * q
        held = [(rows, columns), (rows, columns + 1), (rows + 1, columns), (rows + 1, columns + 1)]
        held += [(row, column + 2) for row, column in held]
        assert packed[step, tile, 0, lane].tolist() == [matrix[place].item() for place in held]
    fine = torch.randn(16, 16)
    high, low = fragments(fine, 2).float().sum((0, 1, 3, 4)), fine.sum()
    assert abs(high.sum() - low) < 1e-3


@pytest.mark.parametrize(("width", "layers", "streams"), [(64, 8, 1), (256, 12, 8), (512, 2, 8)])
def test_cuda_kernel_compiles_for_hopper_without_a_gpu(width, layers, streams):
    pytest.importorskip("cuda.bindings.nvrtc")
    from mambagen.kernels.nvrtc import compile_cubin

    weights = draw_weights(width, layers)
    layout = Layout.of(weights, streams, 1, 227 << 10)
    assert layout.launch_bytes <= 227 << 10
    assert unsupported_shape(weights, 227 << 10) is None
    assert compile_cubin(source(), layout.defines(), "sm_90a")


def test_what_a_backend_cannot_do_is_said():
    weights = draw_weights(states=8)
    assert why_not("cuda", weights) == "the weights are on cpu"
    with pytest.raises(ValueError, match="cannot run this: the weights are on cpu"):
        make_decoder(weights, 1, "graph")
    with pytest.raises(ValueError, match="batch 0"):
        make_decoder(weights, 0)
    with pytest.raises(ValueError, match="not one of"):
        make_decoder(weights, 1, "tpu")
    with pytest.raises(ValueError, match="precision"):
        make_decoder(weights, 1, precision="int8")
    assert isinstance(make_decoder(to_double(weights), 1), ReferenceDecoder)
    wide, narrow = draw_weights(width=768, layers=1), draw_weights(states=8)
    assert "d_model 768 needs more than" in str(unsupported_shape(wide, 227 << 10))
    assert "8 states" in str(unsupported_shape(narrow, 227 << 10))
    assert "vocabulary of 2000" in str(unsupported_shape(draw_weights(vocabulary=2000), 227 << 10))


# ---- on a GPU


@pytest.fixture
def gpu_shapes() -> Iterator[tuple[dict[str, int], int]]:
    return iter([({"width": 64, "layers": 8}, 1), ({"width": 256, "layers": 3}, 3), ({"width": 256, "layers": 2}, 128)])


@needs_gpu
@pytest.mark.gpu
def test_cuda_kernel_agrees_with_float64(gpu_shapes):
    for model, batch in gpu_shapes:
        weights = draw_weights(**model)
        tokens = random_tokens(batch, 50)
        after, _ = read_in_float64(weights, tokens)
        decoder = CudaDecoder(on_device(weights, "cuda"), batch, "float32")
        assert relative_error(decoder.read(tokens.cuda()), after) < 1e-4


@needs_gpu
@pytest.mark.gpu
def test_graph_of_plain_operations_agrees_with_float64():
    weights, tokens = draw_weights(), random_tokens(3, 20)
    after, _ = read_in_float64(weights, tokens)
    decoder = make_decoder(on_device(weights, "graph"), 3, "graph")
    assert relative_error(decoder.read(tokens.cuda()), after) < 1e-4
