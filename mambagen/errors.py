"""The errors that a user can cause, each with the exit code that the command line gives it.

Raise one of these with a message that says what, where and what to do, in one line; the command line prints it as
``mambagen: error: MESSAGE`` and exits with ``exit_code``. Anything else that escapes is a bug of ours: exit 1.
"""


class MambagenError(Exception):
    """Base of every error that is the input's, the machine's or the user's, not ours."""

    exit_code = 1


class UsageError(MambagenError):
    """Options that do not fit together or have unknown values."""

    exit_code = 2


class InputError(MambagenError):
    """Data that cannot be used: name the file, and the record or line where there is one."""

    exit_code = 3

    @classmethod
    def at(cls, path: object, line: int | None, what: str) -> "InputError":
        """An error in a file, as ``FILE:LINE: what`` (the line is 1-based and may be unknown)."""
        return cls(f"{path}:{line}: {what}" if line else f"{path}: {what}")


class ModelError(MambagenError):
    """A model folder or checkpoint that is damaged, incomplete or of another kind."""

    exit_code = 4


class ResourceError(MambagenError):
    """A full disk, a refused write, a failed download."""

    exit_code = 5


class OutOfMemoryError(MambagenError):
    """Host or device memory is too small for what was asked: say what would fit."""

    exit_code = 6


class DivergedError(MambagenError):
    """Training met a loss or gradient that is not finite."""

    exit_code = 7


class InterruptedRun(MambagenError):
    """A job that stopped because it was asked to (Ctrl-C, SIGTERM), after saving what it had."""

    exit_code = 130

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code
