"""Outputs are whole or not there, and what is no file stays what it is."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from mambagen.data.whole_file import byte_output, row_output, whole_file
from mambagen.errors import InputError, UsageError


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def test_a_pipe_is_written_to_and_stays_a_pipe(pipe: Path) -> None:
    """So does /dev/null, which a rename by root would turn into a file."""
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    with byte_output(pipe) as stream:
        stream.write(b"rows")
    reader.join(10)
    assert read == [b"rows"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(pipe.parent) == ["pipe"]


def test_what_needs_a_file_refuses_a_pipe(pipe: Path) -> None:
    with pytest.raises(UsageError, match="pipe: is a device or pipe"), whole_file(pipe):
        pass
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_disk_that_is_full_is_told_with_the_file_s_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with pytest.raises(OSError) as raised, whole_file(path):
            raise OSError(code, os.strerror(code))  # as a write has it
        assert raised.value.filename == str(path)
    with pytest.raises(BrokenPipeError) as raised, whole_file(path):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")  # of stdout: another's
    assert raised.value.filename is None
    assert os.listdir(tmp_path) == []


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
