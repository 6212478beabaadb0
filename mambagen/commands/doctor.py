"""`mambagen doctor`: what this machine offers, and whether the kernels on it are right."""

import json
import re
from dataclasses import asdict
from typing import Any

import click

from mambagen.commands.options import CONTEXT_SETTINGS, debug_option


class Shape(click.ParamType):
    """BxLxC, three whole numbers."""

    name = "BxLxC"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        if isinstance(value, tuple):
            return value
        if not re.fullmatch(r"\d+x\d+x\d+", str(value)):
            self.fail(f"{value!r} is not batch x length x channels, as in 2x1000x128", param, ctx)
        batch, length, channels = map(int, str(value).split("x"))
        return batch, length, channels


@click.command(name="doctor", context_settings=CONTEXT_SETTINGS)
@click.option(
    "--shapes", type=Shape(), multiple=True, help="Check the kernels at batch x length x channels; may be repeated."
)
@click.option("--state", type=int, default=16, show_default=True, metavar="N", help="States a channel of the scan.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
@click.pass_context
def doctor(ctx: click.Context, shapes: tuple[tuple[int, int, int], ...], state: int, as_json: bool) -> None:
    """Show what this machine offers and check the kernels on it.

    Every backend that runs here is compared, forward and backward, with the float64 reference: the errors are relative
    to the largest value. Exit code 1 where one fails.
    """
    from mambagen.pipelines.doctor import DEFAULT_SHAPES, Check, backends, check_kernels, devices, versions

    facts = {"versions": versions(), "devices": devices()}
    found = backends()
    if not as_json:
        for group in facts.values():
            for name, value in group.items():
                click.echo(f"{name:<14} {value}")
        click.echo()
        for each in found:
            click.echo(f"{each.op:<14} {each.backend:<7} {f'runs on {each.device}' if each.device else each.reason}")
        click.echo("\n" + _ROW.format("op", "backend", "device", "dtype", "shape", "forward", "backward", "result"))
    checks: list[Check] = []
    for check in check_kernels(shapes or DEFAULT_SHAPES, state):
        checks.append(check)
        if not as_json:
            errors = ["-" if e is None else f"{e:.1e}" for e in (check.forward_error, check.backward_error)]
            columns = (check.op, check.backend, check.device, check.dtype, check.shape, *errors, check.result)
            click.echo(f"{_ROW.format(*columns)}  {check.note}".rstrip())
    failed = sum(check.result == "FAIL" for check in checks)
    passed = sum(check.result == "PASS" for check in checks)
    if as_json:
        results = {"backends": [asdict(each) for each in found], "checks": [asdict(check) for check in checks]}
        click.echo(json.dumps(facts | results | {"passed": passed, "failed": failed}, indent=1))
    else:
        click.echo(f"\n{passed} passed, {failed} failed")
    ctx.exit(1 if failed else 0)


_ROW = "{:<14}  {:<7}  {:<6}  {:<8}  {:<12}  {:>8}  {:>8}  {:<6}"
