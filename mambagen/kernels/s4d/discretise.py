"""From the continuous diagonal system to one step of it, in float64: there are few numbers, and they are raised to
high powers, so that an error in them grows with the length.

In torch that is some forty operations with their gradients, each on a handful of numbers: on a GPU they take longer to
launch than a convolution to run, so for "zoh" they are one kernel forward and one backward there (triton.py).
"""

from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambagen.kernels.dispatch import backend_module, entered_directly, is_plain_eager

DISCRETISATIONS = ("zoh", "bilinear")
SMALLEST = 1e-150  # of |1 + dt A / 2|: the bilinear step forgets everything where dt A = -2, and has no logarithm


def discretise(dt: Tensor, A: Tensor, method: str = "zoh") -> tuple[Tensor, Tensor]:
    """One step of h' = A h + x with step size dt, as (log of A-bar, B-bar for B = 1).

    Args:
        dt: (ssms,) real. A: (ssms, state), real or complex.
        method: "zoh" (A-bar = exp(dt A), B-bar = (A-bar - 1) / A) or "bilinear" (A-bar = (1 + dt A / 2) /
            (1 - dt A / 2), B-bar = dt / (1 - dt A / 2)); S4D, arXiv 2206.11893, section 3.1.

    Returns:
        Two (ssms, state) complex128 tensors; the powers of A-bar are exp(t log A-bar).
    """
    if method not in DISCRETISATIONS:
        raise ValueError(f"s4d: discretisation is {method!r}; it must be one of {', '.join(DISCRETISATIONS)}")
    dt = dt.double()[:, None]
    step = dt * A.to(torch.complex128)
    if method == "zoh":
        # (exp(s) - 1) / s by its series where s is tiny (A may be 0); elsewhere the difference keeps 12 digits or more
        tiny = step.abs() < 1e-4
        safe = torch.where(tiny, torch.ones_like(step), step)
        growth = torch.where(tiny, 1 + step / 2 * (1 + step / 3), (torch.exp(safe) - 1) / safe)
        return step, dt * growth
    above, below = 1 + step / 2, 1 - step / 2
    above = torch.where(above.abs() < SMALLEST, torch.full_like(above, SMALLEST), above)
    return torch.log(above) - torch.log(below), dt / below


def coefficients(
    dt: Tensor, A: Tensor, C: Tensor, method: str, dtype: torch.dtype, backend: str = "torch"
) -> tuple[Tensor, Tensor]:
    """What the kernel sum_n c_n exp(t z_n) is made of: z = log A-bar, complex128, and c = C B-bar, rounded to `dtype`.

    Args:
        dt, A, method: as of `discretise`. C: (ssms, state), real or complex.
        dtype: complex64 or complex128.
        backend: "torch" (any device) or "triton" (GPU; used for "zoh" and complex64).

    Returns:
        Two (ssms, state) tensors; differentiable once in dt, A and C.
    """
    if backend == "triton" and method == "zoh" and dtype == torch.complex64:
        A, C = (v if v.is_complex() else v.to(torch.promote_types(v.dtype, torch.complex64)) for v in (A, C))
        run = _direct if is_plain_eager(dt, A, C) else _forward
        z, c = run(dt, A, C)
        return z, c
    z, b = discretise(dt, A, method)
    return z, (C.to(torch.complex128) * b).to(dtype)


@torch.library.custom_op("mambagen::s4d_coefficients", mutates_args=())
def _forward(dt: Tensor, A: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    return _forward_now(dt, A, C)


def _forward_now(dt: Tensor, A: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    z, c = backend_module("s4d", "triton").coefficients(dt, A, C)
    return z, c


@_forward.register_fake
def _(dt: Tensor, A: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    return A.new_empty(A.shape, dtype=torch.complex128), C.new_empty(C.shape, dtype=torch.complex64)


@torch.library.custom_op("mambagen::s4d_coefficients_backward", mutates_args=())
def _backward(dz: Tensor, dc: Tensor, dt: Tensor, A: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_now(dz, dc, dt, A, C)


def _backward_now(dz: Tensor, dc: Tensor, dt: Tensor, A: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_dt, dA, dC = backend_module("s4d", "triton").coefficient_gradients(dz, dc, dt, A, C)
    return d_dt, dA, dC


@_backward.register_fake
def _(dz: Tensor, dc: Tensor, dt: Tensor, A: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return dt.new_empty(dt.shape), A.new_empty(A.shape), C.new_empty(C.shape)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dz, dc, *, backward=None):  # type: ignore[no-untyped-def]
    return (backward or _backward)(dz, dc, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_setup)
_direct = entered_directly(_forward_now, _setup, once_differentiable(partial(_gradients, backward=_backward_now)))
