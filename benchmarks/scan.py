"""The selective scan and the causal convolution on a GPU: ours, the limit, and the official kernels where installed.

    python -m benchmarks.scan [--out scan.json] [--figure lengths.png] [--quick]

Times are medians in milliseconds of recorded CUDA graphs, bfloat16, state size 16, with z, D, dt_bias and softplus;
"fwd" is inference, "fwd +" also saves what the backward needs. The limit of the forward is one ex2 an element (batch x
length x channels x state) or the bytes of inputs and outputs, whichever takes longer; of the backward about 21 issue
slots an element or its bytes.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import graph_ms, print_table, write_json
from mambagen.kernels import causal_conv1d, selective_scan

SHAPES = ((8, 2048, 2048), (8, 8192, 2048), (1, 131072, 512), (1, 1048576, 512), (64, 1024, 128))
CONV_SHAPES = ((8, 2048, 2048), (1, 1048576, 512), (64, 1024, 512))
STATE = 16
EX2_A_SECOND = 4.17e12  # measured on an H200, see docs/performance.md
SLOTS_A_SECOND = 132 * 4 * 1.98e9  # instructions of 32 lanes
COPY_BYTES_A_SECOND = 4.27e12
BACKWARD_SLOTS = 21


def draw(batch: int, length: int, channels: int) -> dict[str, Tensor]:
    """Random inputs in the range of a fresh model."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda")

    row = (batch, length, channels)
    return {
        "x": normal(*row).bfloat16(),
        "dt": (0.5 * normal(*row)).bfloat16(),
        "A": -torch.arange(1, STATE + 1, device="cuda").float().repeat(channels, 1),
        "B": normal(batch, length, STATE).bfloat16(),
        "C": normal(batch, length, STATE).bfloat16(),
        "D": normal(channels),
        "z": normal(*row).bfloat16(),
        "dt_bias": torch.rand(channels, device="cuda") * 2 - 5,
    }


def scan_row(shape: tuple[int, int, int], backend: str) -> dict[str, Any]:
    """One shape: ours, the limits, the official kernel."""
    batch, length, channels = shape
    tensors = draw(*shape)
    elements = batch * length * channels * STATE
    wide = batch * length * channels * 2
    narrow = batch * length * STATE * 2
    fwd_limit = max(elements / EX2_A_SECOND, (4 * wide + 2 * narrow) / COPY_BYTES_A_SECOND) * 1e3
    bwd_bytes = (7 * wide + 6 * narrow) / COPY_BYTES_A_SECOND
    bwd_limit = max(elements / 32 * BACKWARD_SLOTS / SLOTS_A_SECOND, bwd_bytes) * 1e3

    def run(**arguments: Tensor) -> Tensor:
        y = selective_scan(**arguments, dt_softplus=True, backend=backend)  # type: ignore[arg-type]
        assert isinstance(y, Tensor)
        return y

    fwd, fwd_save, bwd = times(run, tensors)
    row: dict[str, Any] = {
        "batch, length, channels": shape,
        "backend": backend,
        "fwd": fwd,
        "fwd +": fwd_save,
        "bwd": bwd,
    }
    row |= {"limit fwd": fwd_limit, "limit bwd": bwd_limit}
    official = official_scan()
    if official:
        row |= dict(zip(("official fwd", "official bwd"), official(tensors), strict=True))
    return row


def times(run: Callable[..., Tensor], tensors: dict[str, Tensor]) -> tuple[float, float, float]:
    """Milliseconds of the forward, of the forward that keeps for a backward, and of the backward (by difference)."""
    with torch.no_grad():
        forward = graph_ms(lambda: run(**tensors))
    leaves = {name: v.detach().requires_grad_() for name, v in tensors.items()}
    g = torch.randn_like(run(**tensors))
    saving = graph_ms(lambda: run(**leaves))
    both = graph_ms(lambda: torch.autograd.grad(run(**leaves), list(leaves.values()), g))
    return forward, saving, both - saving


def official_scan() -> Callable[[dict[str, Tensor]], tuple[float, float]] | None:
    """The official CUDA kernel's times on the same numbers in its own layout (channels before length), if installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None

    def measure(t: dict[str, Tensor]) -> tuple[float, float]:
        turned = {k: t[k].transpose(1, 2).contiguous() for k in ("x", "dt", "B", "C", "z")}

        def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
            return selective_scan_fn(x, dt, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)

        inputs = {**turned, "A": t["A"], "D": t["D"], "bias": t["dt_bias"]}
        forward, _, backward = times(run, inputs)
        return forward, backward

    return measure


def conv_row(shape: tuple[int, int, int]) -> dict[str, Any]:
    """The convolution with SiLU, width 4: ours, the bandwidth limit, the official channels-last kernel."""
    batch, length, channels = shape
    torch.manual_seed(0)
    tensors = {
        "x": torch.randn(batch, length, channels, device="cuda").bfloat16(),
        "weight": torch.randn(channels, 4, device="cuda") / 2,
        "bias": torch.randn(channels, device="cuda"),
    }
    bytes_moved = batch * length * channels * 2

    def run(**arguments: Tensor) -> Tensor:
        y = causal_conv1d(**arguments, activation="silu")  # type: ignore[arg-type]
        assert isinstance(y, Tensor)
        return y

    fwd, _, bwd = times(run, tensors)
    row: dict[str, Any] = {"batch, length, channels": shape, "fwd": fwd, "bwd": bwd}
    row |= {"limit fwd": 2e3 * bytes_moved / COPY_BYTES_A_SECOND, "limit bwd": 3e3 * bytes_moved / COPY_BYTES_A_SECOND}
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError:
        return row

    def official(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu")

    fwd, _, bwd = times(
        official, tensors | {"weight": tensors["weight"].bfloat16(), "bias": tensors["bias"].bfloat16()}
    )
    return row | {"official fwd": fwd, "official bwd": bwd}


def length_rows(lengths: list[int], tokens: int = 1 << 17, d_model: int = 1024) -> list[dict[str, Any]]:
    """Forward and forward + backward by length at the same tokens in flight: scan beside causal FlashAttention."""
    rows = []
    for length in lengths:
        batch = max(1, tokens // length)
        t = draw(batch, length, d_model)

        def scan(**arguments: Tensor) -> Tensor:
            y = selective_scan(**arguments, dt_softplus=True)  # type: ignore[arg-type]
            assert isinstance(y, Tensor)
            return y

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        scale = 1e6 / (batch * length)  # nanoseconds a token
        fwd, save, bwd = times(scan, t)
        row: dict[str, Any] = {
            "length": length,
            "batch": batch,
            "scan fwd": fwd * scale,
            "scan fwd+bwd": (save + bwd) * scale,
        }
        del t
        if length <= 1 << 17:
            heads = torch.randn(3, batch, d_model // 64, length, 64, device="cuda").bfloat16().unbind(0)
            fwd, save, bwd = times(attention, dict(zip("qkv", heads, strict=True)))
            row |= {"attention fwd": fwd * scale, "attention fwd+bwd": (save + bwd) * scale}
        rows.append(row)
    return rows


def draw_lengths(rows: list[dict[str, Any]], path: str) -> None:
    """The figure of time a token against length."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, part in zip(axes, ("fwd", "fwd+bwd"), strict=True):
        for name, colour in (("scan", "C0"), ("attention", "C1")):
            points = [(r["length"], r[f"{name} {part}"]) for r in rows if r.get(f"{name} {part}")]
            label = "selective scan (ours)" if name == "scan" else "causal FlashAttention (torch SDPA)"
            axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
        axis.set(
            xscale="log", yscale="log", xlabel="length", title={"fwd": "forward", "fwd+bwd": "forward + backward"}[part]
        )
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("nanoseconds a token (1,024 channels)")
    axes[0].legend()
    figure.suptitle(f"{torch.cuda.get_device_name()}, bfloat16, at least 131,072 tokens in flight")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    print(f"drawn: {path}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="write the rows as JSON")
    parser.add_argument("--figure", help="draw time against length, beside FlashAttention")
    parser.add_argument("--quick", action="store_true", help="the two smallest shapes only")
    parser.add_argument("--backends", nargs="+", default=["auto", "triton"])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.scan: needs an NVIDIA GPU; see benchmarks.cpu for the CPU")
    shapes = [s for s in SHAPES if not options.quick or s[0] * s[1] * s[2] <= 1 << 25]
    scans = []
    for shape in shapes:
        for backend in options.backends:
            scans.append(scan_row(shape, backend))
            torch.cuda.empty_cache()
    print_table(scans, "selective scan, ms")
    convs = [conv_row(shape) for shape in CONV_SHAPES]
    print_table(convs, "causal conv1d + SiLU, ms")
    rows = [{"part": "scan", **r} for r in scans] + [{"part": "conv", **r} for r in convs]
    if options.figure:
        lengths = length_rows([1 << k for k in range(10, 21, 1)])
        print_table(lengths, "nanoseconds a token")
        draw_lengths(lengths, options.figure)
        rows += [{"part": "length", **r} for r in lengths]
    write_json(options.out, "scan", rows)


if __name__ == "__main__":
    main()
