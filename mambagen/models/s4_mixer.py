"""The S4 mixer: a diagonal-plus-low-rank system on every channel, GELU, a gated projection (arXiv 2111.00396).

Code name -> the paper's symbol, with N = d_state complex states, each standing for a conjugate pair:

    log_dt                        Δ = exp(log_dt), (ssms,)
    log_Lambda_real, Lambda_imag  Λ = -(1e-4 + exp(log_Lambda_real)) + i Lambda_imag, (ssms, N)
    P, B, C                       (ssms, N, 2) real and imaginary: A = diag(Λ) - P P*; Λ, P, B (1, ...) if shared
    D                             the skip, (channels,)

A begins as HiPPO-LegS. Λ on the left and the low-rank part subtracted, no step can make the state longer, whatever an
optimiser does. `S4` is the system alone and keeps the contract of a mixer, as does `S4Mixer` around it.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mambagen.kernels.s4 import s4, s4_step
from mambagen.models.hippo import dplr_legs
from mambagen.models.s4d_mixer import (
    LEAST_DECAY,
    GatedSsm,
    S4State,
    SsmConfig,
    log_uniform,
    slow_parameter,
    wide,
    zero_state,
)


class S4Config(SsmConfig):
    """What determines the weights of an S4 mixer; impossible values raise pydantic.ValidationError."""

    kernel: Literal["powers", "cauchy"] = "powers"  # how the convolution's kernel is computed; the numbers are the same
    share_system: bool = False  # one Λ, P and B for all systems, each with its own dt and C (as SaShiMi)


class S4(nn.Module):
    """Diagonal-plus-low-rank systems over (batch, length, d_model), each on its channels; with the skip.

    First values: Λ, P and B of HiPPO-LegS, C complex normal of variance 1, D 1, dt log-uniform in [dt_min, dt_max]. dt,
    Λ, P and B learn at `lr_scale` of the rate, and none of the parameters is decayed.
    """

    def __init__(self, config: S4Config) -> None:
        super().__init__()
        ssms, N, slow = config.ssms, config.d_state, config.lr_scale
        self.config = config
        self.backend: str = config.kernel
        self.log_dt = slow_parameter(torch.empty(ssms), slow)
        own = 1 if config.share_system else ssms
        self.log_Lambda_real = slow_parameter(torch.empty(own, N), slow)
        self.Lambda_imag = slow_parameter(torch.empty(own, N), slow)
        self.P = slow_parameter(torch.empty(own, N, 2), slow)
        self.B = slow_parameter(torch.empty(own, N, 2), slow)
        self.C = slow_parameter(torch.empty(ssms, N, 2), 1.0)
        self.D = nn.Parameter(torch.empty(config.d_model))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all parameters anew from torch's global generator, on the CPU."""
        if self.C.is_meta:
            return  # there is nothing to draw into; parameters are being counted
        config = self.config
        Lambda, P, B = (torch.from_numpy(v) for v in dplr_legs(config.d_state)[:3])
        self.log_dt.copy_(log_uniform(config.ssms, config.dt_min, config.dt_max))
        self.log_Lambda_real.copy_(torch.log(-Lambda.real - LEAST_DECAY).expand(self.log_Lambda_real.shape))
        self.Lambda_imag.copy_(Lambda.imag.expand(self.Lambda_imag.shape))
        self.P.copy_(torch.view_as_real(P).expand(self.P.shape))
        self.B.copy_(torch.view_as_real(B).expand(self.B.shape))
        self.C.copy_(torch.randn(self.C.shape, device="cpu") * math.sqrt(0.5))
        self.D.fill_(1.0)

    def system(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """dt (ssms,), Lambda, P, B and C (ssms, N), D (d_model,), as `mambagen.kernels.s4` takes them."""
        real = -(LEAST_DECAY + torch.exp(wide(self.log_Lambda_real)))
        P, B, C = (torch.complex(*wide(v).unbind(-1)) for v in (self.P, self.B, self.C))
        Lambda, P, B = (v.expand(C.shape) for v in (torch.complex(real, wide(self.Lambda_imag)), P, B))
        return torch.exp(wide(self.log_dt)), Lambda, P, B, C, wide(self.D)

    def forward(
        self, x: Tensor, state: S4State | None = None, resets: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, S4State | None]:
        """Run a stretch of a sequence; see `S4DMixer.forward`. With `reverse` time runs from the last position."""
        y = s4(
            x,
            *self.system(),
            initial_state=None if state is None else state.complex,
            resets=resets,
            reverse=reverse,
            return_final_state=state is not None,
            backend=self.backend,
        )
        return (y[0], S4State.of(y[1])) if isinstance(y, tuple) else (y, None)

    def step(self, x: Tensor, state: S4State) -> tuple[Tensor, S4State]:
        """One position: x (batch, d_model) -> y (batch, d_model) and the new state."""
        y, h = s4_step(x, state.complex, *self.system())
        return y, S4State.of(h)

    def allocate_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> S4State:
        """The state before the first position: zeros, float32 or, where `dtype` (or the weights') is that, float64."""
        return zero_state(self.C, batch, self.config, device, dtype)


class S4Mixer(GatedSsm):
    """The layer around `S4`."""

    def __init__(self, config: S4Config) -> None:
        super().__init__(S4(config), config.d_model)
        self.config = config
