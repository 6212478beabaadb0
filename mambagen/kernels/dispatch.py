"""Which implementation of an op runs: the choice by device, and the checks that every op shares."""

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")


def backend_module(op: str, backend: str) -> ModuleType:
    """The module of an op's backend, imported when it is first used (Triton and numba are slow to import)."""
    return importlib.import_module(f"mambagen.kernels.{op}.{backend}")


def choose_backend(op: str, backend: str, x: Tensor, **facts: object) -> str:
    """The backend to run: the one that was asked for, or for "auto" the fastest that can do this call on x's device.

    A backend module may have `unsupported(x, **facts)`, which returns a reason in words or None.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if backend != "auto":
        if backend not in ("reference", "auto"):
            reason = _unsupported(op, backend, x, facts)
            if reason:
                raise ValueError(f"{op}: backend {backend!r} cannot run this: {reason}")
        return backend
    if x.dtype == torch.float64:
        return "reference"
    order = ("cuda", "triton") if x.is_cuda else ("cpu",)
    for name in order:
        if _unsupported(op, name, x, facts) is None:
            return name
    return "reference"


@torch.compiler.assume_constant_result
def _import_error(op: str, backend: str) -> str | None:
    """Why the backend's module cannot be imported, or None; a constant under torch.compile, which traces no imports."""
    try:
        backend_module(op, backend)
    except ImportError as error:
        return f"it cannot be imported here ({error})"
    return None


def _unsupported(op: str, backend: str, x: Tensor, facts: dict[str, object]) -> str | None:
    if backend == "cpu" and x.device.type != "cpu":
        return f"the tensors are on {x.device}"
    if backend == "triton" and not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton needs a GPU (or TRITON_INTERPRET=1, its slow interpreter)"
    if backend == "cuda" and not x.is_cuda:
        return f"the tensors are on {x.device}"
    if x.dtype == torch.float64:
        return "float64 runs on the reference only"
    reason = _import_error(op, backend)
    if reason is not None:
        return reason
    # from sys.modules, where torch.compile can guard it: functions of a module that is a constant it cannot call
    check = getattr(sys.modules[f"mambagen.kernels.{op}.{backend}"], "unsupported", None)
    return check(x, **facts) if check else None


def is_plain_eager(*tensors: Tensor | None) -> bool:
    """Whether autograd can be entered directly: nothing traces, fakes or transforms these tensors.

    An op registered with torch.library costs some 0.1 ms of Python a call; an autograd function a fifth of that.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack()
    ):
        return False
    return all(v is None or type(v) in (Tensor, torch.nn.Parameter) for v in tensors)


def entered_directly(
    forward: Callable[..., Any], setup: Callable[..., None], gradients: Callable[..., Any]
) -> Callable[..., Any]:
    """An op as an autograd function of its own, for calls that `is_plain_eager` allows past torch.library.

    Args:
        forward: (*inputs) -> output. setup: (ctx, inputs, output), as of `register_autograd`.
        gradients: (ctx, *gradients of the output) -> a gradient for each input.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *given: Any) -> Any:
            return gradients(ctx, *given)

    return Direct.apply


def check_shape(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    """ValueError unless the tensor, where given, has this shape."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape} {meaning}")


def triton_or_torch(
    op: str, backend: str, x: Tensor, name: str | None = None, more: tuple[str, ...] = (), **facts: object
) -> str:
    """The backend of an op that is either Triton kernels or what torch does anyway: "triton" or "torch".

    "auto" is Triton where x is on a GPU and the kernels can run; "triton" raises ValueError where they cannot. Without
    elements there is nothing to launch.

    Args:
        name: what errors call the op, where that is not its folder's name.
        more: other backends that the op has, for errors to name.
        facts: what the Triton module's `unsupported` asks for.
    """
    name = name or op
    if backend == "auto":
        return "triton" if x.is_cuda and x.numel() and _unsupported(op, "triton", x, facts) is None else "torch"
    if backend not in ("triton", "torch"):
        names = ", ".join(("auto", "triton", "torch", *more))
        raise ValueError(f"{name}: backend is {backend!r}; it must be one of {names}")
    if backend == "torch" or not x.numel():
        return "torch"
    reason = _unsupported(op, "triton", x, facts)
    if reason:
        raise ValueError(f"{name}: backend 'triton' cannot run this: {reason}")
    return "triton"
