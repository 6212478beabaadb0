"""The Mamba mixer: projection, causal convolution, selective scan, gate, projection (arXiv 2312.00752, figure 3).

Code name -> the paper's symbol; D, E, N, R are d_model, d_inner, d_state and dt_rank:

    x, z         the two halves of in_proj's output, (batch, length, E) each: the signal and its gate
    dt           Δ, the step size of each channel at each step, softplus(dt_proj(...) + bias)
    A            A = -exp(A_log), (E, N)
    B, C         B_t and C_t, (batch, length, N): selected by the input through x_proj
    D            the skip, (E,) (a parameter; not the width of the model)
    state.ssm    h_t, (batch, E, N)

A mixer maps a sequence to a sequence: `forward(x, state, resets) -> (y, state)`, `step(x_t, state) -> (y_t, state)`,
`allocate_state(batch)`. The whole sequence, chunks with a carried state, and single steps give the same numbers.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambagen.kernels import causal_conv1d, selective_scan
from mambagen.models.config import MambaConfig
from mambagen.models.initialisation import init_weights


class MambaState(NamedTuple):
    """What one layer carries from one stretch of a sequence to the next; nothing is changed in place."""

    conv: Tensor  # (batch, d_conv - 1, E): the last inputs of the convolution, oldest first
    ssm: Tensor  # (batch, E, N) float32: h after the last step


class MixerWeights(NamedTuple):
    """The parameters of one mixer as plain tensors, in the order in which they are used."""

    in_proj: Tensor  # (2E, D)
    conv_weight: Tensor  # (E, 1, d_conv)
    conv_bias: Tensor  # (E,)
    x_proj: Tensor  # (R + 2N, E)
    dt_proj: Tensor  # (E, R)
    dt_bias: Tensor  # (E,)
    A_log: Tensor  # (E, N)
    D: Tensor  # (E,)
    out_proj: Tensor  # (D, E)


class MambaMixer(nn.Module):
    """One Mamba mixer over (batch, length, d_model); initialised as published (see `init_weights`)."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        E, N, R = config.d_inner, config.d_state, config.rank
        self.config = config
        self.backend = "auto"  # of the two kernels; benchmarks and tests set another
        self.in_proj = nn.Linear(config.d_model, 2 * E, bias=False)
        self.conv1d = nn.Conv1d(E, E, config.d_conv, groups=E)  # only its weights are used: (E, 1, d_conv) and (E,)
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, E)
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.D = nn.Parameter(torch.empty(E))
        self.out_proj = nn.Linear(E, config.d_model, bias=False)
        init_weights(self, config)

    def weights(self) -> MixerWeights:
        """The parameters, for the functions below."""
        conv_bias = self.conv1d.bias
        assert conv_bias is not None
        return MixerWeights(
            self.in_proj.weight,
            self.conv1d.weight,
            conv_bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            self.A_log,
            self.D,
            self.out_proj.weight,
        )

    def forward(
        self, x: Tensor, state: MambaState | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, MambaState | None]:
        """Mix a stretch of a sequence.

        Args:
            x: (batch, length, d_model).
            state: what the stretch before left, or `allocate_state` at the start; None where none is to be carried.
            resets: (batch, length) bool, True where a packed document begins: nothing flows across.

        Returns:
            y like x, and the new state (None where none was given: training then pays nothing for it).
        """
        return mamba_mixer_forward(x, self.weights(), state, resets, self.backend)

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """One position: x (batch, d_model) -> y (batch, d_model) and the new state."""
        return mamba_mixer_step(x, self.weights(), state)

    def allocate_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MambaState:
        """The state before the first position: zeros. `dtype` is the convolution's (default: the weights')."""
        config, weight = self.config, self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        conv = torch.zeros(batch, config.d_conv - 1, config.d_inner, device=device, dtype=dtype)
        ssm = torch.zeros(batch, config.d_inner, config.d_state, device=device, dtype=_wide(dtype))
        return MambaState(conv, ssm)


def mamba_mixer_forward(
    x: Tensor,
    weights: MixerWeights,
    state: MambaState | None = None,
    resets: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MambaState | None]:
    """`MambaMixer.forward` as a function of plain tensors, so that a fused operation can stand in for it.

    Nothing is copied on the way: x and z are the strided halves of in_proj's output, B and C are slices of x_proj's;
    softplus, the bias of dt and the gate are done inside the scan. Under autocast the projections and the scan's
    inputs are in the low precision; A, D, the biases and h stay in float32.
    """
    x, z = F.linear(x, weights.in_proj).chunk(2, dim=-1)
    y, after = convolve_and_scan(x, z, weights, state, resets, backend=backend)
    return F.linear(y, weights.out_proj), after


def convolve_and_scan(
    x: Tensor,
    z: Tensor,
    weights: MixerWeights,
    state: MambaState | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, MambaState | None]:
    """What is between in_proj and out_proj: signal x and gate z (batch, length, E) -> y like x, and the state.

    With `reverse` time runs from the last position to the first; in_proj and out_proj of the weights are not used.
    """
    w = weights
    rank, d_state = w.dt_proj.shape[1], w.A_log.shape[1]
    streams = state is not None
    convolved = causal_conv1d(
        x,
        w.conv_weight.squeeze(1),
        w.conv_bias,
        "silu",
        initial_state=None if state is None else state.conv,
        resets=resets,
        reverse=reverse,
        return_final_state=streams,
        backend=backend,
    )
    x, conv_state = convolved if isinstance(convolved, tuple) else (convolved, None)
    low, B, C = F.linear(x, w.x_proj).split([rank, d_state, d_state], dim=-1)
    scanned = selective_scan(
        x,
        F.linear(low, w.dt_proj),
        -torch.exp(_wide_tensor(w.A_log)),
        B,
        C,
        _wide_tensor(w.D),
        z=z,
        dt_bias=_wide_tensor(w.dt_bias),
        dt_softplus=True,
        initial_state=None if state is None else state.ssm,
        resets=resets,
        reverse=reverse,
        return_final_state=streams,
        backend=backend,
    )
    y, ssm_state = scanned if isinstance(scanned, tuple) else (scanned, None)
    after = None if conv_state is None or ssm_state is None else MambaState(conv_state, ssm_state)
    return y, after


def mamba_mixer_step(x: Tensor, weights: MixerWeights, state: MambaState) -> tuple[Tensor, MambaState]:
    """`MambaMixer.step` as a function of plain tensors: the recurrence itself, (batch, d_model) -> (batch, d_model)."""
    w = weights
    rank, d_state = w.dt_proj.shape[1], w.A_log.shape[1]
    x, z = F.linear(x, w.in_proj).chunk(2, dim=-1)
    low_precision = x.dtype
    window = torch.cat([state.conv.to(low_precision), x[:, None]], dim=1)  # (batch, d_conv, E)
    taps = _wide_tensor(w.conv_weight).squeeze(1).T  # (d_conv, E); the last meets the present
    x = F.silu((window * taps).sum(1) + w.conv_bias).to(low_precision)
    low, B, C = F.linear(x, w.x_proj).split([rank, d_state, d_state], dim=-1)
    dt = F.softplus(_wide_tensor(F.linear(low, w.dt_proj)) + w.dt_bias)  # (batch, E)
    decay = torch.exp(dt[..., None] * -torch.exp(_wide_tensor(w.A_log)))
    h = decay * state.ssm + (dt * x)[..., None] * B[:, None]
    y = (h * C[:, None]).sum(-1) + w.D * x
    y = (y * F.silu(_wide_tensor(z))).to(low_precision)
    return F.linear(y, w.out_proj), MambaState(window[:, 1:], h)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wide_tensor(v: Tensor) -> Tensor:
    """The tensor in float32 at least (float64 stays)."""
    return v.to(_wide(v.dtype))
