"""The causal convolution for NVIDIA GPUs: the forward in CUDA C++ (cuda.cu), measured faster; Triton's backward."""

import functools
import struct
from pathlib import Path

import torch
from torch import Tensor

from mambagen.kernels.causal_conv1d.triton import backward
from mambagen.kernels.launching import byte_flags
from mambagen.kernels.nvrtc import Kernel, why_unavailable

__all__ = ["WRITES_INTO", "backward", "forward", "unsupported"]

WRITES_INTO = True  # backward takes `dx_out`
ROWS = 8  # outputs of a thread at a time
STEPS = 128  # outputs of a thread in all
THREADS = 64
MAX_BATCH = 65535  # the launch grid's second axis
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_unavailable = functools.cache(why_unavailable)


def unsupported(x: Tensor, width: int) -> str | None:
    """Why this call cannot run here, or None."""
    if x.dtype not in _DTYPES:
        return f"dtype {x.dtype}"
    vector = 16 // x.element_size()
    if x.shape[2] % vector:
        return f"{x.shape[2]} channels (the CUDA kernel takes multiples of {vector})"
    if width < 2:
        return "width 1"
    if x.shape[0] > MAX_BATCH:
        return f"{x.shape[0]} sequences at once (the CUDA kernels take up to {MAX_BATCH})"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the GPU is older than Ampere"
    return _unavailable()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """y and the last width - 1 inputs; see the package for shapes."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    size = x.element_size()
    if x.data_ptr() % 16 or any(stride * size % 16 for stride in x.stride()[:2]):
        x = x.contiguous()
    y = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    final = torch.empty((batch, width - 1, channels), dtype=x.dtype, device=x.device)
    flags = byte_flags(resets)
    kernel = _kernel(x.device.index, _DTYPES[x.dtype], width, silu, resets is not None, reverse)
    pointers = (x, weight.t().contiguous(), bias, initial_state, flags, y, final)
    parameters = struct.pack(
        "7P3qi4x", *(0 if v is None else v.data_ptr() for v in pointers), x.stride(0), x.stride(1), length, channels
    )
    threads = -(-length // STEPS) * (channels * size // 16)
    kernel((-(-threads // THREADS), batch, 1), THREADS, parameters)
    return y, final


@functools.cache
def _kernel(device: int, dtype: int, width: int, silu: bool, has_resets: bool, reverse: bool) -> Kernel:
    folder = Path(__file__).parent
    source = (folder.parent / "prelude.cuh").read_text() + (folder / "cuda.cu").read_text()
    defines = {
        "DTYPE": dtype, "WIDTH": width, "SILU": silu, "HAS_RESETS": has_resets, "REVERSE": reverse,
        "ROWS": ROWS, "STEPS": STEPS, "THREADS": THREADS,
    }  # fmt: skip
    return Kernel(source, "conv_forward", defines, device)
