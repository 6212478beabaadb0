"""DNA as tokens: one token a base, with the ids of HyenaDNA's character tokenizer.

Letters become ids through a table of 256 entries, so that encoding runs at memory speed. What becomes of lower case, N
and the other IUPAC codes is a stated policy, kept in the checkpoint beside the weights.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, field_validator

CLS, SEP, BOS, MASK, PAD, RESERVED, UNK, A, C, G, T, N = range(12)
VOCABULARY = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", "A", "C", "G", "T", "N")

IGNORED = -100
"""A target that takes no part in the loss (the default ``ignore_index`` of ``torch.nn.functional.cross_entropy``)."""

UNAMBIGUOUS_CODES = b"ACGTNacgtn"
IUPAC_CODES = b"ACGTURYSWKMBDHVNacgturyswkmbdhvn"
"""The bytes that a DNA sequence may hold: the IUPAC nucleotide codes, and U, which is read as T."""

_BLOCK = 1 << 20

_COMPLEMENT = np.arange(256, dtype=np.uint8)
_COMPLEMENT[[A, C, G, T]] = [T, G, C, A]


class DnaTokenizer(BaseModel):
    """Base letters to ids and back, with the policy for letters that are not plain bases.

    ``lower_case``: "same" reads soft-masked letters as their upper case; "n" reads them as N.
    ``n``: "ignore" keeps N as a token of the input and leaves it out of the loss; "predict" makes it a target too.
    ``iupac``: every other IUPAC code becomes N (U becomes T).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["dna"] = "dna"
    lower_case: Literal["same", "n"] = "same"
    n: Literal["ignore", "predict"] = "ignore"
    iupac: Literal["n"] = "n"
    vocabulary: tuple[str, ...] = VOCABULARY

    @field_validator("vocabulary")
    @classmethod
    def _only_vocabulary(cls, vocabulary: tuple[str, ...]) -> tuple[str, ...]:
        if vocabulary != VOCABULARY:
            raise ValueError(f"the vocabulary must be {' '.join(VOCABULARY)}, in this order")
        return vocabulary

    @property
    def vocab_size(self) -> int:
        """Number of tokens, 12."""
        return len(self.vocabulary)

    @property
    def letters(self) -> tuple[int, ...]:
        """Ids of the tokens that the loss counts: A, C, G, T, and N where it is predicted."""
        return (A, C, G, T) if self.n == "ignore" else (A, C, G, T, N)

    def table(self) -> NDArray[np.uint8]:
        """The (256,) table from byte to id; bytes that are no DNA letter become UNK."""
        return np.frombuffer(_table(self.lower_case), dtype=np.uint8)

    def encode(self, sequence: bytes | bytearray | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Ids, (length,) uint8, of a sequence given as bytes or as a (length,) array of bytes."""
        letters = np.frombuffer(sequence, dtype=np.uint8) if isinstance(sequence, bytes | bytearray) else sequence
        if letters.dtype != np.uint8 or letters.ndim != 1:
            raise ValueError(f"expected one dimension of uint8, got {letters.ndim} of {letters.dtype}")
        table = _table(self.lower_case)
        ids = np.empty(letters.shape, dtype=np.uint8)
        # bytes.translate is ten times faster than numpy's take, which widens every index to 64 bits first; blocks that
        # fit the cache keep its two copies cheap.
        for start in range(0, len(letters), _BLOCK):
            block = letters[start : start + _BLOCK].tobytes().translate(table)
            ids[start : start + _BLOCK] = np.frombuffer(block, dtype=np.uint8)
        return ids

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The letters of one sequence of ids; special tokens appear by name, as in ``[PAD]``."""
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and not 0 <= int(array.min()) <= int(array.max()) < self.vocab_size):
            raise ValueError(f"expected one dimension of ids from 0 to {self.vocab_size - 1}")
        return "".join([self.vocabulary[i] for i in array.tolist()])

    def reverse_complement(self, ids: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The other strand, 5' to 3', along the last axis; N and the special tokens complement to themselves."""
        return reverse_complement(ids)

    def targets(self, ids: NDArray[np.uint8], dtype: type[np.signedinteger[Any]] = np.int64) -> NDArray[Any]:
        """Targets of the loss: the ids, ``IGNORED`` for special tokens and, unless predicted, for N.

        They are int64, as a loss takes them, or of another signed type: int8 is an eighth of the work and memory.
        """
        ignored = ids < A
        if self.n == "ignore":
            ignored |= ids == N
        targets = ids.astype(dtype)
        np.copyto(targets, dtype(IGNORED), where=ignored)
        return targets


@cache
def _table(lower_case: str) -> bytes:
    table = np.full(256, UNK, dtype=np.uint8)
    table[list(IUPAC_CODES)] = N
    for letters, id_ in ((b"Aa", A), (b"Cc", C), (b"Gg", G), (b"TtUu", T)):
        table[list(letters)] = id_
    if lower_case == "n":
        table[list(b"acgtu")] = N
    return table.tobytes()


def reverse_complement(ids: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The other strand of token ids, 5' to 3', along the last axis: A with T, C with G, the rest as it is."""
    flipped = np.ascontiguousarray(ids[..., ::-1])
    other = flipped.tobytes().translate(_COMPLEMENT.tobytes())
    return np.frombuffer(bytearray(other), dtype=np.uint8).reshape(ids.shape)
