"""The causal depthwise convolution, written as its definition; every backend is held to this one in float64."""

import torch
from torch import Tensor


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """y and the last width - 1 inputs, in the order in which they were seen (oldest first).

    y_t = act(bias + sum_k weight[:, width-1-k] x_{t-k}); taps that reach back over the start of t's document are zero.
    With `reverse` the same with t+k for t-k: time runs from the last position to the first.
    """
    batch, length, channels = x.shape
    width = weight.shape[1]
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    x, weight = x.to(dtype), weight.to(dtype)
    past = x.new_zeros(batch, width - 1, channels) if initial_state is None else initial_state.to(dtype)
    document = torch.zeros(batch, length, dtype=torch.long, device=x.device)
    if resets is not None:
        document = resets.long().cumsum(1)
    if reverse:
        x, document = x.flip(1), document.flip(1)
        before = document[:, :1].expand(batch, width - 1)  # what comes after the last position belongs to its document
        leaving = document[:, -1] - (0 if resets is None else resets[:, 0].long())
    else:
        before = torch.zeros(batch, width - 1, dtype=torch.long, device=x.device)
        leaving = document[:, -1]
    seen = torch.cat([past, x], 1)
    owner = torch.cat([before, document], 1)
    y = x.new_zeros(batch, length, channels)
    for k in range(width):
        tap = slice(width - 1 - k, width - 1 - k + length)
        same = (owner[:, tap] == document).to(dtype)[..., None]
        y = y + weight[:, width - 1 - k] * seen[:, tap] * same
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = torch.nn.functional.silu(y)
    final = seen[:, length:] * (owner[:, length:] == leaving[:, None]).to(dtype)[..., None]
    return (y.flip(1) if reverse else y), final
