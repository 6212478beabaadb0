"""A linear time-invariant state-space system run as a convolution: what S4D and S4 share.

The system itself is a few functions: its convolution, what a state adds to the outputs that follow it, and the state
that a stretch leaves. With them a stretch with a carried state is

    y = conv(x, kernel) + outputs of the carried state,    final = state left by x + what remains of the carried one

and packed documents are documents side by side: those of similar length are gathered into one batch (each padded to
less than twice its length), convolved, and put back. What is carried is masked: into the first document, out of the
last.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Convolution = Callable[[Tensor, bool], Tensor]  # x (batch, length, channels), reverse -> y, the skip included


class System(NamedTuple):
    """Functions of one discretised system; states are (batch, channels, state) complex."""

    convolution: Callable[[int], Convolution]  # longest -> the convolution with the kernel of x no longer than that
    outputs: Callable[[Tensor, int], Tensor]  # state, length -> (batch, length, channels): y where x is zero
    state_after: Callable[[Tensor], Tensor]  # x (batch, length, channels) -> the state after it, from zero
    remains: Callable[[Tensor, int], Tensor]  # state, length -> the state so many steps on, where x is zero


def run_as_convolution(
    system: System,
    x: Tensor,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y like x and the final state where it is asked for; arguments as in `s4d`."""
    length = x.shape[1]
    y = system.convolution(length)(x, reverse) if resets is None else _by_documents(system, x, resets, reverse)
    if initial_state is None and not return_final_state:
        return y, None
    into, out_of = _carried(resets, x, reverse)  # (batch, length): in the document that the state enters, or leaves
    if initial_state is not None:
        added = system.outputs(initial_state, length)
        if reverse:
            added = added.flip(1)
        y = (y + (added if into is None else added * into[..., None])).to(y.dtype)
    if not return_final_state:
        return y, None
    kept = x if out_of is None else x * out_of[..., None]
    final = system.state_after(kept.flip(1) if reverse else kept)
    if initial_state is not None:
        remains = system.remains(initial_state, length)
        if resets is not None:
            remains = remains * ~resets.any(1)[:, None, None]
        final = final + remains
    return y, final


def _carried(resets: Tensor | None, x: Tensor, reverse: bool) -> tuple[Tensor | None, Tensor | None]:
    if resets is None:
        return None, None
    seen = resets.cumsum(1)
    first, last = (seen == 0).to(x.dtype), (seen == seen[:, -1:]).to(x.dtype)
    # In reverse the state enters the last document and leaves the first, or nothing where that begins at position 0.
    return (last, first) if reverse else (first, last)


def _by_documents(system: System, x: Tensor, resets: Tensor, reverse: bool) -> Tensor:
    batch, length, channels = x.shape
    flags = resets.clone()
    flags[:, 0] = True
    starts = flags.flatten().nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_tensor([batch * length]))
    longest = int(lengths.max())
    convolve = system.convolution(longest)
    rows = x.reshape(batch * length, channels)
    y = torch.zeros_like(rows)
    upper = 1
    while True:
        chosen = (lengths <= upper) & (lengths > upper // 2)
        if bool(chosen.any()):
            width = min(upper, longest)
            steps = torch.arange(width, device=x.device)
            inside = steps < lengths[chosen, None]
            where = (starts[chosen, None] + steps)[inside]
            padded = x.new_zeros(*inside.shape, channels).masked_scatter(inside[..., None], rows[where])
            y = y.index_put((where,), convolve(padded, reverse)[inside])
        if upper >= longest:
            return y.view(batch, length, channels)
        upper *= 2
