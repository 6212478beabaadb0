"""Holds the fused passes between an encoder's products to float64 on this GPU, then times them beside plain torch.

    python -m benchmarks.check_pointwise [--tokens 131072] [--width 272] [--sweep] [--out pointwise.json]

gelu_product at three times the width, the others at the width; "sums" also takes the sums of gradients that biases get,
for which plain torch reads those gradients again. Held to float64 in float32 and bfloat16; timed in bfloat16, the
forward pass and forward with backward. The rate is that of the tensors that a pass must read and write, beside that of
a copy. "call us" is what a forward call of 128 tokens takes from Python. --sweep times the kernels under other tiles.
Ends with status 1 where a number is wrong.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import median_ms, print_table, write_json
from mambagen.kernels.dispatch import backend_module
from mambagen.kernels.gelu import gelu_product, masked_gelu, product
from mambagen.kernels.layer_norm import add_layer_norm

ALLOWED = {torch.float32: 3e-6, torch.bfloat16: 4e-3}  # error's norm over the norm
SECONDS = 0.06  # that each is timed for


class Case(NamedTuple):
    """An op with its inputs, the gradients of its outputs, and the bytes that it must move."""

    name: str
    dtype: torch.dtype
    run: Callable[..., Tensor | tuple[Tensor, ...]]  # (*inputs, *biases, backend=)
    inputs: list[Tensor]
    given: list[Tensor]
    forward_bytes: int
    train_bytes: int
    summed: tuple[int, ...] = ()  # the inputs whose gradient's sum is that of a bias

    def forward(self, backend: str) -> None:
        """Without what the backward needs."""
        with torch.no_grad():
            self.run(*self.inputs, backend=backend)

    def train(self, backend: str, wide: bool = False) -> list[Tensor]:
        """Outputs, gradients and sums, which plain torch takes as a projection's backward does; `wide` in float64."""
        leaves = [(v.double() if wide else v).detach().requires_grad_() for v in self.inputs]
        biases = []
        if backend == "triton":
            biases = [torch.zeros(v.shape[-1], device=v.device, requires_grad=True) for v in self.inputs_summed]
        outputs = self.run(*leaves, *biases, backend=backend)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        given = [g.to(y) for g, y in zip(self.given, outputs, strict=True)]
        gradients = list(torch.autograd.grad(outputs, [*leaves, *biases], given))
        if not biases:
            gradients += [gradients[i].flatten(0, -2).sum(0) for i in self.summed]
        return [*(y.detach() for y in outputs), *gradients]

    @property
    def inputs_summed(self) -> list[Tensor]:
        """The inputs with a bias."""
        return [self.inputs[i] for i in self.summed]


def cases(tokens: int, width: int, device: str = "cuda") -> Iterator[Case]:
    """Every op in both dtypes, at an encoder's sizes, without and with the sums of gradients."""

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def norm(dtype: torch.dtype) -> Callable[..., tuple[Tensor, ...]]:
        def run(
            h: Tensor, x: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None = None, *, backend: str
        ) -> tuple[Tensor, ...]:
            low = h.dtype if h.dtype == torch.float64 else dtype
            return add_layer_norm(h, x, weight, bias, 1e-5, low, x_bias, backend=backend)

        return run

    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        size = dtype.itemsize * tokens
        gate = 3 * width
        a, b, dy = (draw(1, tokens, gate, dtype=dtype) for _ in range(3))
        one = Case("gelu_product", dtype, gelu_product, [a, b], [dy], 3 * size * gate, 8 * size * gate)
        yield one
        yield one._replace(name="gelu_product, sums", summed=(0, 1))
        a, b, dy = (draw(1, tokens, width, dtype=dtype) for _ in range(3))
        yield Case("product, sums", dtype, product, [a, b], [dy], 3 * size * width, 8 * size * width, (0, 1))
        one = Case("gelu, sums", dtype, masked_gelu, [a], [dy], 2 * size * width, 5 * size * width, (0,))
        yield one
        mask = torch.rand(1, tokens, 1, device=device) < 0.1
        yield one._replace(name="masked_gelu", run=partial(masked_gelu, mask=mask), summed=())
        yield one._replace(name="masked_gelu, sums", run=partial(masked_gelu, mask=mask))
        h, x = draw(1, tokens, width), draw(1, tokens, width, dtype=dtype)
        given = [draw(1, tokens, width), draw(1, tokens, width, dtype=dtype)]
        low = size * width if dtype != torch.float32 else 0  # in float32 both gradients of the sum are one tensor
        forward = (8 * tokens + 2 * size) * width
        backward = (12 * tokens + size) * width + low
        one = Case(
            "add_layer_norm", dtype, norm(dtype), [h, x, draw(width), draw(width)], given, forward, forward + backward
        )
        yield one
        yield one._replace(name="add_layer_norm, sums", summed=(1,))


def wrong(case: Case) -> float:
    """The worst error of outputs, gradients and sums, as a share of what their dtype allows."""
    worst = 0.0
    for ours, exact in zip(case.train("triton"), case.train("torch", wide=True), strict=True):
        error = float((ours.double() - exact).norm() / exact.norm())
        worst = max(worst, (error if error == error else float("inf")) / ALLOWED[ours.dtype])
    return worst


def copy_rate() -> float:
    """GB/s of a copy of a gigabyte, read and written."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / median_ms(lambda: b.copy_(a), seconds=SECONDS) / 1e6


def call_us(case: Case, backend: str) -> float:
    """What a forward call of 128 tokens takes from Python, in microseconds."""
    small = case._replace(inputs=[v[:, :128].contiguous() if v.dim() == 3 else v for v in case.inputs])
    if "mask" in case.name:
        mask = torch.zeros(1, 128, 1, dtype=torch.bool, device="cuda")
        small = small._replace(run=partial(masked_gelu, mask=mask))
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            small.forward(backend)
        best = min(best, (time.perf_counter() - start) / 100)
    return 1e6 * best


def times(case: Case, backend: str) -> tuple[float, float]:
    """Milliseconds of a forward pass, and of one with backward."""
    forward, train = (median_ms(partial(run, backend), seconds=SECONDS) for run in (case.forward, case.train))
    return forward, train


def measured(case: Case, copy: float) -> dict[str, Any]:
    """A row: both ways, and what share of a copy's rate the fused passes reach."""
    forward, train = times(case, "triton")
    plain, plain_train = times(case, "torch")
    rate, train_rate = case.forward_bytes / forward / 1e6, case.train_bytes / train / 1e6
    return {
        "op": case.name,
        "forward us": 1e3 * forward, "torch": 1e3 * plain, "GB/s": rate, "of a copy": rate / copy,
        "train us": 1e3 * train, "torch train": 1e3 * plain_train, "train GB/s": train_rate,
        "train of a copy": train_rate / copy,
        "call us": call_us(case, "triton"), "torch call": call_us(case, "torch"),
    }  # fmt: skip


def swept(all_cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """The kernels' times under other tiles: the constants of their modules."""
    gelu, norm = (backend_module(op, "triton") for op in ("gelu", "layer_norm"))
    tries: list[tuple[str, Any, list[dict[str, Any]]]] = [
        ("gelu_product, sums", gelu, [{"TILE": t, "PROGRAMS": p} for t in (1024, 2048) for p in (4, 8, 16)]),
        ("gelu_product", gelu, [{"BLOCK": b, "WARPS": w} for b, w in ((1024, 4), (2048, 4), (2048, 8), (4096, 8))]),
        (
            "add_layer_norm, sums", norm,
            [{"FORWARD": (n, e), "BACKWARD": (n, e)} for n in (512, 1024, 2048, 4096) for e in (8, 16, 32)],
        ),
        ("add_layer_norm, sums", norm, [{"PROGRAMS": p} for p in (6, 12, 24)]),
    ]  # fmt: skip
    for name, module, settings in tries:
        case = next(c for c in all_cases if c.name == name and c.dtype == torch.bfloat16)
        for setting in settings:
            before = {key: getattr(module, key) for key in setting}
            vars(module).update(setting)
            forward, train = times(case, "triton")
            vars(module).update(before)
            yield {"op": name, "setting": str(setting), "forward us": 1e3 * forward, "train us": 1e3 * train}


def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--width", type=int, default=272)
    parser.add_argument("--sweep", action="store_true", help="also time the kernels under other tiles")
    parser.add_argument("--out")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.check_pointwise: needs a CUDA device")
    copy = copy_rate()
    print(f"{torch.cuda.get_device_name()}: a copy runs at {copy:.0f} GB/s")
    all_cases = list(cases(args.tokens, args.width))
    checked: list[dict[str, Any]] = [
        {"op": case.name, "dtype": str(case.dtype)[6:], "error": wrong(case)} for case in all_cases
    ]
    print_table(checked, "error as a share of what is allowed: below 1 is right")
    rows = [measured(case, copy) for case in all_cases if case.dtype == torch.bfloat16]
    print_table(rows, f"{args.tokens:,} tokens, width {args.width}, bfloat16")
    if args.sweep:
        print_table(list(swept(all_cases)), "other tiles")
    write_json(args.out, "pointwise", rows)
    if any(row["error"] > 1 for row in checked):
        sys.exit("benchmarks.check_pointwise: WRONG")


if __name__ == "__main__":
    main()
