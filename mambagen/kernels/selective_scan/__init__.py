"""The selective scan (S6) of Mamba: `selective_scan`, registered with torch.library under `mambagen::`.

Backends are modules beside this one with two plain functions on tensors, no autograd:

    forward(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, resets, reverse, save)
        -> (y, final_state, saved)
    backward(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, resets, reverse, saved)
        -> (dx, ddt, dA, dB, dC, dD | None, dz | None, ddt_bias | None, dinitial_state | None)

and `saved_shape(batch, length, channels, groups, state, x)`, the shape of the float32 tensor that forward leaves for
backward (`saved` is empty where `save` is false). B and C come as (batch, length, groups, state); x, dt, z, B and C
share one dtype and have unit stride along their last axis, any strides before it; A, D, dt_bias and states are float32
and contiguous; `resets` is bool.
"""

import torch
from torch import Tensor

from mambagen.kernels.dispatch import backend_module, check_shape, choose_backend, entered_directly, is_plain_eager
from mambagen.kernels.selective_scan.reference import selective_scan_reference

__all__ = ["selective_scan", "selective_scan_reference"]

MAX_STATE = 256


def selective_scan(
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
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective state-space scan, fused with its step-size softplus, skip and gate.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = (C_t . h_t + D x_t) silu(z_t)
    (Mamba, arXiv 2312.00752, section 3.2: A by zero-order hold, B by Euler.)

    Args:
        x: (batch, length, channels), float32, bfloat16 or float16 (float64 runs on the reference).
        dt: step sizes like x, before bias and softplus where those are given.
        A: (channels, state), real, float32; negative for a stable scan. 1 <= state <= 256.
        B, C: (batch, length, state), or (batch, length, groups, state) with groups dividing channels.
        D: (channels,) skip. z: gate like x. dt_bias: (channels,).
        dt_softplus: apply softplus to dt + dt_bias.
        initial_state: (batch, channels, state) float32: the state before the first step.
        resets: (batch, length) bool: True where a packed document begins; nothing flows across.
        reverse: run from the last position to the first, without copies.
        return_final_state: also give the state after the last step that ran, (batch, channels, state) float32.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        y like x, or (y, final_state). First derivatives of all tensor arguments but `resets`, the state included;
        asking for second ones is an error.

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend cannot run this call (the message says why).
    """
    op = "selective_scan"
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be a real (batch, length, channels) tensor, not {x.dtype} {tuple(x.shape)}")
    batch, length, channels = x.shape
    if A.dim() != 2 or A.shape[0] != channels or A.is_complex():
        raise ValueError(f"{op}: A must be real (channels={channels}, state), not {A.dtype} {tuple(A.shape)}")
    state = A.shape[1]
    if not 1 <= state <= MAX_STATE:
        raise ValueError(f"{op}: state size {state} is outside 1 to {MAX_STATE}")
    if B.dim() == 3:
        B = B.unsqueeze(2)
    if C.dim() == 3:
        C = C.unsqueeze(2)
    groups = B.shape[2]
    if groups < 1 or channels % groups:
        raise ValueError(f"{op}: {groups} groups in B do not divide {channels} channels")
    check_shape(op, "dt", dt, (batch, length, channels), "(like x)")
    check_shape(op, "z", z, (batch, length, channels), "(like x)")
    for name, tensor in (("B", B), ("C", C)):
        check_shape(op, name, tensor, (batch, length, groups, state), "(batch, length, groups, state)")
    for name, vector in (("D", D), ("dt_bias", dt_bias)):
        check_shape(op, name, vector, (channels,), "(channels,)")
    check_shape(op, "initial_state", initial_state, (batch, channels, state), "(batch, channels, state)")
    check_shape(op, "resets", resets, (batch, length), "(batch, length)")
    if length == 0 or batch == 0:
        raise ValueError(f"{op}: x is empty: {tuple(x.shape)}")
    if resets is not None:
        resets = resets.bool()

    chosen = choose_backend(op, backend, x, state=state, groups=groups, channels=channels)
    if chosen == "reference":
        y, final = selective_scan_reference(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, resets, reverse)
        y = y.to(x.dtype)
        return (y, final) if return_final_state else y

    dtype = x.dtype
    for other in (dt, B, C, z):
        if other is not None:
            dtype = torch.promote_types(dtype, other.dtype)
    given_dtype = x.dtype
    x, dt, B, C = (_rows(v.to(dtype)) for v in (x, dt, B, C))
    z = None if z is None else _rows(z.to(dtype))
    A = A.float().contiguous()
    D, dt_bias, initial_state = (None if v is None else v.float().contiguous() for v in (D, dt_bias, initial_state))
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    save = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)
    run = _direct if is_plain_eager(*tensors) else _forward
    y, final, _ = run(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, resets, reverse, save, chosen)
    y = y.to(given_dtype)
    return (y, final) if return_final_state else y


def _rows(v: Tensor) -> Tensor:
    """The tensor with unit stride along its last axis (and along the last two of B and C, so that a row is one run)."""
    fits = v.stride(-1) == 1 and (v.dim() == 3 or v.shape[2] == 1 or v.stride(2) == v.shape[3])
    return v if fits else v.contiguous()


@torch.library.custom_op("mambagen::selective_scan_forward", mutates_args=())
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = backend_module("selective_scan", backend).forward
    return run(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, resets, reverse, save)


@_forward.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, resets, reverse, save, backend):  # type: ignore[no-untyped-def]
    batch, length, channels = x.shape
    shape = backend_module("selective_scan", backend).saved_shape(batch, length, channels, B.shape[2], A.shape[1], x)
    return (
        x.new_empty(x.shape),
        A.new_empty(batch, channels, A.shape[1]),
        A.new_empty(shape if save else (0,)),
    )


@torch.library.custom_op("mambagen::selective_scan_backward", mutates_args=())
def _backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    saved: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _backward_now(
        dy, dfinal, x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, resets, reverse, saved, backend
    )  # fmt: skip


def _backward_now(dy, dfinal, *inputs):  # type: ignore[no-untyped-def]
    """The backend's backward; gradients of what was not given are empty tensors, as the registered op must return."""
    *rest, backend = inputs
    x, A = inputs[0], inputs[2]
    run = backend_module("selective_scan", backend).backward
    dy = torch.zeros_like(x) if dy is None else _rows(dy.to(x.dtype))
    if dfinal is not None:
        dfinal = dfinal.contiguous()
    grads = run(dy, dfinal, *rest)
    return tuple(A.new_empty(0) if g is None else g for g in grads)


@_backward.register_fake
def _(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, resets, reverse, saved, backend):  # type: ignore[no-untyped-def]
    none = A.new_empty(0)
    like = [none if v is None else v.new_empty(v.shape) for v in (x, dt, A, B, C, D, z, dt_bias, initial_state)]
    return tuple(like)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.dt_softplus, initial_state, resets, ctx.reverse, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, initial_state, resets, output[2])


def _gradients(ctx, dy, dfinal, _, *, backward=None):  # type: ignore[no-untyped-def]
    x, dt, A, B, C, D, z, dt_bias, initial_state, resets, saved = ctx.saved_tensors
    if saved.numel() == 0:
        raise RuntimeError("selective_scan: the forward ran without saving for a backward")
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial = (backward or _backward)(
        dy, dfinal, x, dt, A, B, C, D, z, dt_bias,
        ctx.dt_softplus, initial_state, resets, ctx.reverse, saved, ctx.backend,
    )  # fmt: skip

    def given(value: Tensor | None, gradient: Tensor) -> Tensor | None:
        return None if value is None else gradient

    return (
        dx, ddt, dA, dB, dC, given(D, dD), given(z, dz), given(dt_bias, ddt_bias),
        None, given(initial_state, dinitial), None, None, None, None,
    )  # fmt: skip


def _no_second_derivative(ctx, *_):  # type: ignore[no-untyped-def]
    raise RuntimeError("selective_scan has no second derivative; use backend='reference' (slow) where one is needed")


_forward.register_autograd(_gradients, setup_context=_setup)
_backward.register_autograd(_no_second_derivative, setup_context=lambda ctx, inputs, output: None)


def _forward_now(*inputs):  # type: ignore[no-untyped-def]
    return backend_module("selective_scan", inputs[-1]).forward(*inputs[:-1])


def _gradients_now(ctx, *gradients):  # type: ignore[no-untyped-def]
    # with create_graph=True the registered op runs, which refuses to be differentiated once more
    return _gradients(ctx, *gradients, backward=_backward if torch.is_grad_enabled() else _backward_now)


_direct = entered_directly(_forward_now, _setup, _gradients_now)
