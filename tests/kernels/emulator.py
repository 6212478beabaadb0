"""CUDA kernels on a host processor: a kernel's source compiled by the system's C++ compiler over cluster_emulator.h."""

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
AVAILABLE = COMPILER is not None and platform.machine() == "x86_64" and platform.system() == "Linux"


def build(name: str, source: str, defines: Iterable[tuple[str, object]], optimise: str = "-O1") -> ctypes.CDLL:
    """The library of a source that stands on the emulator, with its macros; kept in the folder of temporary files."""
    assert COMPILER is not None
    text = (HERE / "cluster_emulator.h").read_text() + source
    options = [f"-D{key}={int(value) if isinstance(value, bool) else value}" for key, value in defines]
    key = hashlib.sha256("\0".join([text, *options]).encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"mambagen-emulated-{name}-{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory() as scratch:
            file, built = Path(scratch) / f"{name}.cpp", Path(scratch) / f"{name}.so"
            file.write_text(text)
            command = [
                COMPILER,
                optimise,
                "-std=c++17",
                "-w",
                "-shared",
                "-fPIC",
                *options,
                str(file),
                "-o",
                str(built),
            ]
            subprocess.run(command, check=True)
            shutil.move(str(built), str(target))
    return ctypes.CDLL(str(target))
