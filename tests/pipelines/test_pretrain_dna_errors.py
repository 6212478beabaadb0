"""Bad input to `mambagen pretrain-dna`: one line that names the fault, and the exit code of its kind."""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mambagen.data_manifests import resolve_dna

Pretrain = Callable[..., tuple[int, str, str]]
DNA = "ACGTTGCAAC" * 300


def one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("mambagen: error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert "a bug of mambagen" not in err
    return lines[0]


def no_run_is_left(folder: Path) -> bool:
    return not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "empty"),
        (b"\n\n  \n", "blank"),
        (b"ACGTACGT\n", "no header"),
        (b">p\nMKVLAAGIVGLNSDPEFQ\n", "protein"),
        (b"@read1\nACGT\n+\nIIII\n", "FASTQ"),
        (gzip.compress(f">a\n{DNA}\n".encode())[:-30], "gzip"),
        (f">a\n{DNA}\n".encode("utf-16"), "UTF-16"),
        (f">a\n{DNA}\n>b\n{DNA}\n>a\n{DNA}\n".encode(), ":5: record 'a' occurs twice"),
        (b">a\nACGT\n>b\nACGTAC\n", "context of 32"),
        (f">a\n{'N' * 5000}\n".encode(), "N"),
        (f">a\n{DNA}\nACGT ACGT?\n".encode(), ":3"),
    ],
    ids=[
        "empty",
        "blank",
        "no header",
        "protein",
        "FASTQ",
        "cut-off gzip",
        "UTF-16",
        "duplicate ids",
        "too short",
        "nothing but N",
        "blank inside",
    ],
)
def test_bad_files_are_exit_3_and_named(content: bytes, told: str, pretrain: Pretrain, tmp_path: Path) -> None:
    (tmp_path / "bad.fa").write_bytes(content)
    code, out, err = pretrain("--data", "bad.fa")
    assert code == 3, err
    line = one_line(err)
    assert line.startswith("mambagen: error: bad.fa:")
    assert told in line
    assert out == ""
    assert no_run_is_left(tmp_path)


def test_a_missing_file_a_folder_and_an_unknown_data_set_are_exit_3(pretrain: Pretrain, tmp_path: Path) -> None:
    (tmp_path / "folder.fa").mkdir()
    for name in ("missing.fa", "folder.fa", "nosuchset"):
        code, _, err = pretrain("--data", name)
        assert code == 3
        assert name in one_line(err)
    assert no_run_is_left(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--steps", 0], "--steps is 0"),
        (["--lr", "-1"], "--lr is -1.0"),
        (["--minutes", "inf"], "--minutes is inf"),
        (["--context", 0], "--context is 0"),
        (["--batch-tokens", 31], "--batch-tokens 31 is less than one window of --context 32"),
        (["--warmup", 1], "--warmup is 1.0"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--save-every", "often"], "--save-every is 'often': give a number of steps, such as 500"),
        (["--valid-fraction", 1], "--valid-fraction is 1.0"),
        (["--valid-records", "chrZ"], "no record 'chrZ'"),
        (["--steps", 3, "--minutes", 1], "steps and minutes are two budgets"),
        (["--seed", -1], "--seed is -1"),
    ],
)
def test_impossible_settings_are_exit_2_and_named(
    arguments: list[object], told: str, pretrain: Pretrain, tmp_path: Path
) -> None:
    code, _, err = pretrain(*arguments)
    assert code == 2, err
    assert told in one_line(err)
    assert no_run_is_left(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("contxt = 5\n", "tiny.toml: unknown key 'contxt'; did you mean 'context'?"),
        ("lr = 'fast'\n", "tiny.toml: lr is 'fast'"),
        ("lr = \n", "tiny.toml: is not TOML: Invalid value (at line 1"),
        ("size = '9m'\n", "tiny.toml: size is '9m': it must be one of 250k"),
        ("[model]\nd_stat = 3\n", "unknown key d_stat"),
        ("steps = 3\nminutes = 1\n", "steps and minutes are two budgets"),
    ],
)
def test_a_bad_configuration_file_is_exit_2_and_its_key_named(
    text: str, told: str, pretrain: Pretrain, tiny: Path
) -> None:
    tiny.write_text(text)
    code, _, err = pretrain()
    assert code == 2
    assert told in one_line(err)


def test_a_missing_configuration_file_is_exit_2(pretrain: Pretrain) -> None:
    code, _, err = pretrain("--config", "none.toml", config=False)
    assert code == 2
    assert "none.toml" in one_line(err)


def test_a_run_is_never_overwritten(pretrain: Pretrain, tmp_path: Path) -> None:
    assert pretrain("--steps", 1, "--out", "run")[0] == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    code, _, err = pretrain("--steps", 1, "--out", "run")
    assert code == 2
    assert "run: exists already; choose another --out, or go on with a run by --resume" in one_line(err)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_place_that_cannot_be_written_is_exit_5(pretrain: Pretrain, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = pretrain("--steps", 1, "--out", "file/run")
    assert code == 5
    assert "file/run" in one_line(err)


def test_what_cannot_be_gone_on_with_is_refused_in_one_line(pretrain: Pretrain, tmp_path: Path) -> None:
    own = tmp_path / "own.fa"
    shutil.copy(resolve_dna(["demo"])[0], tmp_path / "own.fa.gz")
    own.write_bytes(gzip.decompress((tmp_path / "own.fa.gz").read_bytes()))
    assert pretrain("--data", own, "--steps", 4, "--out", "run")[0] == 0
    os.unlink(tmp_path / "tiny.toml")

    for arguments, code, told in [
        (["--resume", "nowhere"], 4, "nowhere: is not the folder of a run"),
        (["--resume", "run", "--size", "700k"], 2, "--size cannot change when a run goes on"),
        (["--resume", "run", "--context", "16"], 2, "--context cannot change"),
        (["--resume", "run", "--data", "demo"], 2, "--data cannot change"),
        (["--resume", "run", "--seed", "9"], 2, "--seed cannot change"),
    ]:
        found, _, err = pretrain(*arguments, config=False)
        assert found == code, err
        assert told in one_line(err)

    settings = (tmp_path / "run" / "config.toml").read_text()
    (tmp_path / "run" / "config.toml").write_text(settings.replace("n_layer = 1", "n_layer = 2"))
    code, _, err = pretrain("--resume", "run", config=False)
    assert code == 4
    assert "holds another architecture" in one_line(err)
    (tmp_path / "run" / "config.toml").write_text(settings)

    content = own.read_bytes()
    own.write_bytes(content.replace(b"ACG", b"AGC", 1))
    code, _, err = pretrain("--resume", "run", config=False)
    assert code == 4
    assert "data is not what the run began with" in one_line(err)
    own.write_bytes(content)

    code, _, err = pretrain("--resume", "run", "--steps", 5, config=False)
    assert code == 0, err


def test_damaged_checkpoints_are_named_and_fallen_back_from(pretrain: Pretrain, tmp_path: Path) -> None:
    assert pretrain("--out", "run")[0] == 0
    assert pretrain("--out", "other")[0] == 0
    newest = tmp_path / "run" / "checkpoints" / "step-00000006" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    code, _, err = pretrain("--resume", "run", config=False)
    assert code == 0
    assert "mambagen: warning: " in err
    assert "step-00000006/optimizer.safetensors: cut off" in err
    assert losses(tmp_path / "run") == losses(tmp_path / "other")

    for folder in (tmp_path / "run" / "checkpoints").glob("step-*"):
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-1] ^= 4
        (folder / "model.safetensors").write_bytes(weights)
    code, _, err = pretrain("--resume", "run", config=False)
    assert code == 4
    assert "none of the 3 checkpoints is whole" in one_line(err)


def losses(folder: Path) -> list[object]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row.get("loss"), row.get("valid_loss")) for row in rows]


def test_infinities_are_exit_7_and_name_the_records(
    pretrain: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from mambagen.pipelines.dna_language_model import DnaLanguageTask

    plain = DnaLanguageTask.batch

    def batch(self: DnaLanguageTask, step: int):  # type: ignore[no-untyped-def]
        made = plain(self, step)
        made.tensors["scale"] = torch.ones(made.rows())
        made.tensors["scale"][2] = torch.inf if step == 3 else 1.0
        return made

    loss = DnaLanguageTask.loss
    monkeypatch.setattr(DnaLanguageTask, "batch", batch)
    monkeypatch.setattr(
        DnaLanguageTask, "loss", lambda self, m, t: loss(self, m, t) * t.get("scale", torch.ones(1)).max()
    )
    code, out, err = pretrain("--out", "run")
    assert code == 7
    assert out == ""
    line = one_line(err)
    assert "training diverged at step 4" in line
    report = json.loads((tmp_path / "run" / "diverged.json").read_text())
    bad = [window for window in report["windows"] if not window["finite"]]
    assert [f"{w['record']} at {w['start'] + 1:,} ({w['strand']})" in line for w in bad] == [True]
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    assert (tmp_path / "run" / "loss.png").is_file()


def test_no_memory_is_exit_6_with_advice(pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from mambagen.pipelines.dna_language_model import DnaLanguageTask

    def loss(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. More words")

    monkeypatch.setattr(DnaLanguageTask, "loss", loss)
    code, _, err = pretrain("--out", "run")
    assert code == 6
    assert "Tried to allocate 20.00 GiB" in one_line(err)
    assert "--accumulate" in one_line(err)
