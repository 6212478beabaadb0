"""The folder of a run: its configuration, metrics and checkpoints, and the lock that keeps it to one process.

RUN/config.toml      every setting, defaults included, as the run uses them
RUN/metrics.jsonl    one JSON object a line: a row a step, and a row an evaluation
RUN/tensorboard/     the same for TensorBoard, where it is installed
RUN/checkpoints/     see `checkpoint`
RUN/loss.png         drawn at the end
RUN/report.html      the same with figures, settings and how to repeat
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from mambagen.errors import ModelError, ResourceError, UsageError


class RunFolder:
    """Paths of a run and its log of metrics."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        self.metrics_file = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.loss_plot = path / "loss.png"

    @staticmethod
    def vacant(path: Path | None, job: str) -> Path:
        """`path`, or runs/JOB-DATE-TIME here; UsageError where a run (or anything) is there already."""
        if path is None:
            return _unused(Path("runs") / f"{job}-{datetime.now():%Y%m%d-%H%M%S}")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"{path}: exists already; choose another --out, or go on with a run by --resume")
        return path

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        """A new folder at `path`."""
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{path}: the run's folder cannot be made: {error.strerror}") from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The folder of an earlier run; ModelError where there is none."""
        run = cls(path)
        if not run.config_file.is_file():
            raise ModelError(f"{path}: is not the folder of a run (it has no config.toml)")
        return run

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; ResourceError where another one trains in it."""
        with open(self.path / ".lock", "w") as stream:
            try:
                import fcntl

                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # no such lock on Windows: go without
                pass
            except BlockingIOError as error:
                raise ResourceError(f"{self.path}: another process is training in this run; wait for it") from error
            yield

    def write_config(self, values: Mapping[str, Any]) -> None:
        """Write config.toml, whole or not at all."""
        partial = self.config_file.with_name(".config.toml.partial")
        partial.write_text(to_toml(values), "utf-8")
        os.replace(partial, self.config_file)


def _unused(path: Path) -> Path:
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


class Metrics:
    """The log of a run, metrics.jsonl and TensorBoard: rows are appended, and on resuming cut back to the checkpoint.

    Rows of steps hold step, loss (nats a target; null where a batch had no target), lr, grad_norm, tokens, seconds,
    tokens_per_second; rows of evaluations hold step and figures whose names begin with "valid_".
    """

    def __init__(self, run: RunFolder, step: int = 0) -> None:
        """Open the log of a run that stands at `step`: later rows, and a last line cut in two, are dropped."""
        self._file = run.metrics_file
        self.evaluated_at = self._cut_back(step)
        self._stream = open(self._file, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        self._board = _Board.open(run.tensorboard, step)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        with self._disk_errors_named():
            self._stream.write(json.dumps(row) + "\n")
        if self._board:
            self._board.write(row)

    def flush(self, to_disk: bool = False) -> None:
        """Make the rows readable by others; `to_disk` before a checkpoint, which must not be ahead of its rows."""
        with self._disk_errors_named():
            self._stream.flush()
            if to_disk:
                os.fsync(self._stream.fileno())
            if self._board:
                self._board.flush()

    def close(self) -> None:
        """Flush and close; what the disk does not take any more is lost here without a further error."""
        with contextlib.suppress(OSError):
            self._stream.close()
        with contextlib.suppress(OSError):
            if self._board:
                self._board.close()

    @contextmanager
    def _disk_errors_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceError(
                f"{self._file}: cannot be written: {error.strerror}; checkpoints are whole: make room and go on with "
                f"--resume"
            ) from error

    def _cut_back(self, step: int) -> int:
        rows = [row for row in read_metrics(self._file) if row["step"] <= step]
        if self._file.exists():
            partial = self._file.with_name(".metrics.jsonl.partial")
            with open(partial, "w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in rows)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, self._file)
        return max((row["step"] for row in rows if "valid_loss" in row), default=-1)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; lines that are no whole row (a process was killed while writing) are left out."""
    rows = []
    if file.exists():
        for line in file.read_text("utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


class _Board:
    """TensorBoard's event file, written by its own package without torch's writer (which costs seconds of import)."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-untyped]

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder))
        if step:  # TensorBoard drops what an earlier process wrote from here on
            self._writer.add_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    @classmethod
    def open(cls, folder: Path, step: int) -> "_Board | None":
        try:
            return cls(folder, step)
        except ImportError:
            return None

    def write(self, row: dict[str, Any]) -> None:
        import time

        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "step" and isinstance(value, (int, float))
        ]
        self._writer.add_event(
            self._event(step=row["step"], wall_time=time.time(), summary=self._summary(value=values))
        )

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def to_toml(values: Mapping[str, Any]) -> str:
    """Plain values, lists and tables as TOML; None is left out (the default stands)."""
    plain = {key: value for key, value in values.items() if value is not None and not isinstance(value, Mapping)}
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    lines = [f"{key} = {_toml_value(value)}" for key, value in plain.items()]
    for name, table in tables.items():
        lines += ["", f"[{name}]", to_toml(table).rstrip("\n")]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
