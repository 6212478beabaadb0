"""Which parameters are decayed, and at what share of the learning rate: the groups an optimiser is given."""

from typing import Any

from torch import nn

# Parameters of two dimensions that are no matrices of a linear map: decay would pull A towards -1.
NEVER_DECAYED = ("A_log",)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for `torch.optim`: {"params", "names", "weight_decay", "lr_scale"}.

    Not decayed: A_log, and all that has fewer than two dimensions (D, biases, norms), as published; further any
    parameter with an attribute `_no_weight_decay = True`. A parameter's `_lr_scale` (1 where it has none) says by what
    the schedule's learning rate is multiplied. Tied parameters appear once; frozen ones do not appear.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = (
            parameter.ndim < 2 or name.split(".")[-1] in NEVER_DECAYED or getattr(parameter, "_no_weight_decay", False)
        )
        decay = 0.0 if exempt else weight_decay
        lr_scale = float(getattr(parameter, "_lr_scale", 1.0))
        group = groups.setdefault(
            (decay, lr_scale), {"params": [], "names": [], "weight_decay": decay, "lr_scale": lr_scale}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
