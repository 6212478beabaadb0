"""The selective scan, written as its definition: one step at a time, autograd for the gradients.

Every other backend is held to this one in float64. It is slow on purpose; nothing calls it but tests, `doctor` and
`backend="reference"`.
"""

import torch
from torch import Tensor


def selective_scan_reference(
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
    """y and the final state in the precision of the widest input; B, C are (batch, length, groups, state).

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = (C_t . h_t + D x_t) silu(z_t)   (Mamba, eq. 2 with the
    discretisation of section 3.6). A reset at t zeroes what h_t receives from its predecessor in time; with `reverse`
    time runs from the last position to the first and the same document borders are cut.
    """
    batch, length, channels = x.shape
    groups, state = B.shape[2], B.shape[3]
    dtype = torch.promote_types(torch.promote_types(x.dtype, A.dtype), torch.float32)
    real = dtype
    x, dt, B, C = (v.to(real) for v in (x, dt, B, C))
    A = A.to(real)
    if dt_bias is not None:
        dt = dt + dt_bias.to(real)
    if dt_softplus:
        dt = torch.nn.functional.softplus(dt)
    B, C = (v.repeat_interleave(channels // groups, dim=2) for v in (B, C))  # (batch, length, channels, state)
    h = x.new_zeros(batch, channels, state) if initial_state is None else initial_state.to(real)
    keep = carried_over(resets, batch, length, reverse, x)
    ys: list[Tensor] = [x.new_zeros(0)] * length
    steps = list(zip(*(v.unbind(1) for v in (x, dt, B, C, keep)), strict=True))  # indexing's backward is quadratic
    for t in reversed(range(length)) if reverse else range(length):
        x_t, dt_t, B_t, C_t, keep_t = steps[t]
        h = torch.exp(dt_t[..., None] * A) * keep_t[:, None, None] * h + (dt_t * x_t)[..., None] * B_t
        ys[t] = (h * C_t).sum(-1)
    y = torch.stack(ys, 1)
    if D is not None:
        y = y + D.to(real) * x
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(real))
    if reverse and resets is not None:  # what leaves position 0 would enter the document before it
        h = h * (~resets[:, 0].bool())[:, None, None]
    return y, h


def carried_over(resets: Tensor | None, batch: int, length: int, reverse: bool, like: Tensor) -> Tensor:
    """(batch, length) of ones and zeros: whether step t takes over the state of the step that runs before it."""
    if resets is None:
        return like.new_ones(batch, length)
    starts = resets.to(like.dtype)
    if reverse:  # t + 1 runs before t, and they belong to one document unless t + 1 begins one
        starts = torch.nn.functional.pad(starts[:, 1:], (0, 1))
    return 1 - starts
