"""Sequences out of .2bit files, the format of UCSC's genome archives.

Header: signature, version (0, or 1 with 64-bit offsets), number of records, 0; then for each record the length of its
name, the name and its offset. A record: length, number of N blocks, their starts, their lengths, the same of masked
(lower-case) blocks, 0, and the bases, four a byte, the first in the highest bits, T 0, C 1, A 2, G 3. All numbers are
32 bits in the writer's byte order (http://genome.ucsc.edu/FAQ/FAQformat.html#format7).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambagen.data.record import Record
from mambagen.errors import InputError

SIGNATURE = 0x1A412743
_LETTERS = np.frombuffer(b"TCAG", dtype=np.uint8)
_FOUR = _LETTERS[(np.arange(256)[:, None] >> np.array([6, 4, 2, 0])) & 3].copy().view(np.uint32).ravel()
_BLOCK = 1 << 22  # bytes of packed bases unpacked at a time


def is_two_bit(path: str | Path) -> bool:
    """Does a file (not stdin, not a pipe) begin like a .2bit file?"""
    if str(path) == "-" or not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4) in (SIGNATURE.to_bytes(4, "little"), SIGNATURE.to_bytes(4, "big"))
    except OSError:
        return False  # the reader of text says what is wrong with it


def two_bit_records(path: str | Path) -> Iterator[Record]:
    """The records of a .2bit file in the order of its index; lower case where masked, N where unknown.

    ``line`` is the record's number. Raises InputError where the file cannot be read, is cut off or damaged.
    """
    try:
        with open(path, "rb") as file:
            yield from _records(_Reader(str(path), np.memmap(file, dtype=np.uint8, mode="r")))
    except OSError as error:
        raise InputError.at(path, None, f"it cannot be read: {error.strerror or error}") from None


@dataclass
class _Reader:
    """Numbers and bytes from a file in memory, one after the other."""

    path: str
    content: NDArray[np.uint8]
    at: int = 0
    order: str = "<"
    where: str = "its header"

    def take(self, count: int) -> NDArray[np.uint8]:
        """The next ``count`` bytes."""
        if count < 0 or self.at + count > len(self.content):
            raise InputError.at(self.path, None, f"the 2bit file is cut off in {self.where}; copy or download it again")
        piece = self.content[self.at : self.at + count]
        self.at += count
        return piece

    def numbers(self, count: int, size: int = 4) -> NDArray[np.int64]:
        """(count,) unsigned numbers of ``size`` bytes."""
        return self.take(count * size).view(f"{self.order}u{size}").astype(np.int64)

    def number(self, size: int = 4) -> int:
        return int(self.numbers(1, size)[0])

    def blocks(self) -> list[tuple[int, int]]:
        """(start, length) of blocks."""
        count = self.number()
        starts = self.numbers(count)
        return list(zip(starts.tolist(), self.numbers(count).tolist(), strict=True))


def _records(reader: _Reader) -> Iterator[Record]:
    if reader.number() != SIGNATURE:
        reader.order, reader.at = ">", 4
    version, count = reader.number(), reader.number()
    if version > 1:
        raise InputError.at(reader.path, None, f"the 2bit file has version {version}; versions 0 and 1 are read")
    reader.at += 4
    index = []
    for _ in range(count):
        name = reader.take(reader.number(1)).tobytes().decode("latin-1")
        index.append((name, reader.number(8 if version else 4)))
    for number, (name, offset) in enumerate(index, start=1):
        reader.at, reader.where = offset, f"record '{name}'"
        yield Record(name, "", _sequence(reader, name), reader.path, number)


def _sequence(reader: _Reader, name: str) -> NDArray[np.uint8]:
    length = reader.number()
    unknown, masked = reader.blocks(), reader.blocks()
    reader.at += 4
    packed = reader.take(-(-length // 4))
    letters = np.empty(len(packed) * 4, dtype=np.uint8)
    for at in range(0, len(packed), _BLOCK):
        letters[4 * at : 4 * (at + _BLOCK)] = _FOUR[packed[at : at + _BLOCK]].view(np.uint8)
    letters = letters[:length]
    for start, size in (*unknown, *masked):
        if start + size > length:
            raise InputError.at(
                reader.path, None, f"record '{name}' has {length} bases and a block up to {start + size}; it is damaged"
            )
    for start, size in unknown:
        letters[start : start + size] = ord("N")
    for start, size in masked:
        letters[start : start + size] |= 0x20  # lower case
    return letters
