"""Options and habits that commands share. Imports click and the standard library only."""

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import click

CONTEXT_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

# The keys of mambagen.models.MAMBA_SIZES, repeated here so that --help need not import torch (a test compares them).
SIZES = ("250k", "700k", "1.4m", "3.5m", "7m", "19m", "41m")
# Those of mambagen.models.encoders that see both sides.
ENCODERS = ("bigs", "bigs-stack", "bimamba", "bert")
# The keys of mambagen.pipelines.recipes.RECIPES.
RECIPES = ("scaling", "length-1k", "length-4k", "length-16k", "length-64k", "length-256k", "length-1m")
POOLINGS = ("mean", "first", "last", "max")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")


class Bases(click.ParamType):
    """A number of bases (or tokens) as people write it: 131072, 2M (millions), 10k, 1.5G or 1.5B, 1Mi (2^20), 128Ki."""

    name = "N"
    UNITS: ClassVar[dict[str, int]] = {
        "": 1,
        "k": 10**3,
        "m": 10**6,
        "g": 10**9,
        "b": 10**9,
        "ki": 1 << 10,
        "mi": 1 << 20,
        "gi": 1 << 30,
    }

    def __init__(self, least: int | None = None) -> None:
        """`least`: fewer are refused here, where nothing that reads the option does."""
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).replace("_", "").replace(",", "").strip().lower().removesuffix("bp")
        number = text.rstrip("kmgbi")
        try:
            amount = Decimal(number) * self.UNITS[text[len(number) :]]
        except (ArithmeticError, KeyError):
            self.fail(f"{value!r} is no number of bases; write it as 131072, 2M or 1Mi", param, ctx)
        if not amount.is_finite() or amount != amount.to_integral_value():
            self.fail(f"{value!r} is no whole number of bases", param, ctx)
        if self.least is not None and amount < self.least:
            self.fail(f"{value!r} is less than {self.least}", param, ctx)
        return int(amount)


BASES = Bases()

F = TypeVar("F", bound=Callable[..., Any])


def debug_option(command: F) -> F:
    """`--debug`, on every command; the command line's entry looks for it, the command itself never sees it."""
    option = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
    return option(command)


def together(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """Several options as one decorator, in the order in which `--help` shows them."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def update_options(clip: float = 1.0) -> Callable[[F], F]:
    """What a training command says of its updates beside the learning rate; `clip` is the default."""
    return together(
        click.option(
            "--warmup", type=float, metavar="SHARE", help="Share of the budget in which it rises.  [default: 0.1]"
        ),
        click.option("--weight-decay", type=float, metavar="X", help="AdamW's weight decay.  [default: 0.1]"),
        click.option("--clip", type=float, metavar="X", help=f"Largest norm of the gradient.  [default: {clip}]"),
        click.option(
            "--accumulate", type=int, metavar="N", help="Cut an update into N pieces to save memory.  [default: 1]"
        ),
    )


machine_options = together(
    click.option("--precision", type=click.Choice(PRECISIONS), help="auto: bf16 on a GPU, else fp32.  [default: auto]"),
    click.option(
        "--device", metavar="|".join(DEVICES), help="Where to train; cuda:1 is the second GPU.  [default: auto]"
    ),
    click.option("--threads", type=int, metavar="N", help="CPU threads.  [default: all cores]"),
)
save_every_option = click.option(
    "--save-every", metavar="N|Mm", help="Write a checkpoint every N steps, or M minutes as in 10m.  [default: 10m]"
)


def checkpoint_options(seed_of: str) -> Callable[[F], F]:
    """When checkpoints are written, how many are kept, and the seed."""
    return together(
        save_every_option,
        click.option("--keep", type=int, metavar="K", help="Keep the newest K checkpoints.  [default: 3]"),
        click.option("--seed", type=int, metavar="S", help=f"Of {seed_of}.  [default: 0]"),
    )


def run_options(command: str, example: str, resume: str = "Go on with this run.") -> Callable[[F], F]:
    """The run's folder, going on with one, settings in a file (`example` is a line of it), and the result as JSON."""
    folder = click.Path(path_type=Path)
    return together(
        click.option(
            "--out", type=folder, metavar="RUN", help=f"Folder of the run.  [default: runs/{command}-DATE-TIME]"
        ),
        click.option("--resume", type=folder, metavar="RUN", help=resume),
        click.option(
            "--config",
            type=folder,
            metavar="FILE",
            help=f"TOML with these options as keys ({example}); options win over it.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    )


def given(**options: Any) -> dict[str, Any]:
    """The options that the user gave: those that are neither None nor an empty tuple."""
    return {name: value for name, value in options.items() if value is not None and value != ()}
