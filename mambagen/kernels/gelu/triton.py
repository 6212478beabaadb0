"""GELU and its neighbours in Triton, bound by memory.

With 1 + tanh(u) = 2 / (1 + exp(-2 u)), gelu(x) = x s with s = 1 / (1 + exp(-2 u)): an exponential and a reciprocal, and
no difference of near numbers where x is far below zero. Its slope is s + x s (1 - s) 2 u'.

Forward and without sums a program has a block of a contiguous tensor. The size is specialised (divisible by 16 or not),
so that masks do not keep loads and stores from being vectors. With sums over positions it has some columns and many
rows: it adds element by element, then over the rows of its tile, and the programs' sums are added in fixed order.
"""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor, empty_like

from mambagen.kernels.launching import on_device_of, processors
from mambagen.kernels.triton_rows import divided

BLOCK, WARPS = 2048, 4  # elements of a program
TILE, WIDEST = 2048, 128  # elements of a tile and columns of it, where sums are taken
PROGRAMS = 8  # a multiprocessor, for the sums

TWICE = 1.5957691216057308  # 2 sqrt(2 / pi): 2 u = TWICE (x + 0.044715 x^3)
LOG2E = 1.4426950408889634
LINEAR, CUBIC = tl.constexpr(-TWICE * LOG2E), tl.constexpr(-TWICE * LOG2E * 0.044715)  # of -2 u, as a power of 2
SLOPE, BEND = tl.constexpr(TWICE), tl.constexpr(TWICE * 3 * 0.044715)  # of 2 u'


def product(a: Tensor, b: Tensor, activate: bool) -> Tensor:
    a, b = a.contiguous(), b.contiguous()
    y, size = empty_like(a), a.numel()
    if size:
        with on_device_of(a):
            gate_kernel[(triton.cdiv(size, BLOCK),)](a, b, y, size, activate, BLOCK, num_warps=WARPS)
    return y


def product_gradients(dy: Tensor, a: Tensor, b: Tensor, activate: bool, sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """da, db, and their sums (2, channels) float32 (empty where they are not asked for)."""
    dy, a, b = dy.contiguous(), a.contiguous(), b.contiguous()
    da, db, size = empty_like(a), empty_like(b), a.numel()
    if sums:
        return da, db, _sums(gate_sums_kernel, (dy, a, b, da, db), 2, activate)
    if size:
        with on_device_of(a):
            gate_gradients_kernel[(triton.cdiv(size, BLOCK),)](dy, a, b, da, db, size, activate, BLOCK, num_warps=WARPS)
    return da, db, a.new_empty(0, dtype=torch.float32)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    x, mask = x.contiguous(), mask.contiguous()
    y, size = empty_like(x), x.numel()
    if size:
        with on_device_of(x):
            masked_gelu_kernel[(triton.cdiv(size, BLOCK),)](
                x, x, mask, y, size, x.shape[-1], False, BLOCK, num_warps=WARPS
            )
    return y


def masked_gradient(dy: Tensor, x: Tensor, mask: Tensor | None, sums: bool) -> tuple[Tensor, Tensor]:
    """dx, and its sum (channels,) float32 (empty where it is not asked for)."""
    dy, x = dy.contiguous(), x.contiguous()
    mask = None if mask is None else mask.contiguous()
    dx, size = empty_like(x), x.numel()
    if sums:
        return dx, _sums(masked_gelu_sums_kernel, (dy, x, x if mask is None else mask, dx), 1, mask is not None)[0]
    if size:
        with on_device_of(x):
            masked_gelu_kernel[(triton.cdiv(size, BLOCK),)](
                dy, x, mask, dx, size, x.shape[-1], True, BLOCK, num_warps=WARPS
            )
    return dx, x.new_empty(0, dtype=torch.float32)


def _sums(kernel, tensors: tuple[Tensor, ...], count: int, option: bool) -> Tensor:
    """Run a kernel over all columns and rows: `count` sums, (count, channels) float32."""
    last = tensors[-1]
    d = last.shape[-1]
    rows = last.numel() // max(d, 1)
    wide = min(triton.next_power_of_2(d), WIDEST)
    if wide == WIDEST and triton.cdiv(d, wide) * wide > 1.125 * d:
        wide //= 2  # rather than that many idle columns
    tile = max(1, TILE // wide)
    blocks, tiles = triton.cdiv(d, wide), triton.cdiv(rows, tile)
    programs = min(tiles, triton.cdiv(PROGRAMS * processors(last.device), max(blocks, 1)))
    partial = torch.empty(programs, count, d, dtype=torch.float32, device=last.device)
    if last.numel():
        with on_device_of(last):
            kernel[(blocks, programs)](
                *tensors, partial, rows, triton.cdiv(tiles, programs), option, d, tile, wide, num_warps=WARPS
            )
    return partial.sum(0)


@triton.jit
def share(x):
    """gelu(x) / x."""
    return divided(1.0, 1.0 + tl.exp2(x * (LINEAR + CUBIC * x * x)))


@triton.jit
def slope(x, s):
    """gelu'(x), where s is `share(x)`."""
    return s + x * s * (1.0 - s) * (SLOPE + BEND * x * x)


@triton.jit
def gate_gradients(dy, a, b, da, db, at, inside, GELU: tl.constexpr):
    """The gradients of a and b at some elements, stored and given."""
    g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        s, t = share(u), share(v)
        du = g * (v * t) * slope(u, s)
        dv = g * (u * s) * slope(v, t)
    else:
        du = g * v
        dv = g * u
    tl.store(da + at, du.to(da.dtype.element_ty), mask=inside)
    tl.store(db + at, dv.to(db.dtype.element_ty), mask=inside)
    return du, dv


@triton.jit
def gate_kernel(a, b, y, size, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    u = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        u *= share(u)
        v *= share(v)
    tl.store(y + at, (u * v).to(y.dtype.element_ty), mask=inside)


@triton.jit
def gate_gradients_kernel(dy, a, b, da, db, size, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate_gradients(dy, a, b, da, db, at, inside, GELU)


@triton.jit(do_not_specialize=["rows", "each"])
def gate_sums_kernel(
    dy, a, b, da, db, partial, rows, each,
    GELU: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.zeros([TILE, COLUMNS], tl.float32)
    second = tl.zeros([TILE, COLUMNS], tl.float32)
    for k in range(each):
        row = (k * tl.num_programs(1) + tl.program_id(1)) * TILE + tl.arange(0, TILE)
        inside = (row[:, None] < rows) & (column[None, :] < D)
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        du, dv = gate_gradients(dy, a, b, da, db, at, inside, GELU)
        first += du
        second += dv
    to = partial + tl.program_id(1) * 2 * D + column
    tl.store(to, tl.sum(first, 0), mask=column < D)
    tl.store(to + D, tl.sum(second, 0), mask=column < D)


@triton.jit
def masked_gelu_kernel(dy, x, mask, out, size, CHANNELS: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    inside = at < size
    first = (start % CHANNELS).to(tl.int32)
    row = start // CHANNELS + (first + tl.arange(0, BLOCK)) // CHANNELS  # a 64-bit division for the program alone
    silent = tl.load(mask + row, mask=inside, other=0) != 0
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    s = share(v)
    if BACKWARD:
        value = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * slope(v, s)
    else:
        value = v * s
    tl.store(out + at, tl.where(silent, 0.0, value).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "each"])
def masked_gelu_sums_kernel(
    dy, x, mask, dx, partial, rows, each,
    MASKED: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([TILE, COLUMNS], tl.float32)
    for k in range(each):
        row = (k * tl.num_programs(1) + tl.program_id(1)) * TILE + tl.arange(0, TILE)
        inside = (row[:, None] < rows) & (column[None, :] < D)
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * slope(v, share(v))
        if MASKED:
            silent = tl.load(mask + row, mask=row < rows, other=0) != 0
            value = tl.where(silent[:, None], 0.0, value)
        tl.store(dx + at, value.to(dx.dtype.element_ty), mask=inside)
        sums += value
    tl.store(partial + tl.program_id(1) * D + column, tl.sum(sums, 0), mask=column < D)
