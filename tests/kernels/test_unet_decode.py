"""The decoder of the audio U-Net: the compiled loop against plain torch in float64, draws, batches, machine code."""

import math
import platform
import re

import pytest
import torch
from numba import cfunc, types

from mambagen.kernels.mamba_decode.reference import mixer_step, rms_norm
from mambagen.kernels.unet_decode import (
    LayerWeights,
    LevelWeights,
    Sampling,
    UNetWeights,
    choose_backend,
    graph,
    make_decoder,
)
from mambagen.kernels.unet_decode.cpu_matrix import matrix_product, pack_pairs, pack_panels, unpack_pairs
from mambagen.kernels.unet_decode.reference import ReferenceDecoder, draw_tokens
from tests.capturable import run_uncaptured
from tests.kernels.test_cpu_vectors import loops_with

VOCABULARY = 40
SHAPES = {  # widths, pools, layers, five stages or three, states, taps, rank
    "two pools": ((16, 32, 64), (4, 4), 2, True, 16, 4, 4),
    "wider than a panel": ((72, 80, 96), (2, 3), 1, True, 16, 4, 5),
    "three stages, odd sizes": ((10, 12, 14), (3, 2), 2, False, 5, 2, 1),
    "one pool, one tap": ((8, 8), (5,), 1, True, 3, 1, 3),
    "wide": ((48, 144), (3,), 1, True, 16, 3, 9),
    "three stages": ((16, 32, 48), (2, 3), 1, False, 16, 4, 3),
    "three pools": ((8, 16, 24, 32), (2, 2, 2), 1, True, 4, 3, 2),
}


def draw_weights(name="two pools", dtype=torch.float32):
    widths, pools, layers, five, states, taps, rank = SHAPES[name]
    torch.manual_seed(len(name))

    def matrix(outputs, inputs, scale=1.0):
        return torch.randn(outputs, inputs) * scale * inputs**-0.5

    def layer(width):
        inner = 2 * width
        return LayerWeights(
            1 + 0.2 * torch.randn(width),
            matrix(2 * inner, width),
            torch.randn(inner, taps) * taps**-0.5,
            0.3 * torch.randn(inner),
            matrix(rank + 2 * states, inner),
            matrix(inner, rank),
            torch.randn(inner) - 3,
            torch.log(torch.arange(1.0, states + 1)).repeat(inner, 1) + 0.1 * torch.randn(inner, states),
            1 + 0.2 * torch.randn(inner),
            matrix(width, inner, 0.5),
        )

    levels = [
        LevelWeights(
            [layer(width) for _ in range(layers if five else 0)],
            [layer(width) for _ in range(layers)],
            pool,
            matrix(wider, pool * width),
            0.2 * torch.randn(wider),
            matrix(pool * width, wider),
            0.2 * torch.randn(pool * width),
        )
        for width, wider, pool in zip(widths, widths[1:], pools, strict=False)
    ]
    D = widths[0]
    weights = UNetWeights(
        torch.randn(VOCABULARY, D),
        levels,
        [layer(widths[-1]) for _ in range(layers)],
        1 + 0.2 * torch.randn(D),
        matrix(VOCABULARY, D, 2.0),
        0.3 * torch.randn(VOCABULARY),
        1e-5,
    )
    return cast(weights, dtype)


def cast(weights, dtype):
    """The same numbers, in another precision throughout."""
    if isinstance(weights, torch.Tensor):
        return weights.to(dtype)
    if isinstance(weights, tuple):
        return type(weights)(*(cast(part, dtype) for part in weights))
    return [cast(part, dtype) for part in weights] if isinstance(weights, list) else weights


def draw_tokens_for(batch, steps):
    return torch.randint(0, VOCABULARY, (batch, steps), generator=torch.Generator().manual_seed(3))


def draw_conditions(batch, name="two pools"):
    """Vectors of every level, others in each stream."""
    return torch.randn(batch, sum(draw_weights(name).condition_sizes), generator=torch.Generator().manual_seed(6))


def begun(backend, batch=3, name="two pools", steps=21, precision="float32"):
    decoder = make_decoder(draw_weights(name), batch, backend, precision)
    decoder.condition(draw_conditions(batch, name))
    decoder.read(draw_tokens_for(batch, steps))
    return decoder


# ---- the numbers


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_loop_gives_the_reference_in_float64(name, batch):
    tokens = draw_tokens_for(batch, 60)
    expected = make_decoder(draw_weights(name, torch.float64), batch, "reference").read(tokens)
    ours = make_decoder(draw_weights(name), batch, "cpu", "float32").read(tokens)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=2e-5)
    assert expected.std() > 0.5


@torch.no_grad()
def test_the_reference_is_the_layout_of_its_definition():
    """Two pools of two layers written out, whole sequences at each level with zeros before the first frame."""
    weights = draw_weights(dtype=torch.float64)
    tokens = draw_tokens_for(1, 48)[0]

    def run(layers, x, skips=None):
        kept = [x]
        for w in layers:
            conv, ssm = x.new_zeros(1, w.conv_weight.shape[1] - 1, len(w.D)), x.new_zeros(1, *w.A_log.shape)
            steps = [mixer_step(rms_norm(v[None], w.norm, 1e-5), w, conv, ssm)[0] for v in x]
            x = x + torch.stack(steps)
            if skips:
                x = x + skips.pop()
            kept.append(x)
        return x, kept

    def up(w, y, length):
        frames = (y @ w.up_weight.T + w.up_bias).view(-1, w.up_weight.shape[0] // w.pool)
        return torch.cat([frames.new_zeros(w.pool, frames.shape[1]), frames])[:length]

    first, second = weights.levels
    _, kept0 = run(first.down, weights.embedding[tokens])
    pooled = kept0[-1].view(12, -1) @ first.down_weight.T + first.down_bias
    _, kept1 = run(second.down, pooled)
    deep = kept1[-1].view(3, -1) @ second.down_weight.T + second.down_bias
    deep = run(weights.centre, deep)[0] + deep
    y, _ = run(second.up, up(second, deep, 12) + kept1.pop(), kept1)
    y, _ = run(first.up, up(first, y, 48) + kept0.pop(), kept0)
    expected = rms_norm(y, weights.norm_f, 1e-5) @ weights.head.T + weights.head_bias
    torch.testing.assert_close(make_decoder(weights, 1, "reference").read(tokens[None])[0], expected)


def test_bfloat16_pairs_stay_near_and_are_what_they_stand_for():
    tokens = draw_tokens_for(2, 60)
    exact = make_decoder(draw_weights(), 2, "reference").read(tokens)
    ours = make_decoder(draw_weights(), 2, "cpu", "bfloat16").read(tokens)
    assert 1e-4 < (ours - exact).abs().max() < 0.15


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 1), (130, 7), (36, 128), (256, 64)], ids=str)
def test_pairs_are_the_nearest_and_products_those_of_the_unpacked(outputs, inputs):
    torch.manual_seed(0)
    matrix = torch.randn(outputs, inputs) * torch.randn(outputs, 1).exp()
    matrix[1, 0] = matrix[20 % outputs, 0] = 0
    stands = unpack_pairs(pack_pairs(matrix), outputs, inputs)
    assert ((stands - matrix).abs() <= matrix.abs() * 2**-8 + 1e-18).all()  # half of a last place of 8 bits
    assert (stands - matrix).abs().mean() < 1.1 * (matrix.bfloat16().float() - matrix).abs().mean()
    x, rows = torch.randn(3, inputs), -(-outputs // 64) * 64
    results = []
    for pairs, packed in ((1, pack_pairs(matrix)), (0, pack_panels(stands))):
        for streams in (1, 2, 3):
            y = torch.ones(streams, rows)
            address = (packed.data_ptr(), rows // 64, inputs, x.data_ptr(), 4 * inputs, y.data_ptr(), 4 * rows)
            matrix_product(pairs, *address, streams, True)
            results.append(y[:, :outputs])
            torch.testing.assert_close(y[:, :outputs], x[:streams] @ stands.T + 1, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(y[0], results[0][0]) for y in results)  # bit for bit, with neighbours or without


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_condition_is_added_where_each_level_begins_and_turns_up(name, backend):
    """Each stream is one without a condition whose embeddings, biases and first queues have it in them."""
    weights, exact = draw_weights(name), draw_weights(name, torch.float64)
    conditions, tokens = draw_conditions(3, name), draw_tokens_for(3, 60)
    decoder = make_decoder(weights, 3, backend, "float32")
    decoder.condition(conditions)
    ours = decoder.read(tokens)
    for row, given in enumerate(conditions.double()):
        vectors = given.split(weights.condition_sizes)
        embedding, *downs = vectors[: len(weights.widths)]
        ups = vectors[len(weights.widths) :]
        levels = [
            level._replace(down_bias=level.down_bias + down, up_bias=level.up_bias + up.repeat(level.pool))
            for level, down, up in zip(exact.levels, downs, ups, strict=True)
        ]
        alone = make_decoder(exact._replace(embedding=exact.embedding + embedding, levels=levels), 1, "reference")
        state = alone.state()
        alone.load_state(state._replace(queues=[queue + up for queue, up in zip(state.queues, ups, strict=True)]))
        expected = alone.read(tokens[row : row + 1])[0]
        torch.testing.assert_close(ours[row].double(), expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("steps", [0, 1, 7, 16, 21])
def test_a_state_goes_from_one_backend_to_another_and_back(steps):
    decoder, other = (make_decoder(draw_weights(), 2, backend, "float32") for backend in ("cpu", "reference"))
    tokens = draw_tokens_for(2, 40)
    if steps:
        decoder.read(tokens[:, :steps])
    other.load_state(decoder.state())
    expected = decoder.read(tokens[:, steps:])
    torch.testing.assert_close(other.read(tokens[:, steps:]), expected, rtol=1e-4, atol=1e-5)
    decoder.load_state(make_decoder(draw_weights(), 2, "reference").state())
    torch.testing.assert_close(decoder.read(tokens)[:, steps:], expected, rtol=1e-4, atol=1e-5)


# ---- drawing


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.6}],
    ids=["plain", "greedy", "top k", "top p"],
)
@pytest.mark.parametrize("guidance", [None, 2.5], ids=["unguided", "guided"])
def test_tokens_are_those_of_the_reference(options, guidance):
    seeds = torch.tensor([3, 1 << 40, -5, 7])
    ours, theirs = (
        begun(backend, 4).draw(40, Sampling(**options), seeds, guidance) for backend in ("cpu", "reference")
    )
    assert torch.equal(ours, theirs)
    assert ours.min() >= 0
    assert ours.max() < VOCABULARY
    if guidance is not None:
        assert torch.equal(ours[0::2], ours[1::2])
    else:
        assert len({tuple(row) for row in ours.tolist()}) == 4


def test_guidance_goes_on_from_the_one_to_the_other():
    logits = torch.tensor([[0.0, 2.0, 0.0], [1.0, 1.0, -1.0]])
    count = 20_000
    seeds, where = torch.arange(2 * count), torch.zeros(2 * count, dtype=torch.long)
    drawn = draw_tokens(logits.repeat(count, 1), Sampling(), seeds, where, 3.0)[::2]
    expected = torch.tensor([-2.0, 4.0, 2.0]).softmax(0)  # free + 3 (asked - free)
    assert (torch.bincount(drawn, minlength=3) / count - expected).abs().max() < 4 * 0.5 / math.sqrt(count)


@pytest.mark.parametrize("guidance", [None, 1.5], ids=["unguided", "guided"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_stream_does_not_depend_on_the_batch_or_on_calls(guidance, precision):
    batch = 36  # more than one task
    tokens, seeds = draw_tokens_for(batch, 9), torch.arange(batch) + 5
    whole = make_decoder(draw_weights(), batch, "cpu", precision)
    whole.read(tokens)
    expected = whole.draw(30, Sampling(), seeds, guidance)
    for rows in (slice(0, 2), slice(34, 36), slice(10, 16)):
        decoder = make_decoder(draw_weights(), rows.stop - rows.start, "cpu", precision)
        decoder.read(tokens[rows, :4])
        decoder.read(tokens[rows, 4:])
        drawn = [decoder.draw(n, Sampling(), seeds[rows], guidance) for n in (1, 19, 10)]
        assert torch.equal(torch.cat(drawn, 1), expected[rows])


def test_threads_do_not_change_the_numbers():
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(begun("cpu", 5, precision="bfloat16").draw(50, Sampling(), torch.arange(5)))
    torch.set_num_threads(1)
    assert torch.equal(*found)


@pytest.mark.parametrize("guidance", [None, 2.0], ids=["unguided", "guided"])
def test_graphs_are_made_of_the_same_steps(monkeypatch, guidance):
    captured = run_uncaptured(monkeypatch)
    tokens, seeds = draw_tokens_for(2, 7), torch.tensor([4, 5])
    made = []
    for decoder in (graph.GraphDecoder(draw_weights(), 2, "float32"), make_decoder(draw_weights(), 2, "reference")):
        decoder.condition(draw_conditions(2))
        read = decoder.read(tokens)
        drawn = [decoder.draw(n, Sampling(), seeds, guidance) for n in (3, 40, 1)]
        decoder.load_state(decoder.state())
        made.append((read, torch.cat([*drawn, decoder.draw(20, Sampling(), seeds, guidance)], 1)))
    torch.testing.assert_close(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])
    assert len(captured) == 2 + 4  # reading: two depths met; drawing: three depths and a whole cycle


# ---- what cannot be


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: make_decoder(w, 0), "batch 0 is less"),
        (lambda w: make_decoder(w, 1, "gpu"), "backend 'gpu' is not one of"),
        (lambda w: make_decoder(w, 1, "graph"), "the weights are on cpu"),
        (lambda w: make_decoder(w, 1, "cpu", "int4"), "precision 'int4'"),
        (lambda w: make_decoder(cast(w, torch.float64), 1, "cpu"), "float64 runs on the reference only"),
    ],
    ids=["batch", "name", "device", "precision", "dtype"],
)
def test_what_cannot_run_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(draw_weights())


def test_auto_takes_the_loop_for_float32_and_the_reference_for_float64():
    assert choose_backend(draw_weights()) == "cpu"
    assert choose_backend(draw_weights(dtype=torch.float64)) == "reference"
    assert isinstance(make_decoder(draw_weights(dtype=torch.float64)), ReferenceDecoder)


# ---- the machine code


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86 assembly")
def test_the_machine_code_is_vectors_and_calls_no_mathematics_library():
    from mambagen.kernels.unet_decode.cpu import _layer

    assembly = cfunc(types.void(*[types.int64] * 6), error_model="numpy")(_layer)._library.get_asm_str()
    opcodes = re.findall(r"^\s+(v?[a-z0-9]+)\s+", assembly, re.MULTILINE)
    scalar = [op for op in opcodes if re.fullmatch(r"v?(add|sub|mul|div|max|min|sqrt|fn?m(add|sub)\d+)s[sd]", op)]
    assert len(scalar) < 8  # the root of the norm, once a stream
    assert not re.search(r"[$ @](v?(exp|exp2|expm1|log|log2|log1p|pow|fma|ldexp)f?)\b", assembly)
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("loops are counted in 512-bit registers")
    fused = r"vfmadd\d+ps.*zmm"
    shares = set()
    for loop in loops_with(assembly, fused):
        products = sum(bool(re.search(fused, line)) for line in loop)
        if products in (8, 16, 32) and not any(re.search(r"%zmm\d+, .*\(", line) for line in loop):
            shares.add(sum("vpslld" in line for line in loop) / products)  # a matrix: all sums stay in registers
    assert shares >= {0, 1 / 4, 1 / 2}  # float32; pairs, each converted once for two streams; and for one
