"""The CUDA decoder on a host processor: decode.cu compiled by the system's C++ compiler over cluster_emulator.h."""

import ctypes
import functools
from pathlib import Path

from mambagen.kernels.mamba_decode import cuda
from tests.kernels.emulator import build


class EmulatedDecoder(cuda.CudaDecoder):
    """`CudaDecoder` whose launches run in the emulator; `seed` orders its warps and delays."""

    seed = 0
    shared_bytes = 227 << 10

    def _shared_limit(self) -> int:
        return self.shared_bytes

    def _side_by_side(self, layout: cuda.Layout) -> int:
        return 132 // layout.cluster

    def _run(self, parameters: bytes) -> None:
        layout = self.layout
        library = _library(tuple(layout.defines(self.debug).items()))
        failed = library.emulate(parameters, self.clusters, layout.launch_bytes, self.seed)
        assert failed == 0, "the emulator stopped the kernel (its message is on stderr)"


@functools.cache
def _library(defines: tuple[tuple[str, object], ...]) -> ctypes.CDLL:
    folder = Path(cuda.__file__).parent
    launcher = (
        'extern "C" int emulate(const Parameters* p, int clusters, int shared_bytes, u32 seed) {\n'
        "  return launch(clusters, CLUSTER, ALL_THREADS, shared_bytes, seed, [=] { decode(*p); });\n}\n"
    )
    source = "".join((folder / name).read_text() for name in ("sampling.cuh", "decode.cu")) + launcher
    return build("decoder", source, defines, optimise="-O0")
