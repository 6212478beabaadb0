"""The U-Net's CUDA decoder: in the emulator against the reference with the weights it has, and compiled by NVRTC."""

import importlib.util
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
@pytest.mark.parametrize("guidance", [None, 2.0], ids=["unguided", "guided"])
def test_tokens_are_those_of_the_reference(guidance):
    weights, seeds = draw_weights(), torch.tensor([3, 1 << 40])
    ours, theirs = EmulatedUNetDecoder(weights, 2), make_decoder(rounded(weights), 2, "reference")
    made = []
    for decoder in (ours, theirs):
        decoder.condition(draw_conditions(2))
        decoder.read(draw_tokens_for(2, 3))
        made.append([decoder.draw(n, Sampling(0.8, top_p=0.9), seeds, guidance) for n in (2, 16)])
    assert torch.equal(torch.cat(made[0], 1), torch.cat(made[1], 1))


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


@pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="needs cuda-bindings")
def test_the_published_size_compiles_for_hopper():
    layout = Layout((64, 128, 256), (4, 8, 16), (16, 16, 8), (8, 8, 0), (4, 4, 1), 256, 2, 227 << 10)
    assert layout.slots >= 8
    assert layout.launch_bytes <= 227 << 10
    assert len(compile_cubin(source(), layout.defines(), "sm_90")) > 10_000


def test_shapes_that_the_kernel_is_not_for_are_named():
    assert unsupported_shape(draw_weights(), 227 << 10) is None
    assert "16 states" in unsupported_shape(draw_weights("three pools"), 227 << 10)
    assert "multiples of 16" in unsupported_shape(draw_weights("wider than a panel"), 227 << 10)
    assert "shared memory" in unsupported_shape(draw_weights("wide"), 64 << 10)
    weights = draw_weights()
    levels = [weights.levels[0]._replace(pool=129), *weights.levels[1:]]
    assert "2048 outputs" in unsupported_shape(weights._replace(levels=levels), 227 << 10)
