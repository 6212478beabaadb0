"""CUDA C++ compiled at run time: NVRTC (which comes with torch's wheels) makes a cubin, the driver launches it.

Nothing is built at install and no header is needed: the sources use plain C++ and PTX. A cubin is compiled once for a
source, its definitions and the chip (a second or two), then read from the cache folder.
"""

import ctypes
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

MAX_ERROR_LINES = 12
CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION


def cache_folder() -> Path:
    """Where compiled kernels are kept: $MAMBAGEN_HOME/kernels, else the platform's cache folder."""
    home = os.environ.get("MAMBAGEN_HOME")
    if home:
        return Path(home) / "kernels"
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", str(Path.home())))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "mambagen" / "kernels"


def why_unavailable() -> str | None:
    """None where kernels can be compiled and launched here, else the reason in words."""
    if getattr(torch.version, "hip", None):
        return "this is an AMD GPU: CUDA C++ kernels are for NVIDIA"
    try:
        import cuda.bindings.nvrtc  # noqa: F401
    except ImportError:
        return "the package cuda-bindings is missing (it comes with torch's CUDA builds)"
    return None


def compile_cubin(source: str, defines: Mapping[str, object], architecture: str) -> bytes:
    """The cubin of a CUDA C++ source for an architecture such as "sm_90", from the cache where it is there.

    Raises RuntimeError with the compiler's log when the source does not compile.
    """
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--use_fast_math"]
    options += ["--device-as-default-execution-space"]
    options += [f"-D{name}={_literal(value)}" for name, value in sorted(defines.items())]
    version = ".".join(str(v) for v in nvrtc.nvrtcVersion()[1:])
    key = hashlib.sha256("\0".join([source, version, *options]).encode()).hexdigest()[:32]
    path = cache_folder() / f"{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass

    error, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    _check(error)
    encoded = [option.encode() for option in options]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        text = "\n".join(log.decode(errors="replace").strip("\0 \n").splitlines()[:MAX_ERROR_LINES])
        raise RuntimeError(f"NVRTC {version} could not compile a kernel for {architecture}:\n{text}")
    error, size = nvrtc.nvrtcGetCUBINSize(program)
    _check(error)
    cubin = b" " * size
    (error,) = nvrtc.nvrtcGetCUBIN(program, cubin)
    _check(error)
    nvrtc.nvrtcDestroyProgram(program)
    _publish(path, cubin)
    return cubin


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id, padded to 8 bytes, and 64 bytes of value."""

    _fields_ = (("id", ctypes.c_uint64), ("value", ctypes.c_uint * 16))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("count", ctypes.c_uint),
    )


class Kernel:
    """One compiled function on one device; call it with a packed parameter struct.

    `exact` compiles for this very architecture, with the instructions that later ones do not promise to have.
    """

    def __init__(
        self,
        source: str,
        name: str,
        defines: Mapping[str, object],
        device: int,
        shared_bytes: int = 0,
        exact: bool = False,
    ):
        major, minor = torch.cuda.get_device_capability(device)
        cubin = compile_cubin(source, defines, f"sm_{major}{minor}" + ("a" if exact else ""))
        self._driver = _driver()
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # makes the context
            module = ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(cubin))
            self._function = ctypes.c_void_p()
            self._call("cuModuleGetFunction", ctypes.byref(self._function), module, name.encode())
            if shared_bytes > 48 * 1024:  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._call("cuFuncSetAttribute", self._function, 8, shared_bytes)
        self.name, self.device, self.shared_bytes = name, device, shared_bytes

    def __call__(self, grid: tuple[int, int, int], threads: int, parameters: bytes, cluster: int = 0) -> None:
        """Launch on torch's current stream of the device; `parameters` is the kernel's one by-value argument.

        `cluster` blocks in a row form a thread-block cluster (0: none, and a cluster's instructions are illegal);
        above 8 the kernel must be `allow_large_clusters`.
        """
        buffer = ctypes.create_string_buffer(parameters, len(parameters))
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        if cluster == 0:
            result = self._driver.cuLaunchKernel(
                self._function, *grid, threads, 1, 1, self.shared_bytes, stream, arguments, None
            )  # fmt: skip
        else:
            config = self._config(grid, threads, cluster, stream)
            result = self._driver.cuLaunchKernelEx(ctypes.byref(config), self._function, arguments, None)
        if result:
            raise RuntimeError(f"launching {self.name}{grid} failed: CUDA driver error {result}")

    def allow_large_clusters(self) -> None:
        """Clusters of more than 8 blocks, which not every chip has."""
        self._call("cuFuncSetAttribute", self._function, 14, 1)  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED

    def active_clusters(self, threads: int, cluster: int) -> int:
        """How many clusters of that size run at the same time on the whole GPU."""
        count = ctypes.c_int()
        config = self._config((cluster, 1, 1), threads, cluster, ctypes.c_void_p())
        self._call("cuOccupancyMaxActiveClusters", ctypes.byref(count), self._function, ctypes.byref(config))
        return count.value

    def _config(
        self, grid: tuple[int, int, int], threads: int, cluster: int, stream: ctypes.c_void_p
    ) -> "_LaunchConfig":
        attribute = _LaunchAttribute(CLUSTER_DIMENSION, (ctypes.c_uint * 16)(cluster, 1, 1))
        return _LaunchConfig(*grid, threads, 1, 1, self.shared_bytes, stream, ctypes.pointer(attribute), 1)

    def _call(self, function: str, *arguments: object) -> None:
        result = getattr(self._driver, function)(*arguments)
        if result:
            raise RuntimeError(f"{function} failed: CUDA driver error {result}")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _literal(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _check(error: object) -> None:
    if int(error) != 0:  # type: ignore[call-overload]
        raise RuntimeError(f"NVRTC failed: {error}")


def _publish(path: Path, data: bytes) -> None:
    """Put a file into the cache in one step; a cache that cannot be written only costs time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    except OSError:
        pass
