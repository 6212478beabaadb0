"""Time candidate tiles and splits of the Triton kernels on this GPU, to choose the tables in their modules.

    python -m benchmarks.tune_triton [--what forward backward conv conv_backward] [--state 16] [--workers N]

Candidates are compiled side by side in worker processes first (Triton keeps them on disk), then timed one at a time:
medians in milliseconds at bfloat16 with every usual option, the best of each column marked.
"""

import argparse
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import median_ms
from mambagen.kernels.dispatch import backend_module

SHAPES = ((8, 2048, 2048), (1, 131072, 512), (64, 1024, 128))
CONV_SHAPES = ((8, 2048, 2048), (1, 1048576, 512), (64, 1024, 512))
Candidate = dict[str, Any]

SCAN_TILES = tuple(itertools.product((32, 64), (1, 2), (1, 2, 4, 8)))  # channels, warps, rows
FILLS = {"forward": ((0, 1), (3, 12), (8, 12), (8, 16)), "backward": ((0, 1), (6, 8), (8, 12))}
CONV_TILES = tuple(itertools.product((64, 128, 256), (4, 8)))
CONV_PROGRAMS = (8, 12, 14, 32, 64)


def candidates(what: str) -> list[Candidate]:
    """What to try; fills need no compilation of their own."""
    if what.startswith("conv"):
        return [{"tile": tile, "programs": programs} for tile in CONV_TILES for programs in CONV_PROGRAMS]
    tiles = [t for t in SCAN_TILES if (t[2] > 1 if what == "forward" else t[2] < 8)]
    found = [{"tile": tile, "chunk": 32, "fill": fill} for tile in tiles for fill in FILLS[what]]
    if what == "backward":
        found += [{"tile": tile, "chunk": chunk, "fill": FILLS[what][1]} for tile in tiles for chunk in (16, 64)]
    return found


def call(what: str, candidate: Candidate, shape: tuple[int, int, int], state: int) -> Callable[[], object]:
    """The candidate at a shape, ready to be timed."""
    torch.manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda").bfloat16()

    batch, length, channels = shape
    x = normal(*shape)
    if what.startswith("conv"):
        conv: Any = backend_module("causal_conv1d", "triton")
        conv.FORWARD = conv.BACKWARD = conv.Tile(*candidate["tile"], candidate["programs"])
        weights = torch.randn(channels, 4, device="cuda"), torch.randn(channels, device="cuda")
        inputs = (x, *weights, True, None, None, False)
        return lambda: conv.forward(*inputs) if what == "conv" else conv.backward(x, None, *inputs)
    scan: Any = backend_module("selective_scan", "triton")
    padded = 1 << (state - 1).bit_length()
    own = scan.TILINGS[padded]
    tile = scan.Tile(*candidate["tile"], getattr(own, what).rows_of_ends)
    scan.TILINGS[padded] = own._replace(**{what: tile}, chunk=candidate["chunk"])
    setattr(scan, f"FILL_{what.upper()}", scan.Fill(*candidate["fill"]))
    A = -torch.arange(1, state + 1, device="cuda").float().repeat(channels, 1)
    B, C = (normal(batch, length, 1, state) for _ in range(2))
    vectors = torch.randn(channels, device="cuda"), torch.rand(channels, device="cuda") * 2 - 5
    scanned = (x, 0.5 * normal(*shape), A, B, C, vectors[0], normal(*shape), vectors[1], True, None, None, False)
    if what == "forward":
        return lambda: scan.forward(*scanned, True)
    saved = scan.forward(*scanned, True)[2]
    return lambda: scan.backward(x, None, *scanned, saved)


def compile_one(what: str, candidate: Candidate, state: int) -> str | None:
    """Run a candidate once at a small shape, whole and split; why it cannot run, or None."""
    try:
        for shape in ((1, 2048, 128), (64, 128, 2048)):
            call(what, candidate, shape, state)()
        torch.cuda.synchronize()
    except Exception as failure:
        return f"{type(failure).__name__}: {str(failure)[:100]}"
    return None


def main() -> None:
    """Compile all, time all, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("forward", "backward", "conv", "conv_backward")
    parser.add_argument("--what", nargs="+", choices=parts, default=parts)
    parser.add_argument("--state", type=int, default=16)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) * 3 // 4))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.tune_triton: needs a GPU")
    for what in options.what:
        tried = candidates(what)
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            kinds = {str((c["tile"], c.get("chunk"))): c for c in tried}  # what compiles differently
            jobs = {kind: pool.submit(compile_one, what, c, options.state) for kind, c in kinds.items()}
            failures = [jobs[str((c["tile"], c.get("chunk")))].result() for c in tried]
        shapes = CONV_SHAPES if what.startswith("conv") else SHAPES
        rows = []
        for candidate, failure in zip(tried, failures, strict=True):
            if failure:
                print(f"{what} {candidate}: {failure}")
                continue
            times = []
            for shape in shapes:
                times.append(median_ms(call(what, candidate, shape, options.state), seconds=0.05))
                torch.cuda.empty_cache()
            rows.append((candidate, times))
        best = [min(times[i] for _, times in rows) for i in range(len(shapes))]
        print(f"\n{what}: {', '.join(map(str, shapes))}")
        for candidate, times in sorted(rows, key=lambda row: row[1][0]):
            cells = (f"{t:9.3f}{'*' if t <= 1.01 * b else ' '}" for t, b in zip(times, best, strict=True))
            print("".join(cells), candidate, flush=True)


if __name__ == "__main__":
    main()
