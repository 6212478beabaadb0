"""Candidates for the scan's CUDA backward beside the kernel in use: right, repeatable, and how fast.

    python -m benchmarks.backward_candidates [--out candidates.json]

candidates/backward_one_warp.cu takes its sums on tensor cores (1,458 instructions a warp and tile of 8 steps instead of
1,883); in backward_two_warps.cu two warps share 16 channels, so that twice as many run side by side, and with H_SHARED
they keep h in shared memory and spill nothing at 128 registers. None is used by the package before it is measured to be
faster; tests/kernels/test_backward_candidates.py holds them to float64 on a host.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import graph_ms, print_table, write_json
from benchmarks.scan import SHAPES, draw
from mambagen.kernels.nvrtc import Kernel
from mambagen.kernels.selective_scan import cuda

FOLDER = Path(__file__).parent / "candidates"
NAMES = ("backward_one_warp", "backward_two_warps")
SETTINGS = {
    "backward_one_warp": [{"RING": 3, "MIN_BLOCKS": 1}, {"RING": 4, "MIN_BLOCKS": 1}],
    "backward_two_warps": [
        {"RING": 3, "MIN_BLOCKS": 2, "H_SHARED": 0},
        {"RING": 4, "MIN_BLOCKS": 2, "H_SHARED": 0},
        {"RING": 3, "MIN_BLOCKS": 1, "H_SHARED": 0},
        {"RING": 3, "MIN_BLOCKS": 2, "H_SHARED": 1},
        {"RING": 3, "MIN_BLOCKS": 1, "H_SHARED": 1},
    ],
}
in_use = cuda._kernel


def source(name: str) -> str:
    """A candidate with what it includes."""
    prelude = Path(cuda.__file__).parent.parent / "prelude.cuh"
    return "".join(path.read_text() for path in (prelude, FOLDER / "additions.cuh", *kernel_files(name)))


def kernel_files(name: str) -> tuple[Path, Path]:
    """A candidate's own source, which a host can compile too."""
    return FOLDER / "common.cuh", FOLDER / f"{name}.cu"


def warps_of(name: str, warps: int) -> int:
    """Threads / 32 of a block that the package would give so many warps, 16 channels each."""
    return warps if name == "backward_one_warp" else 2 * warps


def shared_bytes(name: str, v: dict[str, int], size: int) -> int:
    """What the candidate's structs take; `size` is that of an element, v has WARPS as launched."""
    tensors, stage = 3 + v["HAS_Z"], 1024 + (3 + v["HAS_Z"]) * 8 * 16 * size
    if name == "backward_one_warp":
        own, owners = 2 * stage + 512 * tensors, v["WARPS"]
    else:
        own, owners = 2 * stage + 512 * tensors + 2048 + 1536, v["WARPS"] // 2
        own += 8192 if v["H_SHARED"] else 0
    return owners * own + v["RING"] * (8192 + owners * 1280 + 16) + 512 + 64


class Launcher:
    """A candidate as `cuda.backward` calls its kernels."""

    def __init__(self, kernel: Kernel, factor: int) -> None:
        self.kernel, self.factor = kernel, factor

    def __call__(self, grid: tuple[int, int, int], threads: int, parameters: bytes) -> None:
        self.kernel(grid, threads * self.factor, parameters)


def candidate(name: str, setting: dict[str, int]) -> Callable[..., Any]:
    """In the place of `cuda._kernel`."""

    @functools.cache
    def kernel(file: str, function: str, device: int, options: tuple[tuple[str, int], ...]) -> Any:
        if file != "cuda_backward.cu":
            return in_use(file, function, device, options)
        values = dict(options) | setting
        factor = warps_of(name, 1) if function == "scan_backward" else 1
        values["WARPS"] = warps_of(name, values["WARPS"])
        size = 4 if values["DTYPE"] == 0 else 2
        memory = shared_bytes(name, values, size) if function == "scan_backward" else 0
        return Launcher(Kernel(source(name), function, values, device, memory), factor)

    return kernel


def gradients(t: dict[str, Tensor], dy: Tensor, saved: Tensor) -> tuple[Tensor | None, ...]:
    """One backward call."""
    B, C = t["B"][:, :, None], t["C"][:, :, None]
    return cuda.backward(
        dy, None, t["x"], t["dt"], t["A"], B, C, t["D"], t["z"], t["dt_bias"], True, None, None, False, saved
    )


def main() -> None:
    """Measure all at the shapes of benchmarks.scan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.backward_candidates: needs a CUDA device")
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        t = draw(*shape)
        B, C = t["B"][:, :, None], t["C"][:, :, None]
        saved = cuda.forward(
            t["x"], t["dt"], t["A"], B, C, t["D"], t["z"], t["dt_bias"], True, None, None, False, True
        )[2]
        dy = torch.randn_like(t["x"])
        cuda._kernel = in_use
        expected = [None if v is None else v.float() for v in gradients(t, dy, saved)]
        plans = [("in use", {}), *((name, setting) for name in NAMES for setting in SETTINGS[name])]
        for name, setting in plans:
            cuda._kernel = in_use if name == "in use" else candidate(name, setting)  # type: ignore[assignment]
            row: dict[str, Any] = {"shape": "x".join(map(str, shape)), "kernel": name, **setting}
            try:
                found, again = gradients(t, dy, saved), gradients(t, dy, saved)
                pairs = [(a, b, e) for a, b, e in zip(found, again, expected, strict=True) if a is not None]
                row["repeats"] = all(b is not None and torch.equal(a, b) for a, b, _ in pairs)
                row["largest difference"] = max(
                    float((a.float() - e).norm() / e.norm()) for a, _, e in pairs if e is not None
                )
                del found, again, pairs
                row["ms"] = graph_ms(lambda t=t, dy=dy, saved=saved: gradients(t, dy, saved))  # type: ignore[misc]
            except RuntimeError as error:
                row["failed"] = str(error).splitlines()[0][:80]
            rows.append({**dict.fromkeys(("shape", "kernel", "RING", "MIN_BLOCKS", "H_SHARED", "repeats")), **row})
            print(rows[-1], flush=True)
        cuda._kernel = in_use
        del t, saved, dy, expected
        torch.cuda.empty_cache()
    print_table(rows, "backward, milliseconds")
    write_json(args.out, "backward_candidates", rows)


if __name__ == "__main__":
    main()
