"""The kernel of a diagonal-plus-low-rank system by its generating function, as S4 has it (arXiv 2111.00396, section 3).

At z = exp(-2 pi i k / M) the transform of the kernel's first M values is C~ (1 - Abar z)^-1 Bbar with
C~ = C (1 - Abar^M). With the bilinear step this is dt C~ [(1 - z) - (1 + z) dt A / 2]^-1 B, of which the formula of
Woodbury leaves four sums of the form

    sum_n v_n / ((1 - z) - (1 + z) w_n),    w = dt Lambda / 2,

Cauchy's but for a factor, which keeps them finite at z = -1 too. The matrix of denominators is made for one stretch of
z at a time and made again in the backward. All in complex128: the sums cancel.
"""

import math

import torch
from torch import Tensor

from mambagen.kernels.fft_conv import fast_length
from mambagen.kernels.s4.dense import after, bilinear_step

SLAB = 2**20  # elements of the matrix of denominators that are there at once


def cauchy_kernel(dt: Tensor, Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """(ssms, length) float64; arguments as `mambagen.kernels.s4.s4`."""
    M = fast_length(length)
    step = bilinear_step(dt, Lambda, P, B, C)
    cut = step.C.mT - after(step.A.mT, step.C.mT, M)  # C (1 - Abar^M), (ssms, 2N, 1)
    half = cut.squeeze(-1).unflatten(-1, (2, -1)) / 2
    C = torch.complex(half[:, 0], -half[:, 1])
    dt = dt.double()[:, None]
    Lambda, P, B = (v.to(torch.complex128) for v in (Lambda, P, B))
    v = torch.stack([C * B, C * P, P.conj() * B, P.conj() * P], 1)
    v = torch.cat([v, v.conj()], -1)  # both of each pair: (ssms, 4, 2N)
    w = dt / 2 * Lambda
    CB, CP, PB, PP = cauchy(v, torch.cat([w, w.conj()], -1), M).unbind(1)
    weight = dt / 2 * (1 + roots(M, 0, M // 2 + 1, dt))
    return torch.fft.irfft(dt * (CB - weight * CP * PB / (1 + weight * PP)), M)[:, :length]


def cauchy(v: Tensor, w: Tensor, M: int) -> Tensor:
    """sum_n v_n / ((1 - z) - (1 + z) w_n) at z = exp(-2 pi i k / M), k = 0 ... M / 2.

    v: (ssms, sums, states), w: (ssms, states), complex128 -> (ssms, sums, M // 2 + 1). Differentiable once.
    """
    return _forward(v, w, M)


def roots(M: int, first: int, last: int, like: Tensor) -> Tensor:
    """exp(-2 pi i k / M) for k = first ... last - 1."""
    angle = torch.arange(first, last, device=like.device, dtype=torch.float64) * (-2 * math.pi / M)
    return torch.polar(torch.ones_like(angle), angle)


def _stretches(w: Tensor, M: int) -> list[tuple[int, int]]:
    width, last = max(1, SLAB // w.numel()), M // 2 + 1
    return [(first, min(first + width, last)) for first in range(0, last, width)]


def _inverse(w: Tensor, z: Tensor) -> Tensor:
    """1 / ((1 - z) - (1 + z) w): (ssms, states, z)."""
    return 1 / ((1 - z) - (1 + z) * w[..., None])


@torch.library.custom_op("mambagen::s4_cauchy", mutates_args=())
def _forward(v: Tensor, w: Tensor, M: int) -> Tensor:
    parts = [v @ _inverse(w, roots(M, *stretch, w)) for stretch in _stretches(w, M)]
    return torch.cat(parts, -1)


@_forward.register_fake
def _(v: Tensor, w: Tensor, M: int) -> Tensor:
    return v.new_empty(v.shape[0], v.shape[1], M // 2 + 1)


@torch.library.custom_op("mambagen::s4_cauchy_backward", mutates_args=())
def _backward(g: Tensor, v: Tensor, w: Tensor, M: int) -> tuple[Tensor, Tensor]:
    dv, dw = torch.zeros_like(v), torch.zeros_like(w)
    for first, last in _stretches(w, M):
        z, part = roots(M, first, last, w), g[..., first:last]
        inverse = _inverse(w, z).conj_physical()
        dv += part @ inverse.mT
        # of w: v (1 + z) / (...)^2, summed over the sums before the states, so that nothing has all three axes
        dw += torch.einsum("snk,smk,smn->sn", inverse.square() * (1 + z).conj_physical(), part, v.conj_physical())
    return dv, dw


@_backward.register_fake
def _(g: Tensor, v: Tensor, w: Tensor, M: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(w)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    v, w, ctx.M = inputs
    ctx.save_for_backward(v, w)


def _gradients(ctx, g):  # type: ignore[no-untyped-def]
    v, w = ctx.saved_tensors
    return *_backward(g.contiguous(), v, w, ctx.M), None


_forward.register_autograd(_gradients, setup_context=_setup)
