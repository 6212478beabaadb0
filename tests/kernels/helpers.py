"""Random cases for the kernels, one forward and backward through any backend, and the distance from the reference.

Every backend's tests draw their cases here, so that all of them are held to the same float64 reference:

    case = draw_scan(seed=0, batch=2, length=17, channels=24, state=16, gate=True)
    assert_close(run_scan(case, "cpu"), run_scan(case, "reference"), 1e-5)
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from mambagen.kernels import causal_conv1d, selective_scan

Case = dict[str, Any]
Result = dict[str, Tensor]

# What a rounded output alone may be off by: half a unit in the last place of the input's dtype.
ROUNDING = {torch.float32: 6e-8, torch.bfloat16: 2**-9, torch.float16: 2**-12}


def draw_scan(
    seed: int = 0,
    batch: int = 2,
    length: int = 17,
    channels: int = 24,
    state: int = 16,
    groups: int = 1,
    *,
    skip: bool = True,
    gate: bool = True,
    bias: bool = True,
    softplus: bool = True,
    initial: bool = True,
    resets: float | None = None,
    reverse: bool = False,
    dtype: torch.dtype = torch.float32,
    strided: bool = False,
    device: str = "cpu",
) -> Case:
    """Keyword arguments for `selective_scan`, drawn as a Mamba layer would see them.

    `resets` is the share of positions that begin a document. `strided` makes x and z the halves of one projection, dt,
    B and C slices of wider rows.
    """
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float32)

    def put(value: Tensor) -> Tensor:
        return value.to(device=device, dtype=dtype)

    width = 2 * channels if strided else channels
    x_z = put(normal(batch, length, 2 * channels))
    dt_row = normal(batch, length, width) * 0.5
    if not softplus:
        dt_row = torch.nn.functional.softplus(dt_row - 3)
    B_C = put(normal(batch, length, 2 * groups * state))
    x, z = x_z[..., :channels], x_z[..., channels:]
    B, C = (v.unflatten(2, (groups, state)) for v in (B_C[..., : groups * state], B_C[..., groups * state :]))
    dt = put(dt_row)[..., width - channels :]
    if not strided:
        x, z, B, C = (v.contiguous() for v in (x, z, B, C))
    case: Case = {
        "x": x,
        "dt": dt,
        "A": -torch.arange(1, state + 1).float().expand(channels, state).contiguous() * (1 + 0.1 * normal(channels, 1)),
        "B": B,
        "C": C,
        "D": normal(channels) if skip else None,
        "z": z if gate else None,
        # without a softplus a negative step would make the state grow without bound
        "dt_bias": (normal(channels) - 4 if softplus else normal(channels).abs() * 0.05) if bias else None,
        "dt_softplus": softplus,
        "initial_state": normal(batch, channels, state) if initial else None,
        "resets": None if resets is None else torch.rand(batch, length, generator=make) < resets,
        "reverse": reverse,
    }
    for name in ("A", "D", "dt_bias", "initial_state", "resets"):
        if case[name] is not None:
            case[name] = case[name].to(device)
    return case


def draw_conv(
    seed: int = 0,
    batch: int = 2,
    length: int = 17,
    channels: int = 24,
    width: int = 4,
    *,
    bias: bool = True,
    activation: str | None = "silu",
    initial: bool = True,
    resets: float | None = None,
    reverse: bool = False,
    dtype: torch.dtype = torch.float32,
    strided: bool = False,
    device: str = "cpu",
) -> Case:
    """Keyword arguments for `causal_conv1d`; `strided` makes x the first half of a wider projection."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float32)

    row = normal(batch, length, 2 * channels).to(device=device, dtype=dtype)
    x = row[..., :channels]
    case: Case = {
        "x": x if strided else x.contiguous(),
        "weight": normal(channels, width) * width**-0.5,
        "bias": normal(channels) if bias else None,
        "activation": activation,
        "initial_state": normal(batch, width - 1, channels).to(dtype) if initial else None,
        "resets": None if resets is None else torch.rand(batch, length, generator=make) < resets,
        "reverse": reverse,
    }
    for name in ("weight", "bias", "initial_state", "resets"):
        if case[name] is not None:
            case[name] = case[name].to(device)
    return case


def run_scan(case: Mapping[str, Any], backend: str, *, seed: int = 1, backward: bool = True) -> Result:
    """y, final_state and every gradient, by name (`dA`, `dinitial_state`, ...); "reference" runs in float64."""
    return _run(selective_scan, case, backend, seed, backward)


def run_conv(case: Mapping[str, Any], backend: str, *, seed: int = 1, backward: bool = True) -> Result:
    """As `run_scan`, for `causal_conv1d`."""
    return _run(causal_conv1d, case, backend, seed, backward)


def _run(op: Callable[..., Any], case: Mapping[str, Any], backend: str, seed: int, backward: bool) -> Result:
    exact = backend == "reference"
    arguments: Case = {}
    leaves: dict[str, Tensor] = {}
    for name, value in case.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            # detach keeps the strides, so the backend meets the rows as they were drawn
            value = (value.double() if exact else value.detach()).requires_grad_(backward)
            leaves[name] = value
        arguments[name] = value
    y, final = op(**arguments, return_final_state=True, backend=backend)
    result = {"y": y.detach(), "final_state": final.detach()}
    if backward:
        make = torch.Generator().manual_seed(seed)
        # cotangents are rounded to the dtype of the case, so that the reference starts from the same ones
        rounded = case["x"].dtype
        dy = torch.randn(y.shape, generator=make).to(rounded).to(y)
        dfinal = torch.randn(final.shape, generator=make).to(rounded).to(final)
        gradients = torch.autograd.grad([y, final], list(leaves.values()), [dy, dfinal], allow_unused=True)
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            result["d" + name] = torch.zeros_like(leaf) if gradient is None else gradient
    return result


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """The larger of two: the error's norm over the norm, and the worst element over the largest; NaN counts as inf."""
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    assert ours.shape == exact.shape, f"{tuple(ours.shape)} is not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return 0.0
    if not torch.isfinite(ours).all():
        return float("inf")
    away = ours - exact
    tiny = 1e-30
    by_norm = away.norm() / exact.norm().clamp_min(tiny)
    by_largest = away.abs().max() / exact.abs().max().clamp_min(tiny)
    return max(by_norm.item(), by_largest.item())


def errors(ours: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """`relative_error` by name; both sides must hold the same names."""
    assert ours.keys() == exact.keys()
    return {name: relative_error(ours[name], exact[name]) for name in ours}


def assert_close(ours: Mapping[str, Tensor], exact: Mapping[str, Tensor], tolerance: float) -> None:
    """Every output and gradient within the tolerance of the reference, each allowed the rounding of its own dtype."""
    found = errors(ours, exact)
    allowed = {name: tolerance + 2 * ROUNDING.get(ours[name].dtype, 0.0) for name in found}
    bad = {name: f"{error:.2e} > {allowed[name]:.2e}" for name, error in found.items() if not error <= allowed[name]}
    assert not bad, bad


def part(case: Case, timed: Collection[str], begin: int, end: int, **other: Any) -> Case:
    """A stretch of a case: its `timed` arguments, (batch, length, ...), cut, and some exchanged for `other`."""
    cut = {k: v[:, begin:end] if k in timed and v is not None else v for k, v in case.items()}
    return {**cut, **other}
