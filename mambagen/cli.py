"""The entry of the command line: a lazy table of commands, and what becomes of an error or a signal.

Imports click and the standard library only, so that `mambagen --help` answers at once; a command's module is imported
when the command runs, and torch when its pipeline does.
"""

import contextlib
import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from mambagen import __version__
from mambagen.commands.options import CONTEXT_SETTINGS, debug_option
from mambagen.errors import InterruptedRun, MambagenError

# name -> (module:attribute, the line that --help shows)
COMMANDS: dict[str, tuple[str, str]] = {
    "pretrain-dna": ("mambagen.commands.pretrain_dna:pretrain_dna", "Train a Mamba language model on DNA."),
    "train-classifier": (
        "mambagen.commands.train_classifier:train_classifier",
        "Train a classifier of labelled DNA sequences.",
    ),
    "classify": ("mambagen.commands.classify:classify", "Tell the class of each record of a FASTA."),
    "train-species": ("mambagen.commands.train_species:train_species", "Train a model that tells species apart."),
    "classify-species": (
        "mambagen.commands.classify_species:classify_species",
        "Tell the species of each record of a FASTA.",
    ),
    "score": ("mambagen.commands.score:score", "Give the log-likelihood of every base of a genome."),
    "score-variants": (
        "mambagen.commands.score_variants:score_variants",
        "Score the variants of a VCF by their log-likelihood ratios.",
    ),
    "embed": ("mambagen.commands.embed:embed", "Write the vectors that a model gives records or regions."),
    "generate-dna": ("mambagen.commands.generate_dna:generate_dna", "Make DNA with a trained model, as FASTA."),
    "check-rc": ("mambagen.commands.check_rc:check_rc", "Check that a model answers both strands of DNA alike."),
    "pretrain-audio": ("mambagen.commands.pretrain_audio:pretrain_audio", "Train a model of raw sound."),
    "generate-audio": (
        "mambagen.commands.generate_audio:generate_audio",
        "Make sound: spoken digits, or what a model of yours learnt.",
    ),
    "eval-sc09": ("mambagen.commands.eval_sc09:eval_sc09", "Judge generated spoken digits: FID, IS, mIS, AM."),
    "train-sc09-classifier": (
        "mambagen.commands.train_sc09_classifier:train_sc09_classifier",
        "Train the judge of eval-sc09 on spoken digits.",
    ),
    "sc09-stats": ("mambagen.commands.sc09_stats:sc09_stats", "Make statistics of real spoken digits for eval-sc09."),
    "data": (
        "mambagen.commands.data:data",
        "List, show, fetch and verify data sets; prepare, audit and simulate genomes.",
    ),
    "doctor": ("mambagen.commands.doctor:doctor", "Show what this machine offers and check the kernels on it."),
}

EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_RESOURCE = 5
EXIT_MEMORY = 6
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141  # as a shell reports a process that SIGPIPE ended


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used; the list of them comes from COMMANDS alone."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    name="mambagen",
    context_settings=CONTEXT_SETTINGS,
    epilog="Exit codes: 0 done, 1 a bug of ours, 2 usage, 3 bad input data, 4 bad model or checkpoint, "
    "5 disk or network, 6 out of memory, 7 training diverged, 130 interrupted.",
)
@click.version_option(__version__, prog_name="mambagen", message="%(prog)s %(version)s")
@debug_option
def mambagen() -> None:
    """Mamba sequence models for DNA and raw audio: train, evaluate, use."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code; `arguments` are those after the program's name."""
    if "_MAMBAGEN_COMPLETE" in os.environ:  # the shell asks for completions: click answers
        mambagen.main(prog_name="mambagen")
    _replace_closed_streams()
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def _replace_closed_streams() -> None:
    """What is written to a stream that the caller had closed (>&-), which Python gives as None, goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open to the end)


def run(arguments: list[str]) -> int:
    """Run one command line; errors become one line on stderr, and the exit code is returned."""
    _show_log()
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in own
    try:
        # Not click's own main(): it turns Ctrl-C and a closed pipe into exit code 1.
        with mambagen.make_context("mambagen", arguments) as context:
            mambagen.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return EXIT_USAGE
    except BaseException as error:
        code, message = explain(error)
        if debug and not isinstance(error, click.ClickException):
            traceback.print_exc()
        if code == EXIT_PIPE:
            silence_stdout()
        elif message:
            complain(message if isinstance(error, InterruptedRun) else f"error: {message}")
        return code


class StderrLog(logging.Handler):
    """Warnings of the package as lines on stderr, in the form of the errors."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(f"{record.levelname.lower()}: {record.getMessage()}")


def _show_log() -> None:
    log = logging.getLogger("mambagen")
    if not any(isinstance(handler, StderrLog) for handler in log.handlers):
        log.addHandler(StderrLog(logging.WARNING))


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code of an error and the line that tells the user what happened ("" where nothing is to be said)."""
    if isinstance(error, MambagenError):
        return error.exit_code, str(error)
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "mambagen"
        return EXIT_USAGE, f"{error.format_message().rstrip('.')} (see {where} --help)"
    if isinstance(error, click.ClickException):
        return error.exit_code, error.format_message()
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return EXIT_INTERRUPTED, "interrupted"
    if isinstance(error, BrokenPipeError):
        return EXIT_PIPE, ""
    if _out_of_memory(error):
        advice = "less at once would fit: a smaller --batch-tokens (or a larger --accumulate), --context or --size"
        return EXIT_MEMORY, f"out of memory ({_first_line(error)}); {advice}"
    if isinstance(error, OSError):
        what = error.strerror or _first_line(error)
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        advice = {
            errno.ENOSPC: "; free some space and try again",
            errno.EDQUOT: "; free some of your quota and try again",
            errno.EFBIG: "; the file system, or ulimit -f, allows no file of this size",
            errno.EACCES: "; choose a place where you may write, or change its permissions",
        }.get(error.errno or 0, "")
        return EXIT_RESOURCE, f"{where}{what}{advice}"
    kind = type(error).__name__
    return EXIT_BUG, (
        f"a bug of mambagen: {kind}: {_first_line(error)} (run the same with --debug for the traceback, and report it)"
    )


def complain(message: str) -> None:
    """One line on stderr, whatever line breaks the message had."""
    clear = "\r\x1b[2K" if sys.stderr.isatty() else ""  # a progress line may stand there
    with contextlib.suppress(BrokenPipeError):
        click.echo(f"{clear}mambagen: {' '.join(message.split())}", err=True)


def silence_stdout() -> None:
    """Give stdout another end, so that the interpreter's last flush does not fail too."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch: Any = sys.modules.get("torch")  # where torch was not imported, the error is not torch's
    if torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


if __name__ == "__main__":
    main()
