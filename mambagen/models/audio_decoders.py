"""Decoders of audio U-Nets with any mixer, for `mambagen.models.audio_stepper`; their state is the model's own.

EagerDecoder    `AudioUNet.step`
BlockDecoder    the same steps with all state in place: a system of S4 or S4D is one product with a real matrix
GraphedBlocks   these as CUDA graphs
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mambagen.kernels.unet_decode import DecoderState, LevelWeights, UNetWeights
from mambagen.kernels.unet_decode.graph import Graphed
from mambagen.kernels.unet_decode.reference import InPlaceUNet, Layer, Stage, StepByStep
from mambagen.models.audio_unet import AudioUNet, StageState
from mambagen.models.mamba_mixer import MambaState
from mambagen.models.s4d_mixer import GatedSsm, S4State
from mambagen.models.unet_blocks import Block, ResidualBlock

ALIGNED = 4  # floats: rows of a multiple of it are read 16 bytes at a time


class EagerDecoder(StepByStep):
    """`Decoder` by `AudioUNet.step`, for any mixer."""

    def __init__(self, model: AudioUNet, batch: int) -> None:
        config, weight = model.config, model.lm_head.weight
        self.model = model
        self.logits = torch.zeros(batch, config.vocab_size, device=weight.device)
        given = model.class_vectors(None)
        self._vectors = None if given is None else given.detach()
        self._state: Any = model.allocate_state(batch)
        self._position = 0

    def condition(self, vectors: Tensor) -> None:
        self._vectors = vectors

    def load_state(self, state: tuple[int, StageState]) -> None:
        self._position, self._state = state

    def state(self) -> tuple[int, StageState]:
        return self._position, self._state

    def _step(self, token: Tensor) -> None:
        logits, self._state = self.model.step_with(token, self._state, self._vectors)
        self.logits.copy_(logits)
        self._position += 1


class BlockDecoder(InPlaceUNet):
    """`Decoder` for any mixer: `AudioUNet.step` with all state in place, in the model's precision, on a copy of it."""

    @torch.no_grad()
    def __init__(self, model: AudioUNet, batch: int) -> None:
        model = copy.deepcopy(model).requires_grad_(False).eval()
        self._model = model

        def layers(where: str, level: int | None = None) -> list[Layer]:
            return [in_place(block, batch) for block in model.blocks(where, level)]

        levels = range(len(model.config.pool))
        stages = [Stage(layers("down", i), layers("up", i)) for i in levels]
        super().__init__(unet_maps(model), [*stages, Stage([], layers("centre"))], batch)

    def load_state(self, state: tuple[int, StageState]) -> None:
        position, stages = state
        blocks, buffers, queues = flatten_stages(self._model, stages)
        for layer, value in zip(self._layers(), blocks, strict=True):
            layer.load(value)
        for to, given in zip([*self._buffers, *self._queues], [*buffers, *queues], strict=True):
            to.copy_(given)
        self._go_to(position)

    def state(self) -> tuple[int, StageState]:
        blocks = [layer.state() for layer in self._layers()]
        return self._position, build_stages(self._model, self._position, blocks, self._buffers, self._queues)

    def _layers(self) -> Iterator[Any]:
        return chain.from_iterable((*stage.down, *stage.up) for stage in self.stages)


class GraphedBlocks(Graphed, BlockDecoder):
    """`BlockDecoder` on a GPU."""


# ---- layers that keep their state


def in_place(block: Block, batch: int) -> Layer:
    """A block with the state of `batch` streams."""
    if isinstance(block, ResidualBlock) and isinstance(block.mixer, GatedSsm):
        return SystemLayer(block, block.mixer, batch)
    return BlockLayer(block, batch)


class BlockLayer:
    """Any block, its new state copied over the old."""

    def __init__(self, block: Block, batch: int) -> None:
        self._block, self._state = block, block.allocate_state(batch)

    def __call__(self, x: Tensor) -> Tensor:
        y, after = self._block.step(x, self._state)
        self.load(after)
        return y

    def held(self) -> Sequence[Tensor]:
        return self._state

    def state(self) -> Any:
        copies = [v.clone() for v in self._state]
        return type(self._state)(*copies) if hasattr(self._state, "_fields") else tuple(copies)

    def load(self, state: Any) -> None:
        for to, value in zip(self._state, state, strict=True):
            to.copy_(value)


class SystemLayer:
    """A block of S4 or S4D. A channel's state and input go into its state and output by one real matrix.

    `_after` (channels, batch, width) has the state's real parts, its imaginary parts, zeros for alignment, and last the
    output; in `_before` the input stands last.
    """

    def __init__(self, block: ResidualBlock, mixer: GatedSsm, batch: int) -> None:
        self._norm, self._mixer = block.norm, mixer
        real = mixer.allocate_state(batch).real
        self._states = real.shape[2]
        self._matrix = step_matrix(mixer.ssm, self._states).to(real.dtype)
        self._after = real.new_zeros(real.shape[1], batch, self._matrix.shape[1])
        self._before = torch.zeros_like(self._after)

    def __call__(self, x: Tensor) -> Tensor:
        given = self._norm(x)
        entering = given.to(self._after.dtype).T[..., None]
        torch.cat([self._after[..., :-1], entering], -1, out=self._before)
        with exact_products():
            torch.bmm(self._before, self._matrix, out=self._after)
        return x + self._mixer.output(self._after[..., -1].T.to(given.dtype))

    def held(self) -> Sequence[Tensor]:
        return (self._after,)

    def state(self) -> S4State:
        real, imag = (v.transpose(0, 1).clone() for v in self._parts())
        return S4State(real, imag)

    def load(self, state: S4State) -> None:
        for to, value in zip(self._parts(), state, strict=True):
            to.copy_(value.transpose(0, 1))

    def _parts(self) -> tuple[Tensor, Tensor]:
        n = self._states
        return self._after[..., :n], self._after[..., n : 2 * n]


def step_matrix(system: nn.Module, states: int) -> Tensor:
    """What `system.step` does, which is linear in the real and imaginary parts of the state and in the input.

    Returns:
        (channels, width, width) float64, rows what goes in and columns what comes out, both in the order of
        `SystemLayer`: found by sending each unit vector through the step.
    """
    system = copy.deepcopy(system).double()
    inputs = torch.eye(2 * states + 1, dtype=torch.float64, device=next(system.parameters()).device)
    channels = system.allocate_state(1).real.shape[1]  # type: ignore[operator]
    real, imag, x = inputs[:, None].expand(-1, channels, -1).split([states, states, 1], -1)
    y, after = system.step(x[..., 0], S4State(real, imag))  # type: ignore[operator]
    found = torch.cat([after.real, after.imag, y[..., None]], -1).transpose(0, 1)
    width = -(-found.shape[1] // ALIGNED) * ALIGNED
    matrix = found.new_zeros(channels, width, width)
    places = torch.arange(2 * states + 1, device=found.device)
    places[-1] = width - 1
    matrix[:, places[:, None], places] = found
    return matrix


@contextmanager
def exact_products() -> Iterator[None]:
    """Not in TF32, whatever the user allows: a state decays by factors that differ from 1 by less than its rounding."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


# ---- between the model's shapes and the decoders'


def unet_maps(model: AudioUNet) -> UNetWeights:
    """All parameters but the layers', as mambagen.kernels.unet_decode takes them."""
    levels = [
        LevelWeights([], [], pool, *(v.detach() for layer in model.pools(i) for v in (layer.weight, layer.bias)))
        for i, pool in enumerate(model.config.pool)
    ]
    return UNetWeights(
        model.embedding.weight.detach(),
        levels,
        [],
        model.norm_f.weight.detach(),
        model.lm_head.weight.detach(),
        model.lm_head.bias.detach(),
        model.config.norm_epsilon,
    )


def flatten_stages(model: AudioUNet, state: Any) -> tuple[list[Any], list[Tensor], list[Tensor]]:
    """A state of `AudioUNet`: those of the blocks in the decoders' order, and each level's buffer and queue, whole."""
    blocks: list[Any] = []
    buffers, queues = [], []
    for pool in model.config.pool:
        blocks += [*state.down, *state.up]
        buffers.append(torch.cat([state.buffer, torch.zeros_like(state.queue)], 1))
        queues.append(torch.cat([torch.zeros_like(state.buffer), state.queue], 1))
        assert buffers[-1].shape[1] == pool
        state = state.deeper
    return [*blocks, *state], buffers, queues


def build_stages(
    model: AudioUNet, position: int, blocks: Sequence[Any], buffers: Sequence[Tensor], queues: Sequence[Tensor]
) -> StageState:
    """The way back; buffers and queues are copied."""
    rest, parts = iter(blocks), []
    for i, pool in enumerate(model.config.pool):
        gone, position = position % pool, position // pool
        down, up = (tuple(next(rest) for _ in model.blocks(where, i)) for where in ("down", "up"))
        parts.append((down, buffers[i][:, :gone].clone(), queues[i][:, gone:].clone(), up))
    after: Any = tuple(rest)
    for down, buffer, queue, up in reversed(parts):
        after = StageState(down, buffer, queue, after, up)
    assert isinstance(after, StageState)
    return after


def decoder_state(model: AudioUNet, state: StageState, position: int) -> DecoderState:
    """A state of a model of Mamba layers as the decoders have it."""
    layers, buffers, queues = flatten_stages(model, state)
    return DecoderState(position, [v.conv.float() for v in layers], [v.ssm for v in layers], buffers, queues)


def stage_state(model: AudioUNet, state: DecoderState) -> StageState:
    """A decoder's state as `AudioUNet` has it."""
    dtype = model.lm_head.weight.dtype
    layers = [MambaState(conv.to(dtype), ssm) for conv, ssm in zip(state.conv, state.ssm, strict=True)]
    return build_stages(model, state.position, layers, state.buffers, state.queues)
