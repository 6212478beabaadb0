"""Log-likelihood ratios of alternate alleles against the reference, in context, on arrays.

On one strand, with c bases of context in front of the site and a bases after it,

    LLR = sum log p(ALT + after | context) - sum log p(REF + after | context)

where the sums run over the allele and the a reference bases behind it, which both alleles share: what an allele does to
the likelihood of the sequence behind it counts. The other strand is the same on the reverse complement, with the sides
exchanged; the score is the mean of the two.

How it is computed (the cost is that of the ALT rows; the reference is all but free):

- A record is divided into cells of `context` bases. The sites of a cell share one context, which begins `context` bases
  in front of the cell: a site has between one and two times `context` bases before it, whatever other sites there are,
  so its score is a function of its place and alleles alone.
- The reference goes through the model once a cell, many cells side by side. Its log-probabilities, kept per base, give
  the REF side of every site as the difference of two sums.
- At every `STRIDE`-th base of a cell the state is at hand. An ALT row begins there: it is the few bases up to the site,
  the allele, and the bases after it, with the state of its cell copied in. Rows of all cells are run side by side.
- Cells are sorted by how far they must be read, and those that are done drop out of the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mambagen.data.dna_tokens import PAD, A, T, reverse_complement
from mambagen.data.sequence_store import SequenceStore, StoredRecord
from mambagen.errors import UsageError
from mambagen.models.mamba_lm import State
from mambagen.models.mamba_mixer import MambaState
from mambagen.pipelines.likelihood import LanguageModel
from mambagen.pipelines.sequence_classification import batches_of_like_length

Tokens = NDArray[np.uint8]

CONTEXT, AFTER = 1024, 256
KEPT = 1 << 24  # values of the reference that are held at once, at most
STRIDE = 64  # bases between two places where rows may begin: half of it is read again for an ALT, on average


@dataclass(frozen=True)
class Site:
    """Bases [start, end) of a record, 0-based, and the alleles that may stand in their place (tokens of A, C, G, T)."""

    record: StoredRecord
    start: int
    end: int
    alternates: tuple[Tokens, ...]


@dataclass(frozen=True)
class _Row:
    """An ALT to run: which one, where its row begins, and its tokens."""

    number: int  # of the ALT, over all sites
    cell: int  # row of the batch whose state it takes
    tokens: Tokens
    skip: int  # tokens in front of the allele


@dataclass
class _Cell:
    """A window of the reference and what is asked of it, in the coordinates of its strand."""

    record: StoredRecord
    anchor: int  # its first base
    end: int  # how far it is read
    asked: list[
        tuple[int, int, int, Sequence[Tokens], int]
    ]  # start, end, end of what follows, ALTs, number of the first


class VariantScorer:
    """Scores sites with a model; see the module's docstring."""

    def __init__(self, model: LanguageModel, context: int = CONTEXT, after: int = AFTER) -> None:
        """``context``: bases in front of a site, at least (fewer at a record's end). ``after``: bases behind it.

        Raises UsageError where they are no such numbers.
        """
        if context < 1 or after < 0:
            raise UsageError(f"context {context} and after {after}: they must be at least 1 and 0")
        self.model, self.context, self.after = model, context, after

    def score(self, store: SequenceStore, sites: Sequence[Site]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(forward, reverse) log-likelihood ratios in nats of all ALTs of all sites, in their order."""
        return self._strand(store, sites, False), self._strand(store, sites, True)

    def _strand(self, store: SequenceStore, sites: Sequence[Site], minus: bool) -> NDArray[np.float64]:
        out = np.zeros(sum(len(site.alternates) for site in sites))
        cells = sorted(self._cells(sites, minus), key=lambda cell: cell.anchor - cell.end)
        for batch in self._batches(cells):
            self._run(store, batch, minus, out)
        return out

    def _cells(self, sites: Sequence[Site], minus: bool) -> list[_Cell]:
        """The windows that the sites need."""
        cells: dict[tuple[int, int], _Cell] = {}
        number = 0
        for site in sites:
            if not site.alternates:
                continue
            length = site.record.length
            start, end = (length - site.end, length - site.start) if minus else (site.start, site.end)
            behind = min(length, end + self.after)
            which = start // self.context
            anchor = max(0, (which - 1) * self.context)
            cell = cells.setdefault((site.record.offset, which), _Cell(site.record, anchor, 0, []))
            alternates = [reverse_complement(a) for a in site.alternates] if minus else site.alternates
            cell.asked.append((start, end, behind, alternates, number))
            cell.end = max(cell.end, behind)
            number += len(site.alternates)
        return list(cells.values())

    def _batches(self, cells: Sequence[_Cell]) -> Iterator[list[_Cell]]:
        """Cells that are read side by side; fewer where an allele is so long that the widest would fill the memory."""
        at = 0
        while at < len(cells):
            widest = cells[at].end - cells[at].anchor
            rows = max(1, min(self.model.batch_tokens // self.context, KEPT // widest))
            yield list(cells[at : at + rows])
            at += rows

    def _run(self, store: SequenceStore, cells: Sequence[_Cell], minus: bool, out: NDArray[np.float64]) -> None:
        """Score the sites of some cells, which are sorted by length, the longest first."""
        widths = np.array([cell.end - cell.anchor for cell in cells])
        window = np.full((len(cells), int(widths[0])), PAD, dtype=np.uint8)
        for row, cell in enumerate(cells):
            window[row, : widths[row]] = store.read(cell.record, cell.anchor, cell.end, minus)
        waiting: dict[int, list[_Row]] = {}  # rows by the place where they begin
        for row, cell in enumerate(cells):
            for start, end, behind, alternates, number in cell.asked:
                at = (start - cell.anchor) // STRIDE * STRIDE
                head = window[row, at : start - cell.anchor]
                tail = window[row, end - cell.anchor : behind - cell.anchor]
                for k, allele in enumerate(alternates):
                    tokens = np.concatenate([head, allele, tail])
                    waiting.setdefault(at, []).append(_Row(number + k, row, tokens, len(head)))

        state, before = self.model.model.allocate_state(len(cells)), None
        known = [np.zeros((len(cells), 1))]  # log-probabilities of the reference; sums begin with 0
        for at, end in self._steps(sorted(waiting), widths):
            active = int((widths > at).sum())  # at least one
            state, before = _rows(state, slice(active)), None if before is None else before[:active]
            if at in waiting:
                self._run_alternates(waiting[at], state, before, out)
            scores, state, before = self._piece(torch.from_numpy(window[:active, at:end].copy()), state, before)
            known.append(np.pad(scores, ((0, len(cells) - active), (0, 0))))
        sums = np.cumsum(np.concatenate(known, 1), 1)
        for row, cell in enumerate(cells):
            for start, _, behind, alternates, number in cell.asked:
                reference = sums[row, behind - cell.anchor] - sums[row, start - cell.anchor]
                out[number : number + len(alternates)] -= reference

    def _steps(self, places: Sequence[int], widths: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """Pieces in which the windows are read: from one place where rows begin to the next, and none too large."""
        at, last = 0, int(widths[0])
        for border in [*[place for place in places if 0 < place < last], last]:
            while at < border:
                most = max(1, self.model.batch_tokens // max(1, int((widths > at).sum())))
                end = min(border, at + most)
                yield at, end
                at = end

    def _run_alternates(
        self, rows: Sequence[_Row], state: State, before: Tensor | None, out: NDArray[np.float64]
    ) -> None:
        """Add to ``out`` the log-likelihood of allele and what follows of each row."""
        for chosen in batches_of_like_length([len(row.tokens) for row in rows], self.model.batch_tokens):
            batch = [rows[i] for i in chosen]
            longest = max(len(row.tokens) for row in batch)
            if longest == 0:
                continue
            tokens = np.full((len(batch), longest), PAD, dtype=np.uint8)
            for line, row in enumerate(batch):
                tokens[line, : len(row.tokens)] = row.tokens
            which = torch.tensor([row.cell for row in batch], device=self.model.device)
            here, ahead = _rows(state, which), None if before is None else before[which]
            most = max(1, self.model.batch_tokens // len(batch))  # an allele may be longer than a batch
            parts = []
            for piece in torch.from_numpy(tokens).split(most, 1):
                scores, here, ahead = self._piece(piece, here, ahead)
                parts.append(scores)
            scores = np.concatenate(parts, 1)
            for line, row in enumerate(batch):
                out[row.number] += scores[line, row.skip : len(row.tokens)].sum()

    def _piece(self, tokens: Tensor, state: State, before: Tensor | None) -> tuple[NDArray[np.float64], State, Tensor]:
        """As `LanguageModel.piece`, with 0 where a token has no likelihood."""
        scores, state, ahead = self.model.piece(tokens, state, before)
        return np.nan_to_num(scores.astype(np.float64), copy=False), state, ahead


def _rows(state: State, which: slice | Tensor) -> State:
    return tuple(MambaState(layer.conv[which], layer.ssm[which]) for layer in state)


def plain(tokens: Tokens) -> bool:
    """Are all of these tokens A, C, G or T?"""
    return bool(((tokens >= A) & (tokens <= T)).all())
