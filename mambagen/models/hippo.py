"""First values of the S4 family's A: HiPPO-LegS, its normal part, and the simpler spectra that stand in for it.

HiPPO-LegS (arXiv 2008.07669) is the matrix whose state holds the coefficients of the past in Legendre polynomials:
A_nk = -sqrt((2n + 1)(2k + 1)) below the diagonal, -(n + 1) on it, 0 above; B_n = sqrt(2n + 1). With P_n = sqrt(n + 1/2)
the matrix A + P P^T is -1/2 I plus a skew-symmetric one: a normal matrix, of which a unitary V makes a diagonal,
V* (A + P P^T) V = Lambda, in conjugate pairs. One of each pair is kept: `state` complex numbers are a system of
2 state real ones.
"""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

Real = npt.NDArray[np.float64]
Complex = npt.NDArray[Any]  # complex128

S4D_INITS = ("lin", "inv", "legs", "real")


def s4d_spectrum(init: str, state: int) -> Complex:
    """A of one S4D system, (state,) (S4D, arXiv 2206.11893, section 4).

    | init | A_n, n = 0 ... state - 1                                                           |
    |------|------------------------------------------------------------------------------------|
    | lin  | -1/2 + i pi n                                                                      |
    | inv  | -1/2 + i (M / pi) (M / (2n + 1) - 1), M = 2 state                                  |
    | legs | the eigenvalues above the real axis of the normal part of HiPPO-LegS of size M     |
    | real | -(n + 1)                                                                           |

    Raises:
        ValueError: another init.
    """
    n = np.arange(state)
    if init == "lin":
        return -0.5 + 1j * np.pi * n
    if init == "inv":
        whole = 2 * state
        return -0.5 + 1j * whole / np.pi * (whole / (2 * n + 1) - 1)
    if init == "legs":
        return dplr_legs(state)[0]
    if init == "real":
        return -(n + 1.0).astype(np.complex128)
    raise ValueError(f"init is {init!r}; it must be one of {', '.join(S4D_INITS)}")


def hippo_legs(size: int) -> tuple[Real, Real]:
    """A (size, size) and B (size,) of HiPPO-LegS."""
    root = np.sqrt(2 * np.arange(size) + 1.0)
    return -(np.tril(np.outer(root, root), -1) + np.diag(np.arange(size) + 1.0)), root


@functools.cache
def dplr_legs(state: int) -> tuple[Complex, Complex, Complex, Complex]:
    """HiPPO-LegS of size 2 state as diagonal plus low rank, A = V (diag(Lambda) - P P*) V*.

    Returns:
        Lambda, P = V* P and B = V* B, (state,) each, imaginary parts of Lambda ascending and positive, and the kept
        columns of V, (2 state, state); the other halves are the conjugates.
    """
    A, B = hippo_legs(2 * state)
    P = np.sqrt(np.arange(2 * state) + 0.5)
    skew = A + np.outer(P, P) + 0.5 * np.eye(2 * state)
    imaginary, V = np.linalg.eigh(-1j * skew)  # Hermitian, so the eigenvalues are real and V is unitary
    V = V[:, state:]  # ascending, in pairs: the second half is above the axis
    return -0.5 + 1j * imaginary[state:], V.conj().T @ P, V.conj().T @ B, V
