"""The other strand of DNA, for encoders: a sequence and its reverse complement are one molecule.

A model f is made exactly equivariant by reading both strands with the same weights and joining what it says of them:

    g(x) = (f(x) + turn(f(RC x))) / 2        turn: positions in reverse and, for logits over bases, A with T, C with G

Then g(RC x) = turn(g(x)) by construction, whatever f is. For an encoder without a head this is the parameter sharing
of Caduceus-PS (arXiv 2403.03234), whose two strands also meet in the head only. It costs two passes of f.

The complement is given as a permutation of the token ids, (vocabulary,), so that nothing here knows an alphabet; as a
tensor on the device where it is used, no copy holds up a GPU.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Complement = Tensor | Sequence[int]


def reverse_complement(tokens: Tensor, mask: Tensor | None, complement: Complement) -> Tensor:
    """The other strand of ids (batch, length), 5' to 3'; padding stays where it is.

    Args:
        mask: (batch, length) bool, true in one run of real positions a row; None where all are real.
        complement: the complement of each id.
    """
    table = torch.as_tensor(complement, device=tokens.device)
    return turn(table[tokens.int()].to(tokens.dtype), mask)


def turn(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (batch, length, ...) with the real positions of each row in reverse; padding stays where it is."""
    if mask is None:
        return x.flip(1)
    positions = torch.arange(x.shape[1], device=x.device).expand(mask.shape)
    first = mask.int().argmax(1, keepdim=True)
    last = first + mask.sum(1, keepdim=True) - 1
    source = torch.where(mask, first + last - positions, positions)
    return x.gather(1, source.view(*source.shape, *[1] * (x.dim() - 2)).expand(x.shape))


def both_strands(
    f: Callable[[Tensor, Tensor | None], Tensor], tokens: Tensor, mask: Tensor | None, complement: Complement
) -> tuple[Tensor, Tensor]:
    """f(x) and f(RC x), each (batch, ...), in one pass of twice the rows."""
    two = torch.cat([tokens, reverse_complement(tokens, mask, complement)])
    here, there = f(two, None if mask is None else torch.cat([mask, mask])).chunk(2)
    return here, there


def rc_average(
    f: Callable[[Tensor, Tensor | None], Tensor],
    tokens: Tensor,
    mask: Tensor | None,
    complement: Complement,
    per_position: bool,
) -> Tensor:
    """(f(x) + turn(f(RC x))) / 2: averaging at inference for any f, and what the equivariant mode computes.

    Args:
        f: (tokens, mask) -> (batch, length, ids) logits or log-probabilities where `per_position`, else (batch, ...).
        per_position: positions are turned back and the ids exchanged with their complements.
    """
    here, there = both_strands(f, tokens, mask, complement)
    if per_position:
        there = turn(there, mask)[..., permutation(complement, there.shape[-1], there.device)]
    return (here + there) / 2


def permutation(complement: Complement, size: int, device: torch.device) -> Tensor:
    """The complement as indices into `size` columns, of which those past the vocabulary stay."""
    table = torch.as_tensor(complement, device=device)
    return torch.cat([table, torch.arange(len(table), size, device=device)])
