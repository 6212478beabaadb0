"""Scores of the variants of a VCF: the log-likelihood ratio of each ALT against REF, in its place in the genome.

From Python:

    from mambagen.pipelines.likelihood import LanguageModel
    from mambagen.pipelines.score_variants import score_variants
    scores = score_variants("variants.vcf.gz", ["genome.fa.gz"], LanguageModel("dna"))
    scores.position, scores.alternate, scores.llr        # arrays, a row an ALT; NaN where it could not be scored

What the ratio is, and how it is computed: mambagen.pipelines.variant_likelihoods.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambagen.data.dna_tokens import N
from mambagen.data.sequence_store import SequenceStore, StoredRecord
from mambagen.data.vcf import Vcf, VcfLine, is_bases
from mambagen.data.whole_file import byte_output
from mambagen.errors import InputError
from mambagen.pipelines.likelihood import LanguageModel
from mambagen.pipelines.variant_likelihoods import AFTER, CONTEXT, Site, VariantScorer, plain

LLR, FORWARD, REVERSE, SKIPPED = "MAMBAGEN_LLR", "MAMBAGEN_LLR_FWD", "MAMBAGEN_LLR_REV", "MAMBAGEN_SKIPPED"
OWN = (LLR, FORWARD, REVERSE, SKIPPED)
LINES_AT_ONCE = 1024  # at least; an eighth of a batch's tokens where that is more, which a GPU needs to be busy
CHARACTERS_AT_ONCE = 1 << 26  # of lines that are held; a line may carry thousands of genotypes

Said = Callable[[int, int], None]  # told how many lines are done, and of how many


@dataclass(frozen=True)
class ScoredLine:
    """A line of the VCF and the scores of its ALTs in nats, (ALTs,) each; NaN for one that could not be scored."""

    line: VcfLine
    forward: NDArray[np.float64]
    reverse: NDArray[np.float64]

    @property
    def llr(self) -> NDArray[np.float64]:
        """The mean of the strands."""
        return (self.forward + self.reverse) / 2

    @property
    def text(self) -> str:
        """The line as it was, with the scores among its INFO."""
        fields = []
        missing = np.isnan(self.llr)
        if not missing.all():
            for name, values in ((LLR, self.llr), (FORWARD, self.forward), (REVERSE, self.reverse)):
                fields.append(f"{name}={','.join('.' if np.isnan(v) else f'{v:.4f}' for v in values)}")
        if missing.any():
            fields.append(SKIPPED)
        return self.line.with_info(OWN, fields)


@dataclass(frozen=True)
class VariantScores:
    """A row an ALT, in the order of the file."""

    record: NDArray[np.str_]
    position: NDArray[np.int64]  # POS: from 1
    reference: NDArray[np.str_]
    alternate: NDArray[np.str_]
    llr: NDArray[np.float64]  # nats, the mean of the strands; NaN where the ALT could not be scored
    forward: NDArray[np.float64]
    reverse: NDArray[np.float64]
    line: NDArray[np.int64]  # of the file, from 1


@dataclass
class VariantJob:
    """A VCF and its genome, held against each other: every line was checked when this exists."""

    vcf: Vcf
    store: SequenceStore
    lines: int = field(init=False, default=0)

    @classmethod
    def open(cls, vcf: Path | str, fasta: Sequence[Path | str], model: LanguageModel) -> "VariantJob":
        """Read both; only the records that the VCF names are kept.

        Raises InputError for a file that cannot be used, and for the first line whose record is not in the FASTA, whose
        position is past its end, or whose REF is not what stands there: it names the line.
        """
        variants = Vcf(vcf)
        names = {line.chrom for line in variants}
        job = cls(variants, SequenceStore.from_files(fasta, model.tokenizer, names.__contains__))
        try:
            job.store.raise_failures()
            for line in variants:
                job._check(line)
                job.lines += 1
        except BaseException:
            job.store.close()
            raise
        return job

    def _check(self, line: VcfLine) -> None:
        record = self._record(line)
        end = line.start + len(line.reference)
        if end > record.length:
            raise line.fault(
                f"REF ends at base {end} of '{record.id}', which has {record.length}; is the VCF of this assembly?"
            )
        there = self.store.read(record, line.start, end)
        given = self.store.tokenizer.encode(line.reference.upper().encode())
        # N stands for the other codes too, which a VCF may not write; and REF is often N where ALT is symbolic.
        if ((there != given) & (there != N) & (given != N)).any():
            letters = self.store.tokenizer.decode(there)
            raise line.fault(
                f"REF is '{_short(line.reference)}', but the sequence has '{_short(letters)}' at {record.id}:"
                f"{line.start + 1}; is the VCF of this assembly?"
            )

    def _record(self, line: VcfLine) -> StoredRecord:
        record = self.store.find(line.chrom)
        if record is None:
            raise line.fault(
                f"there is no record '{line.chrom}' in the FASTA; where names differ (chr1 and 1), rename those of the "
                "VCF (bcftools annotate --rename-chrs)"
            )
        return record

    def site(self, line: VcfLine) -> tuple[Site, NDArray[np.bool_]]:
        """The ALTs that can be scored, and which of the line's they are."""
        record, end = self._record(line), line.start + len(line.reference)
        known = is_bases(line.reference) and plain(self.store.read(record, line.start, end))
        can = np.array([known and is_bases(alternate) for alternate in line.alternates], dtype=bool)
        chosen = [alternate for alternate, yes in zip(line.alternates, can, strict=True) if yes]
        tokens = tuple(self.store.tokenizer.encode(alternate.upper().encode()) for alternate in chosen)
        return Site(record, line.start, end, tokens), can


def score_lines(job: VariantJob, scorer: VariantScorer, said: Said | None = None) -> Iterator[ScoredLine]:
    """Every line of the VCF, in order, with its scores."""
    held: list[VcfLine] = []
    size = done = 0
    at_once = max(LINES_AT_ONCE, scorer.model.batch_tokens // 8)

    def scored() -> Iterator[ScoredLine]:
        asked = [job.site(line) for line in held]
        forward, reverse = scorer.score(job.store, [site for site, _ in asked])
        at = 0
        for line, (site, can) in zip(held, asked, strict=True):
            strands = np.full((2, len(can)), np.nan)
            count = len(site.alternates)
            strands[0, can], strands[1, can] = forward[at : at + count], reverse[at : at + count]
            at += count
            yield ScoredLine(line, strands[0], strands[1])

    for line in job.vcf:
        held.append(line)
        size += sum(map(len, line.columns))
        if len(held) == at_once or size > CHARACTERS_AT_ONCE:
            yield from scored()
            done += len(held)
            if said:
                said(done, job.lines)
            held, size = [], 0
    yield from scored()


def header_lines(job: VariantJob, scorer: VariantScorer, model_name: str) -> list[str]:
    """The VCF's header, with what our INFO fields mean."""
    how = (
        f"log-likelihood ratio of ALT against REF in nats: positive where the model finds ALT likelier; summed over "
        f"the allele and the {scorer.after} reference bases behind it, with {scorer.context} to {2 * scorer.context} "
        f"bases of context in front"
    )
    model_name = model_name.replace('"', "'").replace("\\", "/")
    return job.vcf.header_with(
        {
            LLR: ("A", "Float", f"Mean over both strands of the {how}; mambagen score-variants, model {model_name}"),
            FORWARD: ("A", "Float", f"On the plus strand: {how}"),
            REVERSE: ("A", "Float", f"On the minus strand, whose context is the bases to the right: {how}"),
            SKIPPED: (
                "0",
                "Flag",
                "An ALT of this line has no score: it is symbolic, a breakend or *, or it or REF holds a letter "
                "that is not A, C, G or T",
            ),
        }
    )


def write_scored_vcf(
    vcf: Path | str,
    fasta: Sequence[Path | str],
    scorer: VariantScorer,
    out: Path | str | None = None,
    model_name: str = "",
    said: Said | None = None,
) -> None:
    """Write a VCF (``-``: from stdin) with the scores among its INFO, to a file that is whole or not there, or stdout.

    Errors as `VariantJob.open`: all lines are checked before the first is scored.
    """
    with ExitStack() as stack:
        path = Path(vcf)
        if str(vcf) == "-":  # it is read three times
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "stdin"
            with open(path, "wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
        try:
            job = VariantJob.open(path, fasta, scorer.model)
        except InputError as error:
            raise InputError(str(error).replace(str(path), "stdin") if str(vcf) == "-" else str(error)) from None
        stack.callback(job.store.close)
        stream = stack.enter_context(byte_output(out))
        for text in header_lines(job, scorer, model_name):
            stream.write(text.encode("utf-8", errors="surrogateescape") + b"\n")
        for line in score_lines(job, scorer, said):
            stream.write(line.text.encode("utf-8", errors="surrogateescape") + b"\n")


def score_variants(
    vcf: Path | str,
    fasta: Sequence[Path | str],
    model: LanguageModel,
    context: int = CONTEXT,
    after: int = AFTER,
    said: Said | None = None,
) -> VariantScores:
    """The scores as arrays; errors as `VariantJob.open`."""
    scorer = VariantScorer(model, context, after)
    job = VariantJob.open(vcf, fasta, model)
    rows: list[tuple[str, int, str, str, int]] = []
    strands: list[NDArray[np.float64]] = [np.empty((2, 0))]
    with job.store:
        for scored in score_lines(job, scorer, said):
            line = scored.line
            rows += [(line.chrom, line.start + 1, line.reference, alt, line.line) for alt in line.alternates]
            strands.append(np.stack([scored.forward, scored.reverse]))
    forward, reverse = np.concatenate(strands, 1)
    record, position, reference, alternate, number = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    return VariantScores(
        np.array(record, dtype=str),
        np.array(position, dtype=np.int64),
        np.array(reference, dtype=str),
        np.array(alternate, dtype=str),
        (forward + reverse) / 2,
        forward,
        reverse,
        np.array(number, dtype=np.int64),
    )


def _short(text: str) -> str:
    return text if len(text) <= 20 else f"{text[:20]}..."
