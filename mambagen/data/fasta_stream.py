"""Records of a FASTA file in pieces, so that a chromosome passes through in the memory of a block.

The same checks and messages as `mambagen.data.fasta.read_records`, which holds a record at a time. The records of
GenBank and 2bit files come as one piece each.
"""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambagen.data import fasta
from mambagen.data.byte_blocks import BLOCK, shown, text_blocks
from mambagen.data.record import Record
from mambagen.data.two_bit import is_two_bit, two_bit_records
from mambagen.errors import InputError

log = logging.getLogger("mambagen")


@dataclass(frozen=True)
class Piece:
    """Some of a record's letters, in order; every record has one with ``last`` set, which may be empty."""

    id: str
    path: str  # as it was given; "stdin" for -
    line: int  # of the record's header, from 1
    letters: NDArray[np.uint8]  # (length,) bytes, in their case
    last: bool


def stream_pieces(path: str | Path, block_size: int = BLOCK) -> Iterator[Piece]:
    """The records of a FASTA or GenBank file in pieces of at most about ``block_size`` letters; ``-`` reads stdin.

    Empty records come too, with a warning. Raises InputError as `read_records` does, also where it finds the fault
    after pieces of the same record were given.
    """
    lines_of: dict[str, int] = {}
    bases = length = 0
    for piece in _pieces(path, block_size):
        if lines_of.get(piece.id, piece.line) != piece.line:
            raise InputError.at(
                piece.path,
                piece.line,
                f"record '{piece.id}' occurs twice (line {lines_of[piece.id]} too); rename one",
            )
        lines_of[piece.id] = piece.line
        length += len(piece.letters)
        bases += len(piece.letters)
        if piece.last:
            if length == 0:
                log.warning("%s:%d: record '%s' is empty", piece.path, piece.line, piece.id)
            length = 0
        yield piece
    if bases == 0:
        raise InputError.at(shown(path), None, f"it holds no sequence: all of its {len(lines_of)} records are empty")


def _pieces(path: str | Path, block_size: int) -> Iterator[Piece]:
    """Of a file of any of the formats; only FASTA is cut."""
    name = shown(path)
    if is_two_bit(path):
        yield from map(_whole, two_bit_records(path))
        return
    blocks = text_blocks(path, block_size)
    start, line = b"", 1
    for block in blocks:
        start += block
        first = start.lstrip()  # blank lines may stand before the first record
        line += start[: len(start) - len(first)].count(b"\n")
        start = first
        if len(start) >= 16:  # enough to tell the format by
            break
    text = itertools.chain([start], blocks)
    if start.startswith(b">"):
        yield from _fasta_pieces(name, line, text)
    elif start.startswith(b"LOCUS"):
        yield from map(_whole, fasta._genbank_records(name, text))
    else:
        raise InputError.at(name, line if start else None, fasta._why_neither(start))


def _whole(record: Record) -> Piece:
    return Piece(record.id, record.path, record.line, record.sequence, True)


def _fasta_pieces(name: str, line: int, blocks: Iterator[bytes]) -> Iterator[Piece]:
    """Parse FASTA that begins with ``>`` at ``line``."""
    header: list[bytes] | None = []  # pieces of the header line being read; None while reading sequence
    current: fasta._Sequence | None = None
    line_start = True  # is the next byte the first of its line?
    for block in blocks:
        at = 0
        while at < len(block):
            if header is not None:
                end = block.find(b"\n", at)
                header.append(block[at:] if end < 0 else block[at:end])
                if end < 0:
                    break
                current = fasta._begin(name, line, b"".join(header))
                header, line_start = None, True
                line += 1
                at = end + 1
            else:
                assert current is not None
                end = fasta._next_header(block, at, line_start)
                if end > at:
                    line += current.add(block[at:end], line)
                    line_start = block[end - 1] == ord("\n")
                if end < len(block):
                    yield _taken(current, last=True)
                    header = []
                else:
                    yield _taken(current, last=False)
                at = end
    if header is not None:
        current = fasta._begin(name, line, b"".join(header))
    assert current is not None
    yield _taken(current, last=True)


def _taken(sequence: fasta._Sequence, last: bool) -> Piece:
    """What has gathered in ``sequence``, which is then empty; at the end it is judged as a whole."""
    if last:
        letters = sequence.record().sequence
    else:
        letters = np.frombuffer(b"".join(sequence.pieces), dtype=np.uint8)
    sequence.pieces.clear()
    return Piece(sequence.id, sequence.path, sequence.line, letters, last)
