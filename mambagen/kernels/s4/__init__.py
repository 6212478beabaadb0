"""S4, the diagonal-plus-low-rank state-space model (arXiv 2111.00396): `s4`, a long convolution and a recurrence.

dense.py       one step as a real matrix and its powers, in float64; the kernel as a product of two small factors
cauchy.py      the same kernel as the paper computes it, by its generating function
reference.py   the recurrence, step by step, from the complex matrix
README.md      the derivation
"""

import torch
from torch import Tensor

from mambagen.kernels.dispatch import check_shape
from mambagen.kernels.fft_conv import long_conv
from mambagen.kernels.s4.cauchy import cauchy_kernel
from mambagen.kernels.s4.dense import Step, after, bilinear_step, columns, pairs, rows
from mambagen.kernels.s4.reference import s4_reference
from mambagen.kernels.s4d import check_call
from mambagen.kernels.s4d.vandermonde import block_length
from mambagen.kernels.ssm_conv import Convolution, System, run_as_convolution

__all__ = ["s4", "s4_kernel", "s4_reference", "s4_step"]

BACKENDS = ("auto", "powers", "cauchy", "reference")


def s4(
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
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Diagonal-plus-low-rank state-space systems over a sequence, each on its channels.

    h' = A h + B x, y = C h + D x with A = diag(Lambda) - P P*, discretised by the bilinear rule with step dt. The
    states stand for conjugate pairs, hence y = 2 Re(C . h), and P P* runs over both of each pair. Computed as a
    convolution by FFT.

    Args:
        x: (batch, length, channels), float32, bfloat16, float16 (computed in float32) or float64.
        dt: (ssms,) step sizes, positive; ssms divides channels, and each system serves channels / ssms neighbours.
        Lambda, P, B, C: (ssms, state) complex, real parts of Lambda negative.
        D: (channels,) skip.
        initial_state: (batch, channels, state) complex: the state before the first step.
        resets: (batch, length) bool: True where a packed document begins; nothing flows across.
        reverse: run from the last position to the first.
        return_final_state: also give the state after the last step that ran.
        backend: of the kernel: "powers" of the step's matrix, the paper's "cauchy" sums, "auto" (powers: several times
            faster and nearer to the recurrence); or "reference", the recurrence itself.

    Returns:
        y like x, or (y, final_state). First derivatives of all tensor arguments but `resets`.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    op = "s4"
    check_call(op, x, dt, Lambda, C, D, initial_state, resets)
    check_shape(op, "P", P, tuple(Lambda.shape), "(ssms, state)")
    check_shape(op, "B", B, tuple(Lambda.shape), "(ssms, state)")
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if backend == "reference":
        y, final = s4_reference(x, dt, Lambda, P, B, C, D, initial_state, resets, reverse)
        y = y.to(x.dtype)
        return (y, final) if return_final_state else y
    with torch.autocast(x.device.type, enabled=False):
        system = _system(x, dt, Lambda, P, B, C, D, backend)
        resets = None if resets is None else resets.bool()
        y, state = run_as_convolution(system, x, initial_state, resets, reverse, return_final_state)
    return y if state is None else (y, state)


def s4_kernel(
    dt: Tensor, Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, length: int, backend: str = "powers"
) -> Tensor:
    """The convolution kernel K_t = C Abar^t Bbar, (ssms, length) float64, by "powers" or "cauchy"."""
    if backend == "cauchy":
        return cauchy_kernel(dt, Lambda, P, B, C, length)
    return _kernel(bilinear_step(dt, Lambda, P, B, C), length, torch.float64)


def s4_step(
    x: Tensor, state: Tensor, dt: Tensor, Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence in O(state): x (batch, channels), state (batch, channels, state) -> y and the state.

    (1 - dt A / 2) h_t = (1 + dt A / 2) h_(t-1) + dt B x_t, where A h = Lambda h - 2 P Re(P* h); solved for h_t by the
    formula of Sherman and Morrison.
    """
    dtype, ssms = state.dtype, len(Lambda)
    Lambda, P, B, C = (v.to(dtype)[:, None] for v in (Lambda, P, B, C))
    dt = dt.to(dtype.to_real())[:, None, None]
    h = state.unflatten(1, (ssms, -1))  # (batch, ssms, channels a system, state)
    u = x.to(dtype.to_real()).unflatten(1, (ssms, -1))[..., None]

    def along(v: Tensor) -> Tensor:  # Re(P* v)
        return (P.conj() * v).sum(-1, keepdim=True).real

    right = h + dt / 2 * (Lambda * h - 2 * P * along(h)) + dt * B * u
    g = 1 / (1 - dt / 2 * Lambda)
    h = g * (right - dt * P * (along(g * right) / (1 + dt * along(g * P))))
    y = 2 * (C * h).sum(-1).real.flatten(1)
    if D is not None:
        y = y + D * x
    return y.to(x.dtype), h.flatten(1, 2)


def _kernel(step: Step, length: int, dtype: torch.dtype) -> Tensor:
    J = block_length(length)
    fine, jump = columns(step.A, step.B, J)
    coarse = rows(jump, step.C, -(-length // J))
    return (coarse.to(dtype) @ fine.squeeze(-1).to(dtype)).flatten(1)[:, :length].contiguous()


def _system(
    x: Tensor, dt: Tensor, Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, D: Tensor | None, backend: str
) -> System:
    """The discretised system as functions; float32 unless x is float64."""
    step = bilinear_step(dt, Lambda, P, B, C)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    ssms, whole = len(Lambda), step.A.shape[-1]

    def real(state: Tensor) -> Tensor:
        """(batch, channels, state) complex -> (ssms, 2 state, batch * channels a system) float64."""
        u = pairs(state.to(torch.complex128)).unflatten(1, (ssms, -1))
        return u.permute(1, 3, 0, 2).flatten(2)

    def complex(u: Tensor, batch: int) -> Tensor:
        h = u.unflatten(2, (batch, -1)).permute(2, 0, 3, 1).flatten(1, 2).to(dtype)
        return torch.complex(*h.chunk(2, -1))

    def kernel(length: int) -> Tensor:
        if backend == "cauchy":
            return cauchy_kernel(dt, Lambda, P, B, C, length).to(dtype).contiguous()
        return _kernel(step, length, dtype)

    def convolution(longest: int) -> Convolution:
        k = kernel(longest)
        return lambda x, reverse: long_conv(x, k[:, : x.shape[1]].contiguous(), reverse, D)

    def outputs(state: Tensor, length: int) -> Tensor:
        J = block_length(length)
        fine, jump = columns(step.A, step.A @ real(state), J)  # (ssms, 2 state, J, batch * each)
        coarse = rows(jump, step.C, -(-length // J))
        y = coarse.to(dtype) @ fine.flatten(2).to(dtype)  # (ssms, I, J * batch * each)
        y = y.unflatten(2, (J, len(state), -1)).flatten(1, 2)[:, :length]
        return y.permute(2, 1, 0, 3).flatten(2)

    def state_after(x: Tensor) -> Tensor:
        J = block_length(x.shape[1])
        fine, jump = columns(step.A, step.B, J)
        weights = fine.squeeze(-1).flip(-1).to(dtype)  # (ssms, 2 state, J), the last step having decayed least
        jump = jump.to(dtype)
        first = (x.shape[1] - 1) % J + 1  # the short block comes first, before there is a state to carry
        u = x.new_zeros(ssms, whole, 0, dtype=dtype)
        for block in [x[:, :first], *x[:, first:].split(J, 1)]:
            steps = block.shape[1]
            if steps:
                values = block.to(dtype).unflatten(2, (ssms, -1)).permute(2, 1, 0, 3).flatten(2)
                entered = weights[..., J - steps :] @ values
                u = jump @ u + entered if u.shape[-1] else entered
        return complex(u, len(x))

    def remains(state: Tensor, length: int) -> Tensor:
        return complex(after(step.A, real(state), length), len(state))

    return System(convolution, outputs, state_after, remains)
