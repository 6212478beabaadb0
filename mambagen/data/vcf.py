"""VCF as lines of text with their numbers, so that an error can name one and all that is not ours is kept as it is.

Plain, gzip or bgzip; BCF is turned into lines by pysam.
"""

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mambagen.data.byte_blocks import shown, text_blocks
from mambagen.errors import InputError

_BASES = re.compile(r"[ACGTNacgtn]+\Z")
_CODES = re.compile(r"[ACGTURYSWKMBDHVNacgturyswkmbdhvn]+\Z")
_ID_OF_INFO = re.compile(r"##INFO=<ID=([^,>]+)[,>]")


@dataclass(frozen=True)
class VcfLine:
    """A line of variants: its columns, and where it stands."""

    path: str
    line: int  # from 1
    columns: list[str]

    @property
    def chrom(self) -> str:
        """The record's name."""
        return self.columns[0]

    @property
    def start(self) -> int:
        """First base of REF, 0-based."""
        return int(self.columns[1]) - 1

    @property
    def reference(self) -> str:
        """REF as it stands."""
        return self.columns[3]

    @property
    def alternates(self) -> tuple[str, ...]:
        """The ALTs; none where the column is a dot."""
        return () if self.columns[4] in (".", "") else tuple(self.columns[4].split(","))

    @property
    def text(self) -> str:
        """The line without its end."""
        return "\t".join(self.columns)

    def with_info(self, own: Sequence[str], fields: Sequence[str]) -> str:
        """The line with INFO fields added, less those of the ids ``own`` that an earlier run left."""
        before = self.columns[7].split(";") if self.columns[7] not in (".", "") else []
        kept = [field for field in before if field and field.split("=", 1)[0] not in own]
        info = ";".join([*kept, *fields]) or "."
        return "\t".join([*self.columns[:7], info, *self.columns[8:]])

    def fault(self, what: str) -> InputError:
        """An error that names this line."""
        return InputError.at(self.path, self.line, what)


class Vcf:
    """A VCF file: its header's lines, and an iterator over its variants that can be begun again."""

    def __init__(self, path: str | Path) -> None:
        """Raises InputError where this is no VCF. ``path`` is a file: stdin cannot be read twice."""
        self.path = Path(path)
        self.header: list[str] = []
        for number, text in enumerate(_text_lines(self.path), start=1):
            if number == 1 and not text.startswith("##fileformat=VCF"):
                raise InputError.at(
                    shown(path),
                    1,
                    "this is no VCF: its first line does not begin with ##fileformat=VCF",
                )
            if not text.startswith("#"):
                raise InputError.at(shown(path), number, "variants begin before the line #CHROM; the header is damaged")
            self.header.append(text)
            if text.startswith("#CHROM"):
                return
        raise InputError.at(shown(path), None, "the header has no line #CHROM; is the file cut off?")

    def __iter__(self) -> Iterator[VcfLine]:
        """The variants; InputError with the line where one cannot be read."""
        for number, text in enumerate(_text_lines(self.path), start=1):
            if number > len(self.header) and text.strip():
                yield _checked(VcfLine(str(self.path), number, text.split("\t")))

    def header_with(self, descriptions: dict[str, tuple[str, str, str]]) -> list[str]:
        """The header's lines with INFO fields declared: id -> (number, type, description)."""
        own = [
            f'##INFO=<ID={name},Number={number},Type={kind},Description="{text}">'
            for name, (number, kind, text) in descriptions.items()
        ]
        kept = [line for line in self.header[:-1] if not ((at := _ID_OF_INFO.match(line)) and at[1] in descriptions)]
        return [*kept, *own, self.header[-1]]


def is_bases(allele: str) -> bool:
    """Is an allele written out in A, C, G and T?"""
    return bool(_BASES.match(allele)) and "n" not in allele.lower()


def _checked(line: VcfLine) -> VcfLine:
    columns = line.columns
    if len(columns) < 8:
        raise line.fault(f"a line of variants has 8 columns or more, by tabs; this one has {len(columns)}")
    if not (columns[1].isascii() and columns[1].isdecimal()):
        raise line.fault(f"POS is '{columns[1]}', which is no whole number")
    if line.start < 0:
        raise line.fault("POS is 0, which is before the first base; a telomere cannot be scored")
    if not _CODES.match(line.reference):
        raise line.fault(f"REF is '{line.reference}'; it must be bases")
    return line


def _text_lines(path: Path) -> Iterator[str]:
    """The lines without their ends."""
    if _is_bcf(path):
        yield from _bcf_lines(path)
        return
    rest = ""
    for block in text_blocks(path, wanted="a VCF file"):
        *lines, rest = (rest + block.decode("utf-8", errors="surrogateescape")).split("\n")
        yield from lines
    if rest:
        yield rest


def _is_bcf(path: Path) -> bool:
    try:
        with open(path, "rb") as plain, gzip.open(path) as packed:
            return (packed if plain.read(2) == b"\x1f\x8b" else plain).read(3) == b"BCF"
    except (OSError, EOFError, zlib.error):
        return False  # whatever is wrong with it is said when it is read as text


def _bcf_lines(path: Path) -> Iterator[str]:
    import pysam

    before = pysam.set_verbosity(0)
    try:
        with pysam.VariantFile(str(path)) as file:
            yield from str(file.header).rstrip("\n").split("\n")
            for record in file:
                yield str(record).rstrip("\n")
    except (OSError, ValueError) as error:
        raise InputError.at(path, None, f"the BCF file cannot be read: {error}") from None
    finally:
        pysam.set_verbosity(before)
