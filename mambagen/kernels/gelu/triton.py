"""GELU and its neighbours in Triton: blocks of a contiguous tensor, bound by memory.

With 1 + tanh(u) = 2 / (1 + exp(-2 u)), gelu(x) = x s with s = 1 / (1 + exp(-2 u)): an exponential and a reciprocal, and
no difference of near numbers where x is far below zero. Its slope is s + x s (1 - s) 2 u'.

The sizes are specialised (divisible by 16 or not), so that masks do not keep loads and stores from being vectors.
"""

# mypy: ignore-errors

import triton
import triton.language as tl
from torch import Tensor, empty_like

from mambagen.kernels.launching import on_device_of
from mambagen.kernels.triton_rows import divided

BLOCK, WARPS = 2048, 4  # elements of a program

TWICE = 1.5957691216057308  # 2 sqrt(2 / pi): 2 u = TWICE (x + 0.044715 x^3)
LOG2E = 1.4426950408889634
LINEAR, CUBIC = tl.constexpr(-TWICE * LOG2E), tl.constexpr(-TWICE * LOG2E * 0.044715)  # of -2 u, as a power of 2
SLOPE, BEND = tl.constexpr(TWICE), tl.constexpr(TWICE * 3 * 0.044715)  # of 2 u'


def product(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.contiguous(), b.contiguous()
    y = empty_like(a)
    size = a.numel()
    if size:
        with on_device_of(a):
            gelu_product_kernel[(triton.cdiv(size, BLOCK),)](a, b, y, size, BLOCK, num_warps=WARPS)
    return y


def product_gradients(dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dy, a, b = dy.contiguous(), a.contiguous(), b.contiguous()
    da, db = empty_like(a), empty_like(b)
    size = a.numel()
    if size:
        with on_device_of(a):
            gelu_gradients_kernel[(triton.cdiv(size, BLOCK),)](dy, a, b, da, db, size, BLOCK, num_warps=WARPS)
    return da, db


def masked(x: Tensor, mask: Tensor) -> Tensor:
    return _masked(x, x, mask, backward=False)


def masked_gradient(dy: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    return _masked(dy, x, mask, backward=True)


def _masked(dy: Tensor, x: Tensor, mask: Tensor, backward: bool) -> Tensor:
    dy, x, mask = dy.contiguous(), x.contiguous(), mask.contiguous()
    out = empty_like(x)
    size = x.numel()
    if size:
        with on_device_of(x):
            masked_gelu_kernel[(triton.cdiv(size, BLOCK),)](
                dy, x, mask, out, size, x.shape[-1], backward, BLOCK, num_warps=WARPS
            )
    return out


@triton.jit
def share(x):
    """gelu(x) / x."""
    return divided(1.0, 1.0 + tl.exp2(x * (LINEAR + CUBIC * x * x)))


@triton.jit
def slope(x, s):
    """gelu'(x), where s is `share(x)`."""
    return s + x * s * (1.0 - s) * (SLOPE + BEND * x * x)


@triton.jit
def gelu_product_kernel(a, b, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    u = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (u * share(u) * (v * share(v))).to(y.dtype.element_ty), mask=inside)


@triton.jit
def gelu_gradients_kernel(dy, a, b, da, db, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    s, t = share(u), share(v)
    tl.store(da + at, (g * (v * t) * slope(u, s)).to(da.dtype.element_ty), mask=inside)
    tl.store(db + at, (g * (u * s) * slope(v, t)).to(db.dtype.element_ty), mask=inside)


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
