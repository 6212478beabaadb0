"""The letters of one record as they come in: checked, counted, and refused in words that say what they look like."""

import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mambagen.data.dna_tokens import IUPAC_CODES, UNAMBIGUOUS_CODES
from mambagen.errors import InputError

_AMINO_ACIDS_ONLY = b"EFIJLOPQZefijlopqz*"
_NOT_DNA = re.compile(b"[^\n" + IUPAC_CODES + b"]")
_BLANKS_AT_LINE_END = re.compile(rb"[ \t]+(?=\n|\Z)")


def shortened(text: bytes, length: int = 24) -> str:
    """A piece of the user's file for a message: printable, on one line, not long."""
    printable = "".join(c if c.isprintable() else "?" for c in text[:length].decode("latin-1"))
    return f"'{printable}{'...' if len(text) > length else ''}'"


@dataclass
class GrowingSequence:
    """A record in the making."""

    path: str
    line: int
    id: str
    description: str
    pieces: list[bytes] = field(default_factory=list)
    length: int = 0
    ambiguous: int = 0
    start: bytes = b""  # its first letters, for a message

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
        self.start = self.start or piece[:32]
        self.length += len(piece)
        self.ambiguous += len(unusual) - unusual.count(b"U") - unusual.count(b"u")
        return lines

    def check_as_a_whole(self) -> None:
        """Refuse what is no DNA by its letters' frequencies."""
        # A short protein may by chance be spelt in IUPAC codes only; no DNA is ambiguous for the most part.
        if self.length >= 10 and self.ambiguous * 2 > self.length:
            what = f"most letters are ambiguity codes; this looks like protein ({shortened(self.start)})"
            raise InputError.at(self.path, self.line, f"record '{self.id}': {what}")

    def take(self) -> NDArray[np.uint8]:
        """The (length,) letters that have gathered since the last time."""
        letters = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        self.pieces.clear()
        return np.frombuffer(letters, dtype=np.uint8)

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
        return f"'{letter}' is no DNA letter; this looks like protein ({shortened(text)})"
    if letter in "Xx":
        return f"'{letter}' is no DNA letter; write masked bases as N (or is this protein: {shortened(text)}?)"
    if column == 0 and letter in "+@":
        return f"a line that begins with '{letter}'; this looks like FASTQ, turn it into FASTA first (seqtk seq -a)"
    return f"{shortened(bytes([byte]))} (byte 0x{byte:02x}) is no DNA letter; the line reads {shortened(text)}"
