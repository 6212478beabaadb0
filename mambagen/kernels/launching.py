"""What launching a kernel on a GPU needs, in whatever language the kernel is written."""

import functools

import torch
from torch import Tensor


@functools.cache
def processors(device: torch.device) -> int:
    """The GPU's multiprocessors (a handful on a CPU, where Triton's interpreter runs)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether this is a GPU of NVIDIA's compute capability 9."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def byte_flags(resets: Tensor | None) -> Tensor | None:
    """The document borders as bytes that a kernel reads, or None."""
    return None if resets is None else resets.contiguous().view(torch.uint8)


def on_device_of(x: Tensor) -> torch.cuda.device:
    """Launch on x's GPU, whichever is current (does nothing on a CPU)."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
