"""The published initialisation of Mamba's weights, in one table."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mambagen.models.config import MambaConfig


@torch.no_grad()
def init_weights(module: nn.Module, config: MambaConfig, generator: torch.Generator | None = None) -> None:
    """Draw every parameter of a Mamba mixer, block, stack or language model anew, as the published code does.

    | parameter        | drawn from                                                                              |
    |------------------|-----------------------------------------------------------------------------------------|
    | embedding        | normal, deviation 0.02 (the tied head is the same tensor)                               |
    | norms            | 1                                                                                       |
    | in_proj          | uniform in ±D^-1/2                                                                      |
    | conv1d           | weight and bias uniform in ±d_conv^-1/2                                                 |
    | x_proj           | uniform in ±E^-1/2                                                                      |
    | dt_proj          | weight uniform in ±R^-1/2; bias such that softplus(bias) is log-uniform in [dt_min, dt_max] |
    | A_log            | log(1), ..., log(N) in every channel (S4D-real)                                         |
    | D                | 1                                                                                       |
    | out_proj         | uniform in ±E^-1/2, divided by sqrt(n_layer): the residual stream's sum keeps its size  |
    | lm_head (untied) | uniform in ±D^-1/2                                                                      |

    Numbers are drawn on the CPU in the order of `named_parameters` (from `generator`, or torch's global one), so that
    a seed gives the same weights on every device. A parameter that is not in the table raises ValueError.
    """

    def uniform(bound: float) -> Callable[[Tensor], Tensor]:
        return lambda p: torch.empty(p.shape, device="cpu").uniform_(-bound, bound, generator=generator)

    def normal(deviation: float) -> Callable[[Tensor], Tensor]:
        return lambda p: torch.empty(p.shape, device="cpu").normal_(0, deviation, generator=generator)

    def ones(p: Tensor) -> Tensor:
        return torch.ones(p.shape, device="cpu")

    def dt_bias(p: Tensor) -> Tensor:
        log_dt = uniform(1)(p) * (math.log(config.dt_max) - math.log(config.dt_min)) / 2
        dt = torch.exp(log_dt + (math.log(config.dt_max) + math.log(config.dt_min)) / 2)
        return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus

    def s4d_real(p: Tensor) -> Tensor:
        return torch.log(torch.arange(1, p.shape[1] + 1, dtype=torch.float32, device="cpu")).expand(p.shape)

    D, E = config.d_model, config.d_inner
    table = {
        "embedding.weight": normal(0.02),
        "norm.weight": ones,
        "norm_f.weight": ones,
        "in_proj.weight": uniform(D**-0.5),
        "conv1d.weight": uniform(config.d_conv**-0.5),
        "conv1d.bias": uniform(config.d_conv**-0.5),
        "x_proj.weight": uniform(E**-0.5),
        "dt_proj.weight": uniform(config.rank**-0.5),
        "dt_proj.bias": dt_bias,
        "A_log": s4d_real,
        "D": ones,
        "out_proj.weight": uniform(E**-0.5 / config.n_layer**0.5),
        "lm_head.weight": uniform(D**-0.5),
    }
    for name, parameter in module.named_parameters():
        draw = table.get(".".join(name.split(".")[-2:])) or table.get(name.split(".")[-1])
        if draw is None:
            raise ValueError(f"init_weights: no rule for the parameter {name!r}")
        parameter.copy_(draw(parameter))
