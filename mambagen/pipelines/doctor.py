"""What this machine offers, and whether the kernels on it compute what they should.

Every backend of every op that runs here is held, forward and backward, to the float64 reference on random inputs.
"""

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from mambagen import __version__
from mambagen.errors import UsageError
from mambagen.kernels import causal_conv1d, selective_scan
from mambagen.kernels.dispatch import choose_backend

PACKAGES = ("torch", "triton", "numba", "numpy", "safetensors", "pysam", "biopython", "matplotlib", "tensorboard")
BACKENDS = ("cuda", "triton", "cpu")
DEFAULT_SHAPES = ((2, 130, 64), (1, 1, 32), (3, 17, 96))
LARGEST = 1 << 26  # batch * length * channels * state: the reference keeps some float64 values for each

# The error allowed, relative to the largest value of the reference. float32 sums over long sequences lose a few digits;
# bfloat16 inputs are the same for both sides, so what is left is the rounding of the output (2^-9) and of gradients.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}

KINDS = (("cpu", torch.float32), ("cuda:0", torch.float32), ("cuda:0", torch.bfloat16))

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Backend:
    """Where a backend of an op runs on this machine, or why it does not."""

    op: str
    backend: str
    device: str | None
    reason: str


@dataclass(frozen=True)
class Check:
    """One backend of one op on one device: the largest errors, or why it does not take this shape."""

    op: str
    backend: str
    device: str
    dtype: str
    shape: str
    forward_error: float | None
    backward_error: float | None
    tolerance: float
    result: str  # PASS, FAIL, or "-" where it cannot be
    note: str


def versions() -> dict[str, str]:
    """Name -> version of what matters to a report of a fault."""
    found = {"mambagen": __version__, "python": platform.python_version(), "system": platform.platform(terse=True)}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["CUDA of torch"] = torch.version.cuda or "none (a CPU build)"
    return found


def devices() -> dict[str, str]:
    """Name -> description of the processors that torch can use."""
    found = {"cpu": f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in use{_memory()}"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        capability = f"compute capability {facts.major}.{facts.minor}"
        found[f"cuda:{index}"] = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {capability}"
    return found


def backends() -> list[Backend]:
    """Every backend of every op."""
    found = []
    for op in OPS:
        for name in BACKENDS:
            interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
            device = "cpu" if name == "cpu" or interpreted else "cuda:0"
            if device != "cpu" and not torch.cuda.is_available():
                found.append(Backend(op, name, None, _no_gpu()))
                continue
            reason = _reason(op, name, torch.zeros(1, 1, 32, device=device), 16)
            found.append(Backend(op, name, None if reason else device, reason or ""))
    return found


def check_kernels(shapes: Sequence[Shape] = DEFAULT_SHAPES, state: int = 16) -> Iterator[Check]:
    """Run the self-test of the backends that run here at shapes (batch, length, channels), one result at a time.

    Raises:
        UsageError: a shape is too large for the reference.
    """
    for shape in shapes:
        elements = shape[0] * shape[1] * shape[2] * state
        if min(shape) < 1 or not 1 <= state <= 256 or elements > LARGEST:
            raise UsageError(
                f"--shapes {_name(shape)} with --state {state}: every size must be at least 1, the state at most 256, "
                f"and their product at most {LARGEST:,}, as the float64 reference keeps every state"
            )
    here = [backend for backend in backends() if backend.device]
    for op, draw in OPS.items():
        for shape in shapes:
            for device, dtype in KINDS:
                names = [each.backend for each in here if each.op == op and each.device == device]
                if not names:
                    continue
                inputs = {name: _put(value, device, dtype) for name, value in draw(shape, state).items()}
                exact = run(op, "reference", {name: value.double() for name, value in inputs.items()})
                for name in names:
                    yield _check(op, name, device, dtype, shape, inputs, exact, _reason(op, name, inputs["x"], state))


def run(op: str, backend: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The output, the final state and the gradient of every input, by name."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    if op == "selective_scan":
        y, final = selective_scan(**leaves, dt_softplus=True, return_final_state=True, backend=backend)  # type: ignore[arg-type]
    else:
        y, final = causal_conv1d(**leaves, activation="silu", return_final_state=True, backend=backend)  # type: ignore[arg-type]
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).cos().view(y.shape)
    loss = (y.double() * weights).sum() + final.double().sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y.detach(), "final": final.detach()} | dict(zip(leaves, gradients, strict=True))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest value of the reference; infinity where something is not finite."""
    if found.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def _check(
    op: str,
    backend: str,
    device: str,
    dtype: torch.dtype,
    shape: Shape,
    inputs: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    reason: str | None,
) -> Check:
    facts = (op, backend, device, str(dtype).removeprefix("torch."), _name(shape))
    tolerance = TOLERANCE[dtype]
    if reason is not None:
        return Check(*facts, None, None, tolerance, "-", reason)
    try:
        found = run(op, backend, inputs)
    except Exception as error:  # whatever a kernel raises is what the user came to see
        text = " ".join(str(error).split())[:200]
        return Check(*facts, None, None, tolerance, "FAIL", f"{type(error).__name__}: {text}")
    errors = {name: relative_error(value, exact[name]) for name, value in found.items()}
    forward = max(errors.pop("y"), errors.pop("final"))
    worst = max(errors, key=lambda name: errors[name])
    passed = forward <= tolerance and errors[worst] <= tolerance
    note = "" if errors[worst] <= tolerance else f"the gradient of {worst} is the worst"
    return Check(*facts, forward, errors[worst], tolerance, "PASS" if passed else "FAIL", note)


def _scan_inputs(shape: Shape, state: int) -> dict[str, Tensor]:
    """Inputs as a Mamba layer has them."""
    batch, length, channels = shape
    make = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=make)

    return {
        "x": normal(batch, length, channels),
        "dt": 0.5 * normal(batch, length, channels),
        "A": -torch.arange(1, state + 1).expand(channels, state) * torch.exp(0.1 * normal(channels, 1)),
        "B": normal(batch, length, state),
        "C": normal(batch, length, state),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "dt_bias": normal(channels) - 4,
        "initial_state": normal(batch, channels, state),
    }


def _conv_inputs(shape: Shape, state: int, width: int = 4) -> dict[str, Tensor]:
    batch, length, channels = shape
    make = torch.Generator().manual_seed(0)
    sizes = {
        "x": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial_state": (batch, width - 1, channels),
    }
    return {name: torch.randn(size, generator=make) for name, size in sizes.items()}


OPS: dict[str, Callable[[Shape, int], dict[str, Tensor]]] = {
    "selective_scan": _scan_inputs,
    "causal_conv1d": _conv_inputs,
}


def _put(value: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """On the device; what has the size of the sequence in the dtype, parameters and states in float32."""
    return value.to(device=device, dtype=dtype if value.dim() == 3 else torch.float32)


def _no_gpu() -> str:
    return "torch sees no CUDA device" if torch.version.cuda else "this build of torch is for the CPU only"


def _reason(op: str, backend: str, x: Tensor, state: int) -> str | None:
    """Why a backend cannot run this, or None."""
    facts: dict[str, Any] = {"width": 4}
    if op == "selective_scan":
        facts = {"state": state, "groups": 1, "channels": x.shape[2]}
    try:
        choose_backend(op, backend, x, **facts)
    except ValueError as error:
        return str(error).split("cannot run this: ", 1)[-1]
    return None


def _name(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        return f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, ValueError, OSError):
        return ""
