"""The S4D mixer: a diagonal state-space system on every channel, GELU, a gated projection (arXiv 2206.11893).

Code name -> the paper's symbol, with N = d_state complex states, each standing for a conjugate pair:

    log_dt                   Δ = exp(log_dt), (ssms,)
    log_A_real, A_imag       A = -(1e-4 + exp(log_A_real)) + i A_imag, (ssms, N): never on the growing side
    C                        C, (ssms, N, 2) real and imaginary; B is 1, as it only ever meets C
    D                        the skip, (channels,)

`S4D` is the system alone and keeps the contract of a mixer, as does `S4DMixer` around it. In training it is a long
convolution; with a state it is that and what the state adds; `step` is the recurrence.
"""

import math
from typing import Annotated, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from mambagen.kernels.s4d import s4d, s4d_step
from mambagen.models.config import Count, Positive
from mambagen.models.hippo import s4d_spectrum

LEAST_DECAY = 1e-4  # -Re(A) is larger


class S4State(NamedTuple):
    """The state of an S4 or S4D system, (batch, channels, N) complex as two real tensors, float32 at least."""

    real: Tensor
    imag: Tensor

    @property
    def complex(self) -> Tensor:
        return torch.complex(self.real, self.imag)

    @classmethod
    def of(cls, h: Tensor) -> Self:
        return cls(h.real, h.imag)


class SsmConfig(BaseModel):
    """What S4D and S4 mixers have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    d_model: Count  # channels
    d_state: Annotated[int, Field(ge=1, le=1024)] = 32  # complex states a system: pairs, twice as many real ones
    n_ssm: Count | Literal["channels"] = "channels"  # systems; each serves d_model / n_ssm neighbouring channels
    dt_min: Positive = 1e-3  # step sizes begin log-uniform in [dt_min, dt_max]
    dt_max: Positive = 1e-1
    lr_scale: Positive = 0.1  # the learning rate of dt and A, as a share of the others'

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} is larger than dt_max {self.dt_max}")
        if self.d_model % self.ssms:
            raise ValueError(f"n_ssm {self.ssms} does not divide d_model {self.d_model}")
        return self

    @property
    def ssms(self) -> int:
        """`n_ssm` as a number."""
        return self.d_model if self.n_ssm == "channels" else self.n_ssm


class S4DConfig(SsmConfig):
    """What determines the weights of an S4D mixer; impossible values raise pydantic.ValidationError."""

    init: Literal["lin", "inv", "legs", "real"] = "legs"  # of A; see mambagen.models.hippo
    discretisation: Literal["zoh", "bilinear"] = "zoh"


class S4D(nn.Module):
    """Diagonal systems over (batch, length, d_model), each on its channels; with the skip, without projections.

    First values: A by `config.init`, C complex normal of variance 1, D 1, dt log-uniform in [dt_min, dt_max]. dt and A
    learn at `lr_scale` of the rate, and none of the parameters is decayed.
    """

    def __init__(self, config: S4DConfig) -> None:
        super().__init__()
        ssms, N = config.ssms, config.d_state
        self.config = config
        self.backend = "auto"
        self.log_dt = slow_parameter(torch.empty(ssms), config.lr_scale)
        self.log_A_real = slow_parameter(torch.empty(ssms, N), config.lr_scale)
        real = config.init == "real"
        self.A_imag = None if real else slow_parameter(torch.empty(ssms, N), config.lr_scale)
        self.C = slow_parameter(torch.empty(ssms, N, 1 if real else 2), 1.0)
        self.D = nn.Parameter(torch.empty(config.d_model))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all parameters anew from torch's global generator, on the CPU."""
        if self.C.is_meta:
            return  # there is nothing to draw into; parameters are being counted
        config = self.config
        A = torch.from_numpy(s4d_spectrum(config.init, config.d_state))
        self.log_dt.copy_(log_uniform(config.ssms, config.dt_min, config.dt_max))
        self.log_A_real.copy_(torch.log(-A.real - LEAST_DECAY).expand(self.log_A_real.shape))
        if self.A_imag is not None:
            self.A_imag.copy_(A.imag.expand(self.A_imag.shape))
        self.C.copy_(torch.randn(self.C.shape, device="cpu") * math.sqrt(1 / self.C.shape[-1]))
        self.D.fill_(1.0)

    def system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt (ssms,), A and C (ssms, N), D (d_model,), as `mambagen.kernels.s4d` takes them; float32 at least."""
        log_dt, log_A, C = (wide(v) for v in (self.log_dt, self.log_A_real, self.C))
        A_real = -(LEAST_DECAY + torch.exp(log_A))
        D = wide(self.D)
        if self.A_imag is None:
            return torch.exp(log_dt), A_real, C.squeeze(-1), D
        return torch.exp(log_dt), torch.complex(A_real, wide(self.A_imag)), torch.complex(*C.unbind(-1)), D

    def forward(
        self, x: Tensor, state: S4State | None = None, resets: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, S4State | None]:
        """Run a stretch of a sequence; see `S4DMixer.forward`. With `reverse` time runs from the last position."""
        dt, A, C, D = self.system()
        y = s4d(
            x, dt, A, C, D,
            discretisation=self.config.discretisation,
            initial_state=None if state is None else state.complex,
            resets=resets,
            reverse=reverse,
            return_final_state=state is not None,
            backend=self.backend,
        )  # fmt: skip
        return (y[0], S4State.of(y[1])) if isinstance(y, tuple) else (y, None)

    def step(self, x: Tensor, state: S4State) -> tuple[Tensor, S4State]:
        """One position: x (batch, d_model) -> y (batch, d_model) and the new state."""
        y, h = s4d_step(x, state.complex, *self.system(), discretisation=self.config.discretisation)
        return y, S4State.of(h)

    def allocate_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> S4State:
        """The state before the first position: zeros, float32 or, where `dtype` (or the weights') is that, float64."""
        return zero_state(self.C, batch, self.config, device, dtype)


class GatedSsm(nn.Module):
    """GLU(W gelu(ssm(x)) + b) over (batch, length, d_model): the S4 layer, without norm and residual."""

    def __init__(self, ssm: nn.Module, d_model: int) -> None:
        super().__init__()
        self.ssm = ssm
        self.out_proj = nn.Linear(d_model, 2 * d_model)

    def forward(
        self, x: Tensor, state: S4State | None = None, resets: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, S4State | None]:
        """Mix a stretch of a sequence.

        Args:
            x: (batch, length, d_model).
            state: what the stretch before left, or `allocate_state` at the start; None where none is to be carried.
            resets: (batch, length) bool, True where a packed document begins: nothing flows across.
            reverse: from the last position to the first.

        Returns:
            y like x, and the new state (None where none was given).
        """
        y, after = self.ssm(x, state, resets, reverse)
        return self.output(y), after

    def step(self, x: Tensor, state: S4State) -> tuple[Tensor, S4State]:
        """One position: x (batch, d_model) -> y (batch, d_model) and the new state."""
        y, after = self.ssm.step(x, state)  # type: ignore[operator]
        return self.output(y), after

    def allocate_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> S4State:
        """The state before the first position; see `S4D.allocate_state`."""
        state: S4State = self.ssm.allocate_state(batch, device, dtype)  # type: ignore[operator]
        return state

    def output(self, y: Tensor) -> Tensor:
        """The two halves of W gelu(y) + b, one times the logistic of the other."""
        return F.glu(self.out_proj(F.gelu(y, approximate="tanh")), dim=-1)


class S4DMixer(GatedSsm):
    """The layer around `S4D`."""

    def __init__(self, config: S4DConfig) -> None:
        super().__init__(S4D(config), config.d_model)
        self.config = config


def slow_parameter(value: Tensor, lr_scale: float) -> nn.Parameter:
    """A parameter that `parameter_groups` does not decay and gives its own share of the learning rate."""
    parameter = nn.Parameter(value)
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    parameter._lr_scale = lr_scale  # type: ignore[attr-defined]
    return parameter


def log_uniform(count: int, least: float, most: float) -> Tensor:
    """Logarithms of draws that are uniform in the logarithm, from torch's global generator."""
    return torch.empty(count, device="cpu").uniform_(math.log(least), math.log(most))


def zero_state(
    like: Tensor, batch: int, config: SsmConfig, device: torch.device | str | None, dtype: torch.dtype | None
) -> S4State:
    dtype = torch.promote_types(dtype or like.dtype, torch.float32)
    zeros = torch.zeros(batch, config.d_model, config.d_state, device=device or like.device, dtype=dtype)
    return S4State(zeros, zeros.clone())


def wide(v: Tensor) -> Tensor:
    """The tensor in float32 at least (float64 stays)."""
    return v.to(torch.promote_types(v.dtype, torch.float32))
