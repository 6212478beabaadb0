"""The Vandermonde product and its gradients in Triton: any GPU that Triton compiles for, and its interpreter.

A program computes ROWS x COLUMNS consecutive values of one kernel: with t = t0 + i COLUMNS + j the factors
exp((t0 + i COLUMNS) z) and exp(j z) are made in registers, a few states at a time, and multiplied. So nothing is read
but c and z, and nothing written but the kernel. The backward makes the same factors and leaves one sum a program, which
are added in fixed order.

Only the phase is reduced in float64 (a product, a floor and a difference an element of a factor); the rest is float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambagen.kernels.launching import on_device_of
from mambagen.kernels.triton_turns import half_turn

ROWS, COLUMNS = 16, 64  # with twice the rows the backward spills
STATES = 16  # at a time

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
            _pairs(c.to(torch.complex64)), _pairs(z), K, length, blocks,
            STATE=state, ROWS=ROWS, COLUMNS=COLUMNS, STATES=STATES, num_warps=4,
        )  # fmt: skip
    return K


def moments(g: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """sum_t g_t exp(t z) and sum_t t g_t exp(t z): (ssms, state) complex128 each, for g (ssms, length) float32."""
    ssms, state = z.shape
    length = g.shape[1]
    blocks = triton.cdiv(length, ROWS * COLUMNS)
    parts = torch.empty(ssms, blocks, 4, state, dtype=torch.float32, device=g.device)
    with on_device_of(g):
        moments_kernel[(ssms * blocks,)](
            g.contiguous(), _pairs(z), parts, length, blocks,
            STATE=state, ROWS=ROWS, COLUMNS=COLUMNS, STATES=STATES, num_warps=4,
        )  # fmt: skip
    first = torch.arange(blocks, device=g.device, dtype=torch.float64)[:, None] * (ROWS * COLUMNS)
    re, im, t_re, t_im = parts.double().unbind(2)  # the weights t are counted from the start of each block
    sums = torch.complex(re, im)
    return sums.sum(1), (torch.complex(t_re, t_im) + first * sums).sum(1)


def carry(entered: Tensor, a: Tensor, batch: int, backwards: bool) -> Tensor:
    """The states that blocks begin with from what entered in each, in place.

    entered: (batch * blocks, 2 state, channels) float32, imaginary parts after the real ones; a: (state,) complex64.
    """
    blocks, elements = entered.shape[0] // batch, entered.shape[1] * entered.shape[2] // 2
    with on_device_of(entered):
        carry_kernel[(batch * triton.cdiv(elements, 256),)](
            entered, _pairs(a), blocks, elements, entered.shape[2], BACKWARDS=backwards, BLOCK=256, num_warps=4
        )
    return entered


def _pairs(v: Tensor) -> Tensor:
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
def carry_kernel(entered, a, blocks, elements, channels, BACKWARDS: tl.constexpr, BLOCK: tl.constexpr):
    tiles = tl.cdiv(elements, BLOCK)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    e = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = e < elements
    a_re = tl.load(a + e // channels * 2, mask=inside, other=0.0)
    a_im = tl.load(a + e // channels * 2 + 1, mask=inside, other=0.0)
    step = tl.cast(elements, tl.int64) * 2
    row = entered + batch * blocks * step + e
    if BACKWARDS:
        row += (blocks - 1) * step
        step = -step
    h_re = tl.zeros([BLOCK], tl.float32)
    h_im = tl.zeros([BLOCK], tl.float32)
    for _ in range(blocks):
        re = tl.load(row, mask=inside, other=0.0)
        im = tl.load(row + elements, mask=inside, other=0.0)
        tl.store(row, h_re, mask=inside)
        tl.store(row + elements, h_im, mask=inside)
        next_re = a_re * h_re - a_im * h_im + re
        h_im = a_re * h_im + a_im * h_re + im
        h_re = next_re
        row += step
