"""How a base changes in time: the HKY85 model with rates that vary between sites by a gamma distribution.

HKY85 (Hasegawa, Kishino and Yano 1985): the rate from base i to base j is beta pi_j for a transversion and
beta kappa pi_j for a transition (A with G, C with T), pi the frequencies at equilibrium. beta is such that a branch of
length 1 brings one substitution a site on average. Bases are numbered A 0, C 1, G 2, T 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CATEGORIES = 256
"""Rates a site may have: means of this many equally likely parts of the gamma distribution, so a byte holds one."""

_PIECE = 1 << 18  # sites at a time: what fits a cache

_PARTNER = np.array([2, 3, 0, 1], dtype=np.uint8)  # the base that a transition leads to


@dataclass(frozen=True)
class HKY:
    """The model: equilibrium frequencies of A, C, G, T, the ratio of transitions to transversions, the rates' shape."""

    frequencies: tuple[float, float, float, float] = (0.295, 0.205, 0.205, 0.295)
    kappa: float = 4.0
    alpha: float = 0.5  # shape of the gamma distribution of rates, whose mean is 1; infinity: all sites alike

    def __post_init__(self) -> None:
        if len(self.frequencies) != 4 or min(self.frequencies) <= 0 or abs(sum(self.frequencies) - 1) > 1e-9:
            raise ValueError(f"the frequencies of A, C, G and T must be positive and add up to 1: {self.frequencies}")
        if not (self.kappa > 0 and self.alpha > 0):
            raise ValueError(f"kappa and alpha must be positive, not {self.kappa} and {self.alpha}")

    def decays(self) -> tuple[float, NDArray[np.float64]]:
        """The two kinds of exponents a unit of time: beta, and for each base that of its own group (R or Y)."""
        a, c, g, t = self.frequencies
        beta = 1 / (2 * (a + g) * (c + t) + 2 * self.kappa * (a * g + c * t))
        group = np.array([a + g, c + t, a + g, c + t])
        return beta, beta * (1 + group * (self.kappa - 1))

    def matrix(self, time: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """(..., 4, 4) chances of the base after ``time`` (...) substitutions a site, given the base before."""
        beta, own = self.decays()
        return self._matrix(np.exp(-beta * np.asarray(time)), np.exp(-np.multiply.outer(np.asarray(time), own)))

    def mean_matrix(self, time: float) -> NDArray[np.float64]:
        """(4, 4) chances averaged over the rates: E exp(-c r t) = (1 + c t / alpha)^-alpha takes exp's place."""
        beta, own = self.decays()
        if np.isinf(self.alpha):
            return self.matrix(time)
        return self._matrix(
            np.asarray((1 + beta * time / self.alpha) ** -self.alpha), (1 + own * time / self.alpha) ** -self.alpha
        )

    def _matrix(self, across: NDArray[np.float64], within: NDArray[np.float64]) -> NDArray[np.float64]:
        """The matrix from exp(-beta t), shape (...), and exp(-own t), shape (..., 4), by arriving base."""
        pi = np.array(self.frequencies)
        group = pi + pi[_PARTNER]
        across = across[..., None]
        transversion = pi * (1 - across)
        arrived = pi + pi * (1 / group - 1) * across  # what a transition and a stay have in common
        transition = arrived - pi / group * within
        stay = arrived + (group - pi) / group * within
        out = np.repeat(transversion[..., None, :], 4, axis=-2)
        bases = np.arange(4)
        out[..., bases, bases] = stay
        out[..., _PARTNER, bases] = transition
        return np.asarray(out)

    def expected_difference(self, time: float) -> float:
        """The expected share of sites that differ between two sequences ``time`` substitutions a site apart.

        They are at equilibrium, and ``time`` is the sum of both ways to their common ancestor.
        """
        return float(1 - np.array(self.frequencies) @ np.diag(self.mean_matrix(time)))

    def rates(self) -> NDArray[np.float64]:
        """(CATEGORIES,) the mean rate of each of that many equally likely parts of the gamma distribution."""
        if np.isinf(self.alpha):
            return np.ones(CATEGORIES)
        from scipy.special import gammainc, gammaincinv

        edges = gammaincinv(self.alpha, np.arange(1, CATEGORIES) / CATEGORIES)
        below = np.concatenate(([0.0], gammainc(self.alpha + 1, edges), [1.0]))
        return np.asarray(np.diff(below) * CATEGORIES)


def equilibrium_bases(model: HKY, count: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """(count,) independent bases at the model's frequencies."""
    edges = np.cumsum(model.frequencies)[:3]
    return np.searchsorted(edges, rng.random(count), side="right").astype(np.uint8)


def substitute(
    bases: NDArray[np.uint8], rates: NDArray[np.uint8], time: float, model: HKY, rng: np.random.Generator
) -> None:
    """Let ``time`` pass over (length,) bases, in place; ``rates`` (length,) holds each site's category."""
    matrices = model.matrix(time * model.rates())  # (CATEGORIES, 4, 4)
    stay = np.ascontiguousarray(np.diagonal(matrices, axis1=-2, axis2=-1)).ravel()
    for at in range(0, len(bases), _PIECE):
        piece = bases[at : at + _PIECE]
        row = rates[at : at + _PIECE].astype(np.uint16) * np.uint16(4) + piece
        changed = np.flatnonzero(rng.random(len(piece)) >= stay[row])
        piece[changed] = _other(matrices.reshape(-1, 4)[row[changed]], piece[changed], rng)


def substitute_each(
    bases: NDArray[np.uint8], times: NDArray[np.float64], model: HKY, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """(length,) bases after times (length,) of their own, in substitutions a site (rates are the caller's)."""
    after = bases.copy()
    for at in range(0, len(bases), _PIECE):
        piece = after[at : at + _PIECE]
        matrices = model.matrix(times[at : at + _PIECE])
        rows = matrices[np.arange(len(piece)), piece]
        changed = np.flatnonzero(rng.random(len(piece)) >= rows[np.arange(len(piece)), piece])
        piece[changed] = _other(rows[changed], piece[changed], rng)
    return after


def _other(chances: NDArray[np.float64], base: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A base other than ``base`` by its row of chances, (n, 4)."""
    chances = chances.copy()
    chances[np.arange(len(base)), base] = 0
    edges = np.cumsum(chances, axis=1)
    drawn = rng.random(len(base)) * edges[:, 3]
    return (drawn[:, None] >= edges[:, :3]).sum(axis=1).astype(np.uint8)


def frequencies_of(gc: float) -> Sequence[float]:
    """Frequencies of A, C, G, T with this share of G and C, both strands alike."""
    return ((1 - gc) / 2, gc / 2, gc / 2, (1 - gc) / 2)
