"""What the Triton kernels of all ops share: rows of a sequence in the order in which they run, and document borders.

Steps are counted in the order in which they run: step s is position s, or length - 1 - s in reverse, which `oriented`
turns into a base and a stride. Index arithmetic is 64-bit wherever a whole tensor is addressed.
"""

# mypy: ignore-errors

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # where libdevice cannot be called


@triton.jit
def oriented(base, stride, length, REVERSE: tl.constexpr):
    """Base and stride such that step s lies at base + s * stride."""
    if REVERSE:
        first = base + tl.cast(length - 1, tl.int64) * stride
        step = -stride
    else:
        first = base
        step = stride
    return first, step


@triton.jit
def load_rows(base, stride, start, end, offsets, mask, ROWS: tl.constexpr):
    """Steps start to start + ROWS - 1 as a tuple of rows; zeros from `end` on."""
    rows = ()
    for k in tl.static_range(ROWS):
        step = start + k
        row = base + tl.cast(step, tl.int64) * stride
        rows += (tl.load(row + offsets, mask=mask & (step < end), other=0.0),)
    return rows


@triton.jit
def begins(resets, step, length, REVERSE: tl.constexpr):
    """Whether this step takes nothing over from the step that runs before it; false outside the sequence."""
    if REVERSE:  # the step before it is position length - step, which begins a document of its own
        flag = tl.load(resets + (length - step), mask=(step > 0) & (step < length), other=0)
    else:
        flag = tl.load(resets + step, mask=(step >= 0) & (step < length), other=0)
    return flag != 0


@triton.jit
def divided(a, b):
    """a / b to some units in the last place, by a reciprocal and a product; 0 where b is above 2^126."""
    if INTERPRETED:
        return a / b
    else:
        return libdevice.fast_dividef(a, b)


@triton.jit
def logistic(v):
    return divided(1.0, 1.0 + tl.exp2(v * -LOG2E))


@triton.jit
def silu(v):
    return divided(v, 1.0 + tl.exp2(v * -LOG2E))
