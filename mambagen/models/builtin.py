"""The models that come with the package, by name."""

from pathlib import Path

from mambagen.errors import ModelError

WEIGHTS_HOME = Path(__file__).resolve().parent.parent / "weights"


def builtin_models() -> list[str]:
    """The names of the models in this installation."""
    return sorted(config.parent.name for config in WEIGHTS_HOME.glob("*/config.json"))


def find_model(name_or_folder: Path | str) -> Path:
    """The folder of a model: the one that is named, if it holds a model, or else the built-in one of that name.

    Raises:
        ModelError: there is neither.
    """
    folder = Path(name_or_folder)
    names = builtin_models()
    if (folder / "config.json").exists() or (folder.is_dir() and str(name_or_folder) not in names):
        return folder  # which may be damaged: that is said when it is read
    if str(name_or_folder) in names:
        return WEIGHTS_HOME / str(name_or_folder)
    if folder.exists():
        raise ModelError(f"{name_or_folder}: is a file; a model is a folder with config.json and model.safetensors")
    known = f"built in are: {', '.join(names)}" if names else "this installation has none built in"
    raise ModelError(f"{name_or_folder}: no such model folder, and no built-in model ({known}); give a model's folder")
