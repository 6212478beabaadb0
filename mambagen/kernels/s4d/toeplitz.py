"""The convolution as one matrix product: on a CPU, for short sequences in which many channels share a kernel.

A Toeplitz matrix of the kernel times all channels at once costs length multiply-adds an element. Up to LONGEST steps
that is less than two transforms of twice the length, by a third to a half; on a GPU it is not less at any length.
"""

import torch
from torch import Tensor

LEAST_CHANNELS = 32  # a kernel, below which the product is too narrow
LONGEST = 128


def pays(x: Tensor, kernels: int) -> bool:
    """Whether this should be quicker than the FFT."""
    return not x.is_cuda and x.shape[1] <= LONGEST and x.shape[2] >= LEAST_CHANNELS * kernels


def toeplitz_conv(x: Tensor, k: Tensor, reverse: bool = False) -> Tensor:
    """`long_conv(x, k, reverse)`: x (batch, length, channels), k (kernels, length) -> y like x."""
    kernels, length = k.shape
    padded = torch.cat([k.new_zeros(kernels, length - 1), k], 1)
    matrix = padded.unfold(1, length, 1).flip(2)  # [t, s]: k_(t - s), 0 where s is to come
    rows = x.to(k.dtype).unflatten(2, (kernels, -1))
    return torch.einsum("kst,bskc->btkc" if reverse else "kts,bskc->btkc", matrix, rows).flatten(2).to(x.dtype)
