"""S4 written as its definition: the whole complex matrix A, discretised by a linear solve, one step at a time."""

import torch
from torch import Tensor

from mambagen.kernels.s4d.reference import recurrence


def s4_reference(
    x: Tensor,
    dt: Tensor,
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """y (batch, length, channels) and the final state (batch, channels, state); shapes as `s4`."""
    each = x.shape[2] // len(Lambda)
    real = torch.promote_types(x.dtype, torch.float32)
    Abar, Bbar = dense_bilinear(dt, Lambda, P, B)
    wide = torch.complex128 if real == torch.float64 else torch.complex64
    Abar, Bbar, C = (v.to(wide).repeat_interleave(each, 0) for v in (Abar, Bbar, C))

    def advance(h: Tensor, v: Tensor) -> Tensor:
        whole = torch.cat([h, h.conj()], -1)
        return (torch.einsum("cij,bcj->bci", Abar, whole) + Bbar * v[..., None])[..., : h.shape[-1]]

    return recurrence(x.to(real), advance, C, D, initial_state, resets, reverse)


def dense_bilinear(dt: Tensor, Lambda: Tensor, P: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Abar (ssms, 2 state, 2 state) and Bbar (ssms, 2 state) of the states and their conjugates, complex128."""
    Lambda, P, B = (torch.cat([v, v.conj()], -1).to(torch.complex128) for v in (Lambda, P, B))
    A = torch.diag_embed(Lambda) - P[..., None] * P.conj()[..., None, :]
    half = dt.double()[:, None, None] / 2 * A
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    Abar = torch.linalg.solve(eye - half, eye + half)
    Bbar = torch.linalg.solve(eye - half, dt.double()[:, None] * B)
    return Abar, Bbar
