"""Sequence-length warmup: windows begin short and double until they have the context, the batch halving with it.

A step has the same number of tokens at every length, and the length is a function of the step alone, so a run that is
resumed passes through the same windows.
"""

from collections.abc import Sequence
from typing import NamedTuple

from mambagen.errors import UsageError


class Stage(NamedTuple):
    """Windows of ``context`` bases, ``rows`` a step, in the steps before ``end``."""

    context: int
    rows: int
    end: int


def length_stages(first: int, context: int, batch_tokens: int, steps: int, shares: Sequence[float] = ()) -> list[Stage]:
    """The stages from windows of ``first`` bases to windows of ``context``, by shares of the steps (default: alike).

    Raises UsageError where the context is no doubling of the first length, tokens do not divide, or shares do not fit.
    """
    doublings = max(0, (context // first).bit_length() - 1)
    if first << doublings != context or doublings < 1:
        raise UsageError(
            f"--length-warmup {first}: doubling it must lead to --context {context}, as 1024 leads to 8192"
        )
    if batch_tokens % context:
        raise UsageError(
            f"--batch-tokens {batch_tokens}: with --length-warmup it must be a multiple of --context {context}, "
            f"so that every step has as many tokens"
        )
    if shares and len(shares) != doublings + 1:
        raise UsageError(
            f"--length-shares has {len(shares)} numbers; from {first} to {context} there are {doublings + 1}"
        )
    weights = list(shares) or [1.0] * (doublings + 1)
    if min(weights) < 0 or weights[-1] <= 0:
        raise UsageError("--length-shares must not be negative, and the last, that of the context, must be above 0")
    total, sum_so_far, stages = sum(weights), 0.0, []
    for i, weight in enumerate(weights):
        sum_so_far += weight
        end = steps if i == doublings else round(steps * sum_so_far / total)
        length = first << i
        stages.append(Stage(length, batch_tokens // length, end))
    return stages
