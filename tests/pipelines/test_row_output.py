"""Rows of text go to a file that is whole or not there."""

import os
from pathlib import Path

import pytest

from mambagen.errors import InputError
from mambagen.pipelines.row_output import row_output


def test_rows_survive_bad_input_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"

    def job(rows: list[str], error: BaseException) -> None:
        with row_output(path, "name\n") as write:
            for row in rows:
                write(row)
            raise error

    for rows, error in [(["grün\n"], InputError("next")), ([], InputError("only")), (["half\n"], KeyboardInterrupt())]:
        with pytest.raises(type(error)):
            job(rows, error)
        assert path.read_bytes() == "name\ngrün\n".encode()
        assert os.listdir(tmp_path) == ["rows.tsv"]
