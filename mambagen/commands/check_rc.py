"""`mambagen check-rc`: check that a model answers both strands of DNA alike."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from mambagen.commands.options import CONTEXT_SETTINGS, DEVICES, debug_option

_ROW = "{:>8}  {:<9}  {:>14}  {:>9}  {:<6}"


@click.command(name="check-rc", context_settings=CONTEXT_SETTINGS)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--length", "lengths", multiple=True, type=click.IntRange(min=1), metavar="N",
    help="Length of the sequences to try; may be repeated.  [default: 1, 2, 65, 512]",
)  # fmt: skip
@click.option("--average", is_flag=True, help="Try the average over both strands instead of the model alone.")
@click.option("--tolerance", type=float, default=1e-5, show_default=True, metavar="X", help="Of the probabilities.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="S", help="Of the sequences.")
@click.option("--device", default="auto", show_default=True, metavar="|".join(DEVICES), help="Where to compute.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
@click.pass_context
def check_rc(
    ctx: click.Context,
    model: Path,
    lengths: tuple[int, ...],
    average: bool,
    tolerance: float,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Check that a model answers both strands of DNA alike.

    Random sequences and their reverse complements go through MODEL: a masked model has to give the complement's
    probabilities at the mirrored position, a classifier the same classes. Exit code 1 where they deviate.
    """
    from mambagen.pipelines.check_rc import LENGTHS
    from mambagen.pipelines.check_rc import check_rc as run

    checks = list(run(model, lengths or LENGTHS, device, average, seed, tolerance))
    worst = max(check.deviation for check in checks)
    failed = any(check.result == "FAIL" for check in checks)
    if as_json:
        rows = [asdict(check) | {"result": check.result} for check in checks]
        click.echo(json.dumps({"checks": rows, "largest_deviation": worst, "equivariant": not failed}, indent=1))
    else:
        click.echo(_ROW.format("length", "batch", "largest |dp|", "allowed", "result"))
        for check in checks:
            batch = "padded" if check.padded else "equal"
            click.echo(
                _ROW.format(check.length, batch, f"{check.deviation:.2e}", f"{tolerance:.0e}", check.result).rstrip()
            )
        what = f"{'average over both strands' if average else 'model'} {'is not' if failed else 'is'}"
        click.echo(f"\nThe {what} reverse-complement equivariant: largest deviation {worst:.2e}.")
    ctx.exit(1 if failed else 0)
