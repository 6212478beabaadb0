"""How a CPU kernel is compiled, kept and run on several threads.

A kernel is a function of one int64, the address of its parameters (int64 as well: addresses, strides, sizes). The
first two parameters are counters: every thread claims a number for itself, whose scratch memory it then owns, and after
that one task after another until all are done. What a task computes never depends on who runs it.
"""

# mypy: disallow-untyped-defs=False

import array
import ctypes
import functools
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from numba import cfunc, njit, types
from numba.core.errors import NumbaError
from torch import Tensor

from mambagen.kernels.cpu_memory import BFLOAT16, FLOAT16, FLOAT32, load_int

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
NEXT_THREAD, NEXT_TASK, TASKS, SCRATCH, SCRATCH_BYTES = range(0, 40, 8)  # offsets of the first parameters, in bytes
FIRST_NUMBER, FIRST_ROWS, PARAMETER_BYTES = 40, 512, 1024
SMALL = 20_000  # element-steps below which waking a second thread costs more than it saves


class Kernel:
    """A numba function compiled to machine code at its first run, and found in numba's cache at later starts."""

    def __init__(self, function: Callable[[int], None]) -> None:
        self.function = function
        self._lock = threading.Lock()
        self._address = 0
        self._call: Any = None
        self.compiled: Any = None

    def compile(self) -> int:
        """The address of the machine code."""
        if not self._address:
            with self._lock:
                if not self._address:
                    self.compiled = self._compile()
                    self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.compiled.address)
                    self._address = self.compiled.address
        return self._address

    def _compile(self) -> Any:
        # numba looks for changes in this function's file only, so the cached name carries the sources of all
        self.function.__qualname__ = f"{self.function.__name__}_{_sources()}"
        make = functools.partial(cfunc, types.void(types.int64), error_model="numpy")
        try:
            return make(cache=True)(self.function)
        except NumbaError:
            raise
        except Exception:  # no folder to write to, a full disk, a damaged cache: none is a reason not to compute
            return make()(self.function)

    def run(self, parameters: Mapping[int, int], tasks: int, scratch_bytes: int, elements: int) -> None:
        """Run all tasks on torch's threads and wait for them; `parameters` by byte offset, those not given are 0."""
        address = self.compile()
        threads = max(1, min(torch.get_num_threads(), tasks)) if elements > SMALL else 1
        scratch_bytes = -(-scratch_bytes // 64) * 64
        scratch = torch.empty(threads * scratch_bytes, dtype=torch.uint8)
        block = array.array("q", bytes(PARAMETER_BYTES))
        block[TASKS >> 3], block[SCRATCH >> 3], block[SCRATCH_BYTES >> 3] = tasks, scratch.data_ptr(), scratch_bytes
        for offset, value in parameters.items():
            block[offset >> 3] = value
        where = block.buffer_info()[0]
        if threads == 1:
            self._call(where)
        else:
            _on_threads(address, self._call, where, threads)


@functools.cache
def _sources() -> str:
    here = Path(__file__).parent
    files = sorted([*here.glob("cpu_*.py"), *here.glob("*/cpu*.py")])
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:12]


class Number(IntEnum):
    """Names of parameters that are one int64, with their offsets as values."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[int]) -> int:
        return FIRST_NUMBER + 8 * count


class Rows(IntEnum):
    """Names of parameters that are three: an address and the bytes to the next batch and to the next step."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[int]) -> int:
        return FIRST_ROWS + 24 * count


@njit(forceinline=True)
def get(p, name):
    """A parameter, in a kernel."""
    return load_int(p + name)


@njit(forceinline=True)
def row(p, name, batch, step):
    """The address of a row, in a kernel."""
    return load_int(p + name) + batch * load_int(p + name + 8) + step * load_int(p + name + 16)


def rows(name: Rows, tensor: Tensor | None, reverse: bool) -> dict[int, int]:
    """The parameters for a tensor of (batch, length, ...); in reverse its rows run from the last step to the first."""
    if tensor is None:
        return {}
    size = tensor.element_size()
    address, step = tensor.data_ptr(), tensor.stride(1) * size
    if reverse:
        address, step = address + (tensor.shape[1] - 1) * step, -step
    return {name: address, name + 8: tensor.stride(0) * size, name + 16: step}


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# ---- threads: torch's own OpenMP team where it has one, so that the two never compete for the cores


def _on_threads(function: int, call: Callable[[int], None], parameters: int, threads: int) -> None:
    team = None if _forked else _openmp()
    if team is not None:
        team(function, parameters, threads, 0)
        return
    pool = _pool(threads - 1)
    others = [pool.submit(call, parameters) for _ in range(threads - 1)]
    call(parameters)
    for other in others:  # all tasks are claimed by now: a thread that did not wake in time is not waited for
        if not other.cancel():
            other.result()


@functools.cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """`GOMP_parallel` of the OpenMP library that torch has loaded (LLVM's and Intel's have it beside GNU's)."""
    try:
        maps = Path("/proc/self/maps").read_text()
        loaded = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "omp" in line}
    except OSError:
        return None
    torch_folder = str(Path(torch.__file__).parent)
    for path in sorted(loaded, key=lambda name: not name.startswith(torch_folder)):
        if Path(path).name.startswith(("libgomp", "libomp", "libiomp")):
            try:
                library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
                parallel, maximum = library.GOMP_parallel, library.omp_get_max_threads
            except (OSError, AttributeError):
                continue
            if maximum() != torch.get_num_threads():  # torch does not use this one
                continue
            parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            parallel.restype = None
            return parallel
    return None


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="mambagen-cpu")


_forked = False


def _after_fork() -> None:
    # an OpenMP team and a pool's threads do not follow into a child, where waiting for them would last for ever
    global _forked
    _forked = True
    _pool.cache_clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)
