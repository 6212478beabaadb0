"""Prepared genomes: the tokens of a file, one byte a base, in one file that is mapped into memory.

    signature, 64 bytes in all     tokens of all records     index as JSON     length of the index, signature

Reading a window touches the window's pages only, every process on a machine shares them, and a genome of three billion
bases takes no memory of its own. A prepared genome is made once, in a cache folder, under a name that is a hash of the
source's content and of the policy for its letters; it gets that name last, so one that is there is whole. What lies
beside the source (.fai and .gzi files) is neither read nor written.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.fasta_stream import stream_pieces
from mambagen.errors import InputError, ResourceError

log = logging.getLogger("mambagen")

FORMAT = 1
SIGNATURE = b"MAMBAGEN GENOME\n"
HEADER = 64  # bytes before the tokens

Progress = Callable[[str], None]


@dataclass(frozen=True)
class PreparedRecord:
    """A record as the index knows it, with its tokens: (length,) uint8, a view of the mapped file."""

    id: str
    description: str
    line: int
    tokens: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class PreparedGenome:
    """One source file, prepared."""

    path: Path  # of the prepared file
    source: str  # as it was given
    records: tuple[PreparedRecord, ...]
    made: bool  # now, or was it there

    @property
    def bases(self) -> int:
        """Of all records."""
        return sum(len(record) for record in self.records)


def prepare(
    source: str | Path, tokenizer: DnaTokenizer, folder: Path, progress: Progress | None = None
) -> PreparedGenome:
    """The prepared genome of a FASTA, GenBank or 2bit file, made in ``folder`` where it is not there yet.

    Raises:
        InputError: the source is no such file, or stdin. ResourceError: the folder or the disk refuses.
    """
    target = prepared_path(source, tokenizer, folder)
    if found := _opened(source, target):
        return found
    if progress:
        progress(f"preparing {source} (once) ...")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_forgotten(folder)
        scratch = folder / f".{target.name}.partial-{os.getpid()}"
        try:
            _write(source, tokenizer, scratch)
            os.replace(scratch, target)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{folder}: the prepared genome of {source} cannot be written: {error.strerror or error}; make room, or "
            f"set MAMBAGEN_HOME to another folder"
        ) from error
    return PreparedGenome(target, str(source), _records(target), made=True)


def find_prepared(source: str | Path, tokenizer: DnaTokenizer, folder: Path) -> PreparedGenome | None:
    """The prepared genome of a file, if there is one. Raises InputError where the source cannot be read."""
    return _opened(source, prepared_path(source, tokenizer, folder)) if folder.is_dir() else None


def prepared_path(source: str | Path, tokenizer: DnaTokenizer, folder: Path) -> Path:
    """Where the prepared genome of a file is or would be: its name says the source's content and the policy."""
    digest = content_hash(source, folder)
    policy = f"{FORMAT} {tokenizer.lower_case} {tokenizer.iupac}"  # what the tokens depend on
    key = hashlib.sha256(f"{digest} {policy}".encode()).hexdigest()[:24]
    there = sorted(folder.glob(f"*-{key}.genome"))  # perhaps made from a file of another name
    return there[0] if there else folder / f"{Path(source).name.split('.')[0][:40]}-{key}.genome"


def content_hash(source: str | Path, folder: Path) -> str:
    """sha256 of a file; remembered in ``folder`` by its place, size and time of change, as reading it takes seconds."""
    try:
        path = Path(source).resolve(strict=True)
        status = path.stat()
        if not path.is_file():
            raise InputError.at(source, None, "only a file can be prepared, not a folder or a pipe")
        seen = _seen(folder)
        key = [status.st_size, status.st_mtime_ns, status.st_ino]
        entry = seen.get(str(path))
        if isinstance(entry, dict) and entry.get("status") == key:
            return str(entry["sha256"])
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError.at(source, None, (error.strerror or str(error)).lower()) from None
    _remember(folder, {**seen, str(path): {"status": key, "sha256": digest}})
    return digest


# ---- the file -------------------------------------------------------------------------------------------------------


def _write(source: str | Path, tokenizer: DnaTokenizer, path: Path) -> None:
    index: list[dict[str, Any]] = []
    offset = HEADER
    with open(path, "wb") as file:
        file.write(SIGNATURE.ljust(HEADER, b"\0"))
        length = 0
        for piece in stream_pieces(source):
            file.write(tokenizer.encode(piece.letters).data)
            length += len(piece.letters)
            if piece.last:
                row = {"id": piece.id, "description": piece.description, "line": piece.line}
                index.append(row | {"offset": offset, "length": length})
                offset += length
                length = 0
        text = json.dumps({"format": FORMAT, "records": index}, ensure_ascii=False).encode()
        file.write(text + len(text).to_bytes(8, "little") + SIGNATURE)
        file.flush()
        os.fsync(file.fileno())


def _opened(source: str | Path, target: Path) -> PreparedGenome | None:
    if not target.is_file():
        return None
    try:
        records = _records(target)
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("%s: is damaged and made again", target)
        return None
    for record in records:
        if not len(record):
            log.warning("%s:%d: record '%s' is empty", source, record.line, record.id)
    return PreparedGenome(target, str(source), records, made=False)


def _records(path: Path) -> tuple[PreparedRecord, ...]:
    with open(path, "rb") as file:
        content = np.memmap(file, dtype=np.uint8, mode="r")
    tail = content[-len(SIGNATURE) - 8 :].tobytes()
    if not tail.endswith(SIGNATURE) or content[: len(SIGNATURE)].tobytes() != SIGNATURE:
        raise ValueError("no signature")
    size = int.from_bytes(tail[:8], "little")
    index = json.loads(content[len(content) - len(tail) - size : len(content) - len(tail)].tobytes())
    if index["format"] != FORMAT:
        raise ValueError("another format")
    end = len(content) - len(tail) - size
    records = []
    plain = content.view(np.ndarray)  # slices of a memmap object cost ten times those of an array
    for row in index["records"]:
        first, last = row["offset"], row["offset"] + row["length"]
        if not HEADER <= first <= last <= end:
            raise ValueError("a record outside of the file")
        records.append(PreparedRecord(row["id"], row["description"], row["line"], plain[first:last]))
    return tuple(records)


def _remove_forgotten(folder: Path) -> None:
    """Remove what killed processes left a day ago or more."""
    for path in folder.glob(".*.partial-*"):
        if time.time() - path.stat().st_mtime > 86_400:
            path.unlink(missing_ok=True)


# ---- hashes that were taken -----------------------------------------------------------------------------------------


def _seen(folder: Path) -> dict[str, Any]:
    try:
        table = json.loads((folder / "seen.json").read_text("utf-8"))
        return table if isinstance(table, dict) else {}
    except (OSError, ValueError):
        return {}


def _remember(folder: Path, table: dict[str, Any]) -> None:
    """Keep the table; where that fails, hashes are taken again."""
    scratch = folder / f".seen.json.partial-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(table, indent=1), "utf-8")
        os.replace(scratch, folder / "seen.json")
    except OSError:
        log.debug("%s cannot be written", scratch)


def list_prepared(folder: Path) -> Iterator[Path]:
    """The prepared genomes of a folder."""
    return iter(sorted(folder.glob("*.genome"))) if folder.is_dir() else iter(())


def unpacked_size(sources: Sequence[str | Path]) -> int:
    """About how many bases files hold: their size, four times that where they are gzip, or 2bit."""
    total = 0
    for source in sources:
        if str(source) == "-":
            continue
        try:
            with open(source, "rb") as file:
                head = file.read(4)
                packed = head[:2] == b"\x1f\x8b" or head in (b"\x1a\x41\x27\x43", b"\x43\x27\x41\x1a")
                total += os.fstat(file.fileno()).st_size * (4 if packed else 1)
        except OSError:
            continue  # the reader says what is wrong with it
    return total
