"""Vectors of DNA out of a trained model: one a record or region, or one a base, for any model of the package.

From Python:

    from mambagen.pipelines.embed import Embedder
    Embedder("runs/my-run").embed(b"ACGTACGT")             # (d_model,) float32, the mean over the bases

A causal model reads a sequence of any length in chunks with the carried state. An encoder sees both sides at once: a
sequence longer than its window is read in windows side by side.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.sequence_store import SequenceStore
from mambagen.data.whole_file import whole_file
from mambagen.errors import UsageError
from mambagen.models.heads import MaskedLM, SequenceClassifier
from mambagen.models.mamba_lm import MambaLM, State
from mambagen.models.reverse_complement import both_strands, turn
from mambagen.pipelines.dna_models import (
    BATCH_TOKENS,
    DEFAULT_MODEL,
    choose_precision,
    load_dna_model,
    mixed_precision,
)
from mambagen.pipelines.embedding_files import check_suffix, open_embeddings
from mambagen.pipelines.likelihood import BATCHES_HELD, Span
from mambagen.pipelines.score import spans_of
from mambagen.pipelines.sequence_classification import batches_of_like_length, padded
from mambagen.training.loop import choose_device

Pool = Literal["mean", "last", "none"]
Vectors = NDArray[np.float32]

WINDOW = 1 << 15  # bases that an encoder reads at once


class Embedder:
    """A model that is asked for hidden vectors."""

    def __init__(
        self,
        model: Path | str | nn.Module = DEFAULT_MODEL,
        layer: int | None = None,
        device: str = "auto",
        batch_tokens: int | None = None,
        precision: str = "fp32",
        window: int = WINDOW,
        tokenizer: DnaTokenizer | None = None,
    ) -> None:
        """
        Args:
            model: a folder, the name of a built-in model, or a model in memory (with its ``tokenizer``): a causal
                language model, a masked one, or a classifier of sequences.
            layer: 0 for the embedding of the tokens, k for what the first k layers make of it; None for the last
                layer's output after the model's last norm.
            batch_tokens: bases that go through the model at once (default by device).
            window: of encoders.

        Raises:
            ModelError: the folder holds no such model of DNA. UsageError: there is no such layer, device or precision.
        """
        self.device = choose_device(device)
        self.model: Any
        if isinstance(model, nn.Module):
            self.model, self.tokenizer = model.to(self.device).eval(), tokenizer or DnaTokenizer()
        else:
            kinds = [MambaLM.kind, MaskedLM.kind, SequenceClassifier.kind]
            self.model, self.tokenizer = load_dna_model(model, self.device, kinds)
        self.precision = choose_precision(precision, self.device)
        self.batch_tokens = batch_tokens or BATCH_TOKENS[self.device.type]
        self.causal = isinstance(self.model, MambaLM)
        self._trunk = self.model.backbone if self.causal else self.model.trunk
        self.window = max(1, window)
        layers = len(self._trunk.layers)
        if layer is not None and not 0 <= layer <= layers:
            raise UsageError(
                f"--layer {layer}: the model has layers 1 to {layers}, and 0 for the embedding of the tokens"
            )
        self.layer = layer
        self.dimension = int(self._trunk.config.d_model)

    def embed(self, sequence: bytes | NDArray[np.uint8], pool: Pool = "mean") -> Vectors:
        """(d_model,) of a sequence of letters, or (length, d_model) where ``pool`` is "none"."""
        with SequenceStore(self.tokenizer) as store:
            record = store.put("sequence", self.tokenizer.encode(sequence))
            pieces = [vectors for _, _, vectors in self.spans(store, [Span(record, 0, len(record))], pool)]
        return np.concatenate(pieces) if pool == "none" else pieces[0][0]

    def spans(self, store: SequenceStore, spans: Sequence[Span], pool: Pool) -> Iterator[tuple[int, int, Vectors]]:
        """The vectors of spans, in their order: (index of the span, first base, vectors) pieces.

        Pooled, a span is one piece of one row, which is NaN where it has no base; else its pieces hold a row a base.
        """
        if pool not in get_args(Pool):
            raise UsageError(f"pool {pool!r}: it must be {', '.join(get_args(Pool))}")
        held: list[int] = []
        bases = 0
        for at, span in enumerate(spans):
            if len(span) > (self.batch_tokens if self.causal else min(self.window, self.batch_tokens)):
                yield from self._short(store, spans, held, pool)
                held, bases = [], 0
                yield from self._long(store, at, span, pool)
                continue
            held.append(at)
            bases += len(span)
            if bases > BATCHES_HELD * self.batch_tokens:
                yield from self._short(store, spans, held, pool)
                held, bases = [], 0
        yield from self._short(store, spans, held, pool)

    def _short(
        self, store: SequenceStore, spans: Sequence[Span], held: Sequence[int], pool: Pool
    ) -> Iterator[tuple[int, int, Vectors]]:
        """Spans side by side."""
        found: dict[int, Vectors] = {}
        filled = [at for at in held if len(spans[at])]
        for rows in batches_of_like_length([len(spans[at]) for at in filled], self.batch_tokens):
            chosen = [filled[row] for row in rows]
            tensors = padded([store.read(spans[at].record, spans[at].start, spans[at].end) for at in chosen])
            hidden, _ = self._hidden(tensors["tokens"], tensors.get("real"), None)
            for row, at in enumerate(chosen):
                found[at] = _pooled(hidden[row, : len(spans[at])], pool)
        for at in held:
            empty = np.full((0 if pool == "none" else 1, self.dimension), np.nan, dtype=np.float32)
            yield at, spans[at].start, found.get(at, empty)

    def _long(self, store: SequenceStore, at: int, span: Span, pool: Pool) -> Iterator[tuple[int, int, Vectors]]:
        """One span in chunks (or windows)."""
        state = self.model.allocate_state(1) if self.causal else None
        size = self.batch_tokens if self.causal else self.window
        total = torch.zeros(self.dimension, dtype=torch.float64, device=self.device)
        last = np.empty((1, self.dimension), np.float32)
        for start in range(span.start, span.end, size):
            tokens = store.read(span.record, start, min(start + size, span.end))
            hidden, state = self._hidden(torch.from_numpy(tokens.copy())[None], None, state)
            if pool == "none":
                yield at, start, _pooled(hidden[0], pool)
            elif pool == "mean":
                total += hidden[0].sum(0, dtype=torch.float64)
            else:
                last = _pooled(hidden[0], pool)
        if pool != "none":
            yield at, span.start, (total / len(span)).float().cpu().numpy()[None] if pool == "mean" else last

    def _hidden(self, tokens: Tensor, mask: Tensor | None, state: State | None) -> tuple[Tensor, State | None]:
        """(batch, length, d_model) of tokens (batch, length), and the state after them where one is given.

        A causal model needs no mask: padding stands behind what is real.
        """
        tokens = tokens.to(self.device)
        mask = None if mask is None or self.causal else mask.to(self.device)
        with torch.no_grad(), mixed_precision(self.device, self.precision):
            if self.causal:
                with self._tap() as seen:
                    out, state = self._trunk(tokens, state)
                return (out if not seen else seen[-1]).float(), state
            if not getattr(self.model.config, "equivariant", False):
                return self._encoded(tokens, mask).float(), None
            here, there = both_strands(self._encoded, tokens, mask, self.model.complement)
            return ((here + turn(there, mask)) / 2).float(), None

    def _encoded(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        with self._tap() as seen:
            out: Tensor = self._trunk(tokens, mask)
        return seen[-1] if seen else out

    def _tap(self) -> "_Tap":
        """Catches what the asked layer puts out; nothing where it is the model's own output."""
        if self.layer is None:
            return _Tap(None)
        return _Tap(self._trunk.embedding if self.layer == 0 else self._trunk.layers[self.layer - 1])


def embed_files(
    model: Embedder,
    paths: Sequence[Path | str],
    out: Path | str,
    regions: Path | str | None = None,
    pool: Pool = "mean",
    model_name: str = "",
    said: Callable[[int, int], None] | None = None,
    rna: bool = False,
) -> None:
    """Write the vectors of all records, or of the regions of a BED file, as `embedding_files` says.

    The file is there when it is whole. A FASTA that cannot be read does not keep the others from being done; one that
    holds U is warned of unless it is meant as ``rna``: U is read as T either way.

    Raises InputError at the end, naming the files that could not be read; UsageError for a name of no known suffix.
    """
    kind = check_suffix(out)
    with SequenceStore.from_files(paths, model.tokenizer, warn_of_rna=not rna) as store:
        if not store.records:
            store.raise_failures()
        spans = spans_of(store, regions, context=0, apart=True)
        total = sum(map(len, spans))
        about = {"model": model_name, "layer": model.layer, "pool": pool}
        with (
            whole_file(out) as partial,
            open_embeddings(partial, kind, spans, model.dimension, pool != "none", about) as file,
        ):
            done = 0
            for at, start, vectors in model.spans(store, spans, pool):
                file.write(at, start, vectors)
                done += len(spans[at]) if pool != "none" else len(vectors)
                if said:
                    said(done, total)
        store.raise_failures()


class _Tap:
    """While open, holds the outputs of a module."""

    def __init__(self, module: nn.Module | None) -> None:
        self._module, self._seen = module, list[Tensor]()

    def __enter__(self) -> list[Tensor]:
        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            self._seen.append(output[0] if isinstance(output, tuple) else output)

        self._hook = None if self._module is None else self._module.register_forward_hook(see)
        return self._seen

    def __exit__(self, *_: object) -> None:
        if self._hook is not None:
            self._hook.remove()


def _pooled(hidden: Tensor, pool: Pool) -> Vectors:
    """(1, d_model) of (length, d_model), or all of it."""
    if pool == "mean":
        hidden = hidden.mean(0, keepdim=True)
    elif pool == "last":
        hidden = hidden[-1:]
    vectors: Vectors = hidden.cpu().numpy()
    return vectors
