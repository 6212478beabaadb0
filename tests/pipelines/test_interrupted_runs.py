"""A run of `mambagen pretrain-dna` that is stopped, killed and gone on with equals one that was left alone."""

import json
import os
import signal
import time
from pathlib import Path

from mambagen import cli
from mambagen.models.files import list_checkpoints
from tests.forks import command_process

STEPS = 24


def rows(run: Path) -> list[tuple[object, ...]]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row.get("loss"), row.get("grad_norm"), row.get("valid_loss")) for row in found]


def newest(run: Path) -> int:
    return max((step for step, _ in list_checkpoints(run / "checkpoints")), default=-1)


def stopped_at(folder: Path, arguments: list[str], step: int, how: signal.Signals) -> tuple[int | None, str]:
    """Start the command, signal it when it has saved a step after `step`; its exit code and last words."""
    process = command_process(arguments, folder, folder / "stderr")
    process.start()
    assert process.pid
    deadline = time.monotonic() + 120
    while newest(folder / "run") <= step:
        assert process.is_alive(), (folder / "stderr").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, how)
    process.join(60)
    return process.exitcode, (folder / "stderr").read_text()


def test_a_run_stopped_interrupted_and_killed_equals_one_left_alone(tiny: Path, tmp_path: Path) -> None:
    begin = ["pretrain-dna", "--config", str(tiny), "--steps", str(STEPS), "--save-every", "1", "--reverse-complement"]
    assert cli.run([*begin, "--out", "whole"]) == 0
    resume = ["pretrain-dna", "--resume", "run"]

    code, said = stopped_at(tmp_path, [*begin, "--out", "run"], 1, signal.SIGTERM)
    assert code == 143, said
    last_line = said.splitlines()[-1]
    assert last_line.startswith("mambagen: stopped by SIGTERM after step ")
    assert last_line.endswith("go on with --resume run")

    code, said = stopped_at(tmp_path, resume, newest(tmp_path / "run"), signal.SIGINT)
    assert code == 130, said
    assert "stopped by SIGINT" in said

    code, said = stopped_at(tmp_path, resume, newest(tmp_path / "run"), signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    assert newest(tmp_path / "run") < STEPS, "it ended before it was killed"

    assert cli.run(resume) == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    for name in ("model.safetensors", "optimizer.safetensors"):
        last = Path("checkpoints") / f"step-{STEPS:08d}" / name
        assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()
