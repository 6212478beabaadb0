"""The U-Net's CUDA decoder on a host processor, as emulated_decoder.py has the language model's."""

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from mambagen.kernels.unet_decode import cuda
from tests.kernels.emulated_decoder import COMPILER

HERE = Path(__file__).parent


class EmulatedUNetDecoder(cuda.CudaDecoder):
    """`CudaDecoder` whose launches run in the emulator; `seed` orders its warps and delays."""

    seed = 0
    shared_bytes = 227 << 10

    def _chip(self) -> tuple[int, int]:
        return self.shared_bytes, 132

    def _run(self, parameters: bytes, layout: cuda.Layout) -> None:
        library = _library(tuple(layout.defines().items()))
        blocks = self._rows // layout.streams
        failed = library.emulate(parameters, blocks, layout.launch_bytes, self.seed)
        assert failed == 0, "the emulator stopped the kernel (its message is on stderr)"


@functools.cache
def _library(defines: tuple[tuple[str, object], ...]) -> ctypes.CDLL:
    assert COMPILER is not None
    kernels = Path(cuda.__file__).parent
    files = [HERE / "cluster_emulator.h", kernels.parent / "mamba_decode" / "sampling.cuh", kernels / "decode.cu"]
    text = "".join(file.read_text() for file in files) + (
        'extern "C" int emulate(const Parameters* p, int blocks, int shared_bytes, u32 seed) {\n'
        "  return launch(blocks, 1, THREADS + 32, shared_bytes, seed, [=] { decode(*p); });\n}\n"
    )
    options = [f"-D{name}={value}" for name, value in defines]
    key = hashlib.sha256("\0".join([text, *options]).encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"mambagen-emulated-unet-{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory() as scratch:
            source, built = Path(scratch) / "decode.cpp", Path(scratch) / "decode.so"
            source.write_text(text)
            command = [COMPILER, "-O1", "-std=c++17", "-w", "-shared", "-fPIC", *options, str(source), "-o", str(built)]
            subprocess.run(command, check=True)
            shutil.move(str(built), str(target))
    return ctypes.CDLL(str(target))
