"""The published SC09 table, and the arithmetic of the code that made such tables, repeated for comparison.

`sashimi_scores` gives what the evaluation script of SaShiMi (arXiv 2202.09729) computes from the same features and
probabilities, its random numbers included. It differs from `sc09_metrics` in this:

- IS: clips are shuffled and halved, and the divergence is taken over clips for each class, not over classes for each
  clip (scipy's `entropy` sums over axis 0). So it is no inception score: a generator that always says one digit
  clearly can score far above 10, the most there is.
- mIS: 10,000 random pairs, drawn with replacement, a clip beside itself included.
- Threshold: the clips, ordered by likelihood, are halved at random; thresholds are to be tuned on one half, but the
  best score is never kept, so the last pair tried is always used: of the other half, the clips between its quantiles
  0.40 and 0.95.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mambagen.pipelines.sc09_metrics import Array, Moments, frechet_distance

PAIRS = 10_000
THRESHOLDS = (0.4, 0.95)  # the last of those that the script tries


@dataclass(frozen=True)
class PublishedRow:
    """A row of Mamba's SC09 table (arXiv 2312.00752); NLL in nats a sample."""

    name: str
    parameters: str
    nll: float | None
    fid: float
    inception: float
    modified_inception: float
    am: float


PUBLISHED = (
    PublishedRow("SampleRNN", "35.0M", 2.042, 8.96, 1.71, 3.02, 1.76),
    PublishedRow("WaveNet", "4.2M", 1.925, 5.08, 2.27, 5.80, 1.47),
    PublishedRow("SaShiMi", "5.8M", 1.873, 1.99, 5.13, 42.57, 0.74),
    PublishedRow("WaveGAN", "19.1M", None, 2.03, 4.90, 36.10, 0.80),
    PublishedRow("DiffWave", "24.1M", None, 1.92, 5.26, 51.21, 0.68),
    PublishedRow("DiffWave + SaShiMi", "23.0M", None, 1.42, 5.94, 69.17, 0.59),
    PublishedRow("Mamba", "6.1M", 1.852, 0.94, 6.26, 88.54, 0.52),
    PublishedRow("Mamba", "24.3M", 1.860, 0.67, 7.33, 144.9, 0.36),
    PublishedRow("train data", "", None, 0.00, 8.56, 292.5, 0.16),
    PublishedRow("test data", "", None, 0.02, 8.33, 257.6, 0.19),
)


@dataclass(frozen=True)
class SashimiScores:
    """The figures by the published script's arithmetic."""

    count: int
    fid: float
    inception: float
    modified_inception: float
    am: float


def sashimi_scores(
    features: NDArray[np.floating], log_p: Array, reference: Moments, reference_mean: Array
) -> SashimiScores:
    """The script's figures without its threshold, clips in the order of their files."""
    p = np.exp(log_p)
    return SashimiScores(
        len(p),
        frechet_distance(reference, Moments.of(features)),
        sashimi_inception_score(p),
        sashimi_modified_inception_score(p),
        sashimi_am_score(p, reference_mean),
    )


def sashimi_scores_with_threshold(
    features: NDArray[np.floating], log_p: Array, reference: Moments, reference_mean: Array, test_count: int | None
) -> SashimiScores | None:
    """The script's figures with `--threshold`, clips in order of likelihood, the least likely first.

    Args:
        test_count: clips in the test data, on which the script has spent random numbers before it divides the clips.

    Returns:
        None where too few clips are left.
    """
    count = len(log_p)
    random = np.random.RandomState(0)
    if test_count:
        _script_pairs(random, test_count)
    tuning = set(random.choice(count, size=count // 2, replace=False).tolist())
    others = np.array([row for row in range(count) if row not in tuning], dtype=np.int64)
    half = count // 2
    kept = others[int(THRESHOLDS[0] * half) : int(THRESHOLDS[1] * half)]
    if len(kept) < 2:
        return None
    return sashimi_scores(np.asarray(features)[kept], log_p[kept], reference, reference_mean)


def sashimi_inception_score(p: Array) -> float:
    """The script's IS of probabilities (N, classes)."""
    order = np.random.RandomState(0).permutation(len(p))
    first, second = p[order][: len(p) // 2], p[order][len(p) // 2 :]
    return float(np.exp(_entropy(first, np.repeat(second.mean(0)[None], len(first), axis=0), axis=0).mean()))


def sashimi_modified_inception_score(p: Array) -> float:
    """The script's mIS of probabilities (N, classes)."""
    pairs = _script_pairs(np.random.RandomState(0), len(p))
    return float(np.exp(_entropy(p[pairs[:, 0]], p[pairs[:, 1]], axis=1).mean()))


def sashimi_am_score(p: Array, reference_mean: Array) -> float:
    """The script's AM of probabilities (N, classes)."""
    return float(_entropy(reference_mean, p.mean(0), axis=0) + _entropy(p, None, axis=1).mean())


def _script_pairs(random: np.random.RandomState, count: int) -> NDArray[np.int64]:
    return np.array([random.choice(count, size=2, replace=True) for _ in range(PAIRS)], dtype=np.int64)


def _entropy(p: Array, q: Array | None, axis: int) -> Array:
    """Entropy of p, or its divergence from q, along an axis in which both are first normalised (scipy's `entropy`)."""
    p = p / p.sum(axis, keepdims=True)
    if q is None:
        return np.asarray(-np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=axis))
    q = q / q.sum(axis, keepdims=True)
    with np.errstate(divide="ignore"):
        terms = np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - np.log(q)), 0)
    return np.asarray(terms.sum(axis))
