"""DNA records out of FASTA, GenBank and 2bit files, one at a time; ``fasta_stream`` says what is read and refused.

U is read as T wherever tokens are made; with ``rna`` the letters themselves become T.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambagen.data.byte_blocks import BLOCK
from mambagen.data.fasta_stream import stream_pieces
from mambagen.data.record import Record

__all__ = ["Record", "as_dna", "read_records"]

log = logging.getLogger("mambagen")

_RNA_TO_DNA = bytes.maketrans(b"Uu", b"Tt")


def read_records(
    path: str | Path, block_size: int = BLOCK, *, rna: bool = False, keep_empty: bool = False, warn_of_rna: bool = False
) -> Iterator[Record]:
    """The records of a FASTA, GenBank or 2bit file, in order; ``-`` reads stdin. The format is told by the content.

    Args:
        rna: U and u become T and t in the records' letters.
        warn_of_rna: as `stream_pieces`.
        keep_empty: empty records come too, with length 0, for jobs that answer every record. They are warned of anyway.

    Raises InputError, naming file, line and record, where the file is not such a file, a record is not DNA or has no
    name, two records share a name, or none holds a sequence.
    """
    letters: list[NDArray[np.uint8]] = []
    for piece in stream_pieces(path, block_size, warn_of_rna):
        letters.append(as_dna(piece.letters) if rna else piece.letters)
        if piece.last:
            letters = [part for part in letters if len(part)] or letters[:1]
            sequence = letters[0] if len(letters) == 1 else np.concatenate(letters)
            letters = []
            if len(sequence) or keep_empty:
                yield Record(piece.id, piece.description, sequence, piece.path, piece.line)


def as_dna(sequence: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The (length,) letters with U as T and u as t; the array itself where there are none."""
    text = sequence.tobytes()
    return np.frombuffer(text.translate(_RNA_TO_DNA), dtype=np.uint8) if b"U" in text or b"u" in text else sequence
