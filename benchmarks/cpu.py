"""The scan, the convolution and a decoding step on a CPU: ours, the limit, and mambapy and transformers beside them.

    python -m benchmarks.cpu [--out cpu.json] [--threads N] [--quick]

Times are medians in milliseconds, float32, state size 16, with z, D, dt_bias and softplus, all in one process, one
after the other. mambapy is its pscan as `MambaBlock.selective_scan` calls it; transformers its torch path without
kernels (a loop over the steps). The limit is the arithmetic that an element (batch x length x channels x state) cannot
do without, at the rate of this machine's registers: one exp2 and 4 fused multiply-adds forward, another exp2 and 13
backward. transformers' backward writes a gradient of the whole length for every step and takes minutes at 4096 steps:
--quick leaves the peers' backward out.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from numba import njit
from torch import Tensor

from benchmarks.common import median_ms, print_table, write_json
from mambagen.kernels import causal_conv1d, selective_scan
from mambagen.kernels.cpu_memory import store
from mambagen.kernels.cpu_simd import LANES, exp2, fma, splat

SHAPES = ((1, 4096, 512), (4, 1024, 256))
DECODE_CHANNELS = (128, 256, 512)
STATE = 16
FORWARD_FMAS, BACKWARD_FMAS = 4, 13

Scan = Callable[..., Tensor]


def draw(batch: int, length: int, channels: int) -> dict[str, Tensor]:
    """Random inputs in the range of a fresh model."""
    make = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    return {
        "x": normal(batch, length, channels),
        "dt": 0.5 * normal(batch, length, channels),
        "A": -torch.arange(1.0, STATE + 1).repeat(channels, 1),
        "B": normal(batch, length, STATE),
        "C": normal(batch, length, STATE),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "dt_bias": torch.rand(channels, generator=make) * 2 - 5,
    }


# ---- the scans that are compared: all take the same tensors and give the same y


def ours(**tensors: Tensor) -> Tensor:
    return selective_scan(**tensors, dt_softplus=True, backend="cpu")  # type: ignore[arg-type,return-value]


def mambapy_scan() -> Scan:
    from mambapy.mamba import MambaBlock

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
        dt = torch.nn.functional.softplus(dt + dt_bias)
        y: Tensor = MambaBlock.selective_scan(None, x, dt, A, B, C, D)
        return y * torch.nn.functional.silu(z)

    return scan


def transformers_scan() -> Scan:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
        x, dt, B, C, z = (v.transpose(1, 2) for v in (x, dt, B, C, z))
        y: Tensor = mamba_selective_scan(x, dt, A, B, C, D, z=z, delta_bias=dt_bias, delta_softplus=True)
        return y.transpose(1, 2)

    return scan


def importable_peers() -> dict[str, Scan]:
    peers = {}
    for name, find in (("mambapy", mambapy_scan), ("transformers", transformers_scan)):
        try:
            peers[name] = find()
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return peers


# ---- measuring


def with_backward(scan: Scan, tensors: dict[str, Tensor]) -> Callable[[], object]:
    leaves = {name: value.clone().requires_grad_() for name, value in tensors.items()}
    dy = torch.randn_like(tensors["x"])
    return lambda: torch.autograd.grad(scan(**leaves), list(leaves.values()), dy)


def inference(scan: Scan, tensors: dict[str, Tensor]) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            scan(**tensors)

    return run


def once_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def scan_rows(shape: tuple[int, int, int], peers: dict[str, Scan], quick: bool) -> list[dict[str, Any]]:
    """One shape: a row for the forward, one for forward and backward."""
    tensors = draw(*shape)
    elements = shape[0] * shape[1] * shape[2] * STATE
    vectors = elements / LANES / torch.get_num_threads()
    forward_limit = vectors * ns_a_vector(FORWARD_FMAS) * 1e-6
    limits = {"fwd": forward_limit, "fwd+bwd": forward_limit + vectors * ns_a_vector(BACKWARD_FMAS) * 1e-6}
    rows = []
    for part, prepare in (("fwd", inference), ("fwd+bwd", with_backward)):
        mine = median_ms(prepare(ours, tensors), "cpu", seconds=1.0)
        row: dict[str, Any] = {
            "shape": "x".join(map(str, shape)),
            "pass": part,
            "ours": mine,
            "ps/element": 1e9 * mine / elements,
            "limit": limits[part],
            "x limit": mine / limits[part],
        }
        for name, scan in peers.items():
            run = prepare(scan, tensors)
            if part == "fwd":
                row[name] = median_ms(run, "cpu")
            elif quick:
                row[name] = None
            else:
                row[name] = once_ms(run) if name == "transformers" else median_ms(run, "cpu")
            row[f"x {name}"] = row[name] / mine if row[name] else None
        rows.append(row)
    return rows


def conv_row(shape: tuple[int, int, int]) -> dict[str, Any]:
    """causal_conv1d with SiLU beside torch's grouped convolution, which both peers use."""
    _, length, channels = shape
    x, weight, bias = torch.randn(shape), torch.randn(channels, 4) / 2, torch.randn(channels)
    dy = torch.randn(shape)

    def torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = torch.nn.functional.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=channels)
        return torch.nn.functional.silu(y[..., :length]).transpose(1, 2)

    def our_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d(x, weight, bias, "silu", backend="cpu")  # type: ignore[return-value]

    row: dict[str, Any] = {"shape": "x".join(map(str, shape))}
    for name, conv in (("ours", our_conv), ("torch", torch_conv)):
        leaves = [v.clone().requires_grad_() for v in (x, weight, bias)]
        with torch.no_grad():
            row[f"{name} fwd"] = median_ms(lambda conv=conv: conv(x, weight, bias), "cpu", seconds=0.5)  # type: ignore[misc]
        row[f"{name} fwd+bwd"] = median_ms(
            lambda conv=conv, leaves=leaves: torch.autograd.grad(conv(*leaves), leaves, dy),  # type: ignore[misc]
            "cpu",
            seconds=0.5,
        )
    row["x fwd"], row["x fwd+bwd"] = (row[f"torch {part}"] / row[f"ours {part}"] for part in ("fwd", "fwd+bwd"))
    return row


def decode_row(channels: int) -> dict[str, Any]:
    """Microseconds of one step with a carried state."""
    tensors = draw(1, 1, channels)
    state = torch.zeros(1, channels, STATE)
    past, weight = torch.zeros(1, 3, channels), torch.randn(channels, 4)

    def scan() -> None:
        selective_scan(**tensors, dt_softplus=True, initial_state=state, return_final_state=True, backend="cpu")  # type: ignore[arg-type]

    def conv() -> None:
        x = tensors["x"]
        causal_conv1d(x, weight, tensors["D"], "silu", initial_state=past, return_final_state=True, backend="cpu")

    with torch.no_grad():
        return {
            "channels": channels,
            "scan us": 1000 * median_ms(scan, "cpu", seconds=0.5),
            "conv us": 1000 * median_ms(conv, "cpu", seconds=0.5),
        }


# ---- the limit: exp2 and fused multiply-adds on vectors that never leave the registers


def ns_a_vector(fmas: int) -> float:
    """Nanoseconds of one thread for an exp2 and so many fused multiply-adds on sixteen numbers, the best of several."""

    @njit
    def in_registers(repeats, out):  # type: ignore[no-untyped-def]
        a, b, c, d = splat(0.1), splat(0.2), splat(0.3), splat(0.4)
        total = splat(0.0)
        for _ in range(repeats):
            a, b, c, d = a - 1e-6, b - 1e-6, c - 1e-6, d - 1e-6
            p, q, r, s = exp2(a), exp2(b), exp2(c), exp2(d)
            for _ in range(fmas - 1):
                p, q, r, s = fma(p, a, 1.0), fma(q, b, 1.0), fma(r, c, 1.0), fma(s, d, 1.0)
            total = fma(p, q, fma(r, s, total))
        store(out, total)

    out, repeats = torch.empty(16), 200_000
    in_registers(10, out.data_ptr())
    return min(once_ms(lambda: in_registers(repeats, out.data_ptr())) for _ in range(9)) * 1e6 / (4 * repeats)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", help="write the rows as JSON here")
    parser.add_argument("--threads", type=int, help="threads of torch and of the kernels (default: torch's)")
    parser.add_argument("--quick", action="store_true", help="without the backward of the peers")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    peers = importable_peers()
    rows = [row for shape in SHAPES for row in scan_rows(shape, peers, options.quick)]
    print_table(rows, f"selective scan, float32, state {STATE}, {torch.get_num_threads()} threads, milliseconds")
    convs = [conv_row(shape) for shape in SHAPES]
    print_table(convs, "causal_conv1d with SiLU, float32, width 4, milliseconds")
    steps = [decode_row(channels) for channels in DECODE_CHANNELS]
    print_table(steps, "one step of one sequence with its state, microseconds a call")
    kinds = (("scan", rows), ("conv", convs), ("step", steps))
    write_json(options.out, "cpu", [{"op": op, **row} for op, group in kinds for row in group])


if __name__ == "__main__":
    main()
