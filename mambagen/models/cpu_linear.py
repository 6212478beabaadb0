"""Matrix products of long inputs on a CPU by oneDNN, where torch would call MKL.

MKL leaves half of the speed of other makers' processors unused (measured on an AMD EPYC with AVX-512: 33 to 78 billion
operations a second and core, oneDNN 42 to 176). torch has the call for compiled models only.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LEAST_ROWS = 16


class OneDnnLinear(TorchFunctionMode):
    """While entered, `F.linear` of float32 on a CPU goes to oneDNN; not differentiable, so for use without gradients.

    with torch.no_grad(), OneDnnLinear():
        model(tokens)
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is F.linear and not kwargs and _fits(args[0]) and _available():
            x, weight, *bias = args
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias[0] if bias else None, "none", [], "")
        return function(*args, **(kwargs or {}))


def _fits(x: Tensor) -> bool:
    wanted = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() >= LEAST_ROWS * x.shape[-1]
    return wanted and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
