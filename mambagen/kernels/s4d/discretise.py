"""From the continuous diagonal system to one step of it, in float64: there are few numbers, and they are raised to
high powers, so that an error in them grows with the length."""

import torch
from torch import Tensor

DISCRETISATIONS = ("zoh", "bilinear")
SMALLEST = 1e-150  # of |1 + dt A / 2|: the bilinear step forgets everything where dt A = -2, and has no logarithm


def discretise(dt: Tensor, A: Tensor, method: str = "zoh") -> tuple[Tensor, Tensor]:
    """One step of h' = A h + x with step size dt, as (log of A-bar, B-bar for B = 1).

    Args:
        dt: (ssms,) real. A: (ssms, state), real or complex.
        method: "zoh" (A-bar = exp(dt A), B-bar = (A-bar - 1) / A) or "bilinear" (A-bar = (1 + dt A / 2) /
            (1 - dt A / 2), B-bar = dt / (1 - dt A / 2)); S4D, arXiv 2206.11893, section 3.1.

    Returns:
        Two (ssms, state) complex128 tensors; the powers of A-bar are exp(t log A-bar).
    """
    if method not in DISCRETISATIONS:
        raise ValueError(f"s4d: discretisation is {method!r}; it must be one of {', '.join(DISCRETISATIONS)}")
    dt = dt.double()[:, None]
    step = dt * A.to(torch.complex128)
    if method == "zoh":
        # (exp(s) - 1) / s by its series where s is tiny (A may be 0); elsewhere the difference keeps 12 digits or more
        tiny = step.abs() < 1e-4
        safe = torch.where(tiny, torch.ones_like(step), step)
        growth = torch.where(tiny, 1 + step / 2 * (1 + step / 3), (torch.exp(safe) - 1) / safe)
        return step, dt * growth
    above, below = 1 + step / 2, 1 - step / 2
    above = torch.where(above.abs() < SMALLEST, torch.full_like(above, SMALLEST), above)
    return torch.log(above) - torch.log(below), dt / below
