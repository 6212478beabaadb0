"""Sine and cosine of a part of a turn, for Triton kernels that make roots of unity in registers."""

# mypy: ignore-errors

import triton
import triton.language as tl

PI = tl.constexpr(3.141592653589793)


@triton.jit
def half_turn(turns):
    """Sine and cosine of pi turns, float32, for turns within [-1/2, 1/2].

    By their series: the functions of the libraries carry a reduction for large angles that nothing here needs.
    """
    y = turns * PI
    s = y * y
    sine = 1 / 362880 + s * (-1 / 39916800 + s * (1 / 6227020800))
    sine = y * (1.0 + s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * sine))))
    cosine = 1 / 40320 + s * (-1 / 3628800 + s * (1 / 479001600))
    cosine = 1.0 + s * (-1 / 2 + s * (1 / 24 + s * (-1 / 720 + s * cosine)))
    return sine, cosine
