"""Figures of generated clips by a classifier's features and class probabilities: FID, IS, mIS, AM; their intervals.

    p_i       probabilities of the classes for generated clip i, `log_p` their logarithms (N, classes)
    p_gen     mean of p_i over generated clips; p_ref the same over the reference data
    FID       |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of the features' means and covariances (arXiv 1706.08500)
    IS        exp(mean_i KL(p_i || p_gen)), 1 to the number of classes (arXiv 1606.03498)
    mIS       exp(mean over pairs i != j of KL(p_i || p_j)), at least 1 (arXiv 1703.01386)
    AM        KL(p_ref || p_gen) + mean_i H(p_i), 0 at best (arXiv 1703.02000)

Everything is computed in float64. The arithmetic of the published SC09 tables, which differs, is in `sc09_published`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BOOTSTRAP_DRAWS = 200
BOOTSTRAP_DRAWS_WIDE = 30  # where features are so many that one FID takes most of a second
WIDE = 512
FEWEST = 10  # clips that a line is laid through
LEVEL = 0.95


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and unbiased covariance (d, d) of `count` feature vectors."""

    mean: Array
    covariance: Array
    count: int

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> "Moments":
        """The moments of features (N, d), N at least 2."""
        if len(features) < 2:
            raise ValueError("a covariance needs at least two samples")
        values = np.asarray(features, dtype=np.float64)
        mean = values.mean(0)
        centred = values - mean
        return cls(mean, centred.T @ centred / (len(values) - 1), len(values))


def frechet_distance(a: Moments, b: Moments) -> float:
    """The Frechet distance (squared) between Gaussians with these moments.

    tr (S1 S2)^(1/2) is taken as the sum of the square roots of the eigenvalues of R S2 R with R = S1^(1/2), which is
    symmetric: no root of a matrix that is not, no complex numbers, and covariances of too few samples do no harm.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b.covariance @ root), 0)).sum()
    difference = a.mean - b.mean
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(0.0, float(distance))


def inception_score(log_p: Array) -> float:
    """IS of log-probabilities (N, classes): 1 where all clips are alike, the number of classes at best."""
    return float(np.exp(_negative_entropies(log_p).mean() - _plogp(np.exp(log_p).mean(0)).sum()))


def modified_inception_score(log_p: Array) -> float:
    """mIS over all ordered pairs of different clips, which is what random pairs estimate.

    sum over i, j of p_i . (log p_i - log p_j) needs the means of p and of log p only; a clip beside itself adds 0.
    """
    count = len(log_p)
    if count < 2:
        return 1.0
    cross = float(np.exp(log_p).mean(0) @ log_p.mean(0))
    return float(np.exp((_negative_entropies(log_p).mean() - cross) * count / (count - 1)))


def am_score(log_p: Array, reference_mean: Array) -> float:
    """AM of log-probabilities (N, classes) beside the mean prediction (classes,) for the reference data."""
    mean = np.exp(log_p).mean(0)
    divergence = float(np.sum(reference_mean * (np.log(np.maximum(reference_mean, 1e-300)) - np.log(mean))))
    return divergence - float(_negative_entropies(log_p).mean())


def _negative_entropies(log_p: Array) -> Array:
    return np.sum(np.exp(log_p) * log_p, axis=1)


def _plogp(p: Array) -> Array:
    return p * np.log(np.maximum(p, 1e-300))


@dataclass(frozen=True)
class Interval:
    """A figure and the interval that holds 95 % of what resampling the generated clips gives."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """The figures of N clips beside reference data."""

    count: int
    fid: Interval
    inception: Interval
    modified_inception: Interval
    am: Interval
    fid_unbiased: float  # extrapolated to infinitely many generated clips
    draws: int  # of the bootstrap

    @property
    def intervals(self) -> dict[str, Interval]:
        """By the names of the tables."""
        return {"FID": self.fid, "IS": self.inception, "mIS": self.modified_inception, "AM": self.am}


def score(
    features: NDArray[np.floating], log_p: Array, reference: Moments, reference_mean: Array, seed: int = 0
) -> Scores:
    """All figures of generated clips: features (N, d) and log-probabilities (N, classes), N at least 2.

    The reference data are taken as they are: intervals are about the generated clips alone.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # scikit-learn brings it

    # Many small matrices: threads only wait for one another, and where cores are busy they take ten times as long.
    with threadpool_limits(1 if features.shape[1] <= WIDE else None):
        return _score(features, log_p, reference, reference_mean, seed)


def _score(
    features: NDArray[np.floating], log_p: Array, reference: Moments, reference_mean: Array, seed: int
) -> Scores:
    values = np.asarray(features, dtype=np.float64)
    draws = BOOTSTRAP_DRAWS if values.shape[1] <= WIDE else BOOTSTRAP_DRAWS_WIDE
    figures: tuple[Callable[[NDArray[np.int64]], float], ...] = (
        lambda rows: frechet_distance(reference, Moments.of(values[rows])),
        lambda rows: inception_score(log_p[rows]),
        lambda rows: modified_inception_score(log_p[rows]),
        lambda rows: am_score(log_p[rows], reference_mean),
    )
    floors = (0.0, 1.0, 1.0, 0.0)
    fid, inception, modified, am = (
        bootstrap(figure, len(values), draws, seed, floor) for figure, floor in zip(figures, floors, strict=True)
    )
    return Scores(len(values), fid, inception, modified, am, unbiased_fid(values, reference, seed), draws)


def bootstrap(
    figure: Callable[[NDArray[np.int64]], float], count: int, draws: int, seed: int, floor: float = -np.inf
) -> Interval:
    """The figure of all rows, with the spread of the same figure over rows drawn with replacement.

    Drawing with replacement adds to the bias of such figures (FID rises, mIS falls), so the quantiles are of the
    deviations from the draws' own mean, laid around the figure itself.
    """
    value = figure(np.arange(count))
    random = np.random.default_rng(seed)
    drawn = np.array([figure(random.integers(0, count, count)) for _ in range(draws)])
    low, high = np.quantile(drawn - drawn.mean(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, max(floor, float(value + low)), max(floor, float(value + high)))


def unbiased_fid(features: Array, reference: Moments, seed: int = 0, points: int = 12) -> float:
    """FID for infinitely many generated clips: a line in 1 / N through subsets of several sizes (arXiv 1911.07023).

    FID of N clips exceeds its limit by a term in 1 / N. What the reference's own finite number adds stays. Of fewer
    than FEWEST clips it is FID as it is.
    """
    count = len(features)
    smallest = max(2, count // 5)
    if count < FEWEST:
        return frechet_distance(reference, Moments.of(features))
    random = np.random.default_rng(seed)
    sizes = np.unique(np.linspace(smallest, count, points).astype(int))
    found = [
        frechet_distance(reference, Moments.of(features[random.permutation(count)[:size]])) for size in sizes.tolist()
    ]
    slope_and_limit = np.polyfit(1 / sizes, found, 1)
    return max(0.0, float(slope_and_limit[1]))


def spread(log_p: Array) -> NDArray[np.int64]:
    """How many clips are heard as each class."""
    return np.bincount(log_p.argmax(1), minlength=log_p.shape[1])


def effective_classes(counts: NDArray[np.int64]) -> float:
    """exp of the entropy of a histogram, corrected for few samples (Miller and Madow): 1 to the number of classes."""
    total = int(counts.sum())
    if not total:
        return 0.0
    entropy = -float(_plogp(counts / total).sum()) + (np.count_nonzero(counts) - 1) / (2 * total)
    return float(min(len(counts), np.exp(entropy)))
