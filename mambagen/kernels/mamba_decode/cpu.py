"""Decoding on a CPU: one compiled function steps all layers and draws the tokens.

cpu_steps.py has what a layer is made of, cpu_draw.py the draw. Weights are float32, packed once. Threads take streams,
as many at a time as share the reading of the weights; where there are fewer streams than threads and layers are large,
all threads step the same streams (cpu_team.py).
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
from mambagen.kernels.mamba_decode.cpu_team import (
    BOARD_BYTES,
    OVER,
    end,
    finished,
    is_alone,
    look,
    phase_of,
    publish,
    take,
    units_left,
    wait,
)

TEAM_FROM = 1 << 20  # bytes of a layer from which several threads share one stream
MOST_HELPERS = 7  # there are not many more units than that in a phase
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
    INNER = auto()  # channels
    RANK = auto()
    STATES = auto()
    TAPS = auto()
    WIDTH_ROW = auto()  # bytes of a row of d_model, of channels, of x_proj's outputs, of logits; whole panels
    ROW = auto()
    MIXED_ROW = auto()
    LOGITS_ROW = auto()
    # scratch memory, in bytes from its start; it begins with two rows of logits
    RESIDUAL = auto()  # (streams, WIDTH_ROW)
    NORMED = auto()
    X_Z = auto()  # (streams, x and z, ROW)
    DT = auto()
    Y = auto()
    MIXED = auto()
    # a layer's weights, in bytes from the layer's start
    NORM = auto()
    IN_PROJ = auto()  # panels of x and of z by turns
    CONV_WEIGHT = auto()
    CONV_BIAS = auto()
    X_PROJ = auto()
    DT_PROJ = auto()
    DT_BIAS = auto()
    A = auto()
    D = auto()
    OUT_PROJ = auto()
    LAYER_BYTES = auto()
    # addresses
    WEIGHTS = auto()
    EMBEDDING = auto()  # (vocabulary, WIDTH_ROW)
    NORM_F = auto()
    HEAD = auto()
    NUMBERS = auto()  # inverse width, epsilon, inverse temperature, top_p
    CONV = auto()  # (layers, batch, taps - 1, ROW)
    SSM = auto()  # (layers, batch, states, ROW)
    LOGITS = auto()  # (batch, LOGITS_ROW)
    BIAS = auto()
    STREAMS = auto()  # (batch,) int64
    TOKENS = auto()  # (batch, steps) int64: read, or written
    DRAW = auto()  # 1 to draw tokens
    AFTER = auto()  # (batch, steps, LOGITS_ROW) or 0: logits after each token
    TEAM = auto()  # the board (cpu_team.py) where all threads step the same streams, or 0


INTO, SCAN, OUT, PHASES = range(4)  # phases of a layer that are cut into units


def decode(p):
    thread = claim(p + NEXT_THREAD)
    if get(p, P.TEAM):
        if thread == 0:
            for step in range(get(p, P.STEPS)):
                _step(p, 0, get(p, P.BATCH), step, load_int(p + SCRATCH))
            end(get(p, P.TEAM))
        else:
            _help(p, load_int(p + SCRATCH))
        return
    scratch = load_int(p + SCRATCH) + thread * load_int(p + SCRATCH_BYTES)
    tasks = load_int(p + TASKS)
    while True:
        task = claim(p + NEXT_TASK)
        if task >= tasks:
            break
        first = task * get(p, P.GROUP)
        streams = min(get(p, P.GROUP), get(p, P.BATCH) - first)
        for step in range(get(p, P.STEPS)):
            _step(p, first, streams, step, scratch)


@njit
def _step(p, first, streams, step, scratch):
    """A token for each stream, all layers, and the logits of the next."""
    _choose_tokens(p, first, streams, step, scratch)
    width_row, mixed_row, logits_row = get(p, P.WIDTH_ROW), get(p, P.MIXED_ROW), get(p, P.LOGITS_ROW)
    x_row = 2 * get(p, P.ROW)
    x, mixed, inner = scratch + get(p, P.X_Z), scratch + get(p, P.MIXED), get(p, P.INNER)
    for layer in range(get(p, P.LAYERS)):
        weights = get(p, P.WEIGHTS) + layer * get(p, P.LAYER_BYTES)
        _norm(p, weights + get(p, P.NORM), streams, scratch)
        _phase(p, step, layer, INTO, first, streams, scratch)
        x_proj = weights + get(p, P.X_PROJ)
        panels = mixed_row // PANEL_BYTES
        matrix_product(x_proj, panels, inner, x, x_row, mixed, mixed_row, PANEL_BYTES, streams, False)
        _phase(p, step, layer, SCAN, first, streams, scratch)
        _phase(p, step, layer, OUT, first, streams, scratch)
    _norm(p, get(p, P.NORM_F), streams, scratch)
    logits, normed, panels = (
        get(p, P.LOGITS) + first * logits_row,
        scratch + get(p, P.NORMED),
        logits_row // PANEL_BYTES,
    )
    head, width = get(p, P.HEAD), get(p, P.WIDTH)
    matrix_product(head, panels, width, normed, width_row, logits, logits_row, PANEL_BYTES, streams, False)
    if get(p, P.AFTER):
        for s in range(streams):
            to = get(p, P.AFTER) + ((first + s) * get(p, P.STEPS) + step) * logits_row
            for i in range(0, logits_row, BYTES):
                store(to + i, load(logits + s * logits_row + i))


@njit
def _choose_tokens(p, first, streams, step, scratch):
    """A token for each stream, and its embedding as the residual stream."""
    width_row, logits_row, numbers = get(p, P.WIDTH_ROW), get(p, P.LOGITS_ROW), get(p, P.NUMBERS)
    inverse_temperature, top_p = load_float(numbers + 8), load_float(numbers + 12)
    for s in range(streams):
        where = get(p, P.TOKENS) + ((first + s) * get(p, P.STEPS) + step) * 8
        if get(p, P.DRAW):
            token = draw_token(
                get(p, P.LOGITS) + (first + s) * logits_row,
                get(p, P.BIAS),
                logits_row // BYTES,
                inverse_temperature,
                get(p, P.TOP_K),
                top_p,
                get(p, P.SEED),
                get(p, P.POSITION) + step,
                load_int(get(p, P.STREAMS) + (first + s) * 8),
                scratch,
                scratch + logits_row,
            )
            store_int(where, token)
        else:
            token = load_int(where)
        residual = scratch + get(p, P.RESIDUAL) + s * width_row
        for i in range(0, width_row, BYTES):
            store(residual + i, load(get(p, P.EMBEDDING) + token * width_row + i))


@njit
def _norm(p, weight, streams, scratch):
    """The normalised residual of every stream."""
    row, numbers = get(p, P.WIDTH_ROW), get(p, P.NUMBERS)
    for s in range(streams):
        residual, normed = scratch + get(p, P.RESIDUAL) + s * row, scratch + get(p, P.NORMED) + s * row
        rms_norm(residual, weight, row // BYTES, numbers, numbers + 4, normed)


@njit
def _phase(p, step, layer, kind, first, streams, scratch):
    """All units of a phase, done here and by whoever helps."""
    units = (get(p, P.WIDTH_ROW) if kind == OUT else get(p, P.ROW)) // PANEL_BYTES
    board = get(p, P.TEAM)
    if board == 0 or is_alone(board):
        for unit in range(units):
            _unit(p, layer, kind, unit, first, streams, scratch)
        return
    publish(board, (step * get(p, P.LAYERS) + layer) * PHASES + kind, units)
    while True:
        word = look(board)
        if units_left(word) == 0:
            break
        unit = take(board, word)
        if unit >= 0:
            _unit(p, layer, kind, unit, first, streams, scratch)
            finished(board)
    wait(board, units)


@njit
def _help(p, scratch):
    """A thread that is not the leader."""
    board, streams = get(p, P.TEAM), get(p, P.BATCH)
    while True:
        word = look(board)
        if word == OVER:
            return
        unit = take(board, word)
        if unit >= 0:
            phase = phase_of(word)
            _unit(p, phase // PHASES % get(p, P.LAYERS), phase % PHASES, unit, 0, streams, scratch)
            finished(board)


@njit
def _unit(p, layer, kind, unit, first, streams, scratch):
    """64 outputs of a projection for all streams, and what comes after it in those channels."""
    width_row, row, at, vectors = get(p, P.WIDTH_ROW), get(p, P.ROW), unit * PANEL_BYTES, PANEL // LANES
    weights = get(p, P.WEIGHTS) + layer * get(p, P.LAYER_BYTES)
    x, y = scratch + get(p, P.X_Z) + at, scratch + get(p, P.Y)
    states, taps, rank = get(p, P.STATES), get(p, P.TAPS), get(p, P.RANK)
    rows = layer * get(p, P.BATCH) + first  # of the state
    if kind == INTO:
        width = get(p, P.WIDTH)
        in_proj, normed = weights + get(p, P.IN_PROJ) + 2 * at * width, scratch + get(p, P.NORMED)
        matrix_product(in_proj, 2, width, normed, width_row, x, 2 * row, row, streams, False)
        weight, bias = weights + get(p, P.CONV_WEIGHT) + at, weights + get(p, P.CONV_BIAS) + at
        for s in range(streams):
            window = get(p, P.CONV) + (rows + s) * (taps - 1) * row + at
            conv_step(x + s * 2 * row, window, row, weight, bias, taps, vectors)
    elif kind == SCAN:
        mixed, mixed_row, dt = scratch + get(p, P.MIXED), get(p, P.MIXED_ROW), scratch + get(p, P.DT) + at
        dt_proj = weights + get(p, P.DT_PROJ) + at * rank
        matrix_product(dt_proj, 1, rank, mixed, mixed_row, dt, row, PANEL_BYTES, streams, False)
        bias, A, D = weights + get(p, P.DT_BIAS) + at, weights + get(p, P.A) + at, weights + get(p, P.D) + at
        for s in range(streams):
            B = mixed + s * mixed_row + 4 * rank
            h = get(p, P.SSM) + (rows + s) * states * row + at
            u, to = x + s * 2 * row, y + s * row + at
            scan_step(u, u + row, dt + s * row, bias, A, B, B + 4 * states, D, h, row, states, vectors, to)
    else:
        inner, residual = get(p, P.INNER), scratch + get(p, P.RESIDUAL) + at
        out_proj = weights + get(p, P.OUT_PROJ) + at * inner
        matrix_product(out_proj, 1, inner, y, row, residual, width_row, PANEL_BYTES, streams, True)


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
        self._weights = torch.stack([torch.cat(list(layer.values())) for layer in layers])
        self._embedding = F.pad(weights.embedding.float(), (0, width - self._width)).contiguous()
        self._norm_f = F.pad(weights.norm_f.float(), (0, width - self._width))
        self._head = panels(weights.head)
        self._conv = torch.zeros(len(layers), batch, self._taps - 1, inner)
        self._ssm = torch.zeros(len(layers), batch, self._states, inner)
        self._logits = torch.zeros(batch, vocabulary)
        self._bias = torch.full((vocabulary,), -math.inf)
        self._board = torch.zeros(BOARD_BYTES, dtype=torch.uint8)
        self._epsilon = weights.epsilon
        self._sizes: dict[int, int] = {
            P.BATCH: batch,
            P.LAYERS: len(layers),
            P.WIDTH: self._width,
            P.INNER: self._inner,
            P.RANK: rank,
            P.STATES: self._states,
            P.TAPS: self._taps,
            P.WIDTH_ROW: 4 * width,
            P.ROW: 4 * inner,
            P.MIXED_ROW: 4 * _up(rank + 2 * self._states),
            P.LOGITS_ROW: 4 * vocabulary,
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
        offset = 0
        for name, piece in layers[0].items():
            self._sizes[name] = 4 * offset
            offset += piece.numel()

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
        steps, threads, sizes = tokens.shape[1], torch.get_num_threads(), self._sizes
        # fewer streams than threads: all work on the same ones, where a layer is long enough to be shared
        team = self.batch < threads and 4 * self._weights[0].numel() >= TEAM_FROM
        group = self.batch if team else min(GROUP, math.ceil(self.batch / threads))
        everything = 1 << 40
        parameters = sizes | {
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
            P.TEAM: self._board.data_ptr() if team else 0,
        }
        scratch = 2 * sizes[P.LOGITS_ROW]
        row, width_row = sizes[P.ROW], sizes[P.WIDTH_ROW]
        activations = (P.RESIDUAL, width_row), (P.NORMED, width_row), (P.X_Z, 2 * row), (P.DT, row), (P.Y, row)
        for name, size in (*activations, (P.MIXED, sizes[P.MIXED_ROW])):
            parameters[name] = scratch
            scratch += group * size
        self._board[:8].zero_()  # what was learnt of the machine's other work stays
        tasks = min(threads, MOST_HELPERS + 1) if team else math.ceil(self.batch / group)
        decode_kernel.run(parameters, tasks, scratch, steps * self.batch * self._weights.numel())


# ---- weights in the order of their use


def _pack_layer(w: LayerWeights) -> dict[int, Tensor]:
    """The pieces of a layer, flat float32, in the order in which they lie."""
    inner, width = w.out_proj.shape[1], w.out_proj.shape[0]
    more, wider = _up(inner) - inner, _up(width) - width

    def rows(v: Tensor) -> Tensor:
        """(channels, n) -> (n, channels), padded."""
        return F.pad(v.float().T, (0, more))

    x, z = (panels(half) for half in w.in_proj.chunk(2))
    pieces = {
        P.NORM: F.pad(w.norm.float(), (0, wider)),
        P.IN_PROJ: torch.stack([x, z], 1),
        P.CONV_WEIGHT: rows(w.conv_weight),
        P.CONV_BIAS: rows(w.conv_bias[:, None]),
        P.X_PROJ: panels(w.x_proj),
        P.DT_PROJ: panels(w.dt_proj),
        P.DT_BIAS: rows(w.dt_bias[:, None]),
        P.A: rows(-torch.exp(w.A_log.float()) * math.log2(math.e)),
        P.D: rows(w.D[:, None]),
        P.OUT_PROJ: panels(w.out_proj),
    }
    return {name: piece.flatten() for name, piece in pieces.items()}


def panels(matrix: Tensor) -> Tensor:
    """(outputs, inputs) -> (outputs / 64, inputs, 64) float32, padded with zeros; see cpu_steps.py."""
    outputs, inputs = matrix.shape
    padded = F.pad(matrix.float(), (0, 0, 0, _up(outputs) - outputs))
    return padded.view(-1, PANEL, inputs).transpose(1, 2).contiguous()


def _up(n: int) -> int:
    return -(-n // PANEL) * PANEL
