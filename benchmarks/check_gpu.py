"""Check the GPU kernels against float64 on thousands of random calls, then time them.

    python -m benchmarks.check_gpu [--backend triton|cuda|cpu] [--seconds 120] [--workers N] [--seed S] [--huge]
    python -m benchmarks.check_gpu --backend triton --only scan:1234:5678    one case again, as a failure printed it

Workers run side by side because compiling takes longer than checking; each draws options (dtype, state size, which
arguments there are, resets, direction, groups, strides) and for each several shapes. Outputs start as NaN, every call
is made twice and must repeat bit for bit, and y, the final state and every gradient are compared with float64: the
recurrence solved by doubling, itself compared with the step-at-a-time reference first. Exit code 1 if anything is off.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

from mambagen.kernels import causal_conv1d, selective_scan
from mambagen.kernels.causal_conv1d.reference import causal_conv1d_reference
from mambagen.kernels.dispatch import backend_module, choose_backend
from mambagen.kernels.selective_scan.reference import carried_over, selective_scan_reference
from tests.kernels.helpers import draw_conv, draw_scan

Case = dict[str, Any]
Result = dict[str, Tensor]

SHAPES_A_DRAW = 12  # shapes that share their options, so that one compilation serves them
TOLERANCE = 1e-5  # what float32 arithmetic may be off by, in the norm of a tensor
DTYPES = (torch.float32, torch.bfloat16, torch.bfloat16, torch.float16)


def scan_float64(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The scan in log2(length) whole-sequence steps of recursive doubling: exact in float64, and differentiable."""
    batch, length, channels = x.shape
    dt = dt if dt_bias is None else dt + dt_bias
    dt = softplus(dt) if dt_softplus else dt
    B, C = (v.repeat_interleave(channels // v.shape[2], 2) for v in (B, C))
    keep = carried_over(resets, batch, length, reverse, x)[..., None, None]
    a = torch.exp(dt[..., None] * A) * keep
    h = (dt * x)[..., None] * B
    if reverse:
        a, h = a.flip(1), h.flip(1)
    if initial_state is not None:
        h = torch.cat([h[:, :1] + a[:, :1] * initial_state[:, None], h[:, 1:]], 1)
    span = 1
    while span < length:  # h_t now sums the last `span` steps, and a_t is the decay over them
        h = h + a * pad(h, (0, 0, 0, 0, span, 0))[:, :length]
        a = a * pad(a, (0, 0, 0, 0, span, 0))[:, :length]
        span *= 2
    final = h[:, -1]
    if reverse:
        h = h.flip(1)
        if resets is not None:
            final = final * (~resets[:, 0])[:, None, None]
    y = (h * C).sum(-1)
    y = y if D is None else y + D * x
    return (y if z is None else y * silu(z)), final


def draw_options(op: str, dice: random.Random) -> Case:
    """Everything about a call but its shape."""
    options: Case = {
        "dtype": dice.choice(DTYPES),
        "reverse": dice.random() < 0.3,
        "strided": dice.random() < 0.5,
        "bias": dice.random() < 0.7,
        "initial": dice.random() < 0.5,
        "resets": dice.choice((None, None, 0.01, 0.3)),
    }
    if op == "conv":
        return options | {"width": dice.choice((4, 4, 4, 3, 2, 1, 5, 8)), "activation": dice.choice(("silu", None))}
    state = dice.choice((16,) * 8 + (1, 2, 3, 4, 8, 20, 32, 64, 100, 128, 256))
    switches = {name: dice.random() < 0.7 for name in ("skip", "gate", "softplus")}
    return options | switches | {"state": state, "groups": dice.choice((1, 1, 1, 2, 3))}


def draw_shape(op: str, options: Case, dice: random.Random) -> Case:
    """Batch, length and channels: mostly small and odd, sometimes long."""
    groups, state = options.get("groups", 1), options.get("state", 1)
    length = dice.choice((1, 2, 3, dice.randint(4, 40), dice.randint(41, 200), dice.randint(200, 1500)))
    if dice.random() < 0.08:
        length = dice.randint(1500, 12000)
    channels = groups * dice.choice((16, 16, 32, 48, 64, dice.randint(1, 40)))
    if op == "conv":
        channels = dice.choice((8, 64, 128, 200, 256, 512, dice.randint(1, 600)))
    batch = dice.choice((1, 1, 2, 3, 5))
    most = 2**22  # elements with state: 32 MiB in float64, some 40 times that with what autograd keeps
    while batch * length * channels * state > most and (batch > 1 or length > 200):
        batch, length = max(1, batch // 2), max(200, length // 2) if length > 200 else length
    return {"batch": batch, "length": length, "channels": channels}


def device_of(backend: str) -> str:
    return "cpu" if backend == "cpu" else "cuda"


def draw_case(op: str, options_seed: int, shape_seed: int, device: str) -> tuple[Case, Case]:
    """A case as helpers draw it, and what was drawn, both a function of two seeds."""
    options = draw_options(op, random.Random(options_seed))
    drawn = options | draw_shape(op, options, random.Random(shape_seed))
    make = draw_scan if op == "scan" else draw_conv
    return make(seed=shape_seed, **drawn, device=device), drawn


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def results(run: Callable[..., tuple[Tensor, Tensor]], case: Case, exact: bool) -> Result:
    """y, final_state and all gradients of a call, for cotangents that are the same for every run of a case."""
    arguments: Case = {}
    leaves: Result = {}
    for name, value in case.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = (value.double() if exact else value.detach()).requires_grad_()
            leaves[name] = value
        arguments[name] = value
    y, final = run(**arguments)
    device, rounded = case["x"].device, case["x"].dtype
    make = torch.Generator(device).manual_seed(1)
    cotangents = [torch.randn(v.shape, generator=make, device=device).to(rounded).to(v) for v in (y, final)]
    gradients = torch.autograd.grad([y, final], list(leaves.values()), cotangents, allow_unused=True)
    found = {"y": y.detach(), "final_state": final.detach()}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        found["d" + name] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def allowed_error(exact: Tensor, dtype: torch.dtype) -> float:
    """The largest relative error (norm) that a result of float32 arithmetic, rounded once to `dtype`, may have.

    For one element half a unit in the last place is 2^-8 (bfloat16) or 2^-11 (float16) of a value just above a power
    of two and half as much of one just below the next. In the norm of many elements about 0.43 of 2^-8 is left, more
    where a few large ones carry the norm, and which they are differs from case to case. So rounding is not bounded but
    measured on the exact values themselves. To it comes twice the arithmetic's error d: w = v + d rounds to what is
    nearest to w, so |round(w) - v| <= |round(w) - w| + |d| <= |round(v) - w| + |d| <= |round(v) - v| + 2 |d|.
    """
    # the sum of few terms may cancel, a large tensor's norm does not
    arithmetic = TOLERANCE * max(1.0, 10 / max(1, exact.numel()) ** 0.5)
    if dtype == torch.float32:
        return arithmetic  # its own rounding, 6e-8, is lost in this
    rounding = (exact.to(dtype).double() - exact).norm() / exact.norm().clamp_min(1e-30)
    return min(rounding.item(), 1.0) + 2 * arithmetic  # a value beyond float16 makes the first infinite


def check(op: str, case: Case, backend: str) -> tuple[dict[str, float], list[str]]:
    """Errors by tensor, and what is wrong in words."""
    ours_of = selective_scan if op == "scan" else causal_conv1d
    exact_of = scan_float64 if op == "scan" else causal_conv1d_reference

    def run(**arguments: Any) -> tuple[Tensor, Tensor]:
        return ours_of(**arguments, return_final_state=True, backend=backend)  # type: ignore[return-value]

    with poisoned():
        first, second = results(run, case, exact=False), results(run, case, exact=False)
    exact = results(exact_of, case, exact=True)
    found, wrong = {}, []
    for name, ours in first.items():
        if not torch.equal(ours, second[name]):
            wrong.append(f"{name} does not repeat")
        error = (ours.double() - exact[name]).norm() / exact[name].norm().clamp_min(1e-30)
        found[name] = error.item() if ours.numel() and torch.isfinite(ours).all() else float(ours.numel() and "inf")
        allowed = allowed_error(exact[name], ours.dtype)
        if not found[name] <= allowed:
            wrong.append(f"{name} is off by {found[name]:.1e}, allowed {allowed:.1e}")
    return found, wrong


def work(op_of: Callable[[random.Random], str], seed: int, seconds: float, backend: str) -> None:
    """One worker: draw and check until time is up, a line of JSON a case."""
    dice = random.Random(seed)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        op, options_seed = op_of(dice), dice.randrange(2**31)
        for _ in range(SHAPES_A_DRAW):
            shape_seed = dice.randrange(2**31)
            report_case(op, options_seed, shape_seed, backend)
            if time.monotonic() > end:
                break


def report_case(op: str, options_seed: int, shape_seed: int, backend: str) -> bool:
    """Check one case and print its line; whether it is right."""
    case, drawn = draw_case(op, options_seed, shape_seed, device_of(backend))
    drawn["dtype"] = str(drawn["dtype"]).removeprefix("torch.")
    line: Case = {"case": f"{op}:{options_seed}:{shape_seed}", "drawn": drawn, "op": op}
    facts = {name: drawn[name] for name in (("state", "groups", "channels") if op == "scan" else ("width",))}
    try:
        choose_backend("selective_scan" if op == "scan" else "causal_conv1d", backend, case["x"], **facts)
    except ValueError as cannot:
        print(json.dumps(line | {"skipped": str(cannot)}), flush=True)
        return True
    try:
        found, wrong = check(op, case, backend)
    except Exception as failure:  # a launch that failed is a finding like any other
        found, wrong = {}, [f"{type(failure).__name__}: {str(failure)[:500]}"]
    print(json.dumps(line | {"errors": found, "wrong": wrong}), flush=True)
    if any("CUDA error" in what or "illegal" in what for what in wrong):
        raise SystemExit(1)  # nothing more can be run in this process
    return not wrong


def check_float64(device: str) -> None:
    """The doubling against the definition, both in float64."""
    for seed, options in enumerate(
        ({}, {"resets": 0.2, "groups": 2}, {"resets": 0.2, "reverse": True}, {"reverse": True, "length": 33})
    ):
        case = draw_scan(seed=seed, **options, device=device)  # type: ignore[arg-type]
        ours, exact = results(scan_float64, case, exact=True), results(selective_scan_reference, case, exact=True)
        for name, value in ours.items():
            assert (value - exact[name]).norm() <= 1e-12 * exact[name].norm(), f"scan_float64: {name} is wrong"


def run_workers(backend: str, seconds: float, workers: int, seed: int) -> list[Case]:
    """All lines of all workers."""
    command = [sys.executable, "-m", "benchmarks.check_gpu", "--backend", backend, "--seconds", str(seconds)]
    running = [
        subprocess.Popen([*command, "--worker", str(seed * 1000 + i)], stdout=subprocess.PIPE, text=True)
        for i in range(workers)
    ]
    lines = []
    for process in running:
        said, _ = process.communicate()
        lines += [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        if process.returncode:
            lines.append({"case": "a worker", "op": "-", "wrong": [f"ended with {process.returncode}"], "errors": {}})
    return lines


def summarise(lines: list[Case]) -> bool:
    """Print failures and the worst error of each tensor by dtype; whether all is right."""
    checked = [line for line in lines if "errors" in line]
    bad = [line for line in checked if line["wrong"]]
    for line in bad[:20]:
        print(f"WRONG {line['case']}: {'; '.join(line['wrong'])}\n      {line.get('drawn')}")
    for op in ("scan", "conv"):
        worst: dict[str, dict[str, float]] = {}
        for line in checked:
            if line["op"] == op and not line["wrong"]:
                by_dtype = worst.setdefault(line["drawn"]["dtype"], {})
                for name, error in line["errors"].items():
                    by_dtype[name] = max(by_dtype.get(name, 0.0), error)
        if worst:
            print(f"{op}: the largest relative error (norm) of each tensor")
            names = sorted({name for by_dtype in worst.values() for name in by_dtype})
            print(" " * 10 + "".join(f"{name:>16}" for name in names))
            for dtype, by_dtype in sorted(worst.items()):
                cells = (f"{by_dtype[name]:.1e}" if name in by_dtype else "-" for name in names)
                print(f"{dtype:10}" + "".join(f"{cell:>16}" for cell in cells))
    counts = Counter(line["op"] for line in checked)
    skipped = Counter(line["skipped"] for line in lines if "skipped" in line)
    print(f"checked {dict(counts)}, wrong {len(bad)}, not for this backend {sum(skipped.values())}")
    for reason, count in skipped.most_common(5):
        print(f"    {count:5}  {reason}")
    return bool(checked) and not bad


def check_huge(backend: str) -> bool:
    """More than 2^31 elements: the last row of a batch equals the same row alone, which has fewer."""
    batch, length, channels = 2, 2**19 + 37, 2**11 + 16
    make = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, device="cuda", dtype=torch.bfloat16)

    A = -torch.arange(1, 17, device="cuda").float().repeat(channels, 1)
    x = draw(batch, length, channels)
    rows = {"x": x, "dt": draw(batch, length, channels), "B": draw(batch, length, 16), "C": draw(batch, length, 16)}
    assert x.numel() > 2**31

    def run(rows: Result) -> Result:
        leaves = {name: v.detach().requires_grad_() for name, v in rows.items()}
        bias = torch.full((channels,), -4.0, device="cuda")
        y = selective_scan(A=A, **leaves, dt_bias=bias, dt_softplus=True, backend=backend)  # type: ignore[arg-type]
        assert isinstance(y, Tensor)
        gradients = torch.autograd.grad(y, list(leaves.values()), rows["x"])
        return {"y": y.detach()[-1], **{"d" + k: g[-1] for k, g in zip(leaves, gradients, strict=True)}}

    whole, alone = run(rows), run({name: v[-1:] for name, v in rows.items()})
    right = True
    for name, value in whole.items():
        error = ((value - alone[name]).float().norm() / alone[name].float().norm()).item()
        right &= error < 1e-3  # the two may be cut into segments differently
        print(f"{x.numel():,} elements: the last row's {name} is off by {error:.1e}")
    return right


def time_shapes(backend: str) -> None:
    """Milliseconds of the backend's own functions, without autograd and the dispatcher."""
    from benchmarks.common import median_ms
    from benchmarks.scan import CONV_SHAPES, SHAPES, draw

    print("scan, bfloat16, 16 states, ms: forward, forward that saves, backward")
    scan = backend_module("selective_scan", backend)
    for shape in SHAPES:
        t = draw(*shape)
        B, C = t["B"].unsqueeze(2), t["C"].unsqueeze(2)
        inputs = (t["x"], t["dt"], t["A"], B, C, t["D"], t["z"], t["dt_bias"], True, None, None, False)
        _, _, saved = scan.forward(*inputs, True)
        forward = median_ms(lambda inputs=inputs: scan.forward(*inputs, False))  # type: ignore[misc]
        saving = median_ms(lambda inputs=inputs: scan.forward(*inputs, True))  # type: ignore[misc]
        backward = median_ms(lambda inputs=inputs, saved=saved: scan.backward(inputs[0], None, *inputs, saved))  # type: ignore[misc]
        print(f"{shape!s:22} {forward:8.3f} {saving:8.3f} {backward:8.3f}", flush=True)
        del t, inputs, saved, B, C
        torch.cuda.empty_cache()
    if backend != "triton":
        return
    print("conv, bfloat16, width 4, SiLU, ms: forward, backward (and over the bytes at 4.27 TB/s)")
    conv = backend_module("causal_conv1d", backend)
    for shape in CONV_SHAPES:
        x = torch.randn(*shape, device="cuda").bfloat16()
        weights = torch.randn(shape[2], 4, device="cuda"), torch.randn(shape[2], device="cuda")
        call = (x, *weights, True, None, None, False)
        forward = median_ms(lambda call=call: conv.forward(*call))  # type: ignore[misc]
        backward = median_ms(lambda call=call: conv.backward(call[0], None, *call))  # type: ignore[misc]
        floor = x.numel() * 2 / 4.27e12 * 1e3
        print(f"{shape!s:22} {forward:8.3f} {backward:8.3f}   {forward / floor / 2:4.2f} {backward / floor / 3:4.2f}")


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="triton", choices=("triton", "cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to draw cases")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) * 3 // 4))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="OP:OPTIONS:SHAPE of a case that was printed")
    parser.add_argument("--huge", action="store_true", help="also more than 2^31 elements (takes some 50 GB)")
    parser.add_argument("--no-times", action="store_true", help="check only")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if device_of(options.backend) == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.check_gpu: needs a GPU")
    ops = ("scan", "scan", "scan", "conv")
    if options.worker is not None:
        work(lambda dice: dice.choice(ops), options.worker, options.seconds, options.backend)
        return
    if options.only:
        op, options_seed, shape_seed = options.only.split(":")
        raise SystemExit(not report_case(op, int(options_seed), int(shape_seed), options.backend))
    check_float64(device_of(options.backend))
    right = summarise(run_workers(options.backend, options.seconds, options.workers, options.seed))
    if options.huge:
        right &= check_huge(options.backend)
    if device_of(options.backend) == "cuda" and not options.no_times:
        time_shapes(options.backend)
    raise SystemExit(not right)


if __name__ == "__main__":
    main()
