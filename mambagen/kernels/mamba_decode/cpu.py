"""Decoding on a CPU: one compiled function steps all layers and draws the tokens, a task being some streams.

cpu_steps.py has what a layer is made of, cpu_draw.py the draw. Weights are float32, packed once; streams that share a
task share the reading of the weights, and the tasks run on torch's threads.
"""

# mypy: disallow-untyped-defs=False

import math
from collections.abc import Sequence
from enum import auto

import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

from mambagen.kernels.cpu_common import NEXT_TASK, NEXT_THREAD, SCRATCH, SCRATCH_BYTES, TASKS, Kernel, Number, get
from mambagen.kernels.cpu_memory import BYTES, claim, load, load_int, store, store_int
from mambagen.kernels.cpu_simd import LANES
from mambagen.kernels.mamba_decode import LayerWeights, Sampling, StackWeights
from mambagen.kernels.mamba_decode.cpu_draw import draw_token
from mambagen.kernels.mamba_decode.cpu_steps import (
    PANEL,
    PANEL_BYTES,
    conv_step,
    load_float,
    matrix_product,
    rms_norm,
    scan_step,
)

GROUP = 32  # streams of a task at most: their activations stay in the second-level cache


def unsupported(weights: StackWeights) -> str | None:
    """Why these weights cannot be decoded here, or None."""
    return None


class P(Number):
    BATCH = auto()
    GROUP = auto()  # streams of a task
    STEPS = auto()
    POSITION = auto()
    SEED = auto()
    TOP_K = auto()
    LAYERS = auto()
    WIDTH = auto()  # d_model
    WIDTH_PANELS = auto()
    INNER = auto()  # channels
    INNER_PANELS = auto()
    RANK = auto()
    STATES = auto()
    TAPS = auto()
    MIXED_PANELS = auto()  # of x_proj's outputs
    VOCABULARY_PANELS = auto()
    LAYER_BYTES = auto()  # from one layer's weights to the next's
    WEIGHTS = auto()  # addresses from here on
    EMBEDDING = auto()  # (vocabulary, width) padded
    NORM_F = auto()
    HEAD = auto()
    NUMBERS = auto()  # inverse width, epsilon, inverse temperature, top_p
    CONV = auto()  # (layers, batch, taps - 1, channels) padded
    SSM = auto()  # (layers, batch, states, channels) padded
    LOGITS = auto()  # (batch, vocabulary) padded
    BIAS = auto()
    STREAMS = auto()  # (batch,) int64
    TOKENS = auto()  # (batch, steps) int64: read, or written
    DRAW = auto()  # 1 to draw tokens
    AFTER = auto()  # (batch, steps, vocabulary) padded, or 0: logits after each token


def decode(p):
    scratch = load_int(p + SCRATCH) + claim(p + NEXT_THREAD) * load_int(p + SCRATCH_BYTES)
    tasks = load_int(p + TASKS)
    while True:
        task = claim(p + NEXT_TASK)
        if task >= tasks:
            break
        first = task * get(p, P.GROUP)
        streams = min(get(p, P.GROUP), get(p, P.BATCH) - first)
        for step in range(get(p, P.STEPS)):
            _choose_tokens(p, first, streams, step, scratch)
            _step_layers(p, first, streams, step, scratch)


@njit
def _choose_tokens(p, first, streams, step, scratch):
    """A token for each stream, and its embedding as the residual stream."""
    vectors, width = 4 * get(p, P.VOCABULARY_PANELS), 4 * get(p, P.WIDTH_PANELS)
    numbers = get(p, P.NUMBERS)
    inverse_temperature, top_p = load_float(numbers + 8), load_float(numbers + 12)
    for s in range(streams):
        where = get(p, P.TOKENS) + ((first + s) * get(p, P.STEPS) + step) * 8
        if get(p, P.DRAW):
            token = draw_token(
                get(p, P.LOGITS) + (first + s) * vectors * BYTES,
                get(p, P.BIAS),
                vectors,
                inverse_temperature,
                get(p, P.TOP_K),
                top_p,
                get(p, P.SEED),
                get(p, P.POSITION) + step,
                load_int(get(p, P.STREAMS) + (first + s) * 8),
                scratch,
                scratch + vectors * BYTES,
            )
            store_int(where, token)
        else:
            token = load_int(where)
        residual = scratch + _residual(p, s)
        for i in range(width):
            store(residual + i * BYTES, load(get(p, P.EMBEDDING) + (token * width + i) * BYTES))


@njit(forceinline=True)
def _residual(p, stream):
    """Where a stream's residual lies in scratch memory, after what the draw needs; other activations follow."""
    return 2 * get(p, P.VOCABULARY_PANELS) * PANEL_BYTES + stream * get(p, P.WIDTH_PANELS) * PANEL_BYTES


@njit
def _step_layers(p, first, streams, step, scratch):
    width_row, row = get(p, P.WIDTH_PANELS) * PANEL_BYTES, get(p, P.INNER_PANELS) * PANEL_BYTES
    mixed_row = get(p, P.MIXED_PANELS) * PANEL_BYTES
    group = get(p, P.GROUP)
    residual = scratch + _residual(p, 0)
    normed = residual + group * width_row
    x_z = normed + group * width_row  # x and z of a stream lie side by side
    dt = x_z + group * 2 * row
    y = dt + group * row
    mixed = y + group * row
    vectors, width_vectors = row // BYTES, width_row // BYTES
    states, taps, rank = get(p, P.STATES), get(p, P.TAPS), get(p, P.RANK)
    numbers = get(p, P.NUMBERS)
    for layer in range(get(p, P.LAYERS)):
        # the order of _pack_layer
        norm = get(p, P.WEIGHTS) + layer * get(p, P.LAYER_BYTES)
        in_proj = norm + width_row
        conv_weight = in_proj + 2 * row * get(p, P.WIDTH)
        conv_bias = conv_weight + taps * row
        x_proj = conv_bias + row
        dt_proj = x_proj + mixed_row * get(p, P.INNER)
        dt_bias = dt_proj + row * rank
        A = dt_bias + row
        D = A + states * row
        out_proj = D + row
        for s in range(streams):
            rms_norm(residual + s * width_row, norm, width_vectors, numbers, numbers + 4, normed + s * width_row)
        matrix_product(
            in_proj, 2 * row // PANEL_BYTES, get(p, P.WIDTH), normed, width_row, x_z, 2 * row, streams, False
        )
        for s in range(streams):
            window = get(p, P.CONV) + (layer * get(p, P.BATCH) + first + s) * (taps - 1) * row
            conv_step(x_z + s * 2 * row, window, row, conv_weight, conv_bias, taps, vectors)
        matrix_product(x_proj, get(p, P.MIXED_PANELS), get(p, P.INNER), x_z, 2 * row, mixed, mixed_row, streams, False)
        matrix_product(dt_proj, row // PANEL_BYTES, rank, mixed, mixed_row, dt, row, streams, False)
        for s in range(streams):
            x, low = x_z + s * 2 * row, mixed + s * mixed_row
            B, C = low + 4 * rank, low + 4 * (rank + states)
            h = get(p, P.SSM) + (layer * get(p, P.BATCH) + first + s) * states * row
            scan_step(x, x + row, dt + s * row, dt_bias, A, B, C, D, h, row, states, vectors, y + s * row)
        matrix_product(out_proj, get(p, P.WIDTH_PANELS), get(p, P.INNER), y, row, residual, width_row, streams, True)
    for s in range(streams):
        where = s * width_row
        rms_norm(residual + where, get(p, P.NORM_F), width_vectors, numbers, numbers + 4, normed + where)
    logits_row = get(p, P.VOCABULARY_PANELS) * PANEL_BYTES
    logits, head, panels = get(p, P.LOGITS) + first * logits_row, get(p, P.HEAD), get(p, P.VOCABULARY_PANELS)
    matrix_product(head, panels, get(p, P.WIDTH), normed, width_row, logits, logits_row, streams, False)
    if get(p, P.AFTER):
        for s in range(streams):
            to = get(p, P.AFTER) + ((first + s) * get(p, P.STEPS) + step) * logits_row
            for i in range(logits_row // BYTES):
                store(to + i * BYTES, load(logits + s * logits_row + i * BYTES))


decode_kernel = Kernel(decode)


class CpuDecoder:
    """`Decoder` by the kernel above, in float32."""

    @torch.no_grad()
    def __init__(self, weights: StackWeights, batch: int) -> None:
        first = weights.layers[0]
        self.batch = batch
        self._vocabulary, self._width = weights.head.shape
        self._inner, self._states = first.A_log.shape
        self._taps, rank = first.conv_weight.shape[1], first.dt_proj.shape[1]
        inner, width, vocabulary = _up(self._inner), _up(self._width), _up(self._vocabulary)
        layers = [_pack_layer(layer) for layer in weights.layers]
        self._weights = torch.stack(layers)
        self._embedding = F.pad(weights.embedding.float(), (0, width - self._width)).contiguous()
        self._norm_f = F.pad(weights.norm_f.float(), (0, width - self._width))
        self._head = panels(weights.head)
        self._conv = torch.zeros(len(layers), batch, self._taps - 1, inner)
        self._ssm = torch.zeros(len(layers), batch, self._states, inner)
        self._logits = torch.zeros(batch, vocabulary)
        self._bias = torch.full((vocabulary,), -math.inf)
        self._epsilon = weights.epsilon
        self._sizes: dict[int, int] = {
            P.BATCH: batch,
            P.LAYERS: len(layers),
            P.WIDTH: self._width,
            P.WIDTH_PANELS: width // PANEL,
            P.INNER: self._inner,
            P.INNER_PANELS: inner // PANEL,
            P.RANK: rank,
            P.STATES: self._states,
            P.TAPS: self._taps,
            P.MIXED_PANELS: _up(rank + 2 * self._states) // PANEL,
            P.VOCABULARY_PANELS: vocabulary // PANEL,
            P.LAYER_BYTES: 4 * self._weights.shape[1],
            P.WEIGHTS: self._weights.data_ptr(),
            P.EMBEDDING: self._embedding.data_ptr(),
            P.NORM_F: self._norm_f.data_ptr(),
            P.HEAD: self._head.data_ptr(),
            P.CONV: self._conv.data_ptr(),
            P.SSM: self._ssm.data_ptr(),
            P.LOGITS: self._logits.data_ptr(),
            P.BIAS: self._bias.data_ptr(),
        }

    @property
    def logits(self) -> Tensor:
        return self._logits[:, : self._vocabulary]

    def read(self, tokens: Tensor) -> Tensor:
        after = torch.empty(self.batch, tokens.shape[1], self._logits.shape[1])
        self._run(tokens.long().contiguous(), after, Sampling(), 0, None)
        return after[..., : self._vocabulary]

    def draw(self, steps: int, sampling: Sampling, bias: Tensor, position: int, streams: Tensor) -> Tensor:
        self._bias[: self._vocabulary] = bias
        tokens = torch.empty(self.batch, steps, dtype=torch.int64)
        self._run(tokens, None, sampling, position, streams.long().contiguous())
        return tokens

    def load_state(self, conv: Sequence[Tensor], ssm: Sequence[Tensor]) -> None:
        for layer, (window, h) in enumerate(zip(conv, ssm, strict=True)):
            self._conv[layer, :, :, : self._inner] = window
            self._ssm[layer, :, :, : self._inner] = h.transpose(1, 2)

    def state(self) -> tuple[list[Tensor], list[Tensor]]:
        return (
            [v[..., : self._inner].clone() for v in self._conv],
            [v[..., : self._inner].transpose(1, 2).contiguous() for v in self._ssm],
        )

    def _run(
        self, tokens: Tensor, after: Tensor | None, sampling: Sampling, position: int, streams: Tensor | None
    ) -> None:
        numbers = torch.tensor([1 / self._width, self._epsilon, sampling.inverse_temperature, sampling.top_p])
        threads = torch.get_num_threads()
        group = min(GROUP, math.ceil(self.batch / threads))
        steps = tokens.shape[1]
        everything = 1 << 40
        parameters = self._sizes | {
            P.GROUP: group,
            P.STEPS: steps,
            P.POSITION: position,
            P.SEED: (sampling.seed + (1 << 63)) % (1 << 64) - (1 << 63),  # its low 64 bits as they lie in memory
            P.TOP_K: everything if sampling.top_k is None else sampling.top_k,
            P.NUMBERS: numbers.data_ptr(),
            P.STREAMS: 0 if streams is None else streams.data_ptr(),
            P.TOKENS: tokens.data_ptr(),
            P.DRAW: int(streams is not None),
            P.AFTER: 0 if after is None else after.data_ptr(),
        }
        s = self._sizes
        rows = 2 * s[P.WIDTH_PANELS] + 4 * s[P.INNER_PANELS] + s[P.MIXED_PANELS]
        scratch = (2 * s[P.VOCABULARY_PANELS] + group * rows) * PANEL_BYTES
        work = steps * self.batch * self._weights.numel()
        decode_kernel.run(parameters, math.ceil(self.batch / group), scratch, work)


# ---- weights in the order of their use


def _pack_layer(w: LayerWeights) -> Tensor:
    """norm, in_proj, conv weight and bias, x_proj, dt_proj and bias, A, D, out_proj; float32."""
    inner, width = w.out_proj.shape[1], w.out_proj.shape[0]
    more, wider = _up(inner) - inner, _up(width) - width

    def rows(v: Tensor) -> Tensor:
        """(channels, n) -> (n, channels), padded."""
        return F.pad(v.float().T, (0, more)).flatten()

    x, z = w.in_proj.chunk(2)
    pieces = [
        F.pad(w.norm.float(), (0, wider)),
        panels(x),
        panels(z),
        rows(w.conv_weight),
        rows(w.conv_bias[:, None]),
        panels(w.x_proj),
        panels(w.dt_proj),
        rows(w.dt_bias[:, None]),
        rows(-torch.exp(w.A_log.float()) * math.log2(math.e)),
        rows(w.D[:, None]),
        panels(w.out_proj),
    ]
    return torch.cat([piece.flatten() for piece in pieces])


def panels(matrix: Tensor) -> Tensor:
    """(outputs, inputs) -> (outputs / 64, inputs, 64) float32, padded with zeros; see cpu_steps.py."""
    outputs, inputs = matrix.shape
    padded = F.pad(matrix.float(), (0, 0, 0, _up(outputs) - outputs))
    return padded.view(-1, PANEL, inputs).transpose(1, 2).contiguous()


def _up(n: int) -> int:
    return -(-n // PANEL) * PANEL


assert PANEL == 4 * LANES
