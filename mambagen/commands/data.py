"""`mambagen data`: the data sets known by name."""

import json
from collections.abc import Sequence
from typing import Any

import click

from mambagen.commands.options import BASES, CONTEXT_SETTINGS, debug_option

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tab-separated columns.")


@click.group(name="data", context_settings=CONTEXT_SETTINGS)
@debug_option
def data() -> None:
    """List, show, fetch and verify data sets; prepare, audit and simulate genomes.

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


@data.command()
@click.argument("names", metavar="DATA...", nargs=-1, required=True)
@click.option(
    "--lower-case",
    type=click.Choice(["same", "n"]),
    default="same",
    show_default=True,
    help="Soft-masked letters: as upper case, or as N. It has to be that of the later job.",
)
@as_json
@debug_option
def prepare(names: Sequence[str], lower_case: str, as_json: bool) -> None:
    """Turn genomes into files that training maps into memory.

    DATA are names of DNA data sets, or FASTA, GenBank and 2bit files. A prepared genome takes a byte a base in the
    cache and is found again by its source's content. Jobs prepare large genomes themselves; this does it beforehand.
    """
    from mambagen.pipelines.genomes import prepare_data
    from mambagen.training.progress import Progress

    with Progress() as progress, _Rows(as_json) as rows:
        prepare_data(names, lower_case, rows.add, progress.state)


@data.command()
@click.argument("names", metavar="DATA...", nargs=-1, required=True)
@click.option(
    "--length",
    "lengths",
    type=BASES,
    multiple=True,
    default=(1 << 10, 1 << 14, 1 << 17, 1 << 20),
    help="Bases of a window, 1048576 or 1Mi; may be given several times.  [default: 1Ki, 16Ki, 128Ki, 1Mi]",
)
@click.option("--splits", metavar="BED", help="Rows of record, start, end, split, in place of the data set's own.")
@as_json
@debug_option
def audit(names: Sequence[str], lengths: Sequence[int], splits: str | None, as_json: bool) -> None:
    """Count the held-out bases that training windows can reach.

    A row for each length and way of drawing windows: inside of the training stretches, around the data set's intervals
    as published, and the same with --strict-split. Overlaps count distinct bases.
    """
    from mambagen.pipelines.genomes import audit_data

    _print_rows(audit_data(names, lengths, splits), as_json)


@data.command(name="simulate-species")
@click.option("--species", type=int, default=5, show_default=True, help="How many species.")
@click.option(
    "--divergence",
    type=float,
    default=0.01,
    show_default=True,
    help="Substitutions a site between the two that are farthest apart.",
)
@click.option("--length", type=BASES, default="2M", show_default=True, help="Bases a species, such as 2M.")
@click.option("--chromosomes", type=int, default=5, show_default=True, help="Into which each genome is divided.")
@click.option(
    "--tree", default="yule", show_default=True, metavar="yule|star|NEWICK", help="How the species are related."
)
@click.option("--repeat-rate", type=float, default=0.01, show_default=True, help="Repeats inserted a substitution.")
@click.option("--indel-rate", type=float, default=0.1, show_default=True, help="Short indels a substitution.")
@click.option("--kappa", type=float, default=4.0, show_default=True, help="Transition rate over transversion rate.")
@click.option("--alpha", type=float, default=0.5, show_default=True, help="Shape of the gamma distribution of rates.")
@click.option("--gc", type=float, default=0.41, show_default=True, help="Share of G and C.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", metavar="DIR", required=True, help="A new folder for the FASTA files and the truth about them.")
@as_json
@debug_option
def simulate_species_(out: str, as_json: bool, **settings: Any) -> None:
    """Make up species: genomes evolved along a tree.

    Substitutions are HKY85 with gamma rates; there are short indels and families of repeats. Writes a FASTA file a
    species, splits.bed, and the truth: tree.nwk, repeats.bed, parameters.json.
    """
    from mambagen.pipelines.genomes import simulate

    _print_rows(simulate(out, **settings), as_json)


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
