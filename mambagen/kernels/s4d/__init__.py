"""S4D, the diagonal state-space model (arXiv 2206.11893): `s4d`, a long convolution and a recurrence.

discretise.py     the continuous system to one step of it, in float64
vandermonde.py    the convolution's kernel from the step, as a product of two small factors
triton.py         both on a GPU
chunked.py        the convolution in chunks, on tensor cores: bfloat16 on a GPU, many channels a system
toeplitz.py       the convolution as one matrix product: short sequences on a CPU
reference.py      the recurrence, step by step
README.md         the derivation
"""

import torch
from torch import Tensor

from mambagen.kernels.dispatch import check_shape, triton_or_torch
from mambagen.kernels.fft_conv import long_conv
from mambagen.kernels.s4d import chunked, toeplitz
from mambagen.kernels.s4d.discretise import DISCRETISATIONS, coefficients, discretise
from mambagen.kernels.s4d.reference import s4d_reference
from mambagen.kernels.s4d.vandermonde import block_length, powers, vandermonde_product
from mambagen.kernels.ssm_conv import Convolution, System, run_as_convolution

__all__ = ["DISCRETISATIONS", "discretise", "s4d", "s4d_kernel", "s4d_reference", "s4d_step"]


def s4d(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    discretisation: str = "zoh",
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Diagonal state-space systems over a sequence, each on its channels.

    h_t = Abar h_(t-1) + Bbar x_t;  y_t = 2 Re(C . h_t) + D x_t  with B = 1 (S4D, arXiv 2206.11893, section 3); the
    states stand for conjugate pairs, hence 2 Re. Computed as a convolution.

    Args:
        x: (batch, length, channels), float32, bfloat16, float16 (computed in float32) or float64.
        dt: (ssms,) step sizes, positive. ssms divides channels: each system serves channels / ssms neighbours, from
            one of its own for every channel to one for all.
        A: (ssms, state), real or complex, real parts negative. C: (ssms, state), real or complex.
        D: (channels,) skip.
        discretisation: "zoh" or "bilinear"; see `discretise`.
        initial_state: (batch, channels, state) complex: the state before the first step.
        resets: (batch, length) bool: True where a packed document begins; nothing flows across.
        reverse: run from the last position to the first.
        return_final_state: also give the state after the last step that ran.
        backend: "torch" (any device), "triton" (GPU), "auto" (triton where that can run); or "reference", the
            recurrence itself.

    Returns:
        y like x, or (y, final_state). First derivatives of all tensor arguments but `resets`.

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend cannot run this call (the message says why).
    """
    op = "s4d"
    check_call(op, x, dt, A, C, D, initial_state, resets)
    if backend == "reference":
        y, final = s4d_reference(x, dt, A, C, D, discretisation, initial_state, resets, reverse)
        y = y.to(x.dtype)
        return (y, final) if return_final_state else y
    backend = triton_or_torch(op, backend, x, more=("reference",))
    resets = None if resets is None else resets.bool()
    with torch.autocast(x.device.type, enabled=False):
        system = _system(x, dt, A, C, D, discretisation, backend)
        y, state = run_as_convolution(system, x, initial_state, resets, reverse, return_final_state)
    return y if state is None else (y, state)


def s4d_kernel(
    dt: Tensor, A: Tensor, C: Tensor, length: int, discretisation: str = "zoh", backend: str = "torch"
) -> Tensor:
    """The convolution kernel K_t = 2 Re(C . Abar^t Bbar), (ssms, length), float64 where C is complex128 or float64."""
    z, c = coefficients(dt, A, C, discretisation, _complex(C.dtype), backend)
    return vandermonde_product(c, z, length, backend)


def s4d_step(
    x: Tensor,
    state: Tensor,
    dt: Tensor,
    A: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    discretisation: str = "zoh",
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence: x (batch, channels), state (batch, channels, state) -> y like x, and the state."""
    z, b = discretise(dt, A, discretisation)
    dtype, ssms = state.dtype, len(A)
    h = state.unflatten(1, (ssms, -1))  # (batch, ssms, channels a system, state)
    u = x.to(dtype.to_real()).unflatten(1, (ssms, -1))[..., None]
    h = torch.exp(z).to(dtype)[:, None] * h + b.to(dtype)[:, None] * u
    y = 2 * (C.to(dtype)[:, None] * h).sum(-1).real.flatten(1)
    if D is not None:
        y = y + D * x
    return y.to(x.dtype), h.flatten(1, 2)


def check_call(
    op: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    resets: Tensor | None,
) -> None:
    """ValueError unless the arguments that S4D and S4 share fit each other."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be a real (batch, length, channels) tensor, not {x.dtype} {tuple(x.shape)}")
    batch, length, channels = x.shape
    if length == 0 or batch == 0:
        raise ValueError(f"{op}: x is empty: {tuple(x.shape)}")
    if A.dim() != 2 or A.shape[0] < 1 or channels % A.shape[0]:
        raise ValueError(f"{op}: A {tuple(A.shape)} must be (ssms, state) with ssms dividing {channels} channels")
    ssms, state = A.shape
    check_shape(op, "dt", dt, (ssms,), "(ssms,)")
    check_shape(op, "C", C, (ssms, state), "(ssms, state)")
    check_shape(op, "D", D, (channels,), "(channels,)")
    check_shape(op, "initial_state", initial_state, (batch, channels, state), "(batch, channels, state)")
    if initial_state is not None and not initial_state.is_complex():
        raise ValueError(f"{op}: initial_state must be complex, not {initial_state.dtype}")
    check_shape(op, "resets", resets, (batch, length), "(batch, length)")


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype in (torch.float64, torch.complex128) else torch.complex64


def _system(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    C: Tensor,
    D: Tensor | None,
    discretisation: str,
    backend: str,
) -> System:
    """The discretised system as functions; float32 unless x is float64."""
    dtype = _complex(x.dtype)
    z, c = coefficients(dt, A, C, discretisation, dtype, backend)
    ssms = len(A)

    def convolution(longest: int) -> Convolution:
        if backend == "triton" and chunked.pays(x, ssms, A.shape[1]):
            return lambda x, reverse: chunked.chunked_conv(x, c, z, reverse, D)
        k = vandermonde_product(c, z, longest, backend)

        def convolve(x: Tensor, reverse: bool) -> Tensor:
            own = k[:, : x.shape[1]].contiguous()
            if backend == "torch" and toeplitz.pays(x, ssms):
                y = toeplitz.toeplitz_conv(x, own, reverse)
                return y if D is None else (y + D * x).to(x.dtype)
            return long_conv(x, own, reverse, D, backend)

        return convolve

    def outputs(state: Tensor, length: int) -> Tensor:
        J = block_length(length)
        blocks = -(-length // J)
        first = 2 * C.to(z.dtype) * torch.exp(z)
        weights = first[:, None].to(dtype) * powers(z * J, blocks, dtype).mT  # (ssms, I, state)
        h = state.to(dtype).unflatten(1, (ssms, -1))[..., None, :] * weights[:, None]  # (batch, ssms, each, I, state)
        fine = powers(z, J, dtype)[:, None]
        left, right = torch.cat([h.real, -h.imag], -1), torch.cat([fine.real, fine.imag], -2)
        return (left @ right).flatten(3)[..., :length].flatten(1, 2).mT

    def state_after(x: Tensor) -> Tensor:
        J = block_length(x.shape[1])
        fine = powers(z, J, dtype).flip(-1)  # (ssms, state, J): the last step of a block has decayed least
        weights = torch.cat([fine.real, fine.imag], 1).mT
        h: Tensor | None = None
        for block in x.to(dtype.to_real()).split(J, 1):
            steps = block.shape[1]
            rows = block.unflatten(2, (ssms, -1)).permute(0, 2, 3, 1)  # (batch, ssms, each, steps)
            entered = torch.complex(*(rows @ weights[:, J - steps :]).chunk(2, -1))
            h = entered if h is None else h * torch.exp(z * steps).to(dtype)[:, None] + entered
        assert h is not None
        _, b = discretise(dt, A, discretisation)
        return (h * b.to(dtype)[:, None]).flatten(1, 2)

    def remains(state: Tensor, length: int) -> Tensor:
        decay = torch.exp(z * length).to(dtype)[:, None]
        return (state.to(dtype).unflatten(1, (ssms, -1)) * decay).flatten(1, 2)

    return System(convolution, outputs, state_after, remains)
