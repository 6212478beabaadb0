"""What every run does before it goes on: its settings with the changes asked for, and what may not change."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mambagen.errors import ModelError, UsageError
from mambagen.training.checkpoint import Checkpoint
from mambagen.training.config import TrainConfig, configure, overlaid, read_toml, validated
from mambagen.training.run_folder import RunFolder

Config = TypeVar("Config", bound=TrainConfig)


def changed_settings(
    kind: type[Config],
    run: RunFolder,
    options: Mapping[str, Any],
    config_file: Path | None,
    replaced_by: Mapping[str, str] | None = None,
) -> tuple[Config, Config]:
    """(the run's own settings, those with the changes of a file and of options over both).

    Args:
        replaced_by: a setting that is given -> one of the run's that it takes the place of.

    Raises:
        UsageError: impossible settings; see `configure`.
    """
    given = dict(read_toml(config_file) if config_file else {})
    given.update(options)
    before = configure(kind, run.config_file, {})
    kept = before.model_dump(exclude_none=True)
    for setting, other in (replaced_by or {}).items():
        if setting in given:
            kept.pop(other, None)
    return before, validated(kind, overlaid(kept, given), options, config_file)


def refuse_changes(
    folder: Path,
    before: TrainConfig,
    after: TrainConfig,
    fixed: Iterable[str],
    option_names: Mapping[str, str] | None = None,
    advice: str = "begin a new run",
    same: Callable[[str, Any, Any], bool] = lambda name, was, wanted: bool(was == wanted),
) -> None:
    """UsageError where one of the `fixed` settings is another than the run has; both as they are kept in its folder.

    Args:
        option_names: of settings whose option is not their name with hyphens.
        same: (setting, was, wanted) -> whether they mean the same.
    """
    names = {"start_from": "from", **(option_names or {})}
    for name in fixed:
        was, wanted = getattr(before, name), getattr(after, name)
        if not same(name, was, wanted):
            option = names.get(name, name.replace("_", "-"))
            raise UsageError(
                f"--{option} cannot change when a run goes on: {folder} has {was!r}, not {wanted!r}; {advice}"
            )


def refuse_other_data(folder: Path, checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
    """ModelError where what a checkpoint was trained on (its `identity`) is not what is at hand now."""
    for name, value in identity.items():
        if checkpoint.identity.get(name) != value:
            raise ModelError(f"{folder}: the {name} is not what the run began with; begin a new run with --out")
