"""pretrain-dna with windows that grow, budgets in tokens, recipes, intervals, prepared genomes and recomputation."""

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mambagen.commands import options
from mambagen.data.genome import Genome
from mambagen.data.windows import StagedSampler, WindowSampler
from mambagen.errors import UsageError
from mambagen.models import MAMBA_SIZES, MambaConfig, MambaLM
from mambagen.models.mamba_block import MambaBlock
from mambagen.pipelines import genomes
from mambagen.pipelines.length_warmup import length_stages
from mambagen.pipelines.pretrain_dna import choose_recompute, prepare
from mambagen.pipelines.pretrain_dna_config import PretrainDnaConfig
from mambagen.pipelines.recipes import RECIPES
from mambagen.training.progress import Progress
from mambagen.training.run_folder import read_metrics

Pretrain = Callable[..., tuple[int, str, str]]

WARMUP = ("--context", 32, "--length-warmup", 8, "--batch-tokens", 128, "--steps", 12)


def figures(run: Path) -> list[tuple[object, ...]]:
    """Everything in the metrics that is no clock time."""
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("lr"), r.get("tokens"), r.get("valid_loss"))
            for r in read_metrics(run / "metrics.jsonl")]  # fmt: skip


def random_fasta(file: Path, **records: int) -> Path:
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)
    rng = np.random.default_rng(len(records))
    text = "".join(f">{k}\n{letters[rng.integers(0, 4, n)].tobytes().decode()}\n" for k, n in records.items())
    file.write_text(text)
    return file


# ---- lengths --------------------------------------------------------------------------------------------------------


def test_the_length_doubles_and_the_batch_halves_by_shares_of_the_steps() -> None:
    assert length_stages(8, 32, 128, 12) == [(8, 16, 4), (16, 8, 8), (32, 4, 12)]
    assert length_stages(8, 32, 128, 12, (1, 1, 4)) == [(8, 16, 2), (16, 8, 4), (32, 4, 12)]
    assert length_stages(1024, 2048, 1 << 20, 3, (0, 1)) == [(1024, 1024, 0), (2048, 512, 3)]
    for arguments, message in (
        ((8, 24, 120, 12), "doubling it must lead to --context 24"),
        ((32, 32, 128, 12), "doubling"),
        ((64, 32, 128, 12), "doubling"),
        ((8, 32, 100, 12), "multiple of --context 32"),
        ((8, 32, 128, 12, (1, 2)), "has 2 numbers; from 8 to 32 there are 3"),
        ((8, 32, 128, 12, (1, 2, 0)), "above 0"),
        ((8, 32, 128, 12, (1, -2, 1)), "negative"),
    ):
        with pytest.raises(UsageError, match=message):
            length_stages(*arguments)


def test_batches_of_a_stage_are_those_of_a_sampler_of_that_length() -> None:
    stretches = Genome.from_files(genomes.resolve_dna(["demo"])).whole()
    samplers = [WindowSampler(stretches, context, rows, seed=5) for context, rows, _ in length_stages(8, 32, 128, 12)]
    staged = StagedSampler(samplers, [4, 8, 12])
    for step in range(14):
        batch = staged.batch(step)
        own = samplers[min(step // 4, 2)].batch(step)
        assert batch.inputs.shape == (128 // (8 << min(step // 4, 2)), 8 << min(step // 4, 2))
        assert np.array_equal(batch.inputs, own.inputs)
        assert np.array_equal(batch.start, own.start)


def test_a_run_resumed_at_any_length_is_the_run_that_was_never_stopped(pretrain: Pretrain, tmp_path: Path) -> None:
    code, _, err = pretrain(*WARMUP, "--save-every", 1, "--keep", 20, "--out", "whole")
    assert code == 0, err
    assert [row[4] for row in figures(tmp_path / "whole") if row[1]] == [128 * (i + 1) for i in range(12)]
    for step in (3, 4, 8):  # before the first change of length, at it, at the second
        cut = tmp_path / f"cut{step}"
        shutil.copytree(tmp_path / "whole", cut)
        for folder in (cut / "checkpoints").iterdir():
            if int(folder.name[-8:]) > step:
                shutil.rmtree(folder)
        code, _, err = pretrain("--resume", cut, config=False)
        assert code == 0, err
        assert figures(cut) == figures(tmp_path / "whole")
        last = Path("checkpoints") / "step-00000012"
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (cut / last / name).read_bytes() == (tmp_path / "whole" / last / name).read_bytes()


def test_masked_models_warm_up_too_and_what_does_not_fit_is_one_line(pretrain: Pretrain) -> None:
    code, out, err = pretrain(*WARMUP, "--length-shares", "2,1,1", "--objective", "mlm", "--encoder", "bert", "--json",
                              config=False)  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["tokens"] == 12 * 128
    for extra, message in (
        (("--length-warmup", 5), "doubling it must lead to --context 32"),
        (("--length-warmup", 8, "--minutes", 1), "--length-warmup follows the steps"),
        (("--length-shares", "1,1"), "length_shares belong to length_warmup"),
        (("--length-warmup", 8, "--length-shares", "1,x"), "--length-shares is 'x'"),
        (("--length-warmup", 8, "--batch-tokens", 100), "multiple of --context"),
    ):
        code, _, err = pretrain(*extra)
        assert code == 2, extra
        assert message in err
        assert err.count("\n") == 1


# ---- budgets and recipes --------------------------------------------------------------------------------------------


def test_a_budget_in_tokens_is_a_whole_number_of_steps(pretrain: Pretrain, tmp_path: Path) -> None:
    code, out, err = pretrain("--tokens", "640", "--json", "--out", "run")
    assert (code, err) == (0, "")
    assert (json.loads(out)["tokens"], json.loads(out)["steps"]) == (640, 5)
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["steps"] == 5
    code, out, err = pretrain("--resume", "run", "--tokens", "1k", "--json", config=False)
    assert code == 0
    assert json.loads(out)["tokens"] == 1024
    assert "1,000 tokens are no whole number of steps of 128: training on 1,024" in err
    code, _, err = pretrain("--tokens", 640, "--steps", 3)
    assert code == 2
    assert "give one of them" in err


def test_recipes_are_the_published_settings_and_options_win_over_them(pretrain: Pretrain, tmp_path: Path) -> None:
    assert tuple(RECIPES) == options.RECIPES
    scaling = PretrainDnaConfig(recipe="scaling", size="7m")
    assert (scaling.context, scaling.batch_tokens, scaling.steps, scaling.lr) == (1024, 2**20, 10_000, 8e-3)
    assert (scaling.warmup, scaling.weight_decay, scaling.data, scaling.size) == (0.1, 0.1, ("hg38",), "7m")
    longest = PretrainDnaConfig(recipe="length-1m")
    assert (longest.context, longest.batch_tokens, longest.steps) == (2**20, 2**24, 20_000)
    stages = longest.stages()
    assert [stage.context for stage in stages] == [2**e for e in range(10, 21)]
    assert all(stage.rows * stage.context == 2**24 for stage in stages)
    # Two epochs of 34,021 rows of 2^17 bases are 532 steps; the published counts at the longest lengths are 4, 8, 16
    # times that.
    steps = np.diff([0, *(stage.end for stage in stages)])
    assert np.allclose(steps, np.array([1] * 8 + [4, 8, 16]) * 2 * 34_021 * 2**17 / 2**24, rtol=0.05)
    assert PretrainDnaConfig(recipe="length-1k").stages() == []
    for name in RECIPES:
        config = PretrainDnaConfig(recipe=name)
        config.stages()
        assert config.rows() % config.accumulate == 0
        assert config.mamba() == MAMBA_SIZES[config.size]
        assert PretrainDnaConfig(recipe=name, minutes=3).steps is None
    assert PretrainDnaConfig(recipe="scaling", tokens=2**30).in_steps().steps == 1024
    code, _, err = pretrain("--recipe", "scaling", "--device", "cpu", config=False)
    assert code == 3
    assert "mambagen data fetch hg38" in err
    small = ("--data", "demo", "--windows", "stretches", "--steps", 2, "--batch-tokens", 2048, "--threads", 1)
    code, _, err = pretrain("--recipe", "scaling", *small, "--valid-tokens", "4Ki", "--out", "run", config=False)
    assert code == 0, err
    settings = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert (settings["recipe"], settings["steps"], settings["context"]) == ("scaling", 2, 1024)
    code, _, err = pretrain("--resume", "run", "--minutes", "0.01", config=False)
    assert code == 0, err
    with pytest.raises(ValueError, match="the recipe must be one of scaling"):
        PretrainDnaConfig(recipe="scalling")


# ---- what windows are drawn from ------------------------------------------------------------------------------------


def test_windows_follow_a_bed_file_and_strictly_keep_away_from_what_it_holds_out(
    pretrain: Pretrain, tmp_path: Path
) -> None:
    fasta = random_fasta(tmp_path / "g.fa", x=4000, y=3000)
    bed = tmp_path / "splits.bed"
    bed.write_text("x\t500\t700\ttrain\nx\t700\t900\tvalid\nx\t2000\t2100\ttrain\nx\t2400\t2600\ttest\n")
    data = ("--data", fasta, "--splits", bed, "--context", 256, "--batch-tokens", 1024, "--steps", 2)
    for run, extra in (("strict", ()), ("published", ("--no-strict-split",))):
        code, out, err = pretrain(*data, "--windows", "intervals", *extra, "--out", run, "--json")
        assert code == 0, err
        assert json.loads(out)["held_out"]["targets"] == 199
    settings = {
        run: PretrainDnaConfig(**tomllib.loads((tmp_path / run / "config.toml").read_text()))
        for run in ("strict", "published")
    }
    assert settings["strict"].splits == str(bed)
    touched = {}
    for run, config in settings.items():
        batch = prepare(config, Progress()).task.sampler.batch(0)
        starts = batch.start[batch.record == 0]
        assert len(starts) == 4
        touched[run] = sorted({int(s) for s in starts})
    assert set(touched["strict"]) <= {443, 2050 - 128}  # the first moved to end at 700
    assert set(touched["published"]) <= {600 - 128, 2050 - 128}
    code, _, err = pretrain("--resume", "strict", "--no-strict-split", config=False)
    assert code == 2
    assert "--strict-split cannot change" in err
    code, _, err = pretrain(*data)
    assert code == 3
    assert "a context of 256 needs 257 bases in one piece" in err
    assert "choose a context of 199 or less, or --windows intervals" in err
    code, _, err = pretrain("--data", fasta, "--windows", "intervals")
    assert code == 3
    assert "no train intervals" in err
    code, _, err = pretrain("--data", fasta, "--splits", bed, "--valid-fraction", 0.2)
    assert code == 2
    assert "splits say what is held out" in err
    code, _, err = pretrain("--data", fasta, "--splits", "none.bed")
    assert code == 3
    assert "none.bed" in err


def test_a_genome_mapped_from_the_cache_trains_as_one_in_memory(
    pretrain: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAMBAGEN_HOME", str(tmp_path / "home"))
    fasta = random_fasta(tmp_path / "g.fa", x=20_000)
    assert pretrain("--data", fasta, "--out", "memory")[0] == 0
    monkeypatch.setattr(genomes.open_genome, "__defaults__", (None, 1))
    assert pretrain("--data", fasta, "--out", "mapped")[0] == 0
    assert len(list((tmp_path / "home" / "prepared").glob("*.genome"))) == 1
    assert figures(tmp_path / "mapped") == figures(tmp_path / "memory")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, _, err = pretrain("--resume", "mapped", "--steps", 8, config=False)  # and may go on without the cache
    assert code == 0, err


# ---- recomputation --------------------------------------------------------------------------------------------------


def test_recomputed_activations_give_the_same_gradients_from_less_memory() -> None:
    model = MambaLM(MambaConfig(d_model=16, n_layer=3), seed=0)
    tokens = torch.randint(7, 11, (2, 40))

    def gradients(recompute: str) -> tuple[list[torch.Tensor], int]:
        choose_recompute(model, recompute)
        kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(tokens)[0].square().mean()
        model.zero_grad(set_to_none=True)
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None], kept

    never, kept_all = gradients("never")
    always, kept_some = gradients("always")
    assert all(torch.equal(a, b) for a, b in zip(never, always, strict=True))
    assert kept_some < kept_all / 3
    assert {module.keep for module in model.modules() if isinstance(module, MambaBlock)} == {"input"}
    choose_recompute(model, "auto")
    assert gradients("auto")[1] == kept_all


def test_a_run_that_recomputes_is_the_run_that_does_not(pretrain: Pretrain, tmp_path: Path) -> None:
    for choice in ("never", "always"):
        assert pretrain("--recompute", choice, "--out", choice)[0] == 0
    assert figures(tmp_path / "always") == figures(tmp_path / "never")
    code, _, err = pretrain("--recompute", "always", "--objective", "mlm", "--encoder", "bert", config=False)
    assert code == 2
    assert "--recompute always: only Mamba blocks" in err
