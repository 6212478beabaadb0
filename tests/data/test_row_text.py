"""Rows formatted by numpy are those that Python's own formatting gives."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mambagen.data.row_text import characters, constant, decimals, integers, join

NUMBERS = st.one_of(st.just(float("nan")), st.floats(-1e6, 1e6, width=32))


@given(st.lists(NUMBERS, min_size=1, max_size=30), st.integers(1, 7))
def test_decimals_are_those_of_format(values: list[float], places: int) -> None:
    expected = []
    for value in values:
        # halves are rounded after scaling here, so the exact decimal string may differ in the last digit
        text = "NA" if np.isnan(value) else format(np.rint(value * 10**places) / 10**places, f".{places}f")
        expected.append(text.lstrip("-") if not text.strip("-0.") else text)
    assert join([decimals(np.array(values), places)]).decode().splitlines() == expected


@given(st.lists(st.integers(0, 2**40), max_size=30))
def test_integers_and_columns(values: list[int]) -> None:
    array = np.array(values, dtype=np.int64)
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)[array % 4]
    rows = join([constant(b"chr1", len(array)), integers(array), characters(letters)])
    assert rows.decode() == "".join(f"chr1\t{value}\t{'ACGT'[value % 4]}\n" for value in values)
