"""How a training run is configured: defaults here, a TOML file over them, command-line options over both."""

import difflib
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mambagen.errors import UsageError

DEFAULT_MINUTES = 1.0
BUDGETS = ("steps", "minutes", "tokens")  # tokens: of jobs that know how many a step has


class TrainConfig(BaseModel):
    """What the loop itself needs to know; a job adds its own keys by inheriting.

    The budget is `steps` (updates, exact) or `minutes` (see `schedule.Budget`); with neither it is one minute.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False)
    lr: float = Field(8e-3, gt=0, allow_inf_nan=False)
    warmup: float = Field(0.1, ge=0, lt=1)  # share of the budget over which the learning rate rises
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False)
    clip: float = Field(1.0, gt=0, allow_inf_nan=False)  # largest norm of the gradient
    accumulate: int = Field(1, ge=1)  # pieces in which a step's batch goes through the model
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    seed: int = Field(0, ge=0, lt=2**63)
    threads: int | None = Field(None, ge=1)
    save_every: str = "10m"  # steps ("500") or minutes ("10m")
    keep: int = Field(3, ge=1)

    @model_validator(mode="after")
    def _one_budget(self) -> "TrainConfig":
        if self.steps is not None and self.minutes is not None:
            raise ValueError("steps and minutes are two budgets: give one of them")
        return self

    @field_validator("save_every", mode="before")
    @classmethod
    def _steps_or_minutes(cls, value: Any) -> str:
        text = str(value)
        if not re.fullmatch(r"\d+|\d+(\.\d+)?m", text) or float(text.rstrip("m")) == 0:
            raise ValueError("give a number of steps, such as 500, or of minutes, such as 10m")
        return text

    def save_interval(self) -> tuple[int | None, float]:
        """(steps or None, minutes or infinity) between two checkpoints."""
        if self.save_every.endswith("m"):
            return None, float(self.save_every[:-1])
        return int(self.save_every), math.inf

    def with_budget(self) -> Self:
        """The same with the default budget written in where none was given."""
        if self.steps is None and self.minutes is None:
            return self.model_copy(update={"minutes": DEFAULT_MINUTES})
        return self


Config = TypeVar("Config", bound=TrainConfig)
OPTIONS = {"lengths": "length"}  # keys that are options by another name


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file; UsageError names file and line where it cannot be read."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read as a configuration: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not TOML: {error}") from error


def configure(kind: type[Config], file: Path | None, options: Mapping[str, Any]) -> Config:
    """The configuration out of the defaults of `kind`, the TOML file over them and the options over both.

    Raises:
        UsageError: an unknown key, or a value that is not allowed; the message names the key and where it came from.
    """
    table = read_toml(file) if file else {}
    return validated(kind, overlaid(table, options), options, file)


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`; a budget above replaces one of another kind below."""
    merged = dict(below)
    if any(budget in above for budget in BUDGETS):
        for budget in BUDGETS:
            merged.pop(budget, None)
    merged.update(above)
    return merged


def validated(kind: type[Config], values: Mapping[str, Any], options: Mapping[str, Any], file: Path | None) -> Config:
    """The values as a `kind`; what pydantic finds wrong first becomes one line."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise UsageError(explain_invalid(kind, error, options, file)) from error


def explain_invalid(
    kind: type[BaseModel], error: ValidationError, options: Mapping[str, Any], file: Path | None
) -> str:
    """One line for the first thing that is wrong: which key, from where, and what is allowed."""
    first = error.errors()[0]
    where = f"{file}: " if file else ""
    if not first["loc"]:
        return where + str(first["msg"]).removeprefix("Value error, ")
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, list(kind.model_fields), n=1)
        return f"{where}unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    given = str(first["loc"][0])  # of "lengths.0" the option that gave the list
    name = f"--{OPTIONS.get(given, given).replace('_', '-')}" if given in options else f"{where}{key}"
    return f"{name} is {first['input']!r}: {str(first['msg']).removeprefix('Value error, ')}"
