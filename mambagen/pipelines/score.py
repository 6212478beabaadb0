"""Log-likelihoods of every base of FASTA and GenBank files: tracks over records or regions, or a row a record.

From Python:

    from mambagen.pipelines.likelihood import LanguageModel
    LanguageModel("runs/my-run").score(b"ACGTACGT")           # (8,) float32, nats, NaN at the first base

    from mambagen.pipelines.score import summaries
    for row in summaries(LanguageModel("dna"), ["genome.fa.gz"]):
        print(row.record, row.perplexity)
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mambagen.data.regions import merged, read_regions
from mambagen.data.sequence_store import SequenceStore
from mambagen.data.whole_file import byte_output, whole_file
from mambagen.pipelines.likelihood import LanguageModel, Span
from mambagen.pipelines.score_tracks import BedGraphTrack, BigWigTrack, Piece, TsvTrack, check_bigwig

REGION_CONTEXT = 8192  # bases in front of a region that are read first
UNITS = {"nats": 1.0, "bits": 1 / math.log(2)}
COLUMNS = ("record", "start", "end", "name", "scored", "log_likelihood", "mean", "perplexity")

Said = Callable[[int, int], None]  # told how many bases are done, and of how many


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


def pieces_of(
    model: LanguageModel,
    store: SequenceStore,
    spans: Sequence[Span],
    both_strands: bool = False,
    scale: float = 1.0,
    said: Said | None = None,
) -> Iterator[Piece]:
    """The scores of spans, piece by piece, as a track takes them; ``scale`` turns nats into another unit."""
    done, total = 0, sum(map(len, spans))
    for at, start, scores in model.spans(store, spans, both_strands):
        record = spans[at].record
        yield Piece(record, start, scores * np.float32(scale), store.read(record, start, start + len(scores)))
        done += len(scores)
        if said:
            said(done, total)


def summarise(
    model: LanguageModel,
    store: SequenceStore,
    spans: Sequence[Span],
    both_strands: bool = False,
    said: Said | None = None,
) -> Iterator[Summary]:
    """A row a span, in order, as soon as it is known; records without bases have theirs too."""
    found, scored, bases, done = 0.0, 0, 0, 0
    total = sum(map(len, spans))
    for at, _, scores in model.spans(store, spans, both_strands):
        there = scores[~np.isnan(scores)]
        found += float(there.sum(dtype=np.float64))
        scored += len(there)
        bases += len(scores)
        done += len(scores)
        if said:
            said(done, total)
        span = spans[at]
        if bases == len(span):
            known = found if scored else None
            yield Summary(span.record.path, span.record.id, span.start, span.end, span.name, scored, known)
            found, scored, bases = 0.0, 0, 0


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


def write_scores(
    model: LanguageModel,
    paths: Sequence[Path | str],
    out: Path | str | None = None,
    form: str = "tsv",
    regions: Path | str | None = None,
    context: int = REGION_CONTEXT,
    both_strands: bool = False,
    unit: str = "nats",
    model_name: str = "",
    said: Said | None = None,
    rna: bool = False,
) -> None:
    """Write a value a base as "tsv", "bedgraph" or "bigwig" to a file (None: stdout; not for bigWig).

    The file is there when it is whole. A FASTA that cannot be read does not keep the others from being done; one that
    holds U is warned of unless it is meant as ``rna``: U is read as T either way.

    Raises InputError at the end, naming the files that could not be read; UsageError where bigWig cannot be written.
    """
    if form == "bigwig":
        check_bigwig()
    scale = UNITS[unit]
    with SequenceStore.from_files(paths, model.tokenizer, warn_of_rna=not rna) as store:
        pieces = pieces_of(model, store, _some_spans(store, regions, context, apart=False), both_strands, scale, said)
        if form == "bigwig":
            assert out is not None
            with whole_file(out) as partial:
                BigWigTrack(partial, store.records).write(pieces)
        else:
            how = "natural log" if unit == "nats" else "log2"
            strands = "mean of both strands" if both_strands else "plus strand"
            description = f"log-likelihood of each base, {how}, {strands}, model {model_name}"
            with byte_output(out) as stream:
                if form == "tsv":
                    TsvTrack(stream, f"log_likelihood_{unit}").write(pieces)
                else:
                    BedGraphTrack(stream, description).write(pieces)
        store.raise_failures()


def write_summaries(
    model: LanguageModel,
    paths: Sequence[Path | str],
    out: Path | str | None = None,
    regions: Path | str | None = None,
    context: int = REGION_CONTEXT,
    both_strands: bool = False,
    unit: str = "nats",
    as_json: bool = False,
    said: Said | None = None,
    rna: bool = False,
) -> None:
    """Write a row a record or region as TSV or JSON lines; errors as `write_scores`."""
    scale = UNITS[unit]
    with SequenceStore.from_files(paths, model.tokenizer, warn_of_rna=not rna) as store:
        spans = _some_spans(store, regions, context, apart=True)
        with byte_output(out) as stream:
            if not as_json:
                stream.write(("\t".join(COLUMNS) + "\n").encode())
            for row in summarise(model, store, spans, both_strands, said):
                sums = [None if value is None else value * scale for value in (row.total, row.mean)]
                name = row.name or row.record
                values = [row.record, row.start, row.end, name, row.scored, *sums, row.perplexity]
                if as_json:
                    line = json.dumps({"file": row.path, **dict(zip(COLUMNS, values, strict=True))})
                else:
                    line = "\t".join(
                        "NA" if v is None else f"{v:.6f}" if isinstance(v, float) else str(v) for v in values
                    )
                stream.write(line.encode() + b"\n")
        store.raise_failures()


def _some_spans(store: SequenceStore, regions: Path | str | None, context: int, apart: bool) -> list[Span]:
    """`spans_of`; InputError where no file could be read."""
    if not store.records:
        store.raise_failures()
    return spans_of(store, regions, context, apart)
