"""A run that is killed, stopped or damaged goes on as if nothing had happened, bit for bit (on a CPU)."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mambagen.errors import InterruptedRun, ModelError, ResourceError
from mambagen.models.files import list_checkpoints
from mambagen.training.checkpoint import newest_checkpoint
from mambagen.training.run_folder import RunFolder, read_metrics
from tests.forks import fork
from tests.training.standin import CountingTask, run_standin


def figures(folder: Path) -> list[tuple[object, ...]]:
    """Everything in the metrics that is no clock time."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("lr"), r.get("valid_loss")) for r in rows]


def test_a_run_killed_at_random_moments_and_resumed_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    steps, seed = 120, random.SystemRandom().randrange(10**6)
    random_moment = random.Random(seed)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kills = 0
    uninterrupted = fork(run_standin, whole, False, steps=steps)
    uninterrupted.start()
    uninterrupted.join(60)
    while True:
        process = fork(run_standin, killed, kills > 0, steps=steps)
        newest_before = newest(killed)
        process.start()
        while process.is_alive() and kills < 3:  # once it has saved something, kill within a part of a second
            if newest(killed) > newest_before:
                time.sleep(random_moment.uniform(0, 0.2))
                process.kill()
                break
            time.sleep(0.002)
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills, "the run ended before it could be killed"
    assert figures(killed) == figures(whole), f"random moments of seed {seed}"
    assert not [path.name for path in (killed / "checkpoints").iterdir() if "partial" in path.name]
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        last = Path("checkpoints") / f"step-{steps:08d}" / name
        assert (killed / last).read_bytes() == (whole / last).read_bytes()


def newest(folder: Path) -> int:
    return max((step for step, _ in list_checkpoints(folder / "checkpoints")), default=-1)


@pytest.mark.parametrize("step", [1, 2, 4, 5, 6, 13, 14])
def test_going_on_from_any_step_leaves_the_same_rows(tmp_path: Path, step: int) -> None:
    run_standin(tmp_path / "whole", resume=False, steps=14, save_every="1", keep=20)
    run_standin(tmp_path / "cut", resume=False, steps=14, save_every="1", keep=20)
    for later, path in list_checkpoints(tmp_path / "cut" / "checkpoints"):
        if later > step:
            shutil.rmtree(path)
    run_standin(tmp_path / "cut", resume=True, steps=14, save_every="1", keep=20)
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_saves_the_step_at_hand_and_resuming_is_exact(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    class Stopping(CountingTask):
        def loss(self, model, tensors):  # type: ignore[no-untyped-def]
            calls.extend([1] if model.training else [])
            if model.training and len(calls) == 18:  # one rehearsal and 17 steps
                os.kill(os.getpid(), number)
            return super().loss(model, tensors)

    calls: list[int] = []
    with pytest.raises(InterruptedRun) as stopped:
        run_standin(tmp_path / "a", resume=False, steps=40, task=Stopping(), save_every="1000")
    assert stopped.value.exit_code == code
    assert "after step 17" in str(stopped.value)
    assert f"--resume {tmp_path / 'a'}" in str(stopped.value)
    assert list_checkpoints(tmp_path / "a" / "checkpoints")[0][0] == 17
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    run_standin(tmp_path / "a", resume=True, steps=40, save_every="1000")
    run_standin(tmp_path / "b", resume=False, steps=40, save_every="1000")
    assert figures(tmp_path / "a") == figures(tmp_path / "b")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: flip(folder / "optimizer.safetensors"), "optimizer.safetensors"),
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors"),
        (lambda folder: (folder / "state.json").unlink(), "state.json"),
        (lambda folder: cut(folder / "manifest.json"), "manifest.json"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path: Path, damage, told, caplog) -> None:  # type: ignore[no-untyped-def]
    run_standin(tmp_path / "a", resume=False, steps=12)
    run_standin(tmp_path / "b", resume=False, steps=12)
    damage(tmp_path / "a" / "checkpoints" / "step-00000012")
    result = run_standin(tmp_path / "a", resume=True, steps=12)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told in warning
    assert figures(tmp_path / "a") == figures(tmp_path / "b")
    assert newest_checkpoint(tmp_path / "a" / "checkpoints").path == result.checkpoint
    assert result.checkpoint.name == "step-00000012"
    assert (tmp_path / "a" / "checkpoints" / "damaged-step-00000012").is_dir()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def test_without_a_whole_checkpoint_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    run_standin(tmp_path / "a", resume=False, steps=2, keep=1)
    flip(tmp_path / "a" / "checkpoints" / "step-00000002" / "model.safetensors")
    with pytest.raises(ModelError, match="none of the 1 checkpoints is whole"):
        run_standin(tmp_path / "a", resume=True, steps=4)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run_standin(tmp_path / "a", resume=False, steps=20, save_every="4", keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path / "a" / "checkpoints")] == [20, 16]


def test_a_finished_run_resumed_adds_no_row_and_with_more_steps_goes_on(tmp_path: Path) -> None:
    first = run_standin(tmp_path / "a", resume=False, steps=6)
    rows = figures(tmp_path / "a")
    again = run_standin(tmp_path / "a", resume=True, steps=6)
    assert again.held_out == first.held_out
    assert figures(tmp_path / "a") == rows
    assert run_standin(tmp_path / "a", resume=True, steps=9).position.step == 9


def test_a_cut_line_and_rows_past_the_checkpoint_leave_the_metrics(tmp_path: Path) -> None:
    run_standin(tmp_path / "a", resume=False, steps=6, save_every="1000")
    with open(tmp_path / "a" / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps({"step": 7, "loss": 1.0}) + "\n" + '{"step": 8, "lo')
    run_standin(tmp_path / "a", resume=True, steps=8, save_every="1000")
    steps = [json.loads(line)["step"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 9))
    assert steps == sorted(steps)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_ends_the_run_and_leaves_earlier_checkpoints_whole(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(ResourceError, match=r"No space left on device") as full:
            run_standin(disk / "a", resume=False, steps=1000, save_every="1", keep=1000)
        check_what_is_left(disk / "a", full.value)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_write_that_finds_no_space_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = Path.write_bytes, []

    def full_after_a_while(self: Path, data: bytes) -> int:
        written.append(self)
        if len(written) > 7:
            raise OSError(28, "No space left on device", str(self))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full_after_a_while)
    with pytest.raises(ResourceError, match="No space left on device") as full:
        run_standin(tmp_path / "a", resume=False, steps=20, save_every="2")
    check_what_is_left(tmp_path / "a", full.value)


def check_what_is_left(folder: Path, error: ResourceError) -> None:
    assert error.exit_code == 5
    assert "\n" not in str(error)
    checkpoints = list_checkpoints(folder / "checkpoints")
    assert checkpoints
    assert newest_checkpoint(folder / "checkpoints").path == checkpoints[0][1]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == sorted(p.name for _, p in checkpoints)


def test_two_processes_do_not_train_in_one_run(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "a")
    with run.lock(), pytest.raises(ResourceError, match="another process"), RunFolder(tmp_path / "a").lock():
        pass
