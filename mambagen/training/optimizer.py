"""AdamW as the published Mamba recipes use it, and its state as named tensors."""

from typing import Any

import torch
from torch import Tensor, nn

from mambagen.errors import ModelError

BETAS = (0.9, 0.95)


def build_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW over `model.parameter_groups(weight_decay)`.

    A group may carry "lr_scale", by which `set_learning_rate` multiplies. The fused kernels exist for CUDA and for
    the CPU; both leave weights and moments alone when the tensor `optimizer.found_inf` is 1, which is how the loop
    holds an update back without asking the GPU first.
    """
    groups: list[dict[str, Any]] = model.parameter_groups(weight_decay)  # type: ignore[operator]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, weight_decay=weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as `PARAMETER.exp_avg`, `PARAMETER.exp_avg_sq` and `PARAMETER.step`."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value.detach()
    return tensors


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; ModelError where the tensors are another model's."""
    parameters = dict(model.named_parameters())
    state: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(".")
        parameter = parameters.get(name)
        if parameter is None or (key != "step" and value.shape != parameter.shape):
            raise ModelError(f"the optimiser's state {full_name} {tuple(value.shape)} is not this model's")
        state.setdefault(name, {})[key] = value.to(parameter.device)
    for name, values in state.items():
        optimizer.state[parameters[name]] = values
