"""`mambagen pretrain-dna --objective mlm` through the command line: its figures, resuming, longer contexts."""

import json
import math
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mambagen
from mambagen.commands.options import ENCODERS
from mambagen.data.dna_tokens import IGNORED, DnaTokenizer
from mambagen.data.genome import Genome
from mambagen.data.masking import MaskedWindows
from mambagen.data.windows import fixed_windows
from mambagen.data_manifests import default_splits, resolve_dna
from mambagen.models.encoders import ENCODERS as KNOWN
from mambagen.models.encoders import count_parameters
from mambagen.pipelines.dna_masked_model import DNA_COMPLEMENT
from mambagen.pipelines.pretrain_dna import ENCODER_LR, PretrainDnaConfig
from mambagen.training.run_folder import read_metrics
from tests.pipelines.test_pretrain_dna import random_dna, write_fasta

Pretrain = Callable[..., tuple[int, str, str]]
MASKED = ("--objective", "mlm")


def steps_of(run: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(run / "metrics.jsonl") if "lr" in row]


def test_the_complement_of_the_tokens() -> None:
    letters = DnaTokenizer().vocabulary
    assert [letters[i] for i in DNA_COMPLEMENT[7:]] == ["T", "G", "C", "A", "N"]
    assert DNA_COMPLEMENT[:7] == tuple(range(7))


def test_encoders_offered_are_those_that_see_both_sides() -> None:
    assert set(ENCODERS) == {name for name, entry in KNOWN.items() if entry.sees_both_sides} == set(ENCODER_LR)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_figures_are_those_of_the_saved_model_on_fixed_masks(encoder: str, pretrain: Pretrain, tmp_path: Path) -> None:
    code, out, err = pretrain(*MASKED, "--encoder", encoder, "--out", "run", "--json", "--valid-tokens", 4000)
    assert code == 0, err
    result = json.loads(out)
    model, tokenizer = mambagen.load(result["checkpoint"])
    assert (model.kind, model.config.encoder) == ("masked-lm", encoder)
    genome = Genome.from_files(resolve_dna(["demo"]), tokenizer)
    _, valid = genome.hold_out(intervals=default_splits(["demo"]))
    total, right, count = 0.0, 0, 0
    with torch.no_grad():
        for inputs, targets, real in MaskedWindows(fixed_windows(valid, 32, at_most=4000 // 32), seed=0):
            logits = model(torch.from_numpy(inputs), None if real is None else torch.from_numpy(real)).double()
            wanted = torch.from_numpy(targets)
            chosen = wanted != IGNORED
            total -= logits.log_softmax(-1)[chosen].gather(1, wanted[chosen][:, None]).sum().item()
            right += int((logits.argmax(-1)[chosen] == wanted[chosen]).sum())
            count += int(chosen.sum())
    held_out = result["held_out"]
    assert held_out["targets"] == count
    assert held_out["loss"] == pytest.approx(total / count, rel=1e-5)
    assert held_out["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert held_out["accuracy"] == pytest.approx(right / count, abs=2 / count)
    assert set(result["baselines"]) == {"flanks0", "flanks2", "flanks4"}
    settings = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert settings["lr"] == ENCODER_LR[encoder]
    card = (Path(result["checkpoint"]) / "README.md").read_text()
    assert f"encoder {encoder} with 1 layers" in card
    assert "masked bases, context 32" in card


@pytest.mark.parametrize(
    ("encoder", "steps", "at_most"), [("bigs", 120, 2.5), ("bimamba", 120, 2.5), ("bert", 200, 3.2)]
)
def test_it_learns_what_stands_in_a_repeat(
    encoder: str, steps: int, at_most: float, pretrain: Pretrain, tmp_path: Path
) -> None:
    file = write_fasta(tmp_path / "periodic.fa", {"p": random_dna(40) * 200})
    code, out, err = pretrain(
        *MASKED, "--encoder", encoder, "--data", file, "--steps", steps, "--lr", 0.01, "--batch-tokens", 1024,
        "--save-every", 1000, "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert result["baselines"]["flanks0"]["perplexity"] > 3.5
    assert result["held_out"]["perplexity"] < at_most
    assert result["held_out"]["accuracy"] > 1.6 / at_most


@pytest.mark.parametrize("encoder", ["bigs", "bimamba"])
def test_a_run_that_goes_on_equals_one_left_alone(encoder: str, pretrain: Pretrain, tmp_path: Path) -> None:
    options = (*MASKED, "--encoder", encoder, "--reverse-complement")
    assert pretrain(*options, "--out", "whole")[0] == 0
    assert pretrain(*options, "--out", "cut", "--steps", 6)[0] == 0
    for newest in sorted((tmp_path / "cut" / "checkpoints").iterdir())[1:]:
        (newest / "state.json").write_text("{}")  # damaged: the run goes on from step 2
    code, _, err = pretrain("--resume", "cut", config=False)
    assert code == 0, err
    assert "damaged" in err or "cut off" in err or "changed" in err
    assert steps_of(tmp_path / "cut") == steps_of(tmp_path / "whole")
    whole, cut = (tmp_path / name / "checkpoints" / "step-00000006" / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_a_longer_context_is_a_new_run_with_the_weights_of_the_old(pretrain: Pretrain, tmp_path: Path) -> None:
    assert pretrain(*MASKED, "--out", "short")[0] == 0
    code, _, err = pretrain("--resume", "short", "--context", 128, "--steps", 2, config=False)
    assert code == 0, err
    run = tmp_path / "short-context128"
    settings = tomllib.loads((run / "config.toml").read_text())
    assert (settings["context"], settings["model"]["d_model"]) == (128, 16)
    assert settings["start_from"] == str(tmp_path / "short" / "checkpoints" / "step-00000006")
    before, _ = mambagen.load(tmp_path / "short" / "checkpoints" / "step-00000006")
    begun, _ = mambagen.load(run / "checkpoints" / "step-00000000")
    for name, value in before.state_dict().items():
        assert torch.equal(begun.state_dict()[name], value)
    assert pretrain("--resume", run, "--steps", 3, config=False)[0] == 0  # and it goes on as any run
    code, _, err = pretrain("--resume", "short", "--context", 64, "--size", "7m", config=False)
    assert (code, "--size cannot change" in err) == (2, True)
    code, _, err = pretrain("--resume", "short", "--out", "x", config=False)
    assert (code, "do not go together" in err) == (2, True)


def test_a_causal_model_goes_on_at_another_context_by_its_weights(pretrain: Pretrain, tmp_path: Path) -> None:
    assert pretrain("--steps", 1, "--out", "short")[0] == 0
    weights = tmp_path / "short" / "checkpoints" / "step-00000001"
    assert pretrain("--from", weights, "--context", 64, "--steps", 1, "--out", "long")[0] == 0
    before, _ = mambagen.load(weights)
    begun, _ = mambagen.load(tmp_path / "long" / "checkpoints" / "step-00000000")
    assert torch.equal(begun.backbone.embedding.weight, before.backbone.embedding.weight)


def test_weights_of_another_architecture_are_refused(pretrain: Pretrain) -> None:
    assert pretrain(*MASKED, "--steps", 1, "--out", "bigs")[0] == 0
    weights = Path("bigs/checkpoints/step-00000001")
    code, _, err = pretrain(*MASKED, "--encoder", "bert", "--from", weights)
    assert (code, "holds another architecture" in err) == (4, True)
    code, _, err = pretrain("--from", weights)
    assert (code, "holds a model of kind masked-lm; what is needed here is mamba-lm" in err) == (4, True)
    code, _, err = pretrain(*MASKED, "--from", "nowhere")
    assert (code, "no such model folder" in err) == (4, True)


def test_an_equivariant_run(pretrain: Pretrain) -> None:
    code, out, err = pretrain(*MASKED, "--encoder", "bimamba", "--equivariant", "--steps", 2, "--out", "run")
    assert code == 0, err
    assert "bimamba 250k, equivariant" in out
    assert "of the masked bases are guessed right" in out
    assert "counts by 4 bases on either side" in out


@pytest.mark.parametrize("option", [("--encoder", "bert"), ("--equivariant",)])
def test_settings_of_masked_models_say_where_they_belong(option: tuple[str, ...], pretrain: Pretrain) -> None:
    code, _, err = pretrain(*option)
    assert (code, f"{option[0]} belongs to masked models: add --objective mlm" in err) == (2, True)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("size", ["250k", "1.4m"])
def test_a_size_is_the_same_number_of_parameters_whatever_the_encoder(encoder: str, size: str) -> None:
    config = PretrainDnaConfig(objective="mlm", encoder=encoder, size=size)  # type: ignore[arg-type]
    architecture = config.architecture()
    count = count_parameters(encoder, architecture.encoder_config)  # type: ignore[union-attr]
    assert abs(count / {"250k": 262_720, "1.4m": 1_401_472}[size] - 1) <= 0.03
