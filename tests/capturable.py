"""CUDA graphs without a GPU: what they may not hold, and the functions that they would be made of."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mambagen.kernels.unet_decode import graph

# values that come to the host, or sizes that hang on them; values that come from it
FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "multinomial", "lift_fresh")


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in FORBIDDEN, f"{func} cannot be captured"
        if name.startswith("index"):
            places = args[1] if isinstance(args[1], list | tuple) else []
            assert all(v is None or v.dtype != torch.bool for v in places), f"{func} by a mask cannot be captured"
        return func(*args, **(kwargs or {}))


def assert_capturable(run: Callable[[], object]) -> None:
    """The function runs without an operation that waits for the device, or copies from the host."""
    with _Watch():
        run()


def run_uncaptured(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Functions that would be captured run as they are, once to set up and then at every replay; they are listed."""
    made: list[Callable[[], None]] = []

    def run_now(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        run()
        made.append(run)
        return run

    monkeypatch.setattr(graph, "capture", run_now)
    return made
