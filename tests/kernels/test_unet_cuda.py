"""The U-Net's CUDA decoder: in the emulator against the reference with the weights it has, and compiled by NVRTC."""

import importlib.util
import struct
from itertools import product

import pytest
import torch

from mambagen.kernels.nvrtc import compile_cubin
from mambagen.kernels.unet_decode import LayerWeights, LevelWeights, Sampling, cuda, make_decoder
from mambagen.kernels.unet_decode.cuda import Layout, pack_rows, source, spread, unsupported_shape
from tests.kernels.emulated_unet import EmulatedUNetDecoder
from tests.kernels.emulator import AVAILABLE
from tests.kernels.test_unet_decode import draw_conditions, draw_tokens_for, draw_weights

emulated = pytest.mark.skipif(not AVAILABLE, reason="needs a C++ compiler on x86-64 Linux")


def unpacked(packed, outputs, inputs):
    """The matrix that `pack_rows` stands for, put together thread by thread as the kernel reads it."""
    lanes, rows = spread(outputs, inputs)
    words = packed.view(torch.int32).view(len(packed), -1, 32, 4, 1)  # (unit, warp, lane, word)
    halves = torch.cat([words << 16, words], -1).view(torch.float32).flatten(3)
    matrix = torch.full((outputs, inputs), torch.nan)
    for unit, warp, lane in product(*map(range, halves.shape[:3])):
        step, of_lane = divmod(unit, rows)
        part, of_warp = divmod(lane, 32 // lanes)
        row = (warp * rows + of_lane) * (32 // lanes) + of_warp
        if row < outputs:
            for half in range(2):
                begin = 4 * ((2 * step + half) * lanes + part)
                matrix[row, begin : begin + 4] = halves[unit, warp, lane, 4 * half : 4 * half + 4]
    return matrix


def rounded(weights):
    """Float64 weights with the matrices that the kernel has; the norms' weights are in them."""

    def of(matrix):
        return unpacked(pack_rows(matrix), *matrix.shape).double()

    def layer(w):
        mixed = of(w.x_proj)
        return LayerWeights(
            **{name: v.double() for name, v in w._asdict().items()}
            | {"norm": torch.ones_like(w.norm).double(), "in_proj": of(w.in_proj * w.norm), "x_proj": mixed}
            | {"out_proj": of(w.out_proj)}
        )

    levels = [
        LevelWeights(
            [layer(w) for w in level.down],
            [layer(w) for w in level.up],
            level.pool,
            of(level.down_weight),
            level.down_bias.double(),
            of(level.up_weight),
            level.up_bias.double(),
        )
        for level in weights.levels
    ]
    return weights._replace(
        embedding=weights.embedding.double(),
        levels=levels,
        centre=[layer(w) for w in weights.centre],
        norm_f=torch.ones_like(weights.norm_f).double(),
        head=of(weights.head * weights.norm_f),
        head_bias=weights.head_bias.double(),
    )


@pytest.mark.parametrize(
    ("outputs", "inputs", "shared", "rows"),
    [(256, 64, 8, 4), (36, 128, 16, 2), (64, 128, 16, 2), (1024, 256, 2, 4), (2048, 512, 1, 4), (44, 24, 1, 1)],
    ids=str,
)
def test_rows_are_the_nearest_and_unpack(outputs, inputs, shared, rows):
    torch.manual_seed(0)
    matrix = torch.randn(outputs, inputs)
    assert spread(outputs, inputs) == (shared, rows)
    warps = -(-outputs * shared // (32 * rows))
    assert warps <= 16
    packed = pack_rows(matrix)
    assert packed.shape == (inputs // (8 * shared) * rows, warps * 512)
    assert ((unpacked(packed, outputs, inputs) - matrix).abs() <= matrix.abs() * 2**-8).all()


@emulated
@pytest.mark.parametrize(
    ("name", "streams", "batch", "memory", "warps"),
    [
        ("two pools", 1, 1, 227, 16),
        ("two pools", 2, 3, 227, 16),
        ("two pools", 2, 2, 227, 8),
        ("wide", 1, 1, 100, 16),
        ("wide", 2, 2, 227, 8),
        ("three stages", 2, 2, 227, 16),
    ],
    ids=["one stream", "two a block", "eight warps", "wide, a short ring", "wide, eight warps", "three stages"],
)
def test_the_kernel_gives_the_reference(monkeypatch, name, streams, batch, memory, warps):
    monkeypatch.setattr(cuda, "WARPS", warps)
    weights = draw_weights(name)
    tokens = draw_tokens_for(batch, 21)
    conditions = draw_conditions(batch, name)  # of every level, others in each stream
    theirs = make_decoder(rounded(weights), batch, "reference")
    theirs.condition(conditions)
    expected = theirs.read(tokens)

    class Decoder(EmulatedUNetDecoder):
        shared_bytes = memory << 10
        seed = 5

    decoder = Decoder(weights, batch, streams)
    decoder.condition(conditions)
    logits = torch.cat([decoder.read(tokens[:, :6]), decoder.read(tokens[:, 6:])], 1)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(decoder.logits.double(), expected[:, -1], rtol=1e-4, atol=5e-5)


@emulated
@pytest.mark.parametrize(
    ("guidance", "streams"), [(None, 1), (2.0, 2), (2.0, 1)], ids=["unguided", "guided", "guided, a block each"]
)
def test_tokens_are_those_of_the_reference(guidance, streams):
    weights, seeds = draw_weights(), torch.tensor([3, 1 << 40])
    ours, theirs = EmulatedUNetDecoder(weights, 2, streams), make_decoder(rounded(weights), 2, "reference")
    made = []
    for decoder in (ours, theirs):
        decoder.condition(draw_conditions(2))
        decoder.read(draw_tokens_for(2, 3))
        made.append([decoder.draw(n, Sampling(0.8, top_p=0.9), seeds, guidance) for n in (2, 16)])
    assert torch.equal(torch.cat(made[0], 1), torch.cat(made[1], 1))


@emulated
def test_guidance_comes_and_goes_on_one_decoder():
    def made(decoder, rows):  # two pairs, and other streams behind them
        decoder.condition(draw_conditions(5)[:rows])
        seeds = torch.tensor([7, 0, 1 << 40, 0, 9])[:rows]
        drawn = [decoder.draw(n, Sampling(0.9), seeds, guidance) for n, guidance in ((1, 3.0), (3, None), (6, 3.0))]
        decoder.read(draw_tokens_for(5, 2)[:rows])
        return torch.cat([*drawn, decoder.draw(7, Sampling(0.9), seeds, 3.0)], 1)[:4], decoder.logits[:4]

    weights = draw_weights()
    expected, _ = made(make_decoder(rounded(weights), 4, "reference"), 4)
    _, exact = made(EmulatedUNetDecoder(weights, 4, 2), 4)
    for seed, (rows, streams) in enumerate([(4, 2), (5, 2), (4, 1), (5, 1), (4, None)]):
        decoder = EmulatedUNetDecoder(weights, rows, streams)
        decoder.seed = seed  # other orders of the two blocks
        tokens, logits = made(decoder, rows)
        assert torch.equal(tokens, expected), (rows, streams)
        assert torch.equal(logits, exact), (rows, streams)


def test_a_block_has_one_stream_while_there_are_multiprocessors():
    def launches(batch, processors=132, shared=227 << 10, **options):
        seen = []

        class Decoder(cuda.CudaDecoder):
            def _chip(self):
                return shared, processors

            def _run(self, parameters, layout):
                seen.append((layout.streams, layout.pairs))

        decoder = Decoder(weights, batch, **options)
        for guidance in (None, 2.0):
            decoder.draw(1, Sampling(), torch.zeros(batch, dtype=torch.int64), guidance)
        return seen

    weights = draw_weights()
    one, two = [(1, False), (1, True)], [(2, False), (2, False)]
    assert launches(2) == launches(131) == launches(132) == one
    assert launches(133) == launches(264) == two
    assert launches(113, processors=113) == two  # an odd stream has a row beside it
    assert launches(200, streams=1) == one
    assert launches(2, streams=2) == two
    assert launches(2, pairs=False) == [(1, False), (2, False)]
    assert launches(200, pairs=True) == [(2, False), (1, True)]
    least = Layout.of(weights, 1, 0, pairs=True).fixed_bytes + cuda.LEAST_SLOTS * cuda.SLOT
    assert Layout.of(weights, 2, 0).fixed_bytes > least - cuda.LEAST_SLOTS * cuda.SLOT
    assert unsupported_shape(weights, least) is None
    assert launches(200, shared=least) == one  # no room for two streams' state
    assert "shared memory" in unsupported_shape(weights, least - 1)


@emulated
def test_a_state_goes_to_the_reference_and_back():
    weights, tokens = draw_weights(), draw_tokens_for(2, 24)
    ours, theirs = EmulatedUNetDecoder(weights, 2), make_decoder(rounded(weights), 2, "reference")
    ours.read(tokens[:, :9])
    theirs.load_state(ours.state())
    expected = theirs.read(tokens[:, 9:])
    torch.testing.assert_close(ours.read(tokens[:, 9:]).double(), expected, rtol=1e-4, atol=5e-5)
    ours.load_state(make_decoder(weights, 2, "reference").state())
    torch.testing.assert_close(ours.read(tokens)[:, 9:].double(), expected, rtol=1e-4, atol=5e-5)


def registers(cubin):
    """Of a thread when the kernel starts, as the driver reads them: the entry 0x2f in the section .nv.info."""
    place, (count, names) = *struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HH", cubin, 0x3C)
    sections = [struct.unpack_from("<II8xQQQ", cubin, place + 64 * i) for i in range(count)]  # ELF64
    for name, _, _, begin, size in sections:
        if cubin.startswith(b".nv.info\0", sections[names][3] + name):
            end = begin + size
            while begin < end:
                form, entry, value = struct.unpack_from("<BBH", cubin, begin)
                if (form, entry) == (4, 0x2F):
                    return struct.unpack_from("<I", cubin, begin + 8)[0]
                begin += 4 + (value if form == 4 else 0)
    raise AssertionError("no count of registers")


@pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="needs cuda-bindings")
@pytest.mark.parametrize(
    ("architecture", "memory", "streams", "pairs", "warps"),
    [
        ("sm_90a", 227, 2, False, 16),
        ("sm_90a", 227, 1, True, 8),
        ("sm_100a", 227, 1, True, 16),
        ("sm_120a", 99, 1, True, 16),
    ],
    ids=["Hopper", "Hopper, pairs, eight warps", "Blackwell", "Blackwell, compute capability 12"],
)
def test_the_published_size_compiles(monkeypatch, architecture, memory, streams, pairs, warps):
    monkeypatch.setattr(cuda, "WARPS", warps)
    layout = Layout((64, 128, 256), (4, 8, 16), (16, 16, 8), (8, 8, 0), (4, 4, 1), 256, streams, memory << 10, pairs)
    assert layout.fits
    assert layout.launch_bytes <= memory << 10
    found = registers(compile_cubin(source(), layout.defines(), architecture))
    if architecture != "sm_120a":  # whose compiler leaves out that warps pass registers on
        # what warps take later (MANY in decode.cu) is made of these: with fewer they would wait for ever
        assert found == {16: 96, 8: 168}[warps]


def test_shapes_that_the_kernel_is_not_for_are_named():
    assert unsupported_shape(draw_weights(), 227 << 10) is None
    assert "16 states" in unsupported_shape(draw_weights("three pools"), 227 << 10)
    assert "multiples of 16" in unsupported_shape(draw_weights("wider than a panel"), 227 << 10)
    assert "shared memory" in unsupported_shape(draw_weights("wide"), 64 << 10)
    weights = draw_weights()
    levels = [weights.levels[0]._replace(pool=129), *weights.levels[1:]]
    assert "2048 outputs" in unsupported_shape(weights._replace(levels=levels), 227 << 10)
