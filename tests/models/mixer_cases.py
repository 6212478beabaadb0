"""Every causal mixer that keeps the contract of mambagen.models: a new one adds its line to `CASES`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mambagen.models import MambaBlock, MambaConfig, MambaLM, MambaMixer, MambaStack
from mambagen.models.s4_mixer import S4, S4Config, S4Mixer
from mambagen.models.s4d_mixer import S4D, S4DConfig, S4DMixer

CONFIG = MambaConfig(d_model=16, n_layer=2, d_state=8)


@dataclass(frozen=True)
class Case:
    """How to build a mixer, and an input (batch, length, ...) for it."""

    build: Callable[[], nn.Module]
    draw: Callable[[int, int], Tensor]


def vectors(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, CONFIG.d_model)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (batch, length))


CASES = {
    "mamba mixer": Case(lambda: MambaMixer(CONFIG), vectors),
    "mamba mixer, width 1": Case(lambda: MambaMixer(CONFIG.model_copy(update={"d_conv": 1})), vectors),
    "mamba mixer, width 8": Case(lambda: MambaMixer(CONFIG.model_copy(update={"d_conv": 8})), vectors),
    "mamba block": Case(lambda: MambaBlock(CONFIG), vectors),
    "mamba stack": Case(lambda: MambaStack(CONFIG), tokens),
    "mamba language model": Case(lambda: MambaLM(CONFIG), tokens),
    "s4d, one system for all channels": Case(lambda: S4D(S4DConfig(d_model=16, d_state=4, n_ssm=1)), vectors),
    "s4d mixer": Case(lambda: S4DMixer(S4DConfig(d_model=16, d_state=4)), vectors),
    "s4d mixer, real": Case(lambda: S4DMixer(S4DConfig(d_model=16, d_state=4, n_ssm=4, init="real")), vectors),
    "s4, one system for all channels": Case(lambda: S4(S4Config(d_model=16, d_state=4, n_ssm=1)), vectors),
    "s4 mixer": Case(lambda: S4Mixer(S4Config(d_model=16, d_state=4, kernel="cauchy")), vectors),
}


def randomise(module: nn.Module) -> None:
    """Move every parameter off its first value, so that none is at a one or a zero which hides its use."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 + 0.2 * parameter.abs()))


def leaves(state: object) -> list[Tensor]:
    """The tensors of a state, however it nests."""
    if isinstance(state, Tensor):
        return [state]
    assert isinstance(state, tuple)
    return [leaf for part in state for leaf in leaves(part)]
