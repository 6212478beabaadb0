"""Root-mean-square normalisation with its residual stream, for the fused Mamba block.

    forward(x, weight, epsilon, dtype) -> (y of dtype, rstd)
    backward(dy, x, weight, rstd, residual_gradient) -> (dx float32, dweight float32)

y = weight * x / sqrt(mean(x^2) + epsilon) over the last axis (arXiv 1910.07467); x and the residual's gradient are
(rows, d) float32, rstd is (rows,) float32. The Triton functions run on any GPU; elsewhere plain torch does.
"""

import os

import torch
from torch import Tensor

__all__ = ["rms_norm_backward", "rms_norm_forward"]


def rms_norm_forward(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normalise the rows of x (rows, d) float32: y (rows, d) of `dtype`, and 1 / rms (rows,) for the backward."""
    if _runs_triton(x):
        from mambagen.kernels.rms_norm import triton

        return triton.forward(x, weight, epsilon, dtype)
    rstd = torch.rsqrt(x.square().mean(-1) + epsilon)
    return (x * rstd[:, None] * weight).to(dtype), rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual_gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """dx (rows, d) float32, the residual's gradient already added, and dweight (d,) float32, summed in fixed order."""
    if _runs_triton(x):
        from mambagen.kernels.rms_norm import triton

        return triton.backward(dy, x, weight, rstd, residual_gradient)
    normal = x * rstd[:, None]
    scaled = dy.float() * weight
    dx = (scaled - normal * (scaled * normal).mean(-1, keepdim=True)) * rstd[:, None]
    return dx + residual_gradient, (dy.float() * normal).sum(0)


def _runs_triton(x: Tensor) -> bool:
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
