"""A command line for small runs of pretrain-dna, in a folder of its own."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mambagen import cli

TINY = """
context = 32
batch_tokens = 128
save_every = "2"
threads = 1
steps = 6
[model]
d_model = 16
n_layer = 1
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a TOML file for a model of a few thousand parameters and six steps."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "tiny.toml"
    file.write_text(TINY)
    return file


@pytest.fixture
def pretrain(tiny: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`pretrain("--steps", 3)` -> (exit code, stdout, stderr) of `pretrain-dna --config tiny.toml --steps 3`."""

    def run(*arguments: object, config: bool = True) -> tuple[int, str, str]:
        configured = ["--config", str(tiny)] if config else []
        code = cli.run(["pretrain-dna", *configured, *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`command("classify", ...)` -> (exit code, stdout, stderr) in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        return cli.run([str(a) for a in arguments]), *capsys.readouterr()

    return call
