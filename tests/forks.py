"""Processes of their own that need not import torch again: children of one server that has it, each with a real exit.

process = command_process(["pretrain-dna", "--steps", "9"], folder, folder / "stderr")
process.start(); process.kill(); process.join()
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PRELOAD = ["torch._dynamo", "mambagen.pipelines.pretrain_dna", "tests.training.standin"]


def fork(target: Callable[..., Any], *args: Any, **kwargs: Any) -> multiprocessing.process.BaseProcess:
    """A process that calls `target`, not started yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(ROOT) not in paths:  # where the server finds the tests' modules
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, paths)])
    return context.Process(target=target, args=args, kwargs=kwargs)


def command_process(arguments: Sequence[str], folder: Path, stderr: Path) -> multiprocessing.process.BaseProcess:
    """The command line with these arguments, run in `folder`; what it says on stderr goes to a file."""
    return fork(_command, list(arguments), folder, stderr)


def _command(arguments: list[str], folder: Path, stderr: Path) -> None:
    os.chdir(folder)
    sys.stderr = open(stderr, "w", buffering=1)  # noqa: SIM115 (the process ends with it)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    from mambagen import cli

    cli.main(arguments)
