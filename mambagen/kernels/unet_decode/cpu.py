"""The audio U-Net on a CPU: one compiled function steps all levels and draws the samples.

A level is described by a row of numbers in memory (`L`), so that one loop serves all. cpu_matrix.py has the products,
mamba_decode's cpu_steps.py the rest of a layer, cpu_draw.py the draw. Threads take streams, as many at a time as share
the reading of the weights.
"""

# mypy: disallow-untyped-defs=False

import math
from enum import IntEnum, auto

import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

from mambagen.kernels.cpu_common import NEXT_TASK, NEXT_THREAD, SCRATCH, SCRATCH_BYTES, TASKS, Kernel, Number, get
from mambagen.kernels.cpu_memory import BYTES, broadcast, claim, load, load_int, store, store_int
from mambagen.kernels.cpu_simd import fma
from mambagen.kernels.mamba_decode.cpu_draw import draw_token
from mambagen.kernels.mamba_decode.cpu_steps import conv_step, load_float, rms_norm, scan_step
from mambagen.kernels.unet_decode import DecoderState, LayerWeights, Sampling, UNetWeights
from mambagen.kernels.unet_decode.cpu_matrix import PANEL_BYTES, matrix_product, pack_pairs, pack_panels, whole

GROUP = 32  # streams of a task at most: their activations stay in the second-level cache


class P(Number):
    """The run's parameters."""

    BATCH = auto()
    GROUP = auto()  # streams of a task
    STEPS = auto()
    POSITION = auto()
    TOP_K = auto()
    LEVELS = auto()
    PAIRS = auto()  # 1 where matrices are bfloat16 pairs
    LOGITS_ROW = auto()  # bytes
    # scratch memory, in bytes from its start; it begins with two rows of logits and one of guided ones
    RESIDUAL = auto()  # (streams, the level's WIDTH_ROW)
    NORMED = auto()
    X_Z = auto()  # (streams, x and z, the level's ROW)
    DT = auto()
    Y = auto()
    MIXED = auto()
    SKIPS = auto()  # (layers + 1, streams, WIDTH_ROW)
    # addresses
    TABLE = auto()  # (levels, one number of `L` each)
    EMBEDDING = auto()  # (vocabulary, level 0's WIDTH_ROW)
    NORM_F = auto()
    HEAD = auto()
    HEAD_BIAS = auto()
    NUMBERS = auto()  # epsilon, inverse temperature, top_p, guidance
    LOGITS = auto()  # (batch, LOGITS_ROW)
    BIAS = auto()  # (LOGITS_ROW): -inf for what pads the vocabulary
    SEEDS = auto()  # (batch,) int64
    TOKENS = auto()  # (batch, steps) int64: read, or written
    DRAW = auto()  # 0: read; 1: draw; 2: draw for pairs of streams
    AFTER = auto()  # (batch, steps, LOGITS_ROW) or 0: logits after each token


class L(IntEnum):
    """What a level's row of the table holds, at these offsets in bytes."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[int]) -> int:
        return 8 * count

    POOL = auto()  # 1 at the centre
    DOWN = auto()  # layers before the DownPool
    LAYERS = auto()  # in all
    SKIP_EACH = auto()  # 1: a skip around every layer, 0: one around all of them
    WIDTH = auto()
    INNER = auto()
    RANK = auto()
    STATES = auto()
    TAPS = auto()
    WIDTH_ROW = auto()  # bytes, whole panels
    ROW = auto()
    MIXED_ROW = auto()
    INVERSE_WIDTH = auto()  # a float32
    # a layer's weights, in bytes from the layer's start
    NORM = auto()
    IN_PROJ = auto()  # x, then z
    CONV_WEIGHT = auto()
    CONV_BIAS = auto()
    X_PROJ = auto()
    DT_PROJ = auto()  # always float32
    DT_BIAS = auto()
    A = auto()
    D = auto()
    OUT_PROJ = auto()
    LAYER_BYTES = auto()
    # addresses
    WEIGHTS = auto()
    CONV = auto()  # (layers, batch, taps - 1, ROW)
    SSM = auto()  # (layers, batch, states, ROW)
    BUFFER = auto()  # (batch, pool, WIDTH_ROW)
    QUEUE = auto()
    ENTERING = auto()  # (batch, WIDTH_ROW): the condition's vectors, where the level begins
    RISING = auto()  # and where its way up does
    INTO = auto()  # from the level above: the DownPool's matrix, its inputs that level's frames with their padding
    INTO_BIAS = auto()
    BACK = auto()  # to the level above: the UpPool's matrix
    BACK_BIAS = auto()


TABLE_ROW = 8 * len(L)


def decode(p):
    thread = claim(p + NEXT_THREAD)
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
    """A token for each stream, the logits of the next, and whatever levels are due."""
    _choose_tokens(p, first, streams, step, scratch)
    place = get(p, P.POSITION) + step
    level = get(p, P.TABLE)
    for i in range(get(p, P.LEVELS)):
        pool = load_int(level + L.POOL)
        slot = place % pool
        if i > 0:
            _into(p, level, first, streams, scratch)
        _frame(p, level, slot, first, streams, scratch)
        if i > 0:
            _back(p, level, first, streams, scratch)
        else:
            _head(p, level, first, streams, step, scratch)
        if slot + 1 < pool:
            break
        place //= pool
        level += TABLE_ROW


@njit
def _choose_tokens(p, first, streams, step, scratch):
    """A token for each stream, and its embedding as the residual stream."""
    row, logits_row, numbers = load_int(get(p, P.TABLE) + L.WIDTH_ROW), get(p, P.LOGITS_ROW), get(p, P.NUMBERS)
    inverse_temperature, top_p, draw = load_float(numbers + 4), load_float(numbers + 8), get(p, P.DRAW)
    guided, token = scratch + 2 * logits_row, 0
    for s in range(streams):
        where = get(p, P.TOKENS) + ((first + s) * get(p, P.STEPS) + step) * 8
        logits = get(p, P.LOGITS) + (first + s) * logits_row
        if draw == 0:
            token = load_int(where)
        elif draw == 1 or s % 2 == 0:
            if draw == 2:
                for i in range(0, logits_row, BYTES):
                    free = load(logits + logits_row + i)
                    store(guided + i, fma(load(logits + i) - free, broadcast(numbers + 12), free))
                logits = guided
            token = draw_token(
                logits,
                get(p, P.BIAS),
                logits_row // BYTES,
                inverse_temperature,
                get(p, P.TOP_K),
                top_p,
                load_int(get(p, P.SEEDS) + (first + s) * 8),
                get(p, P.POSITION) + step,
                0,
                scratch,
                scratch + logits_row,
            )
        if draw:
            store_int(where, token)
        _copy(scratch + get(p, P.RESIDUAL) + s * row, get(p, P.EMBEDDING) + token * row, row)


@njit
def _frame(p, level, slot, first, streams, scratch):
    """All layers of a level for one frame, in place in the residual stream."""
    row, layers, down = load_int(level + L.WIDTH_ROW), load_int(level + L.LAYERS), load_int(level + L.DOWN)
    residual, skips, size = scratch + get(p, P.RESIDUAL), scratch + get(p, P.SKIPS), streams * row
    each = load_int(level + L.SKIP_EACH)
    _add(residual, load_int(level + L.ENTERING) + first * row, size)
    for i in range(down):
        _copy(skips + i * size, residual, size)
        _layer(p, level, i, first, streams, scratch)
    if load_int(level + L.POOL) > 1:
        for s in range(streams):
            at = ((first + s) * load_int(level + L.POOL) + slot) * row
            _copy(load_int(level + L.BUFFER) + at, residual + s * row, row)
            _add(residual + s * row, load_int(level + L.QUEUE) + at, row)
        _add(residual, load_int(level + L.RISING) + first * row, size)
    if not each:
        _copy(skips, residual, size)
    for i in range(down, layers):
        _layer(p, level, i, first, streams, scratch)
        if each:
            _add(residual, skips + (layers - 1 - i) * size, size)
    if not each:
        _add(residual, skips, size)


@njit
def _layer(p, level, i, first, streams, scratch):
    """residual += mixer(norm(residual)), the layer's state moves on."""
    weights = load_int(level + L.WEIGHTS) + i * load_int(level + L.LAYER_BYTES)
    width, inner, rank = load_int(level + L.WIDTH), load_int(level + L.INNER), load_int(level + L.RANK)
    states, taps, pairs = load_int(level + L.STATES), load_int(level + L.TAPS), get(p, P.PAIRS)
    width_row, row, mixed_row = load_int(level + L.WIDTH_ROW), load_int(level + L.ROW), load_int(level + L.MIXED_ROW)
    residual, normed, x_z = scratch + get(p, P.RESIDUAL), scratch + get(p, P.NORMED), scratch + get(p, P.X_Z)
    dt, y, mixed = scratch + get(p, P.DT), scratch + get(p, P.Y), scratch + get(p, P.MIXED)
    vectors, at = row // BYTES, i * get(p, P.BATCH) + first
    _norm(p, level, weights + load_int(level + L.NORM), streams, scratch)
    in_proj = weights + load_int(level + L.IN_PROJ)
    matrix_product(pairs, in_proj, 2 * row // PANEL_BYTES, width, normed, width_row, x_z, 2 * row, streams, False)
    weight, bias = weights + load_int(level + L.CONV_WEIGHT), weights + load_int(level + L.CONV_BIAS)
    for s in range(streams):
        window = load_int(level + L.CONV) + (at + s) * (taps - 1) * row
        conv_step(x_z + s * 2 * row, window, row, weight, bias, taps, vectors)
    x_proj, dt_proj = weights + load_int(level + L.X_PROJ), weights + load_int(level + L.DT_PROJ)
    matrix_product(pairs, x_proj, mixed_row // PANEL_BYTES, inner, x_z, 2 * row, mixed, mixed_row, streams, False)
    matrix_product(0, dt_proj, row // PANEL_BYTES, rank, mixed, mixed_row, dt, row, streams, False)
    bias, A, D = weights + load_int(level + L.DT_BIAS), weights + load_int(level + L.A), weights + load_int(level + L.D)
    for s in range(streams):
        u, B = x_z + s * 2 * row, mixed + s * mixed_row + 4 * rank
        h = load_int(level + L.SSM) + (at + s) * states * row
        scan_step(u, u + row, dt + s * row, bias, A, B, B + 4 * states, D, h, row, states, vectors, y + s * row)
    out_proj = weights + load_int(level + L.OUT_PROJ)
    matrix_product(pairs, out_proj, width_row // PANEL_BYTES, inner, y, row, residual, width_row, streams, True)


@njit
def _into(p, level, first, streams, scratch):
    """The DownPool: a full frame of the level above becomes the residual stream of this one."""
    row, above = load_int(level + L.WIDTH_ROW), level - TABLE_ROW
    inputs = load_int(above + L.POOL) * load_int(above + L.WIDTH_ROW)  # bytes
    residual, x = scratch + get(p, P.RESIDUAL), load_int(above + L.BUFFER) + first * inputs
    for s in range(streams):
        _copy(residual + s * row, load_int(level + L.INTO_BIAS), row)
    into, panels = load_int(level + L.INTO), row // PANEL_BYTES
    matrix_product(get(p, P.PAIRS), into, panels, inputs // 4, x, inputs, residual, row, streams, True)


@njit
def _back(p, level, first, streams, scratch):
    """The UpPool: what this level gives to the next frames of the one above."""
    row, above = load_int(level + L.WIDTH_ROW), level - TABLE_ROW
    outputs = load_int(above + L.POOL) * load_int(above + L.WIDTH_ROW)  # bytes
    residual, queue = scratch + get(p, P.RESIDUAL), load_int(above + L.QUEUE) + first * outputs
    for s in range(streams):
        _copy(queue + s * outputs, load_int(level + L.BACK_BIAS), outputs)
    back, panels, width = load_int(level + L.BACK), outputs // PANEL_BYTES, load_int(level + L.WIDTH)
    matrix_product(get(p, P.PAIRS), back, panels, width, residual, row, queue, outputs, streams, True)


@njit
def _head(p, level, first, streams, step, scratch):
    """The logits of the next token."""
    _norm(p, level, get(p, P.NORM_F), streams, scratch)
    logits_row, row, normed = get(p, P.LOGITS_ROW), load_int(level + L.WIDTH_ROW), scratch + get(p, P.NORMED)
    logits, panels, width = get(p, P.LOGITS) + first * logits_row, logits_row // PANEL_BYTES, load_int(level + L.WIDTH)
    for s in range(streams):
        _copy(logits + s * logits_row, get(p, P.HEAD_BIAS), logits_row)
    matrix_product(get(p, P.PAIRS), get(p, P.HEAD), panels, width, normed, row, logits, logits_row, streams, True)
    if get(p, P.AFTER):
        for s in range(streams):
            to = get(p, P.AFTER) + ((first + s) * get(p, P.STEPS) + step) * logits_row
            _copy(to, logits + s * logits_row, logits_row)


@njit
def _norm(p, level, weight, streams, scratch):
    """The normalised residual of every stream."""
    row, epsilon = load_int(level + L.WIDTH_ROW), get(p, P.NUMBERS)
    for s in range(streams):
        residual, normed = scratch + get(p, P.RESIDUAL) + s * row, scratch + get(p, P.NORMED) + s * row
        rms_norm(residual, weight, row // BYTES, level + L.INVERSE_WIDTH, epsilon, normed)


@njit
def _copy(to, origin, size):
    for i in range(0, size, BYTES):
        store(to + i, load(origin + i))


@njit
def _add(to, origin, size):
    for i in range(0, size, BYTES):
        store(to + i, load(to + i) + load(origin + i))


decode_kernel = Kernel(decode)


class CpuDecoder:
    """`Decoder` by the kernel above; matrices in float32 or in bfloat16 pairs."""

    @torch.no_grad()
    def __init__(self, weights: UNetWeights, batch: int, precision: str) -> None:
        self.batch = batch
        self._pairs = precision == "bfloat16"
        self._position = 0
        self._vocabulary = weights.head.shape[0]
        self._levels = [_Level(weights, i, batch, self._pairs) for i in range(len(weights.groups))]
        self._table = torch.tensor([[level.row[name] for name in L] for level in self._levels])
        width, vocabulary = self._levels[0].width, whole(self._vocabulary)
        self._embedding = F.pad(weights.embedding.float(), (0, whole(width) - width)).contiguous()
        self._norm_f = F.pad(weights.norm_f.float(), (0, whole(width) - width))
        self._head = _pack(weights.head, self._pairs)
        self._head_bias = F.pad(weights.head_bias.float(), (0, vocabulary - self._vocabulary))
        self._logits = torch.zeros(batch, vocabulary)
        self._bias = F.pad(torch.zeros(self._vocabulary), (0, vocabulary - self._vocabulary), value=-math.inf)
        self._epsilon = weights.epsilon
        self._multiplications = sum(level.weights.numel() for level in self._levels)

    @property
    def logits(self) -> Tensor:
        return self._logits[:, : self._vocabulary]

    def condition(self, vectors: Tensor) -> None:
        parts = [(level, level.entering) for level in self._levels]
        parts += [(level, level.rising) for level in self._levels[:-1]]
        for (level, part), given in zip(parts, vectors.split([level.width for level, _ in parts], 1), strict=True):
            part[:, : level.width] = given

    def read(self, tokens: Tensor) -> Tensor:
        after = torch.empty(self.batch, tokens.shape[1], self._logits.shape[1])
        self._run(tokens.long().contiguous(), Sampling(), after=after)
        return after[..., : self._vocabulary]

    def draw(self, steps: int, sampling: Sampling, seeds: Tensor, guidance: float | None = None) -> Tensor:
        tokens = torch.empty(self.batch, steps, dtype=torch.int64)
        self._run(tokens, sampling, seeds=seeds.long().contiguous(), guidance=guidance)
        return tokens

    def load_state(self, state: DecoderState) -> None:
        conv, ssm = iter(state.conv), iter(state.ssm)
        for level in self._levels:
            for i in range(len(level.conv)):
                level.conv[i, :, :, : level.inner] = next(conv)
                level.ssm[i, :, :, : level.inner] = next(ssm).transpose(1, 2)
        for level, buffer, queue in zip(self._levels, state.buffers, state.queues, strict=False):
            level.buffer[..., : level.width] = buffer
            level.queue[..., : level.width] = queue
        self._position = state.position

    def state(self) -> DecoderState:
        conv = [v[..., : level.inner].clone() for level in self._levels for v in level.conv]
        ssm = [v[..., : level.inner].transpose(1, 2).contiguous() for level in self._levels for v in level.ssm]
        pooled = self._levels[:-1]
        buffers = [level.buffer[..., : level.width].clone() for level in pooled]
        return DecoderState(
            self._position, conv, ssm, buffers, [level.queue[..., : level.width].clone() for level in pooled]
        )

    def _run(
        self,
        tokens: Tensor,
        sampling: Sampling,
        after: Tensor | None = None,
        seeds: Tensor | None = None,
        guidance: float | None = None,
    ) -> None:
        strength = 1.0 if guidance is None else guidance
        numbers = torch.tensor([self._epsilon, sampling.inverse_temperature, sampling.top_p, strength])
        steps, threads = tokens.shape[1], torch.get_num_threads()
        group = min(GROUP, math.ceil(self.batch / threads))
        if guidance is not None:
            group += group % 2  # a pair is one task's
        logits_row = 4 * self._logits.shape[1]
        parameters: dict[int, int] = {
            P.BATCH: self.batch,
            P.GROUP: group,
            P.STEPS: steps,
            P.POSITION: self._position,
            P.TOP_K: 1 << 40 if sampling.top_k is None else sampling.top_k,
            P.LEVELS: len(self._levels),
            P.PAIRS: int(self._pairs),
            P.LOGITS_ROW: logits_row,
            P.TABLE: self._table.data_ptr(),
            P.EMBEDDING: self._embedding.data_ptr(),
            P.NORM_F: self._norm_f.data_ptr(),
            P.HEAD: self._head.data_ptr(),
            P.HEAD_BIAS: self._head_bias.data_ptr(),
            P.NUMBERS: numbers.data_ptr(),
            P.LOGITS: self._logits.data_ptr(),
            P.BIAS: self._bias.data_ptr(),
            P.SEEDS: 0 if seeds is None else seeds.data_ptr(),
            P.TOKENS: tokens.data_ptr(),
            P.DRAW: 0 if seeds is None else 1 if guidance is None else 2,
            P.AFTER: 0 if after is None else after.data_ptr(),
        }
        scratch = 3 * logits_row
        rows = {name: max(level.row[name] for level in self._levels) for name in (L.WIDTH_ROW, L.ROW, L.MIXED_ROW)}
        skips = max((level.row[L.LAYERS] + 1) * level.row[L.WIDTH_ROW] for level in self._levels)
        for name, size in (
            (P.RESIDUAL, rows[L.WIDTH_ROW]),
            (P.NORMED, rows[L.WIDTH_ROW]),
            (P.X_Z, 2 * rows[L.ROW]),
            (P.DT, rows[L.ROW]),
            (P.Y, rows[L.ROW]),
            (P.MIXED, rows[L.MIXED_ROW]),
            (P.SKIPS, skips),
        ):
            parameters[name] = scratch
            scratch += group * size
        tasks = math.ceil(self.batch / group)
        decode_kernel.run(parameters, tasks, scratch, steps * self.batch * self._multiplications)
        self._position += steps


class _Level:
    """A level's packed weights, its state, and its row of the table."""

    def __init__(self, weights: UNetWeights, index: int, batch: int, pairs: bool) -> None:
        layers, self.width = weights.groups[index], weights.widths[index]
        first = layers[0]
        self.inner, states = first.A_log.shape
        taps, rank = first.conv_weight.shape[1], first.dt_proj.shape[1]
        inner, width = whole(self.inner), whole(self.width)
        packed = [_pack_layer(layer, pairs) for layer in layers]
        self.weights = torch.stack([torch.cat(list(pieces.values())) for pieces in packed])
        self.conv = torch.zeros(len(layers), batch, taps - 1, inner)
        self.ssm = torch.zeros(len(layers), batch, states, inner)
        centre = index == len(weights.levels)
        pool = 1 if centre else weights.levels[index].pool
        self.buffer, self.queue = torch.zeros(2, batch, pool, width).unbind()
        self.entering, self.rising = torch.zeros(2, batch, width).unbind()
        down = 0 if centre else len(weights.levels[index].down)
        self.into, self.into_bias, self.back, self.back_bias = (torch.zeros(0),) * 4
        if index:
            self._pack_pools(weights, index, pairs)
        self.row: dict[int, int] = {
            L.POOL: pool,
            L.DOWN: down,
            L.LAYERS: len(layers),
            L.SKIP_EACH: int(down > 0),
            L.WIDTH: self.width,
            L.INNER: self.inner,
            L.RANK: rank,
            L.STATES: states,
            L.TAPS: taps,
            L.WIDTH_ROW: 4 * width,
            L.ROW: 4 * inner,
            L.MIXED_ROW: 4 * whole(rank + 2 * states),
            L.INVERSE_WIDTH: int(torch.tensor(1 / self.width).view(torch.int32)),
            L.LAYER_BYTES: 4 * self.weights.shape[1],
            L.WEIGHTS: self.weights.data_ptr(),
            L.CONV: self.conv.data_ptr(),
            L.SSM: self.ssm.data_ptr(),
            L.BUFFER: self.buffer.data_ptr(),
            L.QUEUE: self.queue.data_ptr(),
            L.ENTERING: self.entering.data_ptr(),
            L.RISING: self.rising.data_ptr(),
            L.INTO: self.into.data_ptr(),
            L.INTO_BIAS: self.into_bias.data_ptr(),
            L.BACK: self.back.data_ptr(),
            L.BACK_BIAS: self.back_bias.data_ptr(),
        }
        offset = 0
        for name, piece in packed[0].items():
            self.row[name] = 4 * offset
            offset += piece.numel()

    def _pack_pools(self, weights: UNetWeights, index: int, pairs: bool) -> None:
        w, above = weights.levels[index - 1], weights.widths[index - 1]
        more, mine = whole(above) - above, whole(self.width) - self.width
        frames = w.down_weight.float().unflatten(1, (w.pool, above))
        self.into = _pack(F.pad(frames, (0, more)).flatten(1), pairs)
        self.into_bias = F.pad(w.down_bias.float(), (0, mine))
        frames = w.up_weight.float().unflatten(0, (w.pool, above))
        self.back = _pack(F.pad(frames, (0, 0, 0, more)).flatten(0, 1), pairs)
        self.back_bias = F.pad(w.up_bias.float().unflatten(0, (w.pool, above)), (0, more)).flatten()


def _pack_layer(w: LayerWeights, pairs: bool) -> dict[int, Tensor]:
    """The pieces of a layer, flat 32-bit words, in the order in which they lie."""
    inner, width = w.out_proj.shape[1], w.out_proj.shape[0]
    more = whole(inner) - inner

    def rows(v: Tensor) -> Tensor:
        """(channels, n) -> (n, channels), padded."""
        return F.pad(v.float().T, (0, more)).flatten()

    return {
        L.NORM: F.pad(w.norm.float(), (0, whole(width) - width)),
        L.IN_PROJ: torch.cat([_pack(half, pairs) for half in w.in_proj.chunk(2)]),
        L.CONV_WEIGHT: rows(w.conv_weight),
        L.CONV_BIAS: rows(w.conv_bias[:, None]),
        L.X_PROJ: _pack(w.x_proj, pairs),
        L.DT_PROJ: pack_panels(w.dt_proj),
        L.DT_BIAS: rows(w.dt_bias[:, None]),
        L.A: rows(-torch.exp(w.A_log.float()) * math.log2(math.e)),
        L.D: rows(w.D[:, None]),
        L.OUT_PROJ: _pack(w.out_proj, pairs),
    }


def _pack(matrix: Tensor, pairs: bool) -> Tensor:
    return pack_pairs(matrix) if pairs else pack_panels(matrix)
