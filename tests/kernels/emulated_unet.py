"""The U-Net's CUDA decoder on a host processor, as emulated_decoder.py has the language model's."""

import ctypes
import functools
from pathlib import Path

from mambagen.kernels.unet_decode import cuda
from tests.kernels.emulator import build


class EmulatedUNetDecoder(cuda.CudaDecoder):
    """`CudaDecoder` whose launches run in the emulator; `seed` orders its warps and delays."""

    seed = 0
    shared_bytes = 227 << 10

    def _chip(self) -> tuple[int, int]:
        return self.shared_bytes, 132

    def _run(self, parameters: bytes, layout: cuda.Layout) -> None:
        library = _library(tuple(layout.defines().items()))
        blocks, cluster = self._rows // layout.streams, 2 if layout.pairs else 1
        failed = library.emulate(parameters, blocks // cluster, cluster, layout.launch_bytes, self.seed)
        assert failed == 0, "the emulator stopped the kernel (its message is on stderr)"


@functools.cache
def _library(defines: tuple[tuple[str, object], ...]) -> ctypes.CDLL:
    kernels = Path(cuda.__file__).parent
    files = [kernels.parent / "mamba_decode" / "sampling.cuh", kernels / "decode.cu"]
    launcher = (
        'extern "C" int emulate(const Parameters* p, int clusters, int cluster, int shared_bytes, u32 seed) {\n'
        "  return launch(clusters, cluster, ALL_THREADS, shared_bytes, seed, [=] { decode(*p); });\n}\n"
    )
    return build("unet", "".join(file.read_text() for file in files) + launcher, defines)
