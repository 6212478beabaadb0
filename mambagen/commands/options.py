"""Options and habits that commands share. Imports click and the standard library only."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

CONTEXT_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

# The keys of mambagen.models.MAMBA_SIZES, repeated here so that --help need not import torch (a test compares them).
SIZES = ("250k", "700k", "1.4m", "3.5m", "7m", "19m", "41m")
# Those of mambagen.models.encoders that see both sides.
ENCODERS = ("bigs", "bigs-stack", "bimamba", "bert")
POOLINGS = ("mean", "first", "last", "max")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")

F = TypeVar("F", bound=Callable[..., Any])


def debug_option(command: F) -> F:
    """`--debug`, on every command; the command line's entry looks for it, the command itself never sees it."""
    option = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
    return option(command)


def given(**options: Any) -> dict[str, Any]:
    """The options that the user gave: those that are neither None nor an empty tuple."""
    return {name: value for name, value in options.items() if value is not None and value != ()}
