"""Hold the S4D convolution in chunks to the one by FFT in float32 on this GPU, run it again and again, and time both.

    python -m benchmarks.check_s4d [--channels 272] [--states 64] [--tokens 131072] [--lengths 1000 1024 32768 131072]

A row a length and direction: how far y and the gradients of x, c, z and D are from those by FFT, as shares of the
latter's norms (y and dx are rounded to bfloat16, 1.7e-3); whether seven runs have the same bits; and milliseconds,
forward and with backward. Ends with status 1 where a number is wrong or runs differ.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import median_ms, print_table
from mambagen.kernels.fft_conv import long_conv
from mambagen.kernels.s4d.chunked import chunked_conv
from mambagen.kernels.s4d.vandermonde import vandermonde_product

RUNS = 7
ROUNDED, EXACT = 4e-3, 3e-5  # allowed of what is bfloat16, and of what is float32 or more

Op = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x, c, z, D -> y


def by_fft(x: Tensor, c: Tensor, z: Tensor, D: Tensor, *, reverse: bool) -> Tensor:
    return long_conv(x, vandermonde_product(c, z, x.shape[1], "triton"), reverse, D, "triton")


def in_chunks(x: Tensor, c: Tensor, z: Tensor, D: Tensor, *, reverse: bool) -> Tensor:
    return chunked_conv(x, c, z, reverse, D)


def run(op: Op, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y and the gradients."""
    leaves = [v.detach().requires_grad_() for v in inputs]
    y = op(leaves[0], leaves[1], leaves[2], leaves[3])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def apart(ours: Tensor, other: Tensor) -> float:
    """The norm of the difference as a share of the other's."""
    wide = ours.to(torch.promote_types(ours.dtype, other.dtype))
    return float((wide - other).norm() / other.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=272)
    parser.add_argument("--states", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1000, 1024, 32768, 131072])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.check_s4d: needs a CUDA device")
    torch.manual_seed(0)
    n = torch.arange(options.states, dtype=torch.float64, device="cuda")
    z = torch.complex(-0.025 + 0 * n, 0.05 * torch.pi * n)[None]  # S4D-Lin at a step of 0.05
    c = 0.05 * torch.randn(1, options.states, dtype=torch.complex64, device="cuda")
    D = torch.randn(options.channels, device="cuda")
    rows, wrong = [], False
    for length in options.lengths:
        shape = (max(1, options.tokens // length), length, options.channels)
        x, dy = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for reverse in (False, True):
            chunks, fft = partial(in_chunks, reverse=reverse), partial(by_fft, reverse=reverse)
            expected = run(fft, [x.float(), c, z, D], dy)
            found = [run(chunks, [x, c, z, D], dy) for _ in range(RUNS)]
            errors = [apart(a, b) for a, b in zip(found[0], expected, strict=True)]
            same = all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again, strict=True))
            wrong |= not same or max(errors[:2]) > ROUNDED or max(errors[2:]) > EXACT
            row = {"length": length, "reverse": reverse, "same bits": same}
            row |= dict(zip(("y", "dx", "dc", "dz", "dD"), (f"{error:.1e}" for error in errors), strict=True))
            for name, op in (("chunks", chunks), ("fft", fft)):
                with torch.no_grad():
                    row[f"{name} forward ms"] = median_ms(partial(op, x, c, z, D))
                row[f"{name} train ms"] = median_ms(partial(run, op, [x, c, z, D], dy))
            rows.append(row)
            del expected, found
    print_table(rows, f"{options.channels} channels, {options.states} states, one system")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
