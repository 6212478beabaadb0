"""One discretised step of a diagonal-plus-low-rank system as a real matrix, and its powers, in float64.

A state h of N complex numbers stands for N conjugate pairs, so the system acts on the 2N real numbers u = (Re h, Im h):

    A u = M(Lambda) u - 2 q q^T u,    q = (Re P, Im P),    M(g) u = (Re(g h), Im(g h))

as P P* over a pair and its conjugate takes h to 2 P Re(P* h). The bilinear step needs (1 - dt A / 2)^-1, which
the formula of Sherman and Morrison gives from g = 1 / (1 - dt Lambda / 2). Where Re Lambda < 0 the step never makes u
longer, so powers by repeated squaring are stable.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """u_t = A u_(t-1) + B x_t, y_t = C u_t: (ssms, 2N, 2N), (ssms, 2N, 1) and (ssms, 1, 2N), float64."""

    A: Tensor
    B: Tensor
    C: Tensor


def bilinear_step(dt: Tensor, Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor) -> Step:
    """Abar = (1 - dt A / 2)^-1 (1 + dt A / 2) = 2 (1 - dt A / 2)^-1 - 1, Bbar = (1 - dt A / 2)^-1 dt B."""
    dt = dt.double()[:, None]
    Lambda, P, B, C = (v.to(torch.complex128) for v in (Lambda, P, B, C))
    q = pairs(P)[..., None]
    G = matrix(1 / (1 - dt / 2 * Lambda))
    Gq, qG = G @ q, q.mT @ G
    inverse = G - dt[..., None] * (Gq @ qG) / (1 + dt[..., None] * (qG @ q))
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    return Step(2 * inverse - eye, inverse @ (dt * pairs(B))[..., None], 2 * pairs(C.conj())[:, None])


def pairs(h: Tensor) -> Tensor:
    """(..., N) complex -> (..., 2N) real, the imaginary parts after the real ones."""
    return torch.cat([h.real, h.imag], -1)


def matrix(g: Tensor) -> Tensor:
    """The real (2N, 2N) matrix that multiplies h by diag(g)."""
    re, im = torch.diag_embed(g.real), torch.diag_embed(g.imag)
    return torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)


def columns(A: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """v, A v, A^2 v, ... for v (..., n, k), as (..., n, count, k), and A^count; by doubling; count a power of two."""
    found = v[..., None, :]
    while found.shape[-2] < count:
        moved = A @ found.flatten(-2)
        found = torch.cat([found, moved.unflatten(-1, found.shape[-2:])], -2)
        A = A @ A
    return found, A


def rows(A: Tensor, v: Tensor, count: int) -> Tensor:
    """v, v A, v A^2, ... for v (..., 1, n), as (..., count, n)."""
    found = v
    while found.shape[-2] < count:
        found = torch.cat([found, found @ A], -2)
        A = A @ A
    return found[..., :count, :]


def after(A: Tensor, u: Tensor, steps: int) -> Tensor:
    """A^steps u, for u (..., n, k)."""
    while steps:
        if steps & 1:
            u = A @ u
        steps >>= 1
        if steps:
            A = A @ A
    return u
