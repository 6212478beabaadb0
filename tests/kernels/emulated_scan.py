"""The CUDA scan's backward on a host processor: cuda_backward.cu compiled by the system's C++ compiler."""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from mambagen.kernels.selective_scan import cuda
from tests.kernels.emulator import HERE, build

SHARED_BYTES = 227 << 10
LAUNCHERS = """
extern "C" int emulate(const Parameters* p, int x, int y, int z, int shared_bytes, u32 seed) {
  gridDim = {(u32)x, (u32)y, (u32)z};
  copies.assign(32 * WARPS, {});
  return launch(x * y * z, 1, 32 * WARPS, shared_bytes, seed, [=] { scan_backward(*p); });
}
extern "C" void emulate_sums(const Reduction* p, int blocks) {
  gridDim = {(u32)blocks, 1, 1};
  machine = Machine();
  machine.fibers.resize(1);
  machine.current = &machine.fibers[0];
  for (int i = 0; i < 256 * blocks; i++) {
    machine.block_index.x = i / 256;
    machine.current->thread.x = i % 256;
    add_partials(*p);
  }
}
"""


class EmulatedKernel:
    """A kernel whose launches run in the emulator."""

    def __init__(self, file: str, function: str, options: tuple[tuple[str, int], ...]) -> None:
        assert file == "cuda_backward.cu", "only the backward of one chunk is emulated"
        self.function, self.values = function, {key: int(value) for key, value in options}

    def __call__(self, grid: tuple[int, int, int], threads: int, parameters: bytes) -> None:
        library = _library(tuple(self.values.items()))
        if self.function == "add_partials":
            library.emulate_sums(parameters, grid[0])
            return
        memory = cuda._shared_bytes(self.function, self.values, 4 if self.values["DTYPE"] == 0 else 2)
        assert memory <= SHARED_BYTES
        failed = library.emulate(parameters, *grid, memory, 0)
        assert failed == 0, "the emulator stopped the kernel (its message is on stderr)"


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """`cuda.backward` on CPU tensors, while it lasts."""

    def kernel(file: str, function: str, device: int | None, options: tuple[tuple[str, int], ...]) -> EmulatedKernel:
        return EmulatedKernel(file, function, options)

    with mock.patch.object(cuda, "_kernel", kernel), mock.patch.object(cuda, "processors", return_value=1):
        yield


@functools.cache
def _library(options: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    kernel = (Path(cuda.__file__).parent / "cuda_backward.cu").read_text()
    memory = "extern __shared__ __align__(16) u8 raw_shared[];"
    assert memory in kernel
    kernel = kernel.replace(memory, "u8* raw_shared = dynamic_shared();")
    return build("scan", (HERE / "scan_emulator.h").read_text() + kernel + LAUNCHERS, options)
