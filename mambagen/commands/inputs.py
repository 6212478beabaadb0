"""What commands that read sequences and run a model check before anything heavy is imported."""

import sys
from collections.abc import Sequence

from mambagen.commands.options import DEVICES
from mambagen.errors import UsageError


def check_inputs(paths: Sequence[str], device: str) -> None:
    """UsageError for a second ``-``, a stdin that is a terminal, or an unknown device."""
    if list(paths).count("-") > 1:
        raise UsageError("'-' is given twice, but stdin can be read once only")
    if "-" in paths and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("- reads from stdin, which is a terminal here; give a file or pipe one in")
    if device not in DEVICES and not device.startswith("cuda:"):
        raise UsageError(f"--device {device}: it must be {', '.join(DEVICES)} or cuda:N")
