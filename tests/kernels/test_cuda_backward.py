"""The CUDA backward of the scan against the float64 reference, in an emulator that needs no GPU."""

import pytest
import torch
from torch import Tensor

from mambagen.kernels import selective_scan
from mambagen.kernels.selective_scan import cuda
from tests.kernels.emulated_scan import emulated
from tests.kernels.emulator import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the emulator needs a C++ compiler on x86-64 Linux")
STATE, TILE = 16, cuda.SAVE_EVERY
NAMES = ("dx", "ddt", "dA", "dB", "dC", "dD", "dz", "ddt_bias", "dinitial_state")
# fp32: the rounding of sums. bfloat16: half a unit in the last place.
TOLERANCE = {torch.float32: dict.fromkeys(NAMES, 1e-6), torch.bfloat16: dict.fromkeys(NAMES, 2.2e-3)}
TOLERANCE[torch.bfloat16] |= dict.fromkeys(("dA", "dD", "dinitial_state", "ddt_bias"), 1e-6)


def saved_states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, options: dict) -> Tensor:
    """What the forward leaves: the state at the start of every tile, (batch, tiles, state, channels)."""
    length, states = x.shape[1], [options["initial_state"]]
    resets = options["resets"]
    for start in range(TILE, length, TILE):
        part = slice(length - start, length) if options["reverse"] else slice(0, start)
        cut = None if resets is None else resets[:, part]
        _, state = selective_scan(
            x[:, part], dt[:, part], A, B[:, part], C[:, part], dt_bias=options["dt_bias"], dt_softplus=True,
            initial_state=options["initial_state"], resets=cut, reverse=options["reverse"], return_final_state=True,
            backend="reference",
        )  # fmt: skip
        states.append(state)
    return torch.stack(states, 1).transpose(2, 3).float().contiguous()


@pytest.mark.parametrize(
    ("batch", "length", "channels", "groups", "dtype", "resets", "reverse", "gated"),
    [
        (1, 16, 64, 1, torch.bfloat16, False, False, True),
        (1, 37, 64, 1, torch.float32, False, True, True),
        (2, 50, 128, 2, torch.bfloat16, False, False, True),
        (1, 50, 32, 1, torch.float32, True, False, True),
        (1, 21, 16, 1, torch.float32, False, False, False),
    ],
    ids=["two tiles", "reverse", "groups", "resets", "no gate"],
)
def test_gradients_are_those_of_the_reference(
    batch: int, length: int, channels: int, groups: int, dtype: torch.dtype, resets: bool, reverse: bool, gated: bool
) -> None:
    torch.manual_seed(0)
    rows = (batch, length, channels)
    x, z, dy = (torch.randn(rows).to(dtype) for _ in range(3))
    dt = (0.5 * torch.randn(rows) - 2).to(dtype)
    B, C = (torch.randn(batch, length, groups, STATE).to(dtype) for _ in range(2))
    A, D, bias = -4 * torch.rand(channels, STATE) - 0.1, torch.randn(channels), 0.2 * torch.randn(channels)
    initial, dfinal = torch.randn(2, batch, channels, STATE)
    cut = torch.rand(batch, length) < 0.1 if resets else None

    leaves = [v.double().requires_grad_() for v in (x, dt, A, B, C, D, z, bias, initial)]
    wx, wdt, wA, wB, wC, wD, wz, wbias, winitial = leaves
    y, final = selective_scan(
        wx, wdt, wA, wB, wC, D=wD, z=wz if gated else None, dt_bias=wbias, dt_softplus=True, initial_state=winitial,
        resets=cut, reverse=reverse, return_final_state=True, backend="reference",
    )  # fmt: skip
    ((y * dy.double()).sum() + (final * dfinal.double()).sum()).backward()

    options = {"initial_state": initial.double(), "dt_bias": bias.double(), "resets": cut, "reverse": reverse}
    saved = saved_states(x.double(), dt.double(), A.double(), B.double(), C.double(), options)
    with emulated():
        found = cuda.backward(
            dy, dfinal, x, dt, A, B, C, D, z if gated else None, bias, True, initial, cut, reverse, saved
        )
    for which, gradient, leaf in zip(NAMES, found, leaves, strict=True):
        if gradient is None:
            assert which == "dz"
            assert not gated
            continue
        assert leaf.grad is not None
        error = float((gradient.double() - leaf.grad).norm() / leaf.grad.norm())
        assert error < TOLERANCE[dtype][which], which
