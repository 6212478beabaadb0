"""Figures of species classifiers: accuracy by length with intervals, calibration, and baselines to be held against."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mambagen.data.dna_tokens import N
from mambagen.data.kmers import kmer_frequencies
from mambagen.data.species import SpeciesParts
from mambagen.data.species_windows import DrawnWindows, SpeciesSampler, draw_evaluation
from mambagen.models.species_classifier import Calibration, SpeciesClassifier
from mambagen.pipelines.sequence_classification import figures_of
from mambagen.pipelines.species_task import Answers, ask

Z95 = 1.959963984540054
BINS = 10  # of the reliability diagram
CALIBRATION_BASES = 1 << 19  # of a species and length
BASELINE_BASES = 1 << 22  # of a species and length, to fit a regression on
SHUFFLES, STUDENT = 10, 3.250  # of labels, and the 99.5 % quantile with nine degrees of freedom
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # of regularisation, among which validation chooses
STREAM_OF_TRAINING = 1 << 40  # a step that no training reaches


@dataclass(frozen=True)
class Accuracy:
    """The mean over species of their shares of right answers, with its 95 % interval (Wilson).

    A species counts as any other, whatever number of windows it has, so 1 / species is chance. The interval is that of
    as many independent windows, of which each species has the same number, as have the variance of this mean; windows
    that overlap count once.
    """

    length: int
    rows: int
    independent: int
    species: int  # that have windows of this length
    accuracy: float
    low: float
    high: float
    windows: str  # digits of the evaluation windows

    @staticmethod
    def of(drawn: DrawnWindows, said: NDArray[np.int64]) -> "Accuracy":
        """Of answers (rows,) to the windows."""
        share = mean_over_species(drawn, said)
        trials = effective_trials(drawn)
        low, high = wilson(share, trials)
        species = len(np.unique(drawn.label))
        return Accuracy(drawn.length, len(drawn), round(trials), species, share, low, high, drawn.digest())


def mean_over_species(drawn: DrawnWindows, said: NDArray[np.int64]) -> float:
    """The mean over the labels of their shares of right answers."""
    right = said == drawn.label
    return float(np.mean([right[drawn.label == label].mean() for label in np.unique(drawn.label)]))


def effective_trials(drawn: DrawnWindows) -> float:
    """S^2 / sum(1 / n_s): a share of so many trials varies as the mean over S species with n_s trials each does."""
    counts = drawn.independent()
    return float(len(counts) ** 2 / (1 / counts).sum())


def wilson(share: float, trials: float, z: float = Z95) -> tuple[float, float]:
    """The interval of Wilson (1927, JASA 22:209) for a share of so many independent trials."""
    if trials <= 0:
        return 0.0, 1.0
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Reliability:
    """How probabilities and shares of right answers go together, in bins of the best probability."""

    error: float  # expected calibration error: mean |share right - mean probability| over the rows' bins
    loss: float  # nats a record
    counts: tuple[int, ...]
    probability: tuple[float, ...]  # mean in each bin; 0 where it is empty
    right: tuple[float, ...]


def reliability(log_probabilities: NDArray[np.float64], label: NDArray[np.int64], bins: int = BINS) -> Reliability:
    """Of answers (rows, classes); Guo et al. 2017, arXiv:1706.04599, with bins of equal width."""
    best = np.exp(log_probabilities.max(1))
    right = log_probabilities.argmax(1) == label
    which = np.minimum((best * bins).astype(np.int64), bins - 1)
    counts = np.bincount(which, minlength=bins)
    sums = np.bincount(which, weights=best, minlength=bins)
    hits = np.bincount(which, weights=right, minlength=bins)
    safe = np.maximum(counts, 1)
    return Reliability(
        error=float(np.abs(sums - hits).sum() / max(1, len(label))),
        loss=float(-log_probabilities[np.arange(len(label)), label].mean()),
        counts=tuple(counts.tolist()),
        probability=tuple((sums / safe).tolist()),
        right=tuple((hits / safe).tolist()),
    )


def fit_calibration(answers: Answers, weights: NDArray[np.float64], window: int) -> Calibration:
    """Temperature and exponents with the least weighted loss on validation records of many lengths (L-BFGS)."""
    mean = torch.from_numpy(answers.mean)
    size = torch.from_numpy(np.log(answers.bases / window))
    label = torch.from_numpy(answers.label)
    share = torch.from_numpy(weights / weights.sum())
    parameters = torch.tensor([0.0, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        exponent = torch.where(size > 0, parameters[2], parameters[1])
        scaled = mean * torch.exp(parameters[0] + exponent * size)[:, None]
        loss = (torch.nn.functional.cross_entropy(scaled, label, reduction="none") * share).sum()
        loss = loss + 1e-3 * (parameters**2).sum()  # where records of only one kind of length are there
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    log_scale, within, across = parameters.detach().tolist()
    if not all(map(math.isfinite, (log_scale, within, across))):
        return Calibration()
    return Calibration(
        temperature=math.exp(-max(-6.0, min(6.0, log_scale))),
        within=max(-2.0, min(2.0, within)),
        across=max(0.0, min(1.0, across)),
    )


def calibrate(
    model: SpeciesClassifier, parts: SpeciesParts, per_species: int, seed: int, tokens_at_once: int, at_most: int | None
) -> Calibration:
    """Fit it on validation records from a sixteenth of the window to 64 windows; each length counts alike."""
    answers, weights = [], []
    for length in calibration_lengths(model.config.window):
        count = max(4, min(per_species, CALIBRATION_BASES // length))
        drawn = draw_evaluation(parts.valid, length, count, seed + 1)
        if len(drawn):
            answers.append(ask(model, drawn, tokens_at_once, at_most))
            weights.append(np.full(len(drawn), 1 / len(drawn)))
    if not answers:
        return Calibration()
    return fit_calibration(Answers.joined(answers), np.concatenate(weights), model.config.window)


def calibration_lengths(window: int) -> list[int]:
    """The lengths of records that a calibration is fitted on."""
    return [max(1, window // share) for share in (16, 4, 2, 1)] + [window * times for times in (2, 4, 16, 64)]


@dataclass(frozen=True)
class TestFigures:
    """A model on test records: by length, over all of them its confusions and its calibration."""

    by_length: tuple[Accuracy, ...]
    confusion_length: int
    confusion: tuple[tuple[int, ...], ...]  # [true][said], at that length
    before: Reliability  # with the temperature 1 and windows as if independent
    after: Reliability
    missing: dict[int, tuple[str, ...]]  # length -> species that have no window of it


def measure_species(
    model: SpeciesClassifier,
    parts: SpeciesParts,
    lengths: Sequence[int],
    per_species: int,
    seed: int,
    tokens_at_once: int,
    at_most: int | None = None,
    split: str = "test",
    say: Callable[[str], None] = lambda _: None,
) -> TestFigures | None:
    """Accuracy on records of each length of a part, put to the model as `classify-species` does; None without any."""
    config = model.config
    table, answers, missing = [], [], {}
    confusion: tuple[int, tuple[tuple[int, ...], ...]] | None = None
    for length in sorted(lengths):
        say(f"measuring at {length:,} bases ...")
        drawn = draw_evaluation(parts.part(split), length, per_species, seed)
        absent = tuple(name for i, name in enumerate(parts.species) if i not in drawn.label)
        if absent:
            missing[length] = absent
        if not len(drawn):
            continue
        given = ask(model, drawn, tokens_at_once, at_most)
        chances = config.calibration.log_probabilities(given.mean, given.bases, config.window)
        table.append(Accuracy.of(drawn, chances.argmax(1)))
        answers.append(given)
        if confusion is None or length <= config.window:
            confusion = length, figures_of(chances, drawn.label).confusion
    if confusion is None:
        return None
    every = Answers.joined(answers)
    plain = Calibration(temperature=1, within=0, across=1)
    before, after = (
        reliability(which.log_probabilities(every.mean, every.bases, config.window), every.label)
        for which in (plain, config.calibration)
    )
    return TestFigures(tuple(table), *confusion, before, after, missing)


# ---- baselines ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """A logistic regression on something simple, by length."""

    name: str
    accuracy: Accuracy
    chance: tuple[float, float]  # the 95 % interval of guessing

    def row(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, **asdict(self.accuracy), "chance": self.chance}


def baselines(
    parts: SpeciesParts,
    lower: SpeciesParts | None,
    lengths: Sequence[int],
    train_per_species: int,
    per_species: int,
    seed: int,
    ks: Sequence[int] = (1, 2, 3, 4, 5, 6),
    say: Callable[[str], None] = lambda _: None,
) -> list[Baseline]:
    """Logistic regressions on k-mer frequencies, on the share of N, and on the share of lower-case letters, by length.

    The training windows are drawn as a model's are; the strength of regularisation is chosen on validation windows;
    the test windows are those of `measure_species`. k = 1 is composition alone. The mean of regressions (k = 4) on
    shuffled labels must not be told from chance.

    Args:
        lower: the same genomes read with lower-case letters as N, or None to leave that check out.
        train_per_species: windows of each species; of long ones those of four million bases, but at least 20.
    """
    found = []
    for length in sorted(lengths):
        test = draw_evaluation(parts.test, length, per_species, seed)
        valid = draw_evaluation(parts.valid, length, per_species, seed + 1)
        if len(np.unique(test.label)) < 2 or not len(valid):
            continue
        names = [name for i, name in enumerate(parts.species) if _has_windows(parts, i, length)]
        some = parts.only(names)
        rows = max(20, min(train_per_species, BASELINE_BASES // length)) * len(names)
        sampler = SpeciesSampler(some.train, some.species, seed, reverse_complement=False)
        train = sampler.draw(STREAM_OF_TRAINING, length, rows)
        train = _with_labels(train, np.array([parts.species.index(name) for name in names])[train.label])
        chance = wilson(1 / len(np.unique(test.label)), effective_trials(test))

        def add(
            name: str, features: list[NDArray[np.float32]], labels: NDArray[np.int64], at: DrawnWindows = test,
            guess: tuple[float, float] = chance, on: NDArray[np.int64] = valid.label,
        ) -> None:  # fmt: skip
            said = regression(features[0], labels, features[1], on, features[2])
            found.append(Baseline(name, Accuracy.of(at, said), guess))

        drawn = (train, valid, test)
        sequences = [windows.sequences() for windows in drawn]
        for k in ks:
            say(f"k-mers of {k} at {length:,} bases ...")
            features = [kmer_frequencies(part, k) for part in sequences]
            add("composition" if k == 1 else f"{k}-mers", features, train.label)
            if k == min(4, max(ks)):
                control = shuffled_control(features[0], train.label, features[2], test, seed)
                found.append(Baseline(f"{k}-mers, labels shuffled", control, chance))
        unknown = [_share_unknown(windows) for windows in drawn]
        add("share of N", unknown, train.label)
        if lower is not None:
            masked = [_share_unknown(_of(windows, lower)) for windows in drawn]
            add("share of lower case", [m - u for m, u in zip(masked, unknown, strict=True)], train.label)
    return found


def shuffled_control(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    at: NDArray[np.float32],
    test: DrawnWindows,
    seed: int,
) -> Accuracy:
    """The mean accuracy of regressions on shuffled labels, and the 99 % interval of that mean (Student).

    One shuffle says little: where species form clusters, all windows of one are called alike, rightly or not.
    """
    generator = np.random.default_rng(seed)
    shares = []
    for _ in range(SHUFFLES):
        said = regression(features, generator.permutation(labels), at, test.label, at, strengths=STRENGTHS[:1])
        shares.append(mean_over_species(test, said))
    mean, half = float(np.mean(shares)), STUDENT * float(np.std(shares, ddof=1)) / math.sqrt(SHUFFLES)
    species = len(np.unique(test.label))
    return Accuracy(test.length, len(test), SHUFFLES, species, mean, mean - half, mean + half, test.digest())


def regression(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    valid: NDArray[np.float32],
    valid_labels: NDArray[np.int64],
    test: NDArray[np.float32],
    strengths: Sequence[float] = STRENGTHS,
) -> NDArray[np.int64]:
    """What a logistic regression on standardised features says of `test`; its strength is chosen on validation."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # scikit-learn brings it

    scale = StandardScaler()
    scaled = scale.fit_transform(features)
    best: tuple[float, Any] | None = None
    for strength in strengths:
        # BLAS threads cost more on products this small than they save: with two a fit takes up to ten times as long.
        with warnings.catch_warnings(), threadpool_limits(1, user_api="blas"):
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = LogisticRegression(C=strength, max_iter=300).fit(scaled, labels)
        share = float((fitted.predict(scale.transform(valid)) == valid_labels).mean())
        if best is None or share > best[0]:
            best = share, fitted
    assert best is not None
    said: NDArray[np.int64] = best[1].predict(scale.transform(test))
    return said


def _has_windows(parts: SpeciesParts, species: int, length: int) -> bool:
    return all(
        any(end - start >= length for _, start, end in parts.part(split)[species]) for split in ("train", "test")
    )


def _with_labels(drawn: DrawnWindows, label: NDArray[np.int64]) -> DrawnWindows:
    return DrawnWindows(drawn.length, label, drawn.record, drawn.start, drawn.minus, drawn.records)


def _of(drawn: DrawnWindows, parts: SpeciesParts) -> DrawnWindows:
    """The same places in genomes that were read in another way."""
    return DrawnWindows(drawn.length, drawn.label, drawn.record, drawn.start, drawn.minus, parts.train[0].records)


def _share_unknown(drawn: DrawnWindows) -> NDArray[np.float32]:
    """(rows, 1) share of each window that is N."""
    counts = [[np.count_nonzero(drawn.tokens(row) >= N)] for row in range(len(drawn))]
    shares: NDArray[np.float32] = np.array(counts, dtype=np.float32) / np.float32(drawn.length)
    return shares
