"""Compile the Triton kernels for a GPU that is not there, and say what they need of it.

    python -m tests.kernels.compile_triton [--target cuda:90] [--all] [--json]

Each variant is called as a user would call it, on small CPU tensors, with a driver that claims the target and launches
nothing; so the kernels are specialised (strides, alignment, absent arguments) as in a real call. Registers and spilled
bytes come from the cubin (NVIDIA) or the assembly (AMD). Set TRITON_CACHE_DIR to an empty folder to see true times.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from mambagen.kernels.dispatch import backend_module
from tests.kernels.helpers import draw_conv, draw_scan

Row = dict[str, Any]

SCAN_ORDER = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus", "initial_state", "resets", "reverse")
CONV_ORDER = ("x", "weight", "bias", "activation", "initial_state", "resets", "reverse")

SCANS: dict[str, dict[str, Any]] = {
    "bfloat16, 16 states": {"dtype": torch.bfloat16},
    "float32, 64 states, every option": {"state": 64, "strided": True, "resets": 0.1, "reverse": True, "groups": 2},
}
MORE_SCANS: dict[str, dict[str, Any]] = {
    f"{dtype}, {state} states, {'no option' if bare else 'resets'}": {
        "dtype": dtype,
        "state": state,
        **(
            {"skip": False, "gate": False, "bias": False, "softplus": False, "initial": False}
            if bare
            else {"resets": 0.1, "channels": 20}
        ),
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for state in (1, 3, 16, 32, 100, 256)
    for bare in (False, True)
}
CONVS: dict[str, dict[str, Any]] = {
    "bfloat16, width 4": {"dtype": torch.bfloat16, "channels": 256, "initial": False},
    "float32, width 8, every option": {"width": 8, "strided": True, "resets": 0.1, "reverse": True},
}
MORE_CONVS: dict[str, dict[str, Any]] = {
    f"{dtype}, width {width}": {"dtype": dtype, "width": width, "resets": 0.1, "channels": 100}
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for width in (1, 2, 3, 8)
}
FFTS = {
    "bfloat16, a system a channel": (torch.bfloat16, 64),
    "float32, a system for all": (torch.float32, 1),
}
NORMS = {
    "272 channels": (272, torch.bfloat16),
    "65 channels, float32": (65, torch.float32),
    "1024 channels": (1024, torch.bfloat16),
    "8192 channels": (8192, torch.bfloat16),
}
CHUNKS = {"one sequence, 64 states": (1, 64, 1), "200 sequences, 64 states": (200, 64, 1), "12 states": (1, 12, 2)}
S4DS = {"32 states": 32, "64 states": 64, "1024 states": 1024}


class NoDevice:
    """Triton's driver for a target without a device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def resources(kernel: Any) -> Row:
    """Registers a thread, bytes spilled to memory, shared memory."""
    if "cubin" in kernel.asm:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        registers, spilled = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()  # type: ignore[union-attr]
    else:
        said = kernel.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count: +(\d+)", said)[1]  # type: ignore[index]
        spilled = re.search(r"\.private_segment_fixed_size: +(\d+)", said)[1]  # type: ignore[index]
    row = {"registers": int(registers), "spilled": int(spilled), "shared": kernel.metadata.shared}
    return row | {"products": "warp_group_dot " in kernel.asm["ttgir"], "end": products_end(kernel.asm["ttgir"])}


def products_end(code: str) -> bool:
    """Whether no product on tensor cores outlives a step of its loop, whose next copies may overwrite what it reads."""
    pending = False
    for line in code.splitlines():
        if "warp_group_dot " in line and "isAsync = true" in line:
            pending = True
        elif "warp_group_dot_wait" in line and "pendings = 0" in line:
            pending = False
        elif pending and ("async_copy_global_to_local" in line or "scf.yield" in line):
            return False
    return True


def compiled(target: GPUTarget, every: bool) -> list[Row]:
    triton.runtime.driver.set_active(NoDevice(target))
    rows: list[Row] = []
    variant = ""
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        begin = time.perf_counter()
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        seconds = round(time.perf_counter() - begin, 2)
        rows.append({"kernel": self.__name__, "variant": variant, "seconds": seconds, **resources(kernel)})
        return kernel

    JITFunction.run = compile_only
    ops = ("selective_scan", "causal_conv1d", "fft_conv", "s4d", "gelu", "layer_norm")
    scan, conv, fft, s4d, gelu, norm = (backend_module(op, "triton") for op in ops)
    chunked = backend_module("s4d", "chunked_triton")
    for module in (scan, conv, fft, norm, chunked):
        vars(module)["processors"] = lambda device: 64  # enough that the length is split
    for variant, options in {**SCANS, **(MORE_SCANS if every else {})}.items():  # noqa: B007 (compile_only reads it)
        case = draw_scan(**{"batch": 1, "length": 256, "channels": 64, **options})
        arguments = [case[name] for name in SCAN_ORDER]
        y, final, saved = scan.forward(*arguments, True)
        scan.backward(y, final, *arguments, saved)
    for variant, options in {**CONVS, **(MORE_CONVS if every else {})}.items():  # noqa: B007
        case = draw_conv(**{"batch": 1, "length": 256, **options})
        arguments = [case[name] == "silu" if name == "activation" else case[name] for name in CONV_ORDER]
        y, final = conv.forward(*arguments)
        conv.backward(y, final, *arguments)
    for variant, (dtype, kernels) in FFTS.items():  # noqa: B007
        x, k, skip = torch.randn(2, 128, 64).to(dtype), torch.randn(kernels, 128), torch.randn(64)
        fft.forward(x, k, skip, kernels == 1)
        fft.backward(x, x, k, skip, kernels == 1)
    for variant, state in S4DS.items():  # noqa: B007
        dt, A = torch.rand(4), torch.randn(4, state, dtype=torch.complex64)
        z, c = s4d.coefficients(dt, A, A)
        s4d.coefficient_gradients(z, c, dt, A, A)
        s4d.gradients(s4d.forward(c, z, 2048), c, z)
    for variant, (batch, state, ssms) in CHUNKS.items():  # noqa: B007
        x = torch.randn(batch, 2048, 64 * ssms, dtype=torch.bfloat16)
        c, skip = torch.randn(ssms, state, dtype=torch.complex64), torch.randn(64 * ssms)
        chunked.forward(x, c, c.to(torch.complex128), skip, True)
        chunked.backward(x, x, c, c.to(torch.complex128), skip, True)
    for variant, (channels, dtype) in NORMS.items():  # noqa: B007
        h, w = torch.randn(20, channels), torch.randn(channels)
        x = h.to(dtype)
        _, y, moments = norm.forward(h, x, w, w, 1e-5, dtype)
        norm.backward(y, h, h, w, moments, None if dtype == h.dtype else dtype, True)
        for sums in (False, True):
            gelu.product_gradients(gelu.product(x, x, True), x, x, True, sums)
            gelu.masked_gradient(gelu.masked(x, w[:20, None] > 0), x, w[:20, None] > 0, sums)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels without a GPU.")
    parser.add_argument("--target", default="cuda:90", help="cuda:80, cuda:90, hip:gfx942, ...")
    parser.add_argument("--all", action="store_true", help="all dtypes, many state sizes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    kind, _, arch = options.target.partition(":")
    wide = kind == "hip" and arch.startswith("gfx9")
    rows = compiled(GPUTarget(kind, int(arch) if arch.isdigit() else arch, 64 if wide else 32), options.all)
    if options.json:
        json.dump(rows, sys.stdout)
        return
    for row in rows:
        print("{kernel:22} {seconds:5.1f} s {registers:4} registers {spilled:5} spilled   {variant}".format(**row))


if __name__ == "__main__":
    main()
