"""The residual add and LayerNorm in Triton: each row is read once and stays in registers.

Backward, with n the normalised row, g = dy * weight and r = 1 / deviation:

    dh = dtotal + r (g - mean(g) - n mean(g n)),  dweight = sum dy n,  dbias = sum dy,  dbranch_bias = sum dh

The sums over rows are taken element by element by each program, then over its rows, then over programs, in fixed order.
"""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambagen.kernels.launching import on_device_of, processors

FORWARD, BACKWARD = (2048, 16), (1024, 8)  # elements (rows x columns) of a tile, and of a thread
PROGRAMS = 12  # a multiprocessor, for the sums over rows
WIDEST = 8192  # channels


def unsupported(h: Tensor) -> str | None:
    """Why this call cannot run here, or None."""
    if h.dtype != torch.float32:
        return f"h is {h.dtype}; it adds in float32"
    if h.shape[-1] > WIDEST:
        return f"{h.shape[-1]} channels; at most {WIDEST} are supported"
    return None


def forward(
    h: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (empty without a branch), y, and mean and 1 / deviation (2, rows)."""
    h = h.contiguous()
    d = h.shape[-1]
    rows = h.numel() // d
    y = torch.empty(h.shape, dtype=dtype, device=h.device)
    moments = torch.empty(2, rows, dtype=torch.float32, device=h.device)
    if branch is None:
        total, other = h.new_empty(0), h
    else:
        total, other = torch.empty_like(h), branch.contiguous()
    columns, tile, warps = _tile(d, *FORWARD)
    with on_device_of(h):
        add_norm_kernel[(triton.cdiv(rows, tile),)](
            h, other, weight, bias, total, y, moments, rows, epsilon, branch is not None, d, tile, columns,
            num_warps=warps,
        )  # fmt: skip
    return total, y, moments


def backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    moments: Tensor,
    low: torch.dtype | None,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, the same in dtype `low` (empty where that is None), and dweight, dbias and, with `sums`, dh's sum.

    The latter are (2 or 3, channels) float32.
    """
    dy, total = dy.contiguous(), total.contiguous()
    d = total.shape[-1]
    rows = total.numel() // d
    dh = torch.empty_like(total)
    dbranch = total.new_empty(0) if low is None else torch.empty(total.shape, dtype=low, device=total.device)
    columns, tile, warps = _tile(d, *BACKWARD)
    tiles = triton.cdiv(rows, tile)
    programs = min(tiles, PROGRAMS * processors(total.device))
    partial = torch.empty(programs, 3 if sums else 2, d, dtype=torch.float32, device=total.device)
    with on_device_of(total):
        norm_backward_kernel[(programs,)](
            dy, total if dtotal is None else dtotal.contiguous(), total, weight, moments, dh, dbranch, partial,
            rows, triton.cdiv(tiles, programs), dtotal is not None, low is not None, sums, d, tile, columns,
            num_warps=warps,
        )  # fmt: skip
    return dh, dbranch, partial.sum(0)


def _tile(d: int, elements: int, each: int) -> tuple[int, int, int]:
    """Columns (d rounded up to a power of two), rows and warps of a program's tile."""
    columns = triton.next_power_of_2(d)
    tile = max(1, elements // columns)
    return columns, tile, max(1, min(16, tile * columns // (32 * each)))


@triton.jit(do_not_specialize=["rows"])
def add_norm_kernel(
    h, branch, weight, bias, total, y, moments, rows, epsilon,
    ADD: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < D)
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    v = tl.load(h + at, mask=inside, other=0.0)
    if ADD:
        v += tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + at, v, mask=inside)
    mean = tl.sum(v, 1) / D
    v = tl.where(inside, v - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, 1) / D + epsilon)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(y + at, (v * scale[:, None] * w[None, :] + b[None, :]).to(y.dtype.element_ty), mask=inside)
    tl.store(moments + row, mean, mask=row < rows)
    tl.store(moments + rows + row, scale, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "each"])
def norm_backward_kernel(
    dy, dtotal, total, weight, moments, dh, dbranch, partial, rows, each,
    RESIDUAL: tl.constexpr, LOW: tl.constexpr, SUMS: tl.constexpr,
    D: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    dw = tl.zeros([TILE, COLUMNS], tl.float32)
    db = tl.zeros([TILE, COLUMNS], tl.float32)
    dx = tl.zeros([TILE, COLUMNS], tl.float32)
    for k in range(each):
        row = (k * tl.num_programs(0) + tl.program_id(0)) * TILE + tl.arange(0, TILE)
        inside = (row[:, None] < rows) & (column[None, :] < D)
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        v = tl.load(total + at, mask=inside, other=0.0)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(moments + row, mask=row < rows, other=0.0)
        scale = tl.load(moments + rows + row, mask=row < rows, other=0.0)
        n = tl.where(inside, (v - mean[:, None]) * scale[:, None], 0.0)
        dw += g * n
        db += g
        g *= w[None, :]
        out = (g - (tl.sum(g, 1) / D)[:, None] - n * (tl.sum(g * n, 1) / D)[:, None]) * scale[:, None]
        if RESIDUAL:
            out += tl.load(dtotal + at, mask=inside, other=0.0)
        tl.store(dh + at, out, mask=inside)
        if SUMS:
            dx += out
        if LOW:
            tl.store(dbranch + at, out.to(dbranch.dtype.element_ty), mask=inside)
    to = partial + tl.program_id(0) * (3 if SUMS else 2) * D + column
    tl.store(to, tl.sum(dw, 0), mask=column < D)
    tl.store(to + D, tl.sum(db, 0), mask=column < D)
    if SUMS:
        tl.store(to + 2 * D, tl.sum(dx, 0), mask=column < D)
