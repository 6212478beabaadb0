"""Log-likelihoods of every base of FASTA and GenBank files: tracks over records or regions, or a row a record.

From Python:

    from mambagen.pipelines.likelihood import LanguageModel
    LanguageModel("runs/my-run/model").score(b"ACGTACGT")     # (8,) float32, nats, NaN at the first base

    from mambagen.pipelines.score import summaries
    for row in summaries(LanguageModel("dna"), ["genome.fa.gz"]):
        print(row.record, row.perplexity)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mambagen.data.regions import merged, read_regions
from mambagen.data.sequence_store import SequenceStore
from mambagen.pipelines.likelihood import LanguageModel, Span
from mambagen.pipelines.score_tracks import Track

REGION_CONTEXT = 8192  # bases in front of a region that are read first
Said = Callable[[int], None]  # told how many bases are done


@dataclass(frozen=True)
class Summary:
    """A record, or a region of it, and what the model makes of it; None where no base has a likelihood."""

    path: str
    record: str
    start: int
    end: int
    name: str  # of a region; "" for a whole record
    scored: int  # bases that have a likelihood
    total: float | None  # log-likelihood of all of them together, nats

    @property
    def mean(self) -> float | None:
        """Nats a base."""
        return None if self.total is None else self.total / self.scored

    @property
    def perplexity(self) -> float | None:
        """exp of the mean negative log-likelihood: 4 is chance."""
        return None if self.mean is None else math.exp(-self.mean)


def spans_of(
    store: SequenceStore, regions: Path | str | None = None, context: int = REGION_CONTEXT, apart: bool = False
) -> list[Span]:
    """What is to be scored: whole records, or the regions of a BED file (each as it is if ``apart``, else merged)."""
    if regions is None:
        return [Span(record, 0, record.length) for record in store.records]
    store.raise_failures()  # before a region of a file that could not be read is called unknown
    found = read_regions(regions, store)
    return [Span(r.record, r.start, r.end, context, r.name) for r in (found if apart else merged(found, store))]


def write_track(
    model: LanguageModel,
    store: SequenceStore,
    spans: Sequence[Span],
    track: Track,
    both_strands: bool = False,
    scale: float = 1.0,
    said: Said | None = None,
) -> None:
    """Score the spans, piece by piece, into a track; ``scale`` turns nats into another unit."""
    done = 0
    for at, start, scores in model.spans(store, spans, both_strands):
        record = spans[at].record
        track.write(record, start, scores * np.float32(scale), store.read(record, start, start + len(scores)))
        done += len(scores)
        if said:
            said(done)


def summarise(
    model: LanguageModel,
    store: SequenceStore,
    spans: Sequence[Span],
    both_strands: bool = False,
    said: Said | None = None,
) -> Iterator[Summary]:
    """A row a span, in order, as soon as it is known; records without bases have theirs too."""
    total, scored, bases, done = 0.0, 0, 0, 0
    for at, _, scores in model.spans(store, spans, both_strands):
        there = scores[~np.isnan(scores)]
        total += float(there.sum(dtype=np.float64))
        scored += len(there)
        bases += len(scores)
        done += len(scores)
        if said:
            said(done)
        span = spans[at]
        if bases == len(span):
            known = total if scored else None
            yield Summary(span.record.path, span.record.id, span.start, span.end, span.name, scored, known)
            total, scored, bases = 0.0, 0, 0


def summaries(
    model: LanguageModel,
    paths: Sequence[Path | str],
    regions: Path | str | None = None,
    context: int = REGION_CONTEXT,
    both_strands: bool = False,
) -> Iterator[Summary]:
    """`summarise` over files; one that cannot be read does not keep the others from being done.

    Raises InputError at the end, naming the files that could not be read.
    """
    with SequenceStore.from_files(paths, model.tokenizer) as store:
        yield from summarise(model, store, spans_of(store, regions, context, apart=True), both_strands)
        store.raise_failures()
