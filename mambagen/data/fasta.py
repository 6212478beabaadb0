"""DNA records out of FASTA, GenBank and 2bit files: plain, gzip or bgzip, any line ends, from a path or from stdin.

A file is checked as it is read: what is no DNA sequence is refused with its file, line and record. Blanks at the end of
a line are dropped, an empty record is left out with a warning (or handed out, with ``keep_empty``), and every IUPAC
nucleotide code is let through. U is read as T wherever tokens are made; with ``rna`` the letters themselves become T.
"""

import io
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambagen.data.byte_blocks import BLOCK, shown, text_blocks
from mambagen.data.dna_tokens import IUPAC_CODES, UNAMBIGUOUS_CODES
from mambagen.data.record import Record
from mambagen.data.two_bit import is_two_bit, two_bit_records
from mambagen.errors import InputError

__all__ = ["Record", "as_dna", "read_records"]

log = logging.getLogger("mambagen")

_AMINO_ACIDS_ONLY = b"EFIJLOPQZefijlopqz*"
_RNA_TO_DNA = bytes.maketrans(b"Uu", b"Tt")
_NOT_DNA = re.compile(b"[^\n" + IUPAC_CODES + b"]")
_BLANKS_AT_LINE_END = re.compile(rb"[ \t]+(?=\n|\Z)")


def read_records(
    path: str | Path, block_size: int = BLOCK, *, rna: bool = False, keep_empty: bool = False
) -> Iterator[Record]:
    """The records of a FASTA, GenBank or 2bit file, in order; ``-`` reads stdin. The format is told by the content.

    Args:
        rna: U and u become T and t in the records' letters.
        keep_empty: empty records come too, with length 0, for jobs that answer every record; they are warned of.

    Raises InputError, naming file, line and record, where the file is not such a file, a record is not DNA or has no
    name, two records share a name, or none holds a sequence.
    """
    for record in _checked_records(path, block_size, keep_empty):
        yield replace(record, sequence=as_dna(record.sequence)) if rna else record


def as_dna(sequence: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The (length,) letters with U as T and u as t; the array itself where there are none."""
    text = sequence.tobytes()
    return np.frombuffer(text.translate(_RNA_TO_DNA), dtype=np.uint8) if b"U" in text or b"u" in text else sequence


def _checked_records(path: str | Path, block_size: int, keep_empty: bool) -> Iterator[Record]:
    if is_two_bit(path):
        yield from _distinct(shown(path), two_bit_records(path), keep_empty)
        return
    blocks = text_blocks(path, block_size)
    name, line = shown(path), 1
    start = b""
    for block in blocks:
        start += block
        first = start.lstrip()  # blank lines may stand before the first record
        line += start[: len(start) - len(first)].count(b"\n")
        start = first
        if len(start) >= 16:  # enough to tell the format by
            break
    rest = _chain(start, blocks)
    if start.startswith(b">"):
        found = _fasta_records(name, line, rest)
    elif start.startswith(b"LOCUS"):
        found = _genbank_records(name, rest)
    else:
        raise InputError.at(name, line if start else None, _why_neither(start))

    yield from _distinct(name, found, keep_empty)


def _distinct(name: str, found: Iterator[Record], keep_empty: bool) -> Iterator[Record]:
    """The records, whose names must differ; empty ones with a warning, if at all."""
    lines_of: dict[str, int] = {}
    empty = 0
    for record in found:
        if record.id in lines_of:
            raise InputError.at(
                name, record.line, f"record '{record.id}' occurs twice (line {lines_of[record.id]} too); rename one"
            )
        lines_of[record.id] = record.line
        if len(record):
            yield record
        else:
            empty += 1
            what = "is empty" if keep_empty else "is empty and is left out"
            log.warning("%s:%d: record '%s' %s", name, record.line, record.id, what)
            if keep_empty:
                yield record
    if empty == len(lines_of):
        raise InputError.at(name, None, f"it holds no sequence: all of its {empty} records are empty")


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


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
    return f"no header: a FASTA record begins with a line '>NAME', this file with {_shortened(first_line)}"


def _shortened(text: bytes, length: int = 24) -> str:
    """A piece of the user's file for a message: printable, on one line, not long."""
    printable = "".join(c if c.isprintable() else "?" for c in text[:length].decode("latin-1"))
    return f"'{printable}{'...' if len(text) > length else ''}'"


# ---- FASTA ----------------------------------------------------------------------------------------------------------


def _fasta_records(name: str, line: int, blocks: Iterator[bytes]) -> Iterator[Record]:
    """Parse FASTA that begins with ``>`` at ``line``."""
    header: list[bytes] | None = []  # pieces of the header line being read; None while reading sequence
    current: _Sequence | None = None
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
                header = None
                line += 1
                line_start = True
                at = end + 1
            else:
                assert current is not None
                end = _next_header(block, at, line_start)
                if end > at:
                    line += current.add(block[at:end], line)
                    line_start = block[end - 1] == ord("\n")
                if end < len(block):
                    yield current.record()
                    header = []
                at = end
    if header is not None:
        current = _begin(name, line, b"".join(header))
    assert current is not None
    yield current.record()


def _next_header(block: bytes, at: int, line_start: bool) -> int:
    """Where the next line that begins with > starts, or the block's end."""
    found = block.find(b">", at)
    while found >= 0:
        if line_start if found == at else block[found - 1] == ord("\n"):
            return found
        found = block.find(b">", found + 1)
    return len(block)


def _begin(name: str, line: int, header: bytes) -> "_Sequence":
    if b"\0" in header:
        raise InputError.at(name, line, "a NUL byte in the header; is the file damaged or not text?")
    try:
        text = header[1:].decode("utf-8")
    except UnicodeDecodeError:  # an older encoding: as Latin-1 no two names become one, as they would with U+FFFD
        text = header[1:].decode("latin-1")
    words = text.split(None, 1)
    if not words or header[1:2].isspace():
        raise InputError.at(name, line, "a record without a name; write '>NAME'")
    return _Sequence(name, line, words[0], words[1].strip() if len(words) > 1 else "")


@dataclass
class _Sequence:
    """A record in the making."""

    path: str
    line: int
    id: str
    description: str
    pieces: list[bytes] = field(default_factory=list)
    length: int = 0
    ambiguous: int = 0

    def add(self, chunk: bytes, line: int) -> int:
        """Take in a piece of sequence text that begins on ``line``; returns how many lines ended in it."""
        piece = chunk.translate(None, b"\n")
        lines = len(chunk) - len(piece)
        unusual = piece.translate(None, UNAMBIGUOUS_CODES)
        if unusual and unusual.translate(None, IUPAC_CODES):
            # Blanks at a line's end are harmless; text_blocks never cuts such a run, so each is wholly in this piece.
            chunk = _BLANKS_AT_LINE_END.sub(b"", chunk)
            if wrong := _NOT_DNA.search(chunk):
                self._refuse(chunk, wrong.start(), line)
            piece = chunk.translate(None, b"\n")
            unusual = piece.translate(None, UNAMBIGUOUS_CODES)
        self.pieces.append(piece)
        self.length += len(piece)
        self.ambiguous += len(unusual) - unusual.count(b"U") - unusual.count(b"u")
        return lines

    def record(self) -> Record:
        # A short protein may by chance be spelt in IUPAC codes only; no DNA is ambiguous for the most part.
        if self.length >= 10 and self.ambiguous * 2 > self.length:
            start = b"".join(self.pieces[:1])
            raise InputError.at(
                self.path,
                self.line,
                f"record '{self.id}': most letters are ambiguity codes; this looks like protein ({_shortened(start)})",
            )
        sequence = np.frombuffer(self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces), dtype=np.uint8)
        return Record(self.id, self.description, sequence, self.path, self.line)

    def _refuse(self, chunk: bytes, at: int, line: int) -> None:
        line_start = chunk.rfind(b"\n", 0, at) + 1
        what = _what_is_wrong(chunk[at], chunk[line_start : line_start + 200].split(b"\n", 1)[0], at - line_start)
        raise InputError.at(self.path, line + chunk.count(b"\n", 0, at), f"record '{self.id}': {what}")


def _what_is_wrong(byte: int, text: bytes, column: int) -> str:
    """A sentence about a byte that no DNA sequence may hold, found in the line ``text``."""
    letter = chr(byte)
    if byte == 0:
        return "a NUL byte in the sequence; is the file damaged or not text?"
    if byte >= 128:
        return f"byte 0x{byte:02x} is not ASCII; a sequence holds the letters ACGTN and the IUPAC codes only"
    if letter in " \t":
        return f"a blank inside the sequence (column {column + 1}); take it out"
    if letter in "-.":
        return f"a gap '{letter}': this is an alignment; take the gaps out"
    if letter == ">":
        return "'>' inside a line of sequence; is a line end missing before it?"
    if byte in _AMINO_ACIDS_ONLY:
        return f"'{letter}' is no DNA letter; this looks like protein ({_shortened(text)})"
    if letter in "Xx":
        return f"'{letter}' is no DNA letter; write masked bases as N (or is this protein: {_shortened(text)}?)"
    if column == 0 and letter in "+@":
        return f"a line that begins with '{letter}'; this looks like FASTQ, turn it into FASTA first (seqtk seq -a)"
    return f"{_shortened(bytes([byte]))} (byte 0x{byte:02x}) is no DNA letter; the line reads {_shortened(text)}"


# ---- GenBank --------------------------------------------------------------------------------------------------------


def _genbank_records(name: str, blocks: Iterator[bytes]) -> Iterator[Record]:
    """Parse GenBank by Biopython."""
    from Bio import SeqIO
    from Bio.Seq import UndefinedSequenceError
    from Bio.SeqRecord import SeqRecord

    text = b"".join(blocks)
    locus = list(re.finditer(rb"^LOCUS +\S+ +(\d*)", text, re.MULTILINE))
    lines = [1 + text.count(b"\n", 0, found.start()) for found in locus] or [1]
    if not text.rstrip().endswith(b"\n//"):
        raise InputError.at(name, lines[-1], "the GenBank file is cut off: its last record has no end ('//')")
    records: list[SeqRecord] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks about features, which are not used
            records.extend(SeqIO.parse(io.StringIO(text.decode("latin-1")), "genbank"))  # keeps those before an error
    except Exception as error:
        line = lines[min(len(records), len(lines) - 1)]
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError.at(name, line, f"this GenBank record cannot be read: {reason}") from None
    for parsed, line, found in zip(records, lines, locus, strict=False):
        try:
            letters = bytes(parsed.seq or b"")
        except UndefinedSequenceError:
            raise InputError.at(
                name, line, f"record '{parsed.id}' holds no sequence; download it in the full GenBank format"
            ) from None
        if found[1] and int(found[1]) != len(letters):
            raise InputError.at(
                name, line, f"record '{parsed.id}' says {int(found[1])} bases and holds {len(letters)}; is it cut off?"
            )
        sequence = _Sequence(name, line, parsed.id or parsed.name, parsed.description)
        sequence.add(letters, line)
        yield sequence.record()
