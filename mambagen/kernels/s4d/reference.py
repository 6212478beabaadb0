"""S4D written as its definition: one step at a time, autograd for the gradients.

Everything else in this folder is held to this in float64. It is slow on purpose; nothing calls it but tests and
`backend="reference"`.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def s4d_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    discretisation: str = "zoh",
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """y (batch, length, channels) and the final state (batch, channels, state); shapes as `s4d`.

    h_t = Abar h_(t-1) + Bbar x_t;  y_t = 2 Re(C . h_t) + D x_t, with Abar and Bbar straight from the formulas.
    """
    channels = x.shape[2]
    real = torch.promote_types(x.dtype, torch.float32)
    wide = torch.complex128 if real == torch.float64 else torch.complex64
    each = channels // A.shape[0]
    dt, A, C = (v.repeat_interleave(each, 0) for v in (dt.to(real)[:, None], A.to(wide), C.to(wide)))
    if discretisation == "zoh":
        Abar = torch.exp(dt * A)
        Bbar = (Abar - 1) / A
    elif discretisation == "bilinear":
        Abar = (1 + dt * A / 2) / (1 - dt * A / 2)
        Bbar = dt / (1 - dt * A / 2)
    else:
        raise ValueError(f"s4d: discretisation is {discretisation!r}")
    x = x.to(real)
    return recurrence(x, lambda h, v: Abar * h + Bbar * v[..., None], C, D, initial_state, resets, reverse)


def recurrence(
    x: Tensor,
    advance: Callable[[Tensor, Tensor], Tensor],
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The loop over time that S4D and S4 share; `advance(h, x_t)` is the next h, (batch, channels, state) complex."""
    batch, length, channels = x.shape
    h = x.new_zeros(batch, channels, C.shape[1], dtype=C.dtype) if initial_state is None else initial_state.to(C.dtype)
    ys: list[Tensor] = [x.new_zeros(0)] * length
    for t in reversed(range(length)) if reverse else range(length):
        if resets is not None:
            border = t if not reverse else t + 1  # t + 1 runs before t; they belong together unless it begins one
            if border < length:
                h = h * ~resets[:, border, None, None].bool()
        h = advance(h, x[:, t])
        ys[t] = 2 * (C * h).sum(-1).real
    y = torch.stack(ys, 1)
    if D is not None:
        y = y + D.to(x.dtype) * x
    if reverse and resets is not None:  # what leaves position 0 would enter the document before it
        h = h * ~resets[:, 0, None, None].bool()
    return y, h
