"""Per-base log-likelihoods of DNA under a causal language model, in pieces of any sequence.

The likelihood of a base is a probability among the letters that the tokenizer predicts (A, C, G and T; N too where the
model was trained to predict it), given all bases before it in its span. NaN stands where there is none: at the first
base of a span, which nothing is before, and at N.

A span is read in chunks with the carried state, so memory does not grow with it; many short spans go through the model
side by side. Neither changes a number by more than 1e-5.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mambagen.data.dna_tokens import PAD, DnaTokenizer
from mambagen.data.sequence_store import SequenceStore, StoredRecord
from mambagen.models.mamba_lm import MambaLM, State
from mambagen.pipelines.dna_models import BATCH_TOKENS, DEFAULT_MODEL, choose_precision, load_dna_model, mixed_precision
from mambagen.pipelines.sequence_classification import batches_of_like_length
from mambagen.training.loop import choose_device

Scores = NDArray[np.float32]

BATCHES_HELD = 16  # of short spans, which are sorted by length before they are read


@dataclass(frozen=True)
class Span:
    """Bases [start, end) of a record, 0-based; the model reads up to ``lead`` bases in front of them first."""

    record: StoredRecord
    start: int
    end: int
    lead: int = 0
    name: str = ""  # of a region

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def reads(self) -> int:
        """Bases that go through the model for one strand, at most."""
        return len(self) + self.lead


class LanguageModel:
    """A causal language model of DNA, ready to be asked: the model, its tokenizer, and how it is run."""

    def __init__(
        self,
        model: Path | str | MambaLM = DEFAULT_MODEL,
        device: str = "auto",
        batch_tokens: int | None = None,
        precision: str = "fp32",
        tokenizer: DnaTokenizer | None = None,
    ) -> None:
        """
        Args:
            model: a folder, the name of a built-in model, or a model in memory (with its ``tokenizer``).
            batch_tokens: bases that go through the model at once (default by device).
            precision: "fp32", or "bf16" for matrix products on a GPU, which is faster and less exact.

        Raises:
            ModelError: the folder holds no causal language model of DNA. UsageError: no such device or precision.
        """
        where = choose_device(device)
        if isinstance(model, MambaLM):
            self.model, self.tokenizer = model.to(where).eval(), tokenizer or DnaTokenizer()
        else:
            self.model, self.tokenizer = load_dna_model(model, where, [MambaLM.kind])
        self.device, self.precision = where, choose_precision(precision, where)
        self.batch_tokens = batch_tokens or BATCH_TOKENS[where.type]
        self._letters = torch.tensor(self.tokenizer.letters, device=where)
        # token id -> column of the log-probabilities; the last column is NaN
        column = torch.full((256,), len(self.tokenizer.letters), dtype=torch.long)
        column[list(self.tokenizer.letters)] = torch.arange(len(self.tokenizer.letters))
        self._column = column.to(where)

    def log_probabilities(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Of the letter after each of (batch, length) tokens: (batch, length, letters) float32; and the state."""
        with torch.no_grad(), mixed_precision(self.device, self.precision):
            logits, after = self.model(tokens, state)
            assert after is not None
            return logits.float()[..., self._letters].log_softmax(-1), after

    def taken(self, log_probabilities: Tensor, tokens: Tensor) -> Tensor:
        """The log-probability of each token (...) in (..., letters) of them; NaN where it is none of the letters."""
        nan = log_probabilities.new_full((*log_probabilities.shape[:-1], 1), torch.nan)
        column = self._column[tokens.int()]
        return torch.cat([log_probabilities, nan], -1).gather(-1, column[..., None]).squeeze(-1)

    def score(self, sequence: bytes | NDArray[np.uint8], both_strands: bool = False) -> Scores:
        """(length,) log-likelihoods in nats of a sequence of letters; NaN where there is none."""
        with SequenceStore(self.tokenizer) as store:
            record = store.put("sequence", self.tokenizer.encode(sequence))
            pieces = [scores for _, _, scores in self.spans(store, [Span(record, 0, len(record))], both_strands)]
        return np.concatenate([np.empty(0, np.float32), *pieces])

    def spans(
        self, store: SequenceStore, spans: Sequence[Span], both_strands: bool = False
    ) -> Iterator[tuple[int, int, Scores]]:
        """The scores of spans, in their order: (index of the span, first base, log-likelihoods in nats) pieces.

        A span of no bases gives one empty piece. With ``both_strands`` a base's value is the mean of what it has on its
        own strand and, complemented, on the other (where one has none, the other's).
        """
        held: list[int] = []
        bases = 0
        for at, span in enumerate(spans):
            if span.reads > self.batch_tokens:
                yield from self._short(store, spans, held, both_strands)
                held, bases = [], 0
                for start, scores in self._long(store, span, both_strands):
                    yield at, start, scores
                continue
            held.append(at)
            bases += span.reads
            if bases > BATCHES_HELD * self.batch_tokens:
                yield from self._short(store, spans, held, both_strands)
                held, bases = [], 0
        yield from self._short(store, spans, held, both_strands)

    # ---- short spans, side by side ----------------------------------------------------------------------------------

    def _short(
        self, store: SequenceStore, spans: Sequence[Span], held: Sequence[int], both_strands: bool
    ) -> Iterator[tuple[int, int, Scores]]:
        chosen = [spans[at] for at in held]
        found = self._batched(store, chosen, False)
        if both_strands:
            found = [_mean(a, b[::-1]) for a, b in zip(found, self._batched(store, chosen, True), strict=True)]
        for at, scores in zip(held, found, strict=True):
            yield at, spans[at].start, scores

    def _batched(self, store: SequenceStore, spans: Sequence[Span], minus: bool) -> list[Scores]:
        places = [_place(span, minus) for span in spans]
        out: list[Scores] = [np.empty(0, np.float32) for _ in spans]
        for rows in batches_of_like_length([end - lead for lead, _, end in places], self.batch_tokens):
            longest = max(places[row][2] - places[row][0] for row in rows)
            if longest == 0:
                continue
            tokens = np.full((len(rows), longest), PAD, dtype=np.uint8)
            for line, row in enumerate(rows):
                lead, _, end = places[row]
                tokens[line, : end - lead] = store.read(spans[row].record, lead, end, minus)
            scores, _, _ = self.piece(torch.from_numpy(tokens), self.model.allocate_state(len(rows)), None)
            for line, row in enumerate(rows):
                lead, start, end = places[row]
                out[row] = scores[line, start - lead : end - lead].copy()
        return out

    def piece(self, tokens: Tensor, state: State, before: Tensor | None) -> tuple[Scores, State, Tensor]:
        """Scores (batch, length) of tokens, the state after them, and the log-probabilities of what comes next.

        ``before``: such log-probabilities (batch, letters) of the first token; None where nothing is before it.
        """
        tokens = tokens.to(self.device)
        ahead, state = self.log_probabilities(tokens, state)
        first = torch.full_like(ahead[:, :1], torch.nan) if before is None else before[:, None]
        scores = self.taken(torch.cat([first, ahead[:, :-1]], 1), tokens)
        return scores.cpu().numpy(), state, ahead[:, -1]

    # ---- a long span, in chunks -------------------------------------------------------------------------------------

    def _long(self, store: SequenceStore, span: Span, both_strands: bool) -> Iterator[tuple[int, Scores]]:
        """(first base, scores) of the chunks of a span."""
        if not both_strands:
            yield from self._streamed(store, span, False)
            return
        with tempfile.TemporaryFile() as other:  # the other strand's scores come in reverse: they wait here
            for start, scores in self._streamed(store, span, True):
                other.seek(4 * (span.record.length - start - len(scores) - span.start))
                other.write(scores[::-1].tobytes())
            for start, scores in self._streamed(store, span, False):
                other.seek(4 * (start - span.start))
                yield start, _mean(scores, np.frombuffer(other.read(4 * len(scores)), dtype=np.float32))

    def _streamed(self, store: SequenceStore, span: Span, minus: bool) -> Iterator[tuple[int, Scores]]:
        """Chunks of one strand, in that strand's coordinates."""
        lead, start, end = _place(span, minus)
        state, before = self.model.allocate_state(1), None
        for at in range(lead, end, self.batch_tokens):
            tokens = store.read(span.record, at, min(at + self.batch_tokens, end), minus)
            scores, state, before = self.piece(torch.from_numpy(tokens.copy())[None], state, before)
            skipped = max(0, start - at)
            if skipped < len(tokens):
                yield at + skipped, scores[0, skipped:]


def _place(span: Span, minus: bool) -> tuple[int, int, int]:
    """(where reading begins, start, end) of a span in the coordinates of its strand."""
    length = span.record.length
    start, end = (length - span.end, length - span.start) if minus else (span.start, span.end)
    return max(0, start - span.lead), start, end


def _mean(a: Scores, b: Scores) -> Scores:
    """The mean of two strands, or the one that there is."""
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, (a + b) / 2)).astype(np.float32)
