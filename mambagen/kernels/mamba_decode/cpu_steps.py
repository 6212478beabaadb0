"""What a step of a Mamba layer is made of, on a CPU: norm, matrix times vectors, convolution, scan.

Everything is by address (int64), float32, sixteen at a time; rows are padded with zeros to whole vectors. A matrix lies
in panels of 64 outputs, (outputs / 64, inputs, 64): the innermost loop reads it in order and keeps four sums a stream
in registers. Every sum over inputs runs in their order, so that a stream's numbers do not depend on its neighbours.
"""

# mypy: disallow-untyped-defs=False

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from mambagen.kernels.cpu_memory import BYTES, broadcast, load, pointer, store
from mambagen.kernels.cpu_simd import (
    F32,
    FLOATS,
    I32,
    LANES,
    exp2,
    f32x16,
    fma,
    intrinsic,
    sigmoid,
    softplus_and_slope,
    splat,
)

PANEL = 4 * LANES  # outputs
PANEL_BYTES = 4 * BYTES


@njit
def rms_norm(x, weight, vectors, inverse_width, epsilon, y):
    """y = weight x / sqrt(mean(x^2) + epsilon); `inverse_width` and `epsilon` are addresses of numbers."""
    squares = splat(0.0)
    for i in range(vectors):
        v = load(x + i * BYTES)
        squares = fma(v, v, squares)
    scale = 1.0 / square_root(fma(splat(sum_of_lanes(squares)), broadcast(inverse_width), broadcast(epsilon)))
    for i in range(vectors):
        store(y + i * BYTES, load(x + i * BYTES) * scale * load(weight + i * BYTES))


@njit
def matrix_product(matrix, panels, inputs, x, x_row, y, y_row, y_panel, streams, add):
    """y = matrix x for each stream, or y += matrix x with `add`.

    Streams lie x_row and y_row bytes apart, the outputs of one panel y_panel bytes from those of the next.
    """
    panel = inputs * PANEL_BYTES
    if streams == 1:  # two panels at a time: eight sums hide the latency of each
        p = 0
        while p + 1 < panels:
            _two_panels(matrix + p * panel, inputs, x, y + p * y_panel, y_panel, add)
            p += 2
        if p < panels:
            _one_stream(matrix + p * panel, inputs, x, y + p * y_panel, add)
        return
    for p in range(panels):  # a panel stays in the cache while all streams meet it
        w, to, i = matrix + p * panel, y + p * y_panel, 0
        while i + 3 < streams:
            _four_streams(w, inputs, x + i * x_row, x_row, to + i * y_row, y_row, add)
            i += 4
        if i + 1 < streams:
            _two_streams(w, inputs, x + i * x_row, x_row, to + i * y_row, y_row, add)
            i += 2
        if i < streams:
            _one_stream(w, inputs, x + i * x_row, to + i * y_row, add)


@njit
def _one_stream(w, inputs, x, y, add):
    a, b, c, d = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    for k in range(inputs):
        v = broadcast(x + 4 * k)
        a, b, c, d = panel_step(w + k * PANEL_BYTES, v, a, b, c, d)
    panel_finish(y, a, b, c, d, add)


@njit
def _two_panels(w, inputs, x, y, y_panel, add):
    a, b, c, d = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    e, f, g, h = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    for k in range(inputs):
        v = broadcast(x + 4 * k)
        a, b, c, d = panel_step(w + k * PANEL_BYTES, v, a, b, c, d)
        e, f, g, h = panel_step(w + (inputs + k) * PANEL_BYTES, v, e, f, g, h)
    panel_finish(y, a, b, c, d, add)
    panel_finish(y + y_panel, e, f, g, h, add)


@njit
def _two_streams(w, inputs, x, x_row, y, y_row, add):
    a, b, c, d = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    e, f, g, h = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    for k in range(inputs):
        at, row = x + 4 * k, w + k * PANEL_BYTES
        a, b, c, d = panel_step(row, broadcast(at), a, b, c, d)
        e, f, g, h = panel_step(row, broadcast(at + x_row), e, f, g, h)
    panel_finish(y, a, b, c, d, add)
    panel_finish(y + y_row, e, f, g, h, add)


@njit
def _four_streams(w, inputs, x, x_row, y, y_row, add):
    a, b, c, d = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    e, f, g, h = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    i, j, m, n = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    q, r, s, t = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    for k in range(inputs):
        at, row = x + 4 * k, w + k * PANEL_BYTES
        a, b, c, d = panel_step(row, broadcast(at), a, b, c, d)
        e, f, g, h = panel_step(row, broadcast(at + x_row), e, f, g, h)
        i, j, m, n = panel_step(row, broadcast(at + 2 * x_row), i, j, m, n)
        q, r, s, t = panel_step(row, broadcast(at + 3 * x_row), q, r, s, t)
    panel_finish(y, a, b, c, d, add)
    panel_finish(y + y_row, e, f, g, h, add)
    panel_finish(y + 2 * y_row, i, j, m, n, add)
    panel_finish(y + 3 * y_row, q, r, s, t, add)


@njit(forceinline=True)
def panel_step(w, v, a, b, c, d):
    """The four sums of a panel of outputs after another input: a row of weights at w times v."""
    a = fma(load(w), v, a)
    b = fma(load(w + BYTES), v, b)
    c = fma(load(w + 2 * BYTES), v, c)
    d = fma(load(w + 3 * BYTES), v, d)
    return a, b, c, d


@njit(forceinline=True)
def panel_finish(y, a, b, c, d, add):
    """Store the four sums of a panel at y, or add them to what stands there."""
    if add:
        a, b, c, d = a + load(y), b + load(y + BYTES), c + load(y + 2 * BYTES), d + load(y + 3 * BYTES)
    store(y, a)
    store(y + BYTES, b)
    store(y + 2 * BYTES, c)
    store(y + 3 * BYTES, d)


@njit
def conv_step(x, window, row, weight, bias, taps, vectors):
    """x = silu(conv(x)) in place; the window of taps - 1 rows of `row` bytes, oldest first, moves on."""
    for i in range(vectors):
        at = i * BYTES
        new = load(x + at)
        total = fma(load(weight + (taps - 1) * row + at), new, load(bias + at))
        for k in range(taps - 1):
            old = load(window + k * row + at)
            total = fma(load(weight + k * row + at), old, total)
            if k > 0:
                store(window + (k - 1) * row + at, old)
        if taps > 1:
            store(window + (taps - 2) * row + at, new)
        store(x + at, total * sigmoid(total))


@njit
def scan_step(x, z, dt, dt_bias, A, B, C, D, h, row, states, vectors, y):
    """h = exp(dt A) h + dt x B;  y = (C . h + D x) silu(z), with dt = softplus(dt + bias).

    A (states, channels) is times log2(e); h likewise, rows of `row` bytes; B and C are rows of `states` numbers.
    """
    for i in range(vectors):
        at = i * BYTES
        step, _ = softplus_and_slope(load(dt + at) + load(dt_bias + at))
        value = load(x + at)
        u = step * value
        total = load(D + at) * value
        for n in range(states):
            where = h + n * row + at
            state = fma(exp2(step * load(A + n * row + at)), load(where), u * broadcast(B + 4 * n))
            store(where, state)
            total = fma(state, broadcast(C + 4 * n), total)
        gate = load(z + at)
        store(y + at, total * gate * sigmoid(gate))


@intrinsic
def sum_of_lanes(typing: Any, value: Any) -> Any:
    """The sum of a vector's lanes as a float32, always in the same order."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        v = args[0]
        for step in (8, 4, 2, 1):
            lanes = ir.Constant(ir.VectorType(I32, LANES), [lane ^ step for lane in range(LANES)])
            v = builder.fadd(v, builder.shuffle_vector(v, ir.Constant(FLOATS, ir.Undefined), lanes))
        return builder.extract_element(v, I32(0))

    return types.float32(f32x16), generate


@intrinsic
def largest_of_lanes(typing: Any, value: Any) -> Any:
    """The largest lane of a vector as a float32."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        v = args[0]
        for step in (8, 4, 2, 1):
            lanes = ir.Constant(ir.VectorType(I32, LANES), [lane ^ step for lane in range(LANES)])
            other = builder.shuffle_vector(v, ir.Constant(FLOATS, ir.Undefined), lanes)
            v = builder.select(builder.fcmp_ordered(">", other, v), other, v)
        return builder.extract_element(v, I32(0))

    return types.float32(f32x16), generate


@intrinsic
def square_root(typing: Any, value: Any) -> Any:
    """Of each lane."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        kind = ir.FunctionType(FLOATS, [FLOATS])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.sqrt.v16f32"), args)

    return f32x16(f32x16), generate


@intrinsic
def load_float(typing: Any, address: Any) -> Any:
    """One float32."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.load(pointer(builder, args[0], F32), align=4)

    return types.float32(types.int64), generate


@intrinsic
def float_bits(typing: Any, value: Any) -> Any:
    """The bits of a float32 as an int64 (negative where the sign is set)."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.sext(builder.bitcast(args[0], I32), ir.IntType(64))

    return types.int64(types.float32), generate
