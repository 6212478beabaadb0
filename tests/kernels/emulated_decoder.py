"""The CUDA decoder on a host processor: decode.cu compiled by the system's C++ compiler over cluster_emulator.h."""

import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from mambagen.kernels.mamba_decode import cuda

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
AVAILABLE = COMPILER is not None and platform.machine() == "x86_64" and platform.system() == "Linux"


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
    assert COMPILER is not None
    files = [HERE / "cluster_emulator.h"]
    folder = Path(cuda.__file__).parent
    files += [folder / name for name in ("sampling.cuh", "decode.cu")]
    text = "".join(file.read_text() for file in files) + (
        'extern "C" int emulate(const Parameters* p, int clusters, int shared_bytes, u32 seed) {\n'
        "  return launch(clusters, CLUSTER, THREADS, shared_bytes, seed, [=] { decode(*p); });\n}\n"
    )
    options = [f"-D{name}={int(str(value).replace('True', '1').replace('False', '0'))}" for name, value in defines]
    key = hashlib.sha256("\0".join([text, *options]).encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"mambagen-emulated-decoder-{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory() as scratch:
            source, built = Path(scratch) / "decode.cpp", Path(scratch) / "decode.so"
            source.write_text(text)
            command = [COMPILER, "-O0", "-std=c++17", "-w", "-shared", "-fPIC", *options, str(source), "-o", str(built)]
            subprocess.run(command, check=True)
            shutil.move(str(built), str(target))
    return ctypes.CDLL(str(target))
