"""The causal depthwise convolution of Mamba with its activation: `causal_conv1d`, registered under `mambagen::`.

Backends are modules beside this one with two plain functions on tensors, no autograd:

    forward(x, weight, bias, silu, initial_state, resets, reverse) -> (y, final_state)
    backward(dy, dfinal, x, weight, bias, silu, initial_state, resets, reverse)
        -> (dx, dweight, dbias | None, dinitial_state | None)

x, dy and the states share one dtype and have unit stride along channels, any strides before; weight (channels, width)
and bias are float32 and contiguous; `resets` is bool.
"""

import torch
from torch import Tensor

from mambagen.kernels.causal_conv1d.reference import causal_conv1d_reference
from mambagen.kernels.dispatch import backend_module, check_shape, choose_backend, entered_directly, is_plain_eager

__all__ = ["causal_conv1d", "causal_conv1d_reference"]

MAX_WIDTH = 8


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """A depthwise convolution that looks back only, y_t = act(bias + sum_k weight[:, width-1-k] x_{t-k}).

    Args:
        x: (batch, length, channels), float32, bfloat16 or float16 (float64 runs on the reference).
        weight: (channels, width), width 1 to 8; weight[:, -1] meets the present step (as torch.nn.Conv1d's).
        bias: (channels,). activation: None or "silu".
        initial_state: (batch, width - 1, channels): the inputs before the first step, oldest first (zeros if None).
        resets: (batch, length) bool: True where a packed document begins; taps do not reach over it.
        reverse: look ahead instead: time runs from the last position to the first.
        return_final_state: also give the last width - 1 inputs, oldest first, those of ended documents as zeros.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        y like x, or (y, final_state (batch, width - 1, channels) of x's dtype).

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend cannot run this call (the message says why).
    """
    op = "causal_conv1d"
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be a real (batch, length, channels) tensor, not {x.dtype} {tuple(x.shape)}")
    batch, length, channels = x.shape
    if weight.dim() != 2 or weight.shape[0] != channels or not 1 <= weight.shape[1] <= MAX_WIDTH:
        raise ValueError(
            f"{op}: weight must be (channels={channels}, width 1 to {MAX_WIDTH}), not {tuple(weight.shape)}"
        )
    width = weight.shape[1]
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation is {activation!r}; it must be None or 'silu'")
    check_shape(op, "bias", bias, (channels,), "(channels,)")
    check_shape(op, "initial_state", initial_state, (batch, width - 1, channels), "(batch, width - 1, channels)")
    check_shape(op, "resets", resets, (batch, length), "(batch, length)")
    if length == 0 or batch == 0:
        raise ValueError(f"{op}: x is empty: {tuple(x.shape)}")
    if resets is not None:
        resets = resets.bool()

    chosen = choose_backend(op, backend, x, width=width)
    if chosen == "reference":
        y, final = causal_conv1d_reference(x, weight, bias, activation, initial_state, resets, reverse)
        y, final = y.to(x.dtype), final.to(x.dtype)
    else:
        if x.stride(-1) != 1:
            x = x.contiguous()
        weight = weight.float().contiguous()
        bias = None if bias is None else bias.float().contiguous()
        past = None if initial_state is None else initial_state.to(x.dtype).contiguous()
        run = _direct if is_plain_eager(x, weight, bias, past) else _forward
        y, final = run(x, weight, bias, activation == "silu", past, resets, reverse, chosen)
    return (y, final) if return_final_state else y


@torch.library.custom_op("mambagen::causal_conv1d_forward", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = backend_module("causal_conv1d", backend).forward
    return run(x, weight, bias, silu, initial_state, resets, reverse)


@_forward.register_fake
def _(x, weight, bias, silu, initial_state, resets, reverse, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])


@torch.library.custom_op("mambagen::causal_conv1d_backward", mutates_args=())
def _backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward_now(dy, dfinal, x, weight, bias, silu, initial_state, resets, reverse, backend)


def _backward_now(dy, dfinal, *inputs):  # type: ignore[no-untyped-def]
    """The backend's backward; gradients of what was not given are empty tensors, as the registered op must return."""
    *rest, backend = inputs
    x, weight = inputs[:2]
    run = backend_module("causal_conv1d", backend).backward
    if dy is None:
        dy = torch.zeros_like(x)
    dy = dy.to(x.dtype)
    if dy.stride(-1) != 1:
        dy = dy.contiguous()
    if dfinal is not None:
        dfinal = dfinal.to(x.dtype).contiguous()
    return tuple(weight.new_empty(0) if g is None else g for g in run(dy, dfinal, *rest))


@_backward.register_fake
def _(dy, dfinal, x, weight, bias, silu, initial_state, resets, reverse, backend):  # type: ignore[no-untyped-def]
    none = weight.new_empty(0)
    return tuple(none if v is None else v.new_empty(v.shape) for v in (x, weight, bias, initial_state))


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, ctx.silu, initial_state, resets, ctx.reverse, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, initial_state, resets)


def _gradients(ctx, dy, dfinal, *, backward=None):  # type: ignore[no-untyped-def]
    x, weight, bias, initial_state, resets = ctx.saved_tensors
    dx, dweight, dbias, dinitial = (backward or _backward)(
        dy, dfinal, x, weight, bias, ctx.silu, initial_state, resets, ctx.reverse, ctx.backend
    )
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None,
        None if initial_state is None else dinitial,
        None,
        None,
        None,
    )


def _no_second_derivative(ctx, *_):  # type: ignore[no-untyped-def]
    raise RuntimeError("causal_conv1d has no second derivative; use backend='reference' (slow) where one is needed")


_forward.register_autograd(_gradients, setup_context=_setup)
_backward.register_autograd(_no_second_derivative, setup_context=lambda ctx, inputs, output: None)


def _forward_now(*inputs):  # type: ignore[no-untyped-def]
    return backend_module("causal_conv1d", inputs[-1]).forward(*inputs[:-1])


def _gradients_now(ctx, *gradients):  # type: ignore[no-untyped-def]
    # with create_graph=True the registered op runs, which refuses to be differentiated once more
    return _gradients(ctx, *gradients, backward=_backward if torch.is_grad_enabled() else _backward_now)


_direct = entered_directly(_forward_now, _setup, _gradients_now)
