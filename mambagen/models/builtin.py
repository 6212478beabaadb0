"""The models that come with the package, by name."""

from pathlib import Path

from mambagen.errors import ModelError
from mambagen.models.files import list_checkpoints

WEIGHTS_HOME = Path(__file__).resolve().parent.parent / "weights"


def builtin_models() -> list[str]:
    """The names of the models in this installation."""
    return sorted(config.parent.name for config in WEIGHTS_HOME.glob("*/config.json"))


def find_model(name_or_folder: Path | str) -> Path:
    """The folder of a model: the one that is named, if it holds a model, or else the built-in one of that name.

    Of the folder of a training run it is `model`, the best that was kept, or else the newest checkpoint.

    Raises:
        ModelError: there is neither.
    """
    folder = Path(name_or_folder)
    names = builtin_models()
    if (folder / "config.json").exists():
        return folder
    if str(name_or_folder) in names:
        return WEIGHTS_HOME / str(name_or_folder)
    if folder.is_dir():
        return _model_of_run(folder)
    if folder.exists():
        raise ModelError(f"{name_or_folder}: is a file; a model is a folder with config.json and model.safetensors")
    known = f"built in are: {', '.join(names)}" if names else "this installation has none built in"
    raise ModelError(f"{name_or_folder}: no such model folder, and no built-in model ({known}); give a model's folder")


def _model_of_run(folder: Path) -> Path:
    """The model in the folder of a run; the folder itself where none is in it, which is said when it is read."""
    if (folder / "model").is_dir():
        return folder / "model"
    return next((path for _, path in list_checkpoints(folder / "checkpoints")), folder)
