"""RMSNorm in Triton: each row is read once; the weight's gradient is summed by program, then over programs in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_A_TILE_ELEMENTS = 4096  # rows x columns that a program holds at once
PROGRAMS = 1024


def forward(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, d = x.shape
    y = torch.empty((rows, d), dtype=dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    columns, tile = _tile(d)
    _forward[(triton.cdiv(rows, tile),)](x, weight, y, rstd, rows, epsilon, d, tile, columns, num_warps=4)
    return y, rstd


def backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual_gradient: Tensor) -> tuple[Tensor, Tensor]:
    rows, d = x.shape
    dx = torch.empty((rows, d), dtype=torch.float32, device=x.device)
    columns, tile = _tile(d)
    tiles = triton.cdiv(rows, tile)
    programs = min(tiles, PROGRAMS)
    per_program = triton.cdiv(tiles, programs)
    partial = torch.empty((programs, d), dtype=torch.float32, device=x.device)
    _backward[(programs,)](
        dy, x, weight, rstd, residual_gradient, dx, partial, rows, per_program, d, tile, columns, num_warps=4
    )
    return dx, partial.sum(0)


def _tile(d: int) -> tuple[int, int]:
    """(columns, rows) of a program's tile; columns are d rounded up to a power of two."""
    columns = triton.next_power_of_2(d)
    return columns, max(1, ROWS_A_TILE_ELEMENTS // columns)


@triton.jit(do_not_specialize=["rows"])
def _forward(x, weight, y, rstd, rows, epsilon, D: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < D)
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    v = tl.load(x + at, mask=inside, other=0.0)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, 1) / D + epsilon)
    w = tl.load(weight + column, mask=column < D, other=0.0)
    tl.store(y + at, (v * scale[:, None] * w[None, :]).to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "per_program"])
def _backward(
    dy, x, weight, rstd, residual, dx, partial, rows, per_program,
    D: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    w = tl.load(weight + column, mask=column < D, other=0.0)
    dw = tl.zeros([COLUMNS], tl.float32)
    first = tl.program_id(0) * per_program
    for k in range(per_program):
        row = (first + k) * TILE + tl.arange(0, TILE)
        inside = (row[:, None] < rows) & (column[None, :] < D)
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        normal = tl.load(x + at, mask=inside, other=0.0) * scale[:, None]
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        dw += tl.sum(grad * normal, 0)
        grad *= w[None, :]
        out = (grad - normal * (tl.sum(grad * normal, 1) / D)[:, None]) * scale[:, None]
        tl.store(dx + at, out + tl.load(residual + at, mask=inside, other=0.0), mask=inside)
    tl.store(partial + tl.program_id(0) * D + column, dw, mask=column < D)
