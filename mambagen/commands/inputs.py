"""What commands that read sequences and run a model check before anything heavy is imported."""

import sys
from collections.abc import Sequence

import click

from mambagen.commands.options import DEVICES, F
from mambagen.errors import UsageError


def model_option(command: F) -> F:
    """`--model`, by default the built-in one."""
    what = "A model's folder, or a built-in one."
    return click.option("--model", default="dna", show_default=True, metavar="FOLDER", help=what)(command)


def rna_option(command: F) -> F:
    """`--rna`, of commands that answer for records."""
    return click.option("--rna", is_flag=True, help="The records are RNA: U is T (else it is warned of).")(command)


def running_options(command: F) -> F:
    """`--batch-tokens`, `--precision` and `--device`, of commands that ask a model."""
    for option in (
        click.option("--device", default="auto", show_default=True, metavar="|".join(DEVICES),
                     help="Where to compute."),
        click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True,
                     help="Of matrix products; bf16 needs a GPU."),
        click.option("--batch-tokens", type=click.IntRange(min=1), metavar="N", help="Bases read at once."),
    ):  # fmt: skip
        command = option(command)
    return command


def check_inputs(paths: Sequence[str], device: str) -> None:
    """UsageError for a second ``-``, a stdin that is a terminal, or an unknown device."""
    if list(paths).count("-") > 1:
        raise UsageError("'-' is given twice, but stdin can be read once only")
    if "-" in paths and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("- reads from stdin, which is a terminal here; give a file or pipe one in")
    if device not in DEVICES and not device.startswith("cuda:"):
        raise UsageError(f"--device {device}: it must be {', '.join(DEVICES)} or cuda:N")
