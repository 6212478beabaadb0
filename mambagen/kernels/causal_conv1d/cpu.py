"""The CPU backend of the convolution: tensors taken apart for cpu_kernels.py, gradients put together."""

from math import ceil

import torch
from torch import Tensor

from mambagen.kernels.causal_conv1d.cpu_kernels import (
    CHANNELS_AT_ONCE,
    STEPS_AT_ONCE,
    P,
    R,
    backward_kernel,
    backward_scratch,
    forward_kernel,
    forward_scratch,
)
from mambagen.kernels.cpu_common import KINDS, address, rows

MAX_SPANS = 32  # pieces of a sequence in the backward: each keeps sums of its own for dweight and dbias


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    batch, length, channels = x.shape
    y = x.new_empty(x.shape)
    final = x.new_empty(batch, weight.shape[1] - 1, channels)
    taps = weight.flip(1).t().contiguous()
    parameters = _common(x, taps, bias, silu, initial_state, resets, reverse)
    spans = ceil(length / STEPS_AT_ONCE)
    parameters |= {P.SPANS: spans, P.SPAN: STEPS_AT_ONCE, P.FINAL: final.data_ptr(), **rows(R.Y, y, reverse)}
    forward_kernel.run(parameters, batch * spans * parameters[P.CHANNEL_BLOCKS], forward_scratch(), 4 * x.numel())
    return y, final


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> tuple[Tensor | None, ...]:
    batch, length, channels = x.shape
    width = weight.shape[1]
    taps = weight.flip(1).t().contiguous()
    parameters = _common(x, taps, bias, silu, initial_state, resets, reverse)
    # the cut into spans may depend on the shape alone, or the sums would change with the machine
    span = max(4, ceil(length / MAX_SPANS / STEPS_AT_ONCE)) * STEPS_AT_ONCE
    spans, blocks = ceil(length / span), parameters[P.CHANNEL_BLOCKS]
    dx = x.new_empty(x.shape)
    dinitial = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    sums = x.new_zeros(batch * spans, blocks, width + 1, CHANNELS_AT_ONCE, dtype=torch.float64)
    parameters |= {
        P.SPANS: spans,
        P.SPAN: span,
        P.DFINAL: address(dfinal),
        P.DPAST: address(dinitial),
        P.SUMS: sums.data_ptr(),
        **rows(R.DY, dy, reverse),
        **rows(R.DX, dx, reverse),
    }
    backward_kernel.run(parameters, batch * spans * blocks, backward_scratch(), 16 * x.numel())
    # by numpy, which adds in one order whatever the number of threads
    total = torch.from_numpy(sums.numpy().sum(0)).movedim(1, 0).flatten(1)[:, :channels].float()
    return dx, total[:width].t().flip(1).contiguous(), None if bias is None else total[width].clone(), dinitial


def _common(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> dict[int, int]:
    """The parameters that both directions share."""
    return {
        P.KIND: KINDS[x.dtype],
        P.SIZE: x.element_size(),
        P.LENGTH: x.shape[1],
        P.CHANNELS: x.shape[2],
        P.WIDTH: taps.shape[0],
        P.SILU: int(silu),
        P.LATE: int(reverse),
        P.CHANNEL_BLOCKS: ceil(x.shape[2] / CHANNELS_AT_ONCE),
        P.WEIGHT: taps.data_ptr(),
        P.BIAS: address(bias),
        P.PAST: address(initial_state),
        **rows(R.X, x, reverse),
        **rows(R.RESETS, resets, reverse),
    }
