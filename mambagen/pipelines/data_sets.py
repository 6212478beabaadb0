"""Looking at, fetching and checking the data sets that are known by name."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mambagen.data_manifests import Manifest, fetch, folder_of, list_manifests, load_manifest, path_of, present, verify
from mambagen.errors import MambagenError, ResourceError

Row = dict[str, Any]


def list_data_sets() -> list[Row]:
    """One row a data set: name, kind, whether it is here, title."""
    return [
        {"name": m.name, "kind": m.kind, "state": _state(m), "files": len(m.files), "title": m.title}
        for m in list_manifests()
    ]


def show_data_set(name: str) -> Row:
    """All that the manifest says, with the place of each file on this machine."""
    manifest = load_manifest(name)
    shown = manifest.model_dump(mode="json")
    for entry, file in zip(shown["files"], manifest.files, strict=True):
        path = path_of(manifest, file)
        entry["path"] = str(path)
        entry["here"] = path.is_file()
    return {**shown, "state": _state(manifest)}


def fetch_data_sets(names: Sequence[str], done: Callable[[list[Row]], None]) -> None:
    """Fetch each data set and hand its rows to ``done``; one that fails does not keep the others from coming."""
    manifests = [load_manifest(name) for name in names]

    def fetched(manifest: Manifest) -> None:
        with _progress() as progress:
            fetch(manifest, progress)
        done(_rows(manifest))

    _each(manifests, fetched)


def verify_data_sets(names: Sequence[str], done: Callable[[list[Row]], None]) -> None:
    """Read every file of each data set again and hand its rows to ``done``; raises at the end if any is not whole."""
    manifests = [load_manifest(name) for name in names]

    def verified(manifest: Manifest) -> None:
        rows = _rows(manifest)
        done(rows)
        if bad := [f"{row['path']} ({row['note']})" for row in rows if row["state"] != "ok"]:
            advice = "install mambagen again" if manifest.packaged else f"run: mambagen data fetch {manifest.given}"
            raise ResourceError(f"not whole: {', '.join(bad)}; {advice}")

    _each(manifests, verified)


def _each(manifests: Sequence[Manifest], job: Callable[[Manifest], None]) -> None:
    failures: list[MambagenError] = []
    for manifest in manifests:
        try:
            job(manifest)
        except MambagenError as error:
            failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise type(failures[0])("; ".join(str(failure) for failure in failures))


def _rows(manifest: Manifest) -> list[Row]:
    return [
        {
            "name": manifest.name,
            "file": report.file,
            "state": report.state,
            "bytes": report.bytes,
            "sha256": report.sha256,
            "path": str(report.path),
            "note": report.note,
        }
        for report in verify(manifest)
    ]


def _state(manifest: Manifest) -> str:
    if manifest.packaged:
        return "embedded"
    if present(manifest):
        return "fetched"
    folder = folder_of(manifest)
    begun = folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir())
    return "begun" if begun else "not fetched"


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int | None], None] | None]:
    """A bar a file on stderr, or nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(file: str, done: int, total: int | None) -> None:
            if file not in tasks:
                tasks[file] = bars.add_task(file, total=total)
            bars.update(tasks[file], completed=done, total=total)

        yield show
