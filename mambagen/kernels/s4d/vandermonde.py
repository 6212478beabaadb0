"""K_t = 2 Re sum_n c_n exp(t z_n) for t = 0 ... length - 1: the kernel of a diagonal system, without its powers.

The (length, state) matrix of powers is never there. With t = i J + j, exp(t z) = exp(i J z) exp(j z), so that K is a
product of an (I, 2 state) and a (2 state, J) real matrix, I and J near the root of the length. The two are computed in
float64, as a phase t Im(z) of thousands of turns has to keep its fraction, and multiplied in the precision of c. The
gradients are products of the same two factors:

    dc_n = 2 conj(sum_t g_t exp(t z_n)),    dz_n = 2 conj(c_n sum_t t g_t exp(t z_n)).
"""

from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambagen.kernels.dispatch import backend_module, entered_directly, is_plain_eager

SLAB = 2**22  # complex factors that are made at once


def vandermonde_product(c: Tensor, z: Tensor, length: int, backend: str = "torch") -> Tensor:
    """The real kernels of diagonal systems.

    Args:
        c: (ssms, state) complex64 (complex128 computes in float64). z: (ssms, state) complex128, log of A-bar.
        backend: "torch" (any device) or "triton" (GPU, c complex64).

    Returns:
        (ssms, length), real; differentiable once in c and z.
    """
    run = _direct if is_plain_eager(c, z) else _forward
    kernel: Tensor = run(c, z, length, backend)
    return kernel


def powers(z: Tensor, length: int, dtype: torch.dtype, start: int = 0) -> Tensor:
    """exp(t z) for t = start ... start + length - 1: (..., state, length), rounded to `dtype` from complex128."""
    t = torch.arange(start, start + length, device=z.device, dtype=torch.float64)
    return torch.exp(z[..., None] * t).to(dtype)


def block_length(length: int) -> int:
    """J: the power of two next to the root of the length."""
    return 1 << ((length - 1).bit_length() + 1) // 2 if length > 1 else 1


def _slabs(z: Tensor, length: int) -> list[slice]:
    """Cuts over the systems so that the factors of a cut stay below SLAB elements."""
    ssms, state = z.shape
    J = block_length(length)
    width = max(1, SLAB // (state * (J + -(-length // J))))
    return [slice(first, min(first + width, ssms)) for first in range(0, ssms, width)]


def _factors(z: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """exp(i J z) as (ssms, I, state) and exp(j z) as (ssms, state, J)."""
    J = block_length(length)
    blocks = -(-length // J)
    return powers(z * J, blocks, dtype).transpose(1, 2), powers(z, J, dtype)


@torch.library.custom_op("mambagen::s4d_vandermonde", mutates_args=())
def _forward(c: Tensor, z: Tensor, length: int, backend: str) -> Tensor:
    return _forward_now(c, z, length, backend)


def _forward_now(c: Tensor, z: Tensor, length: int, backend: str) -> Tensor:
    if backend == "triton":
        return backend_module("s4d", "triton").forward(c, z, length)
    parts = []
    for cut in _slabs(z, length):
        coarse, fine = _factors(z[cut], length, c.dtype)
        left = 2 * coarse * c[cut, None]
        left, right = torch.cat([left.real, -left.imag], 2), torch.cat([fine.real, fine.imag], 1)
        parts.append(torch.bmm(left, right).flatten(1)[:, :length])
    return torch.cat(parts).contiguous()


@_forward.register_fake
def _(c: Tensor, z: Tensor, length: int, backend: str) -> Tensor:
    return c.new_empty(c.shape[0], length, dtype=c.dtype.to_real())


@torch.library.custom_op("mambagen::s4d_vandermonde_backward", mutates_args=())
def _backward(g: Tensor, c: Tensor, z: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _backward_now(g, c, z, backend)


def _backward_now(g: Tensor, c: Tensor, z: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        dc, dz = backend_module("s4d", "triton").gradients(g, c, z)
        return dc, dz
    pairs = [_moments(g[cut], z[cut], c.dtype) for cut in _slabs(z, g.shape[1])]
    first, moment = (torch.cat(part) for part in zip(*pairs, strict=True))
    return (2 * first.conj_physical()).to(c.dtype), (2 * (c * moment).conj_physical()).to(z.dtype)


@_backward.register_fake
def _(g: Tensor, c: Tensor, z: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(c), torch.empty_like(z)


def _moments(g: Tensor, z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """sum_t g_t exp(t z) and sum_t t g_t exp(t z): (ssms, state) complex128 each."""
    length = g.shape[1]
    coarse, fine = _factors(z, length, dtype)
    blocks, J = coarse.shape[1], fine.shape[2]
    rows = torch.nn.functional.pad(g, (0, blocks * J - length)).unflatten(1, (blocks, J))
    j = torch.arange(J, device=g.device, dtype=g.dtype)
    right = torch.cat([fine.real, fine.imag, fine.real * j, fine.imag * j], 1)
    re, im, t_re, t_im = torch.bmm(rows, right.transpose(1, 2)).double().chunk(4, 2)
    inner, t_inner = torch.complex(re, im), torch.complex(t_re, t_im)  # (ssms, I, state), without i J
    i = torch.arange(blocks, device=g.device, dtype=torch.float64)[:, None] * J
    coarse = coarse.to(torch.complex128)
    return (coarse * inner).sum(1), (coarse * (i * inner + t_inner)).sum(1)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    c, z, _, ctx.backend = inputs
    ctx.save_for_backward(c, z)


def _gradients(ctx, g, *, backward=None):  # type: ignore[no-untyped-def]
    c, z = ctx.saved_tensors
    with torch.autocast(g.device.type, enabled=False):
        dc, dz = (backward or _backward)(g.contiguous(), c, z, ctx.backend)
    return dc, dz, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
_direct = entered_directly(_forward_now, _setup, once_differentiable(partial(_gradients, backward=_backward_now)))
