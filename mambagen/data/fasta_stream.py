"""DNA records out of FASTA, GenBank and 2bit files in pieces: a chromosome passes through in the memory of a block.

Plain, gzip or bgzip, any line ends, from a path or from stdin. A file is checked as it is read: what is no DNA sequence
is refused with its file, line and record. Blanks at the end of a line are dropped, and every IUPAC nucleotide code is
let through. The records of GenBank and 2bit files come as one piece each.
"""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambagen.data.byte_blocks import BLOCK, shown, text_blocks
from mambagen.data.genbank import genbank_records
from mambagen.data.growing_sequence import GrowingSequence, shortened
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
    description: str = ""  # the header's text after the id


def stream_pieces(path: str | Path, block_size: int = BLOCK, warn_of_rna: bool = False) -> Iterator[Piece]:
    """The records of a FASTA, GenBank or 2bit file in pieces of about ``block_size`` letters; ``-`` reads stdin.

    The format is told by the content. Empty records come too, with a warning. With ``warn_of_rna`` the first record of
    the file that holds U is warned of, as it is read as T wherever tokens are made. Raises InputError, naming file,
    line and record, where the file is not such a file, a record is not DNA or has no name, two records share a name, or
    none holds a sequence; the fault may be found after pieces of the same record were given.
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
        if warn_of_rna and _holds_u(piece.letters):
            warn_of_rna = False
            log.warning(
                "%s:%d: record '%s' holds U, which is read as T; say --rna where that is meant",
                *(piece.path, piece.line, piece.id),
            )
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
        yield from map(_whole, genbank_records(name, text))
    else:
        raise InputError.at(name, line if start else None, _why_neither(start))


def _holds_u(letters: NDArray[np.uint8]) -> bool:
    text = letters.tobytes()
    return b"U" in text or b"u" in text


def _whole(record: Record) -> Piece:
    return Piece(record.id, record.path, record.line, record.sequence, True, record.description)


def _fasta_pieces(name: str, line: int, blocks: Iterator[bytes]) -> Iterator[Piece]:
    """Parse FASTA that begins with ``>`` at ``line``."""
    header: list[bytes] | None = []  # pieces of the header line being read; None while reading sequence
    current: GrowingSequence | None = None
    line_start = True  # is the next byte the first of its line?
    for block in blocks:
        at = 0
        while at < len(block):
            if header is not None:
                end = block.find(b"\n", at)
                header.append(block[at:] if end < 0 else block[at:end])
                if end < 0:
                    break
                current = _begin(name, line, b"".join(header))
                header, line_start = None, True
                line += 1
                at = end + 1
            else:
                assert current is not None
                end = _next_header(block, at, line_start)
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
        current = _begin(name, line, b"".join(header))
    assert current is not None
    yield _taken(current, last=True)


def _taken(sequence: GrowingSequence, last: bool) -> Piece:
    """What has gathered in ``sequence``, which is then empty; at the end it is judged as a whole."""
    if last:
        sequence.check_as_a_whole()
    return Piece(sequence.id, sequence.path, sequence.line, sequence.take(), last, sequence.description)


def _next_header(block: bytes, at: int, line_start: bool) -> int:
    """Where the next line that begins with > starts, or the block's end."""
    found = block.find(b">", at)
    while found >= 0:
        if line_start if found == at else block[found - 1] == ord("\n"):
            return found
        found = block.find(b">", found + 1)
    return len(block)


def _begin(name: str, line: int, header: bytes) -> GrowingSequence:
    if b"\0" in header:
        raise InputError.at(name, line, "a NUL byte in the header; is the file damaged or not text?")
    try:
        text = header[1:].decode("utf-8")
    except UnicodeDecodeError:  # an older encoding: as Latin-1 no two names become one, as they would with U+FFFD
        text = header[1:].decode("latin-1")
    words = text.split(None, 1)
    if not words or header[1:2].isspace():
        raise InputError.at(name, line, "a record without a name; write '>NAME'")
    return GrowingSequence(name, line, words[0], words[1].strip() if len(words) > 1 else "")


def _why_neither(start: bytes) -> str:
    first_line = start.split(b"\n", 1)[0]
    if not first_line:
        return "the file holds nothing but blanks; give a FASTA or GenBank file"
    if start.startswith(b"@"):
        return "this looks like FASTQ ('@' where a FASTA record has '>'); turn it into FASTA first (seqtk seq -a)"
    if start.startswith(b"ID   "):
        return "this looks like EMBL format; turn it into FASTA or GenBank first"
    if start[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "this is a web page or XML, not a FASTA file; was the download an error page?"
    return f"no header: a FASTA record begins with a line '>NAME', this file with {shortened(first_line)}"
