"""What is wrong with generated clips, in words: noise, silence, one digit for all, one clip for all."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mambagen.pipelines.sc09_judge import Judged
from mambagen.pipelines.sc09_metrics import Moments, effective_classes, spread

ENOUGH = 20  # clips, below which a histogram says little
FEW_DIGITS = 0.6  # of the digits there are: with fewer of them in use the generator has collapsed
ONE_DIGIT = 0.5  # the share of one digit from which on it is named
NO_DIGIT = 0.5  # share of clips that are more likely no digit
UNSURE = 0.5  # mean probability of the digit that was heard
ALIKE = 0.2  # of the reference's variance
SILENT = 10 ** (-60 / 20)


def find_faults(
    samples: NDArray[np.float32], judged: Judged, reference: Moments, digits: Sequence[str]
) -> Iterator[str]:
    """Sentences about clips (N, samples) that are not what a good generator gives; none where nothing is found."""
    count = len(samples)
    silent = int((np.abs(samples).max(axis=1) < SILENT).sum())
    if silent:
        yield f"Silent: {silent:,} of {count:,} clips have no sample above -60 dBFS."
    yield from _noise(judged)
    yield from _collapsed(judged, digits)
    yield from _alike(samples, judged, reference)


def _noise(judged: Judged) -> Iterator[str]:
    count = len(judged)
    no_digit = int((judged.is_digit < 0.5).sum())
    sure = float(np.exp(judged.log_p.max(1)).mean())
    if no_digit > NO_DIGIT * count:
        yield (
            f"Noise or other sound: the judge takes {no_digit:,} of {count:,} clips for something that is no digit. "
            "FID, IS, mIS and AM of such clips say nothing about digits."
        )
    elif sure < UNSURE:
        yield (
            f"Unclear: the judge is {sure:.0%} sure of the digit it hears, on average; real digits come out far "
            "higher. The clips are noise or speech that is hard to understand."
        )


def _collapsed(judged: Judged, digits: Sequence[str]) -> Iterator[str]:
    counts = spread(judged.log_p)
    total = int(counts.sum())
    in_use = effective_classes(counts)
    if total < ENOUGH or in_use >= FEW_DIGITS * len(digits):
        return
    most = int(counts.argmax())
    share = counts[most] / total
    if share >= ONE_DIGIT:
        yield (
            f"Collapsed: {share:.0%} of the clips are heard as '{digits[most]}'; "
            f"an even spread over the digits has {1 / len(digits):.0%}."
        )
    else:
        unheard = [digit for digit, heard in zip(digits, counts, strict=True) if heard < 0.02 * total]
        rest = f"; hardly ever heard: {', '.join(unheard)}" if unheard else ""
        yield f"Collapsed: the clips use the digits as unevenly as {in_use:.1f} digits out of {len(digits)}{rest}."


def _alike(samples: NDArray[np.float32], judged: Judged, reference: Moments) -> Iterator[str]:
    count = len(samples)
    repeated = count - len(Counter(clip.tobytes() for clip in samples))
    if repeated > 0.05 * count:
        yield f"Repeated: {repeated:,} of {count:,} clips are exact copies of others."
    variance = float(judged.features.var(axis=0, ddof=1).sum(dtype=np.float64))
    share = variance / float(np.trace(reference.covariance))
    in_use = effective_classes(spread(judged.log_p)) / judged.log_p.shape[1]  # one digit alone varies less than ten
    if share < ALIKE * in_use:
        yield (
            f"All alike: what the judge sees varies {share:.0%} as much as in real digits; "
            "the generator says nearly the same every time."
        )
