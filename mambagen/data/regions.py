"""Regions of records out of a BED file, plain or gzip: record, start, end and, if there is one, a name."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mambagen.data.byte_blocks import shown, text_blocks
from mambagen.data.genome import union
from mambagen.data.sequence_store import SequenceStore, StoredRecord
from mambagen.errors import InputError


@dataclass(frozen=True)
class Region:
    """Bases [start, end) of a record, 0-based, and the name that the file gives them (or RECORD:START-END)."""

    record: StoredRecord
    start: int
    end: int
    name: str


def read_regions(path: str | Path, store: SequenceStore) -> list[Region]:
    """The rows of a BED file (``-``: stdin), each held against the records of the store.

    Raises InputError with file and line for a row that is no region of one of the records, or where there is none.
    """
    name = shown(path)
    text = b"".join(text_blocks(path, wanted="a BED file (record, start, end)")).decode("utf-8", errors="replace")
    regions = list(_rows(name, text, store))
    if not regions:
        raise InputError.at(name, None, "it holds no region; a row is: record, start, end")
    return regions


def _rows(path: str, text: str, store: SequenceStore) -> Iterator[Region]:
    for line, row in enumerate(text.split("\n"), start=1):
        fields = row.split("\t") if "\t" in row else row.split()
        if not row.strip() or row.startswith("#") or fields[0] in ("track", "browser"):
            continue
        if len(fields) < 3 or not (_whole(fields[1]) and _whole(fields[2])):
            raise InputError.at(path, line, "a row must be: record, start, end (0-based, half-open), tabs between them")
        start, end = int(fields[1]), int(fields[2])
        record = store.find(fields[0])
        if record is None:
            some = ", ".join(r.id for r in store.records[:3]) + (", ..." if len(store) > 3 else "")
            raise InputError.at(path, line, f"no record '{fields[0]}' in the sequences, which have {some}")
        if start >= end:
            raise InputError.at(path, line, f"start {start} is not before end {end}")
        if end > record.length:
            raise InputError.at(
                path, line, f"end {end} is past the end of '{record.id}', which has {record.length} bases"
            )
        named = fields[3].strip() if len(fields) > 3 else ""
        yield Region(record, start, end, named if named not in ("", ".") else f"{record.id}:{start}-{end}")


def _whole(text: str) -> bool:
    return text.strip().isascii() and text.strip().isdecimal()


def merged(regions: Sequence[Region], store: SequenceStore) -> list[Region]:
    """The regions in the order of the store, those that touch or overlap made one: each base is there once."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for region in regions:
        spans.setdefault(region.record.id, []).append((region.start, region.end))
    return [
        Region(record, start, end, f"{record.id}:{start}-{end}")
        for record in store.records
        for start, end in union(spans.get(record.id, []))
    ]
