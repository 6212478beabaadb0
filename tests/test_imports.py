"""The rooms of the package and who may know whom: imports run down only (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

import mambagen

PACKAGE = Path(mambagen.__file__).parent

MAY_IMPORT = {
    "cli": {"commands"},
    "commands": {"commands", "pipelines", "training.config", "training.progress"},
    "pipelines": {"pipelines", "training", "reports", "data", "data_manifests", "models", "kernels"},
    "training": {"training", "models.files"},  # models.files: how folders are written whole
    "reports": {"reports"},
    "data": {"data"},
    "data_manifests": {"data_manifests"},
    "models": {"models", "kernels"},
    "kernels": {"kernels"},
    "errors": set(),
    "__init__": {"data", "models"},
}
ROOMS = {name for name in MAY_IMPORT if name != "__init__"}


def imported(file: Path) -> list[tuple[str, int]]:
    """What a file imports of this package, without the package's name, and the line."""
    found = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are written from the top"
            module = node.module or ""
            if module == "mambagen":
                found += [(f"mambagen.{alias.name}", node.lineno) for alias in node.names]
            else:
                found.append((module, node.lineno))
    return [(name.removeprefix("mambagen."), line) for name, line in found if name.startswith("mambagen.")]


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def faults(file: Path) -> list[str]:
    room = room_of(file)
    allowed = MAY_IMPORT[room] | (set() if room == "kernels" else {"errors"})
    return [
        f"{file.name}:{line}: {room} must not import mambagen.{name}"
        for name, line in imported(file)
        if name.split(".")[0] in ROOMS and not any(name == room or name.startswith(f"{room}.") for room in allowed)
    ]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_down_only(room: str) -> None:
    files = [file for file in PACKAGE.rglob("*.py") if room_of(file) == room]
    assert files
    assert [fault for file in files for fault in faults(file)] == []


def test_every_room_has_its_arrows_written_down() -> None:
    assert {room_of(file) for file in PACKAGE.rglob("*.py")} == set(MAY_IMPORT)


def test_an_arrow_that_runs_up_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "kernels").mkdir()
    file = tmp_path / "kernels" / "scan.py"
    file.write_text("def f():\n    from mambagen import errors\n    from mambagen.models.config import MambaConfig\n")
    assert [fault.split(": ")[0] for fault in faults(file)] == ["scan.py:2", "scan.py:3"]


def test_heavy_packages_that_slow_every_start_are_imported_where_they_are_used() -> None:
    heavy = {"matplotlib", "tensorboard", "sklearn", "librosa", "transformers", "rich", "Bio", "pysam", "pooch"}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.parse(file.read_text("utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not heavy & {name.split(".")[0] for name in names}, f"{file}:{node.lineno}"
