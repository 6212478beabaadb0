"""A system's coefficients, its kernel and their gradients in Triton: any GPU that Triton compiles for, and its
interpreter. Five launches in all: the numbers are so few that launching is what takes the time.

The coefficients and their gradients are float64, a program a system.

The kernel is the Vandermonde product. A program computes ROWS x COLUMNS consecutive values of one kernel: with
t = t0 + i COLUMNS + j the factors exp((t0 + i COLUMNS) z) and exp(j z) are made in registers, a few states at a time,
and multiplied. So nothing is read but c and z, and nothing written but the kernel. The backward makes the same factors
and leaves one sum a program, which another kernel adds in fixed order. Only the phase is reduced in float64 (a product,
a floor and a difference an element of a factor); the rest is float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambagen.kernels.launching import on_device_of
from mambagen.kernels.triton_turns import half_turn

ROWS, COLUMNS = 16, 64  # with twice the rows the backward spills
STATES = 16  # at a time
SUMMED = 32  # blocks whose sums are read at a time

TURNS = tl.constexpr(0.15915494309189535)  # 1 / (2 pi)
LOG2E = tl.constexpr(1.4426950408889634)


def unsupported(x: Tensor) -> str | None:
    """Why this call cannot run here, or None."""
    if x.shape[1] >= 2**31 - ROWS * COLUMNS:
        return f"{x.shape[1]} steps; fewer than 2^31 are supported in one call (pass the state from call to call)"
    return None


def forward(c: Tensor, z: Tensor, length: int) -> Tensor:
    """2 Re sum_n c_n exp(t z_n): (ssms, length) float32; see `vandermonde_product`."""
    ssms, state = c.shape
    K = torch.empty(ssms, length, dtype=torch.float32, device=c.device)
    blocks = triton.cdiv(length, ROWS * COLUMNS)
    with on_device_of(c):
        product_kernel[(ssms * blocks,)](
            pairs(c.to(torch.complex64)), pairs(z), K, length, blocks,
            STATE=state, ROWS=ROWS, COLUMNS=COLUMNS, STATES=STATES, num_warps=4,
        )  # fmt: skip
    return K


def gradients(g: Tensor, c: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """dc = 2 conj(sum_t g_t exp(t z)), dz = 2 conj(c sum_t t g_t exp(t z)) like c and z; g (ssms, length) float32."""
    ssms, state = z.shape
    length = g.shape[1]
    blocks = triton.cdiv(length, ROWS * COLUMNS)
    parts = torch.empty(ssms, blocks, 4, state, dtype=torch.float32, device=g.device)
    dc, dz = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (c, z))
    with on_device_of(g):
        moments_kernel[(ssms * blocks,)](
            g.contiguous(), pairs(z), parts, length, blocks,
            STATE=state, ROWS=ROWS, COLUMNS=COLUMNS, STATES=STATES, num_warps=4,
        )  # fmt: skip
        sums_kernel[(ssms * triton.cdiv(state, STATES),)](
            parts, pairs(c), torch.view_as_real(dc), torch.view_as_real(dz), blocks,
            STATE=state, BLOCK=ROWS * COLUMNS, SUMMED=SUMMED, STATES=STATES, num_warps=4,
        )  # fmt: skip
    return dc, dz


def coefficients(dt: Tensor, A: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """z = dt A, complex128, and C (exp(z) - 1) / A, complex64: (ssms, state) from complex A and C of any precision."""
    z = torch.empty(A.shape, dtype=torch.complex128, device=A.device)
    c = torch.empty(A.shape, dtype=torch.complex64, device=A.device)
    with on_device_of(A):
        coefficients_kernel[(len(A),)](
            dt.contiguous(), pairs(A), pairs(C), torch.view_as_real(z), torch.view_as_real(c),
            **_lanes(A.shape[1]),
        )  # fmt: skip
    return z, c


def coefficient_gradients(dz: Tensor, dc: Tensor, dt: Tensor, A: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients like dt, A and C from those of z and c."""
    d_dt, dA, dC = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (dt, A, C))
    with on_device_of(A):
        coefficient_gradients_kernel[(len(A),)](
            pairs(dz), pairs(dc), dt.contiguous(), pairs(A), pairs(C),
            d_dt, torch.view_as_real(dA), torch.view_as_real(dC),
            **_lanes(A.shape[1]),
        )  # fmt: skip
    return d_dt, dA, dC


def _lanes(state: int) -> dict[str, int]:
    """A lane a state, and the warps for some of them each."""
    block = triton.next_power_of_2(state)
    return {"STATE": state, "BLOCK": block, "num_warps": min(max(block // 32, 1), 8)}


def pairs(v: Tensor) -> Tensor:
    """Complex numbers as their real and imaginary parts, side by side."""
    return torch.view_as_real(v.resolve_conj().contiguous())


@triton.jit
def powers(re, im, t):
    """exp(t (re + i im)) in float32 for float64 re, im and t of one broadcast shape: real and imaginary part."""
    turns = im * t * TURNS
    turns -= tl.floor(turns + 0.5)
    sine, cosine = half_turn(turns.to(tl.float32))  # of half the angle
    size = tl.exp2((re * t).to(tl.float32) * LOG2E)
    return size * (1.0 - 2.0 * sine * sine), size * (2.0 * sine * cosine)


@triton.jit(do_not_specialize=["length", "blocks"])
def product_kernel(
    c, z, K, length, blocks,
    STATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    ssm = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * (ROWS * COLUMNS)
    i = start + tl.arange(0, ROWS) * COLUMNS
    j = tl.arange(0, COLUMNS)
    values = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, STATE, STATES):
        n = first + tl.arange(0, STATES)
        at = (ssm * STATE + n) * 2
        re, im = tl.load(z + at, mask=n < STATE, other=0.0), tl.load(z + at + 1, mask=n < STATE, other=0.0)
        c_re, c_im = tl.load(c + at, mask=n < STATE, other=0.0), tl.load(c + at + 1, mask=n < STATE, other=0.0)
        p_re, p_im = powers(re[None, :], im[None, :], i[:, None].to(tl.float64))
        q_re, q_im = powers(re[:, None], im[:, None], j[None, :].to(tl.float64))
        left_re = p_re * c_re[None, :] - p_im * c_im[None, :]
        left_im = p_re * c_im[None, :] + p_im * c_re[None, :]
        values += tl.dot(left_re, q_re, input_precision="ieee") - tl.dot(left_im, q_im, input_precision="ieee")
    t = i[:, None] + j[None, :]
    tl.store(K + ssm * length + t, 2.0 * values, mask=t < length)


@triton.jit(do_not_specialize=["length", "blocks"])
def moments_kernel(
    g, z, parts, length, blocks,
    STATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    ssm = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * (ROWS * COLUMNS)
    offset = tl.arange(0, ROWS) * COLUMNS
    j = tl.arange(0, COLUMNS)
    t = start + offset[:, None] + j[None, :]
    values = tl.load(g + ssm * length + t, mask=t < length, other=0.0)
    later = values * (offset[:, None] + j[None, :]).to(tl.float32)
    for first in range(0, STATE, STATES):
        n = first + tl.arange(0, STATES)
        at = (ssm * STATE + n) * 2
        re, im = tl.load(z + at, mask=n < STATE, other=0.0), tl.load(z + at + 1, mask=n < STATE, other=0.0)
        p_re, p_im = powers(re[None, :], im[None, :], (start + offset)[:, None].to(tl.float64))
        q_re, q_im = powers(re[None, :], im[None, :], j[:, None].to(tl.float64))
        a_re, a_im = tl.dot(values, q_re, input_precision="ieee"), tl.dot(values, q_im, input_precision="ieee")
        b_re, b_im = tl.dot(later, q_re, input_precision="ieee"), tl.dot(later, q_im, input_precision="ieee")
        out = parts + tl.program_id(0).to(tl.int64) * (4 * STATE) + n
        inside = n < STATE
        tl.store(out, tl.sum(p_re * a_re - p_im * a_im, 0), mask=inside)
        tl.store(out + STATE, tl.sum(p_re * a_im + p_im * a_re, 0), mask=inside)
        tl.store(out + 2 * STATE, tl.sum(p_re * b_re - p_im * b_im, 0), mask=inside)
        tl.store(out + 3 * STATE, tl.sum(p_re * b_im + p_im * b_re, 0), mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def sums_kernel(
    parts, c, dc, dz, blocks,
    STATE: tl.constexpr, BLOCK: tl.constexpr, SUMMED: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(STATE, STATES)
    ssm = (tl.program_id(0) // columns).to(tl.int64)
    n = (tl.program_id(0) % columns) * STATES + tl.arange(0, STATES)
    re = tl.zeros([SUMMED, STATES], tl.float64)
    im = tl.zeros([SUMMED, STATES], tl.float64)
    t_re = tl.zeros([SUMMED, STATES], tl.float64)
    t_im = tl.zeros([SUMMED, STATES], tl.float64)
    for first in range(0, blocks, SUMMED):
        block = first + tl.arange(0, SUMMED)
        inside = (block < blocks)[:, None] & (n < STATE)[None, :]
        at = parts + (ssm * blocks + block[:, None]) * (4 * STATE) + n[None, :]
        p_re = tl.load(at, mask=inside, other=0.0).to(tl.float64)
        p_im = tl.load(at + STATE, mask=inside, other=0.0).to(tl.float64)
        start = (block.to(tl.float64) * BLOCK)[:, None]  # the weights t are counted from the start of each block
        re += p_re
        im += p_im
        t_re += tl.load(at + 2 * STATE, mask=inside, other=0.0).to(tl.float64) + start * p_re
        t_im += tl.load(at + 3 * STATE, mask=inside, other=0.0).to(tl.float64) + start * p_im
    place = (ssm * STATE + n) * 2
    store_moments(c, dc, dz, place, n < STATE, tl.sum(re, 0), tl.sum(im, 0), tl.sum(t_re, 0), tl.sum(t_im, 0))


@triton.jit
def store_moments(c, dc, dz, place, inside, re, im, t_re, t_im):
    """dc = 2 conj(sum g exp(t z)) and dz = 2 conj(c sum t g exp(t z)) from the two sums, float64."""
    c_re, c_im = load_pairs(c, place, inside)
    store_pairs(dc, place, inside, 2 * re, -2 * im)
    store_pairs(dz, place, inside, 2 * (c_re * t_re - c_im * t_im), -2 * (c_re * t_im + c_im * t_re))


@triton.jit
def load_pairs(base, place, inside):
    """Real and imaginary parts as float64."""
    re = tl.load(base + place, mask=inside, other=0.0).to(tl.float64)
    return re, tl.load(base + place + 1, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def store_pairs(base, place, inside, re, im):
    tl.store(base + place, re.to(base.dtype.element_ty), mask=inside)
    tl.store(base + place + 1, im.to(base.dtype.element_ty), mask=inside)


@triton.jit
def divided(a_re, a_im, s_re, s_im, size):
    """a / s, where `size` is |s|^2."""
    return (a_re * s_re + a_im * s_im) / size, (a_im * s_re - a_re * s_im) / size


@triton.jit
def growth(s_re, s_im):
    """phi = (exp(s) - 1) / s and its derivative (exp(s) - phi) / s; by their series where s is tiny (A may be 0)."""
    size = s_re * s_re + s_im * s_im
    tiny = size < 1e-8
    size = tl.where(tiny, 1.0, size)
    e_re, e_im = tl.exp(s_re) * tl.cos(s_im), tl.exp(s_re) * tl.sin(s_im)
    phi_re, phi_im = divided(e_re - 1, e_im, s_re, s_im, size)
    phi_re = tl.where(tiny, 1 + s_re / 2 + (s_re * s_re - s_im * s_im) / 6, phi_re)
    phi_im = tl.where(tiny, s_im / 2 + s_re * s_im / 3, phi_im)
    slope_re, slope_im = divided(e_re - phi_re, e_im - phi_im, s_re, s_im, size)
    slope_re = tl.where(tiny, 0.5 + s_re / 3, slope_re)
    slope_im = tl.where(tiny, s_im / 3, slope_im)
    return phi_re, phi_im, slope_re, slope_im


@triton.jit
def coefficients_kernel(dt, A, C, z, c, STATE: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    inside = n < STATE
    place = (tl.program_id(0) * STATE + n) * 2
    step = tl.load(dt + tl.program_id(0)).to(tl.float64)
    A_re, A_im = load_pairs(A, place, inside)
    C_re, C_im = load_pairs(C, place, inside)
    z_re, z_im = step * A_re, step * A_im
    phi_re, phi_im, _, _ = growth(z_re, z_im)
    b_re, b_im = step * phi_re, step * phi_im
    store_pairs(z, place, inside, z_re, z_im)
    store_pairs(c, place, inside, C_re * b_re - C_im * b_im, C_re * b_im + C_im * b_re)


@triton.jit
def coefficient_gradients_kernel(
    dz, dc, dt, A, C, d_dt, dA, dC, STATE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    n = tl.arange(0, BLOCK)
    inside = n < STATE
    place = (tl.program_id(0) * STATE + n) * 2
    step = tl.load(dt + tl.program_id(0)).to(tl.float64)
    A_re, A_im = load_pairs(A, place, inside)
    C_re, C_im = load_pairs(C, place, inside)
    g_re, g_im = load_pairs(dc, place, inside)
    z_re, z_im = load_pairs(dz, place, inside)
    phi_re, phi_im, slope_re, slope_im = growth(step * A_re, step * A_im)
    # of C: dc conj(b), b = dt phi; of b: dc conj(C)
    dC_re, dC_im = step * (g_re * phi_re + g_im * phi_im), step * (g_im * phi_re - g_re * phi_im)
    store_pairs(dC, place, inside, dC_re, dC_im)
    b_re, b_im = g_re * C_re + g_im * C_im, g_im * C_re - g_re * C_im
    # of dt A: dz + dt db conj(phi')
    z_re += step * (b_re * slope_re + b_im * slope_im)
    z_im += step * (b_im * slope_re - b_re * slope_im)
    store_pairs(dA, place, inside, step * z_re, step * z_im)
    d_step = tl.sum(A_re * z_re + A_im * z_im + b_re * phi_re + b_im * phi_im, 0)
    tl.store(d_dt + tl.program_id(0), d_step.to(d_dt.dtype.element_ty))
