"""`mambagen data`: the data sets known by name."""

import json
from collections.abc import Sequence
from typing import Any

import click

from mambagen.commands.options import CONTEXT_SETTINGS, debug_option

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tab-separated columns.")


@click.group(name="data", context_settings=CONTEXT_SETTINGS)
@debug_option
def data() -> None:
    """List, show, fetch and verify the data sets known by name.

    NAME is one of `mambagen data list`, or a manifest file of your own (.toml). Fetched files go into MAMBAGEN_HOME, or
    the platform's cache folder.
    """


@data.command(name="list")
@as_json
@debug_option
def list_(as_json: bool) -> None:
    """List the data sets and whether they are here."""
    from mambagen.pipelines.data_sets import list_data_sets

    _print_rows(list_data_sets(), as_json)


@data.command()
@click.argument("name")
@as_json
@debug_option
def show(name: str, as_json: bool) -> None:
    """Show what NAME is: origin, licence, files, splits."""
    from mambagen.pipelines.data_sets import show_data_set

    shown = show_data_set(name)
    if as_json:
        click.echo(json.dumps(shown, indent=1))
        return
    for key in ("name", "title", "kind", "state", "licence", "provenance", "notes"):
        if shown[key]:
            click.echo(f"{key}\t{shown[key]}")
    for citation in shown["citations"]:
        click.echo(f"citation\t{citation}")
    for file in shown["files"]:
        click.echo("\t".join(["file", file["name"], file["role"], file["sha256"], file["path"]]))
        for url in file["urls"]:
            click.echo(f"url\t{url}")
    splits = shown["splits"] or {"bed": None, "intervals": [], "chromosomes": None}
    if splits["bed"]:
        click.echo(f"splits\t{splits['bed']}")
    for part, labels in (splits["chromosomes"] or {}).items():
        click.echo(f"chromosomes\t{part}\t{' '.join(labels)}")
    for row in splits["intervals"]:
        click.echo(f"split\t{row['record']}\t{row['start']}\t{row['end']}\t{row['split']}")


@data.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@as_json
@debug_option
def fetch(names: Sequence[str], as_json: bool) -> None:
    """Download NAME into the cache and check it.

    A download that was cut off goes on where it stopped; files that are there and whole are left as they are.
    """
    from mambagen.pipelines.data_sets import fetch_data_sets

    with _Rows(as_json) as rows:
        fetch_data_sets(names, rows.add)


@data.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@as_json
@debug_option
def verify(names: Sequence[str], as_json: bool) -> None:
    """Check the files of NAME against their checksums.

    Exit code 5 where one is missing or damaged.
    """
    from mambagen.pipelines.data_sets import verify_data_sets

    with _Rows(as_json) as rows:
        verify_data_sets(names, rows.add)


class _Rows:
    """Prints rows as they come, or as one JSON list at the end, an error notwithstanding."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.rows: list[dict[str, Any]] = []

    def add(self, rows: list[dict[str, Any]]) -> None:
        if not self.as_json:
            _print_rows(rows, False, header=not self.rows)
        self.rows += rows

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *_: object) -> None:
        if self.as_json:
            _print_rows(self.rows, True)


def _print_rows(rows: Sequence[dict[str, Any]], as_json: bool, header: bool = True) -> None:
    if as_json:
        click.echo(json.dumps(list(rows), indent=1))
        return
    if rows and header:
        click.echo("\t".join(rows[0]))
    for row in rows:
        click.echo("\t".join("" if value is None else str(value) for value in row.values()))
