"""Records of GenBank flat files, read by Biopython."""

import io
import re
import warnings
from collections.abc import Iterator

from mambagen.data.growing_sequence import GrowingSequence
from mambagen.data.record import Record
from mambagen.errors import InputError


def genbank_records(name: str, blocks: Iterator[bytes]) -> Iterator[Record]:
    """The records of a GenBank text, whose name in messages is ``name``; Biopython holds all of it."""
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
        sequence = GrowingSequence(name, line, parsed.id or parsed.name, parsed.description)
        sequence.add(letters, line)
        sequence.check_as_a_whole()
        yield Record(sequence.id, sequence.description, sequence.take(), name, line)
