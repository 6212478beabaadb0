"""The habits of the command line: quick help, one-line errors, exit codes, signals, pipes."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from mambagen import __version__, cli
from mambagen.commands import options
from mambagen.errors import InputError, InterruptedRun, ModelError

MAMBAGEN = [sys.executable, "-m", "mambagen.cli"]


def test_help_comes_at_once_and_imports_nothing_heavy() -> None:
    times = []
    for _ in range(6):  # the best of some, in processor time: other tests run beside this one
        began = os.times()
        done = subprocess.run([*MAMBAGEN, "--help"], capture_output=True, text=True, check=True)
        ended = os.times()
        times.append(ended.children_user + ended.children_system - began.children_user - began.children_system)
    assert min(times) < 0.25, times
    assert all(name in done.stdout for name in cli.COMMANDS)
    heavy = ["torch", "numpy", "pydantic", "numba", "matplotlib", "rich", "Bio", "pysam", "pooch", "mambagen.pipelines"]
    code = f"import mambagen.cli, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", [*cli.COMMANDS, None])
def test_every_command_has_help_by_h_and_the_table_tells_its_first_line(
    name: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [name, "-h"] if name else ["-h"]
    assert cli.run(arguments) == 0
    shown = capsys.readouterr().out
    assert "--debug" in shown
    if name:
        command = cli.mambagen.get_command(click.Context(cli.mambagen), name)
        assert command is not None
        assert command.name == name
        assert (command.help or "").strip().splitlines()[0].startswith(cli.COMMANDS[name][1].rstrip("."))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"mambagen {__version__}\n"


def test_sizes_offered_are_those_of_the_models() -> None:
    from mambagen.models import MAMBA_SIZES

    assert tuple(MAMBA_SIZES) == options.SIZES


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError.at("a.fa", 3, "no\n  base here"), 3, "error: a.fa:3: no base here"),
        (ModelError("m: damaged"), 4, "error: m: damaged"),
        (InterruptedRun("stopped", 143), 143, "stopped"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 5, "error: x.bin: No space left on device; free"),
        (OSError(errno.EACCES, "Permission denied", "x.bin"), 5, "error: x.bin: Permission denied; choose a place"),
        (MemoryError(), 6, "error: out of memory (no message); less at once would fit: a smaller --batch-tokens"),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), 6, "error: out of memory"),
        (ValueError("shape\nmismatch"), 1, "error: a bug of mambagen: ValueError: shape (run the same with --debug"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_an_error_is_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, debug: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import torch  # noqa: F401 (its errors are told by it)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli.mambagen, "invoke", fail)
    assert cli.run(["doctor", *["--debug"][:debug]]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(f"mambagen: {line}")
    assert (len(err.splitlines()) > 1) == debug
    assert ("Traceback" in err) == debug


def test_torch_out_of_memory_is_exit_6_with_advice() -> None:
    import torch

    code, message = cli.explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert code == 6
    assert "Tried to allocate 2.00 GiB" in message
    assert "--batch-tokens" in message


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *((command, name) for command in ("pretrain-dna", "train-species") for name in ("context", "batch_tokens")),
        ("train-species", "shortest"),
        ("train-species", "length_warmup"),
        ("train-species", "simulated_length"),
        ("generate-dna", "length"),
        ("score", "context"),
        ("score-variants", "context"),
        ("score-variants", "after"),
        ("embed", "window"),
    ],
)
def test_numbers_of_bases_are_written_alike(command: str, name: str) -> None:
    found = cli.mambagen.get_command(click.Context(cli.mambagen), command)
    assert found is not None
    option = next(option for option in found.params if option.name == name)
    assert option.type.convert("16Ki", option, None) == 16384


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["pretrain"], "No such command 'pretrain'"),
        (["pretrain-dna", "--sice", "7m"], "No such option '--sice'"),
        (["pretrain-dna", "--size", "8m"], "'8m' is not one of '250k'"),
        (["pretrain-dna", "--steps", "many"], "'many' is not a valid integer"),
        (["pretrain-dna", "genome.fa"], "'genome.fa' stands alone"),
        (["pretrain-dna", "--out", "a", "--resume", "b"], "--out and --resume"),
    ],
)
def test_usage_errors_are_exit_2(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("mambagen: error: ")
    assert told in err


def test_ctrl_c_is_130_and_a_closed_pipe_is_silent(tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text(
        "import sys, time, click\nfrom mambagen import cli\n"
        "@click.command()\ndef waits():\n    print('ready', flush=True)\n    time.sleep(30)\n"
        "@click.command()\ndef talks():\n    [print(n) for n in range(10**6)]\n"
        "cli.COMMANDS['waits'] = cli.COMMANDS['talks'] = ('', '')\n"
        "cli.LazyGroup.get_command = lambda self, ctx, name: {'waits': waits, 'talks': talks}[name]\n"
        "cli.main()\n"
    )
    process = subprocess.Popen([sys.executable, script, "waits"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, b"mambagen: error: interrupted\n")

    process = subprocess.Popen([sys.executable, script, "talks"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(20) == 141


def test_stdout_that_is_a_full_disk_is_exit_5() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run([*MAMBAGEN, "--version"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5
    assert "No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_streams_that_are_closed_are_no_bug() -> None:
    for redirection in (">&-", "2>&-", ">&- 2>&-"):
        closed = ["sh", "-c", f'exec "$@" {redirection}', "sh", *MAMBAGEN]
        assert subprocess.run([*closed, "--version"], capture_output=True).returncode == 0
        assert subprocess.run([*closed, "data", "list", "--nope"], capture_output=True).returncode == 2
