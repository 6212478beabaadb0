"""One residual Mamba block on a GPU: its kernels' time forward and backward, what it keeps, the official block beside.

    python -m benchmarks.block [--d-model 256] [--shapes 64x1024 128x8192 1x131072 1x1048576] [--keep auto|all|input]
        [--kernels] [--out block.json]

"kept" is what lies in memory between forward and backward, in bfloat16 values a token as multiples of d_model, the
block's input included. `--kernels` lists every kernel with its share: what to fuse next. bfloat16 autocast, state 16.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import median_ms, print_table, write_json
from mambagen.models import MambaConfig
from mambagen.models.mamba_block import MambaBlock


def ours(d_model: int, keep: str) -> Callable[[Tensor], Tensor]:
    """Our block as a function of the residual stream."""
    torch.manual_seed(0)
    block = MambaBlock(MambaConfig(d_model=d_model, n_layer=12, vocab_size=12)).cuda()
    block.keep = keep
    return lambda x: block(x)[0]


def official(d_model: int) -> Callable[[Tensor], Tensor] | None:
    """The official block with its fused add and norm, or None where it is not installed."""
    try:
        from mamba_ssm.modules.block import Block
        from mamba_ssm.modules.mamba_simple import Mamba
        from mamba_ssm.ops.triton.layer_norm import RMSNorm
    except ImportError:
        return None
    torch.manual_seed(0)
    block = Block(d_model, Mamba, nn.Identity, norm_cls=RMSNorm, fused_add_norm=True, residual_in_fp32=True).cuda()

    def run(x: Tensor) -> Tensor:
        hidden, residual = block(x.bfloat16(), x)
        return residual + hidden

    return run


def measure(name: str, block: Callable[[Tensor], Tensor], shape: tuple[int, int], d_model: int) -> dict[str, Any]:
    """Milliseconds, and what is kept."""
    x = torch.randn(*shape, d_model, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)
    row: dict[str, Any] = {"block": name, "batch": shape[0], "length": shape[1]}

    def forward() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return block(x)

    def inference() -> None:
        with torch.no_grad():
            forward()

    def train() -> None:
        forward().backward(dy)
        x.grad = None

    try:
        row["forward ms"] = median_ms(inference)
        row["train ms"] = median_ms(train)
        before = torch.cuda.memory_allocated()
        y = forward()
        kept = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
        del y
        row["kept / d_model"] = (kept + x.numel() * x.element_size()) / 2 / x.numel()
    except torch.cuda.OutOfMemoryError:
        row |= {"forward ms": None, "train ms": None, "kept / d_model": None}
    return row


def kernel_rows(block: Callable[[Tensor], Tensor], shape: tuple[int, int], d_model: int) -> list[dict[str, Any]]:
    """Every kernel of a train step with its time, forward and backward together."""
    from torch.profiler import ProfilerActivity, profile

    x = torch.randn(*shape, d_model, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)

    def train() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            y = block(x)
        y.backward(dy)

    train()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(5):
            train()
        torch.cuda.synchronize()
    events = [e for e in record.key_averages() if e.self_device_time_total > 0]
    total = sum(e.self_device_time_total for e in events)
    return [
        {
            "kernel": e.key[:70], "calls": e.count / 5, "ms": e.self_device_time_total / 5e3,
            "share": e.self_device_time_total / total,
        }
        for e in sorted(events, key=lambda e: -e.self_device_time_total)[:25]
    ]  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--shapes", nargs="+", default=["64x1024", "128x8192", "1x131072", "1x1048576"])
    parser.add_argument("--keep", choices=("auto", "all", "input"), default="auto")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.block: needs a CUDA device")
    rows = []
    for text in args.shapes:
        batch, length = (int(part) for part in text.split("x"))
        blocks = {"mambagen": ours(args.d_model, args.keep), "mamba_ssm": official(args.d_model)}
        for name, block in blocks.items():
            if block is not None:
                rows.append(measure(name, block, (batch, length), args.d_model))
        if args.kernels:
            print_table(
                kernel_rows(blocks["mambagen"] or ours(args.d_model, args.keep), (batch, length), args.d_model), text
            )
    print_table(rows, f"a block of d_model {args.d_model}")
    write_json(args.out, "block", rows)


if __name__ == "__main__":
    main()
