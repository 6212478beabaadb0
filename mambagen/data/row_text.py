"""Rows of a table as text, by numpy: some millions of rows a second, where formatting one by one makes some 100,000.

A column is a pair of arrays, the characters of each row padded to one width and which of them are used; `join` lays
columns side by side and drops the unused characters.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Column = tuple[NDArray[np.uint8], NDArray[np.bool_]]  # (rows, width) characters, (rows, width) used

_ZERO = ord("0")


def constant(text: bytes, rows: int) -> Column:
    """The same text in every row."""
    letters = np.broadcast_to(np.frombuffer(text, dtype=np.uint8), (rows, len(text)))
    return letters, np.ones(letters.shape, dtype=bool)


def characters(letters: NDArray[np.uint8]) -> Column:
    """One character a row, (rows,)."""
    return letters[:, None], np.ones((len(letters), 1), dtype=bool)


def integers(values: NDArray[np.int64]) -> Column:
    """Whole numbers of 0 or more, (rows,)."""
    width = len(str(int(values.max()))) if len(values) else 1
    powers = 10 ** np.arange(width - 1, -1, -1, dtype=np.int64)
    digits = (values[:, None] // powers % 10 + _ZERO).astype(np.uint8)
    return digits, (values[:, None] >= powers) | (powers == 1)


def decimals(values: NDArray[np.floating], places: int) -> Column:
    """Numbers with so many digits after the point, (rows,), and ``NA`` for NaN; as ``format(x, f".{places}f")``."""
    missing = np.isnan(values)
    scaled = np.rint(np.where(missing, 0, np.abs(values.astype(np.float64))) * 10**places).astype(np.int64)
    digits, used = integers(scaled)
    least = places + 1 - digits.shape[1]  # 0.00012 has a zero before its point
    if least > 0:
        digits = np.pad(digits, ((0, 0), (least, 0)), constant_values=_ZERO)
        used = np.pad(used, ((0, 0), (least, 0)))
    used[:, -places - 1 :] = True
    rows = len(values)
    minus = constant(b"-", rows)[0], (np.signbit(values) & (scaled > 0))[:, None]
    point = constant(b".", rows)
    parts = [minus, (digits[:, :-places], used[:, :-places]), point, (digits[:, -places:], used[:, -places:])]
    number = np.concatenate([part[0] for part in parts], 1), np.concatenate([part[1] for part in parts], 1)
    number[1][missing] = False
    absent = constant(b"NA", rows)[0], np.broadcast_to(missing[:, None], (rows, 2))
    return np.concatenate([number[0], absent[0]], 1), np.concatenate([number[1], absent[1]], 1)


def join(columns: Sequence[Column], between: bytes = b"\t") -> bytes:
    """The rows as text, a line each."""
    rows = len(columns[0][0])
    if rows == 0:
        return b""
    parts: list[Column] = []
    for at, column in enumerate(columns):
        parts += [column, constant(b"\n" if at + 1 == len(columns) else between, rows)]
    letters = np.concatenate([part[0] for part in parts], 1)
    used = np.concatenate([part[1] for part in parts], 1)
    return letters[used].tobytes()
