"""Outputs are whole or not there, and what is no file stays what it is."""

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mambagen.data.whole_file import byte_output, whole_file
from mambagen.errors import UsageError


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


def test_a_packed_file_on_a_full_disk_is_one_error_with_its_name(tmp_path: Path) -> None:
    """In a process of its own: the limit is one of the process, and htslib writes past Python's stderr."""
    code = (
        "import os, resource\n"
        "from mambagen.data.whole_file import byte_output\n"
        "from mambagen.errors import ResourceError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    with byte_output('rows.tsv.gz') as stream:\n"
        "        for _ in range(100):\n"
        "            stream.write(os.urandom(1000))\n"
        "except ResourceError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("rows.tsv.gz: cannot be written whole")
    assert (done.stderr, list(tmp_path.iterdir())) == ("", [])
