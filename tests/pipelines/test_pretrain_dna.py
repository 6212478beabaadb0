"""`mambagen pretrain-dna` through the command line: what a run leaves, and what its figures are."""

import gzip
import io
import json
import math
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import mambagen
from mambagen.commands.pretrain_dna import pretrain_dna, verdict
from mambagen.data.genome import Genome
from mambagen.data.windows import WindowSampler, fixed_windows
from mambagen.data_manifests import default_splits, resolve_dna
from mambagen.pipelines.pretrain_dna import PretrainDnaConfig, PretrainDnaResult
from mambagen.training.run_folder import read_metrics

Pretrain = Callable[..., tuple[int, str, str]]


def random_dna(length: int, seed: int = 0) -> str:
    return "".join(np.random.default_rng(seed).choice(list("ACGT"), length))


def write_fasta(file: Path, records: dict[str, str]) -> Path:
    text = "".join(f">{name}\n{sequence}\n" for name, sequence in records.items())
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


def test_a_run_that_learnt_its_bases_by_heart_says_so(pretrain: Pretrain, tmp_path: Path) -> None:
    """400 random bases to train on and 3,600 held out, of which nothing can be known."""
    data = write_fasta(tmp_path / "noise.fa", {"train": random_dna(400), "held": random_dna(3600, 1)})
    options = ("--data", data, "--valid-records", "held", "--batch-tokens", 256, "--lr", 0.03, "--save-every", 300)
    code, out, err = pretrain(*options, "--steps", 300, "--out", "run")
    assert code == 0, err
    looks = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "valid_loss" in row]
    *on_the_way, end = looks
    assert end["valid_targets"] > end["valid_look_targets"] == on_the_way[0]["valid_targets"]
    best = min(on_the_way, key=lambda row: row["valid_loss"])
    said = [line for line in err.splitlines() if not line.startswith("step ")]
    assert len(said) == 1
    assert f"on the {end['valid_look_targets']:,} held-out bases of the looks rose from" in said[0]
    assert f"{math.exp(best['valid_loss']):.4f} at step {best['step']} to" in said[0]
    assert f"to {math.exp(end['valid_look_loss']):.4f} at step 300 while the training loss fell" in said[0]
    assert "fewer --steps" in said[0]
    assert "train on" not in out
    assert said[0].removeprefix("mambagen: warning: ") in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("objective", ["ar", "mlm"], ids=["next", "masked"])
def test_all_looks_are_compared_on_the_same_bases(pretrain: Pretrain, tmp_path: Path, objective: str) -> None:
    data = write_fasta(tmp_path / "noise.fa", {"train": random_dna(400), "held": random_dna(3600, 1)})
    own = ("--encoder", "bert") if objective == "mlm" else ()
    options = ("--data", data, "--valid-records", "held", "--objective", objective, *own, "--steps", 8, "--lr", 1e-12)
    code, out, err = pretrain(*options, "--out", "still", "--json")  # nothing changes
    assert (code, json.loads(out)["warning"]) == (0, None), err
    looks = [row for row in read_metrics(tmp_path / "still" / "metrics.jsonl") if "valid_loss" in row]
    assert looks[0]["valid_loss"] == pytest.approx(looks[-1]["valid_look_loss"], rel=1e-6)
    assert looks[-1]["valid_look_targets"] < looks[-1]["valid_targets"]


def test_a_run_leaves_a_table_a_folder_and_a_model_that_loads(pretrain: Pretrain, tmp_path: Path) -> None:
    code, out, err = pretrain("--out", "run")
    assert code == 0, err
    run = tmp_path / "run"
    left = {"config.toml", "metrics.jsonl", "checkpoints", "loss.png", "report.html"}
    assert {path.name for path in run.iterdir()} >= left
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    settings = tomllib.loads((run / "config.toml").read_text())
    assert (settings["steps"], settings["context"], settings["lr"]) == (6, 32, PretrainDnaConfig().lr)
    assert settings["model"] == {"d_model": 16, "n_layer": 1}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"step-0000000{n}" for n in (2, 4, 6)}
    for told in ("Markov chain of order 0", "Markov chain of order 3", "Markov chain of order 8", "uniform"):
        assert told in out
    assert "still behind" in out
    assert f"checkpoint  {Path('run/checkpoints/step-00000006')}" in out
    assert "train on    mambagen pretrain-dna --resume run --minutes 10\n" in out
    model, tokenizer = mambagen.load(run / "checkpoints" / "step-00000006")
    assert sum(p.numel() for p in model.parameters()) < 10_000
    assert tokenizer.lower_case == "same"
    card = (run / "checkpoints" / "step-00000006" / "README.md").read_text()
    for told in ("Biopython", "NC_000932", "Held-out perplexity", "mambagen pretrain-dna", "context 32"):
        assert told in card


def test_held_out_figures_are_those_of_the_saved_model_and_of_independent_counts(
    pretrain: Pretrain, tmp_path: Path
) -> None:
    code, out, _ = pretrain("--out", "run", "--json")
    assert code == 0
    result = json.loads(out)
    model, tokenizer = mambagen.load(result["checkpoint"])
    genome = Genome.from_files(resolve_dna(["demo"]), tokenizer)
    train, valid = genome.hold_out(intervals=default_splits(["demo"]))
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in fixed_windows(valid, 32):
            chances = model(torch.from_numpy(batch.inputs))[0].double().log_softmax(-1)
            targets = torch.from_numpy(batch.targets)
            counted = targets >= 0
            total -= chances[counted].gather(1, targets[counted][:, None]).sum().item()
            count += int(counted.sum())
    assert result["held_out"]["targets"] == count
    assert result["held_out"]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["held_out"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    # order 0, counted by hand: frequencies of the training part, each with one more, on every held-out target
    seen = np.bincount(np.concatenate(list(train.tokens())), minlength=12)[7:11] + 1
    held = np.zeros(4)
    for batch in fixed_windows(valid, 32):
        held += np.bincount(batch.targets[batch.targets >= 0], minlength=11)[7:11]
    order0 = -(held * np.log(seen / seen.sum())).sum() / held.sum()
    assert result["baselines"]["order0"]["loss"] == pytest.approx(order0, rel=1e-9)
    assert result["tokens"] == result["steps"] * 128 == 6 * 128


def test_training_windows_never_touch_the_held_out_part() -> None:
    genome = Genome.from_files(resolve_dna(["demo"]), PretrainDnaConfig().tokenizer())
    train, valid = genome.hold_out(intervals=default_splits(["demo"]))
    held = [np.zeros(len(record), dtype=bool) for record in genome.records]
    for record, start, end in valid:
        held[record][start:end] = True
    sampler = WindowSampler(train, context=512, batch_size=64, seed=0)
    for step in range(20):
        batch = sampler.batch(step)
        for record, start in zip(batch.record, batch.start, strict=True):
            assert not held[record][start : start + 513].any()


def test_it_learns_what_a_markov_chain_of_low_order_cannot(pretrain: Pretrain, tmp_path: Path) -> None:
    """A sequence of period 40: order 0 is at about 4, and the model is far below after some hundred steps."""
    file = write_fasta(tmp_path / "periodic.fa", {"p": random_dna(40) * 200})
    code, out, err = pretrain("--data", file, "--steps", 150, "--lr", 0.02, "--save-every", 1000, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["baselines"]["order0"]["perplexity"] > 3.5
    assert result["held_out"]["perplexity"] < 2.0


def test_data_may_be_many_files_gzip_genbank_names_and_stdin(
    pretrain: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = write_fasta(tmp_path / "one.fa", {"a": random_dna(5000, 1)})
    two = write_fasta(tmp_path / "two.fa.gz", {"b": random_dna(5000, 2).lower(), "c": "N" * 3000})
    text = f">piped\n{random_dna(5000, 3)}\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    code, out, err = pretrain("--data", one, two, "-", "--data", "demo", "--steps", 2, "--out", "run")
    assert code == 0, err
    settings = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert settings["data"] == [str(one), "demo", str(two), "-"]
    assert "nan" not in out


def test_records_can_be_held_out_whole(pretrain: Pretrain, tmp_path: Path) -> None:
    file = write_fasta(tmp_path / "g.fa", {"a": random_dna(3000, 1), "b": random_dna(1001, 2), "c": random_dna(501, 3)})
    code, out, err = pretrain("--data", file, "--valid-records", "b,c", "--json")
    assert code == 0, err
    assert json.loads(out)["held_out"]["targets"] == 1500


def test_nothing_held_out_is_said_and_no_error(pretrain: Pretrain, tmp_path: Path) -> None:
    code, out, err = pretrain("--valid-fraction", 0)
    assert code == 0, err
    assert "nothing is held out" in out
    assert all("valid_loss" not in row for row in read_metrics(next((tmp_path / "runs").iterdir()) / "metrics.jsonl"))


def test_the_default_folder_is_new_each_time(pretrain: Pretrain, tmp_path: Path) -> None:
    for _ in range(2):
        assert pretrain("--steps", 1)[0] == 0
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    assert len(names) == 2
    assert all(name.startswith("pretrain-dna-") for name in names)


def test_options_win_over_the_file_and_the_file_over_the_defaults(
    pretrain: Pretrain, tmp_path: Path, tiny: Path
) -> None:
    tiny.write_text("lr = 0.004\nseed = 3\nminutes = 5\n" + tiny.read_text().replace("steps = 6\n", ""))
    assert pretrain("--steps", 2, "--seed", 4, "--out", "run")[0] == 0
    settings = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert (settings["lr"], settings["seed"], settings["steps"]) == (0.004, 4, 2)
    assert "minutes" not in settings
    assert settings["warmup"] == PretrainDnaConfig().warmup


def test_defaults_in_the_help_are_those_of_the_configuration() -> None:
    defaults = PretrainDnaConfig().with_budget().model_dump()
    compared = 0
    for option in pretrain_dna.params:
        text = getattr(option, "help", None) or ""
        if option.name in defaults and "[default: " in text:
            shown = text.split("[default: ")[1].rstrip("]")
            if option.name in ("threads", "valid_fraction", "data"):
                continue
            assert type(defaults[option.name])(shown) == defaults[option.name], option.name
            compared += 1
    assert compared >= 15


def test_every_setting_has_an_option_and_every_option_a_setting() -> None:
    options = {option.name for option in pretrain_dna.params}
    no_settings = {"more_data", "out", "resume", "config", "as_json", "debug"}
    assert options - no_settings == set(PretrainDnaConfig.model_fields) - {"model"}


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (1.0, "The model beats the Markov chains of order 0, order 3 and order 8."),
        (
            1.32,
            "The model beats the Markov chains of order 0 and order 8, and is still behind the Markov chain of order 3",
        ),
        (1.40, "The model is still behind the Markov chains of order 0, order 3 and order 8: train longer"),
    ],
)
def test_the_verdict_says_which_baselines_still_win(loss: float, said: str) -> None:
    result = PretrainDnaResult(
        Path("r"), Path("c"), "Mamba", 1, loss, 9, {0: 1.35, 3: 1.31, 8: 1.33}, 1.39, 1, 1, 1.0, 1.0, "9 bases"
    )  # fmt: skip
    assert verdict(result).startswith(said)
