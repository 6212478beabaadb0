"""`mambagen sc09-stats`: statistics of real spoken digits, for eval-sc09 where the data are not."""

import json
from pathlib import Path

import click

from mambagen.commands.options import CONTEXT_SETTINGS, DEVICES, debug_option

EPILOG = """\b
Examples:
  mambagen sc09-stats speech_commands_v0.02 --name SC09 --out sc09.safetensors
  mambagen eval-sc09 --samples wavs/ --stats sc09.safetensors
"""


@click.command(name="sc09-stats", context_settings=CONTEXT_SETTINGS, epilog=EPILOG)
@click.argument("data")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", required=True, help="The file to write.")
@click.option("--name", metavar="TEXT", help="What the data are called in tables.  [default: the folder's name]")
@click.option("--description", metavar="TEXT", default="", help="What the data are, for the file's header.")
@click.option("--licence", metavar="TEXT", default="", help="Of the data, for the file's header.")
@click.option("--judge", metavar="MODEL", default="digit-judge", show_default=True, help="The statistics are for it.")
@click.option("--device", metavar="|".join(DEVICES), default="auto", show_default=True, help="Where to compute.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@debug_option
def sc09_stats(
    data: str, out: Path, name: str | None, description: str, licence: str, judge: str, device: str, as_json: bool
) -> None:
    """Make statistics of real spoken digits for eval-sc09.

    DATA is a Speech Commands or SC09 folder, or a table of clips. The file holds means and covariances of the judge's
    features, some hundred kilobytes, no sound.
    """
    from mambagen.training.progress import Progress

    with Progress() as progress:
        progress.state("starting ...")

        from mambagen.pipelines.sc09_stats import sc09_stats as run

        reference = run(data, out, name, description, licence, judge, device, progress)
    facts = reference.facts
    if as_json:
        click.echo(json.dumps(facts.model_dump() | {"file": str(out)}, indent=1))
        return
    click.echo("part\tclips\tFID\tIS\tmIS\tAM")
    for row in facts.rows:
        values = "\t".join(f"{row.figures[figure][0]:.4f}" for figure in ("FID", "IS", "mIS", "AM"))
        click.echo(f"{row.name}\t{row.count}\t{values}")
