"""train-classifier, classify and check-rc through the command line."""

import csv
import gzip
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import mambagen
from mambagen.commands.options import ENCODERS, POOLINGS
from mambagen.commands.train_classifier import train_classifier
from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.labelled import Labelled
from mambagen.models import heads, save_model
from mambagen.pipelines.dna_masked_model import DNA_COMPLEMENT
from mambagen.pipelines.model_cards import ModelCard
from mambagen.pipelines.sequence_classification import (
    ClassificationTask,
    batches_of_like_length,
    figures_of,
    kmer_baseline,
)
from mambagen.pipelines.train_classifier import TrainClassifierConfig
from mambagen.training.run_folder import read_metrics
from tests.data.helpers import random_dna

Run = Callable[..., tuple[int, str, str]]
TINY = 'threads = 1\nsave_every = "1000"\nbatch = 16\nlr = 0.02\n[model]\nd_model = 16\nn_layer = 1\n'


@pytest.fixture
def run(tmp_path: Path, command: Run) -> Run:
    """`run("classify", ...)` -> (exit code, stdout, stderr) in an empty folder with tiny.toml."""
    (tmp_path / "tiny.toml").write_text(TINY)
    return command


def table(path: Path, rows: int, seed: int, flip: float = 0.0) -> Path:
    """Two classes: with the motif TATAAAA somewhere, and without; lengths 30 to 60."""
    generator = np.random.default_rng(seed)
    lines = ["sequence,label"]
    for i in range(rows):
        text = random_dna(int(generator.integers(30, 61)), seed * 10_000 + i, b"ACG")
        if i % 2:
            at = int(generator.integers(0, len(text) - 7))
            text = text[:at] + "TATAAAA" + text[at + 7 :]
        lines.append(f"{text},{'with' if i % 2 else 'without'}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path, Path]:
    return (
        table(tmp_path / "train.csv", 400, 1),
        table(tmp_path / "valid.csv", 60, 2),
        table(tmp_path / "test.csv", 60, 3),
    )


def fasta_of(path: Path, out: Path) -> list[str]:
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    out.write_text("".join(f">s{i}\n{row['sequence']}\n" for i, row in enumerate(rows)))
    return [row["label"] for row in rows]


def test_a_motif_is_learnt_and_new_records_are_classified_whatever_their_batch(
    run: Run, data: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    train, valid, test = data
    code, out, err = run(
        "train-classifier", "--config", "tiny.toml", "--data", train, "--valid", valid, "--test", test,
        "--encoder", "bimamba", "--epochs", 6, "--out", "run", "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert result["classes"] == ["with", "without"]
    assert result["test"]["mcc"] > 0.9
    assert result["baseline_test"]["rows"] == 60
    assert sum(map(sum, result["test"]["confusion"])) == 60

    labels = fasta_of(test, tmp_path / "new.fa")
    code, out, err = run("classify", "run/model", "new.fa", "--out", "classes.tsv")
    assert (code, out) == (0, ""), err
    rows = list(csv.DictReader((tmp_path / "classes.tsv").open(), delimiter="\t"))
    assert list(rows[0]) == ["record", "length", "class", "p_with", "p_without"]
    assert [row["record"] for row in rows] == [f"s{i}" for i in range(60)]
    right = np.mean([row["class"] == label for row, label in zip(rows, labels, strict=True)])
    assert right == pytest.approx(result["test"]["accuracy"])
    model, tokenizer = mambagen.load("run/model")
    for row, line in zip(rows, list(csv.DictReader(test.open())), strict=True):  # each by itself: no padding, no batch
        tokens = torch.from_numpy(tokenizer.encode(line["sequence"].encode()))[None]
        with torch.no_grad():
            alone = model(tokens).softmax(-1)[0]
        assert float(row["p_with"]) == pytest.approx(alone[0].item(), abs=1e-5)
        assert float(row["p_with"]) + float(row["p_without"]) == pytest.approx(1, abs=2e-6)
    for size in (1, 200):
        code, out, _ = run("classify", "run/model", "new.fa", "--batch-tokens", size, "--json")
        for row, text in zip(rows, out.splitlines(), strict=True):
            assert json.loads(text)["probabilities"]["with"] == pytest.approx(float(row["p_with"]), abs=1e-5)


def test_a_table_of_figures_for_people(run: Run, data: tuple[Path, Path, Path]) -> None:
    code, out, err = run(
        "train-classifier", "--config", "tiny.toml", "--data", data[0], "--encoder", "bert", "--steps", 3, "--out", "r"
    )
    assert code == 0, err
    for told in ("accuracy      F1     MCC", "5-mer logistic regression", "true \\ said", "mambagen classify r/model"):
        assert told in out
    card = Path("r/model/README.md").read_text()
    assert "encoder bert" in card
    assert "with, without" in card
    report = Path("r/report.html").read_text("utf-8")
    assert "Confusions" in report
    assert "5-mer logistic regression" in report


def test_a_run_that_goes_on_equals_one_left_alone(run: Run, data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    common = ("train-classifier", "--config", "tiny.toml", "--data", data[0], "--encoder", "bimamba", "--no-baseline")
    assert run(*common, "--steps", 60, "--save-every", 20, "--reverse-complement", "--out", "whole")[0] == 0
    assert run(*common, "--steps", 60, "--save-every", 20, "--reverse-complement", "--out", "cut")[0] == 0
    (tmp_path / "cut/checkpoints/step-00000060/state.json").write_text("{}")
    code, _, err = run("train-classifier", "--resume", "cut")
    assert code == 0, err
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")]
    for key in ("loss", "grad_norm", "valid_mcc"):
        assert [row.get(key) for row in rows[0]] == [row.get(key) for row in rows[1]]
    for place in ("model", "checkpoints/step-00000060"):
        one, two = (tmp_path / name / place / "model.safetensors" for name in ("whole", "cut"))
        assert one.read_bytes() == two.read_bytes()
    code, _, err = run("train-classifier", "--resume", "cut", "--pooling", "max")
    assert (code, "--pooling cannot change" in err) == (2, True)


def test_training_ends_early_and_the_best_model_is_kept(run: Run, tmp_path: Path) -> None:
    """Labels that say nothing: validation does not get better, and the model is that of the best look."""
    generator = np.random.default_rng(0)
    lines = [f"{random_dna(30, i)},{generator.integers(2)}" for i in range(200)]
    Path("noise.csv").write_text("sequence,label\n" + "\n".join(lines) + "\n")
    code, out, err = run(
        "train-classifier", "--config", "tiny.toml", "--data", "noise.csv", "--encoder", "bert", "--steps", 400,
        "--patience", 2, "--out", "run", "--json", "--no-baseline",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert result["stopped_early"]
    assert result["steps"] < 400
    looks = [(row["valid_mcc"], -row["valid_loss"]) for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "valid_mcc" in row]  # fmt: skip  # noqa: E501
    assert (result["valid"]["mcc"], -result["valid"]["loss"]) == pytest.approx(max(looks), abs=1e-6)


def test_a_pretrained_encoder_is_gone_on_with(run: Run, data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    shape = {"d_model": 16, "n_layer": 2}
    config = heads.EncoderModelConfig(encoder="bigs", encoder_config=shape, complement=DNA_COMPLEMENT)
    pretrained = heads.MaskedLM(config, seed=9)
    save_model(pretrained, tmp_path / "pre", DnaTokenizer().model_dump(mode="json"), "card")
    common = ("train-classifier", "--data", data[0], "--steps", 1, "--threads", 1, "--no-baseline", "--from", "pre")
    code, _, err = run(*common, "--out", "run")
    assert code == 0, err
    begun, _ = mambagen.load("run/checkpoints/step-00000000")
    for name, value in pretrained.encoder.state_dict().items():
        assert torch.equal(begun.encoder.state_dict()[name], value)
    code, _, err = run(*common, "--encoder", "bert")
    assert (code, "--encoder bert: pre holds a bigs; leave --encoder out" in err) == (2, True)


@pytest.mark.parametrize(
    ("text", "more", "code", "told"),
    [
        ("", [], 3, "t.csv: the file is empty; give a CSV or TSV table"),
        ("sequence,label\nACGT,1\nCCGT,1\n", [], 3, "t.csv: all rows have the label '1'; a classifier needs two"),
        ("sequence,label\nACGT,1\nCCGT,2\n", [], 3, "t.csv: 2 rows are too few to hold any out"),
        ("sequence,label\nMKVL,1\n", [], 3, "t.csv:2: 'L' is no DNA letter"),
        ("sequence,y\nACGT,1\n", [], 3, "t.csv:1: no column 'label'"),
        ("sequence,label\nACGT,1\nGCGT,3\n", ["--valid", "train.csv"], 3, "train.csv:2: the label 'without' is none"),
        ("sequence,label\nACGT,1\nGCGT,3\n", ["--from", "nowhere"], 3, "too few"),
        ("sequence,label\nACGT,1\n", ["--labels", "nolabels.csv"], 3, "nolabels.csv"),
    ],
)
def test_data_that_cannot_be_used_is_one_line_and_exit_code_3(
    text: str, more: list[str], code: int, told: str, run: Run, data: tuple[Path, Path, Path]
) -> None:
    Path("t.csv").write_text(text)
    found, out, err = run("train-classifier", "--config", "tiny.toml", "--data", "t.csv", *more)
    assert (found, out, err.count("\n")) == (code, "", 1), err
    assert told in err
    assert not Path("runs").exists()


def test_labels_without_a_record_are_named(run: Run, data: tuple[Path, Path, Path]) -> None:
    Path("x.fa").write_text(">a\nACGTACGTAA\n>b\nGGGCCCGGGA\n")
    Path("y.fa").write_text(">c\nACGTACGTCC\n>e\nGGGCCCGGGT\n")
    Path("labels.tsv").write_text("a\tyes\nb\tno\nc\tno\nd\tyes\ne\tyes\n")
    common = ("train-classifier", "--config", "tiny.toml", "--labels", "labels.tsv", "--data", "x.fa", "--no-baseline")
    code, _, err = run(*common, "--valid", "y.fa", "--steps", 1, "--out", "one")
    assert (code, "labels.tsv: 1 of its names are no record of the sequence files: d\n" in err) == (0, True), err
    code, _, err = run(*common, "--valid", "x.fa", "--steps", 1, "--out", "two")
    assert (code, "3 of its names are no record of the sequence files: c, d, e\n" in err) == (0, True), err


def test_usage_and_models_that_do_not_fit(run: Run, data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    code, _, err = run("train-classifier")
    assert (code, "no --data" in err) == (2, True)
    code, _, err = run("train-classifier", "--data", data[0], "--encoder", "bert", "--config", "bad.toml")
    assert code == 2
    code, _, err = run("classify", "nowhere", data[0])
    assert (code, "no such model folder" in err) == (4, True)
    config = heads.EncoderModelConfig(encoder="bert", encoder_config={"d_model": 16, "n_layer": 1})
    save_model(heads.MaskedLM(config, seed=0), tmp_path / "masked", DnaTokenizer().model_dump(mode="json"), "card")
    code, _, err = run("classify", "masked", data[0])
    assert (code, "what is needed here is sequence-classifier" in err) == (4, True)
    code, _, err = run("check-rc", "masked")
    assert (code, "no complement" in err) == (4, True)


def a_classifier(folder: Path, **settings: object) -> Path:
    config = heads.ClassifierConfig(
        encoder="bimamba", encoder_config={"d_model": 16, "n_layer": 1}, complement=DNA_COMPLEMENT,
        classes=("a", "b", "c"), **settings,  # type: ignore[arg-type]
    )  # fmt: skip
    save_model(heads.SequenceClassifier(config, seed=0), folder, DnaTokenizer().model_dump(mode="json"), "card")
    return folder


def test_one_bad_file_does_not_keep_the_others_from_being_done(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = a_classifier(tmp_path / "m")
    Path("good.fa").write_text(">a\nACGTN\n>b\nAC\n")
    Path("bad.fa").write_text(">c\nMKVL\n")
    Path("more.fa.gz").write_bytes(gzip.compress(b">d\nacgtacgt\n"))
    code, _, err = run("classify", model, "good.fa", "bad.fa", "more.fa.gz", "--out", "o.tsv")
    assert (code, "bad.fa:2" in err) == (3, True)
    assert [line.split("\t")[:2] for line in Path("o.tsv").read_text().splitlines()[1:]] == [
        ["a", "5"],
        ["b", "2"],
        ["d", "8"],
    ]
    assert not list(tmp_path.glob(".o.tsv*"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b">e\nACG\n")))
    code, out, _ = run("classify", model, "-")
    assert (code, out.splitlines()[1].split("\t")[0]) == (0, "e")


def test_records_before_a_fault_have_their_rows(run: Run, tmp_path: Path) -> None:
    model = a_classifier(tmp_path / "m")
    Path("broken.fa").write_text(">a\nACGT\n>b\nAC\n>c\nAC GT\n>d\nACGT\n")
    code, out, err = run("classify", model, "broken.fa")
    assert (code, [line.split("\t")[0] for line in out.splitlines()[1:]]) == (3, ["a", "b"])
    assert "broken.fa:6: record 'c'" in err
    assert "the 2 records before it have their rows" in err


@pytest.mark.parametrize("job", ["classify", "classify-species"])
def test_rows_go_to_stdout_for_a_dash_and_over_nothing_else(job: str, run: Run, tmp_path: Path) -> None:
    arguments = [job, a_classifier(tmp_path / "m")] if job == "classify" else [job]
    Path("good.fa").write_text(">grün\nACGTACGTAC\n")
    code, out, _ = run(*arguments, "good.fa", "--out", "-")
    assert (code, out.splitlines()[1].split("\t")[:2], Path("-").exists()) == (0, ["grün", "10"], False)
    Path("folder").mkdir()
    code, _, err = run(*arguments, "good.fa", "--out", "folder")
    assert (code, "folder: is a folder" in err) == (2, True)
    code, _, err = run(*arguments, "good.fa", "--out", "nowhere/rows.tsv")
    assert (code, "error: nowhere/rows.tsv: cannot be written" in err) == (5, True)
    Path("rows.tsv").write_text("from before")
    assert run(*arguments, "missing.fa", "--out", "rows.tsv")[0] == 3
    assert Path("rows.tsv").read_text() == "from before"


def test_a_record_without_bases_has_its_row(run: Run, tmp_path: Path) -> None:
    model = a_classifier(tmp_path / "m")
    Path("some.fa").write_text(">a\nACGT\n>nothing\n>b\nAC\n>last\n")
    code, out, err = run("classify", model, "some.fa")
    rows = [line.split("\t") for line in out.splitlines()[1:]]
    assert (code, [row[0] for row in rows]) == (0, ["a", "nothing", "b", "last"])
    assert rows[1] == ["nothing", "0", "unknown", "", "", ""]
    assert sum(float(value) for value in rows[2][3:]) == pytest.approx(1, abs=1e-5)
    assert "record 'nothing' is empty" in err
    answers = [json.loads(line) for line in run("classify", model, "some.fa", "--json")[1].splitlines()]
    assert (answers[1]["class"], answers[1]["probabilities"]) == ("unknown", None)
    assert answers[2]["probabilities"].keys() == {"a", "b", "c"}


def test_averaging_strands_gives_both_strands_one_answer(run: Run, tmp_path: Path) -> None:
    model = a_classifier(tmp_path / "m")
    text = random_dna(50, 4)
    other = DnaTokenizer().decode(DnaTokenizer().reverse_complement(DnaTokenizer().encode(text.encode())))
    Path("both.fa").write_text(f">one\n{text}\n>other\n{other}\n")
    one, two = (
        line.split("\t")[2:] for line in run("classify", model, "both.fa", "--average-strands")[1].splitlines()[1:]
    )
    assert one == two
    one, two = (line.split("\t")[2:] for line in run("classify", model, "both.fa")[1].splitlines()[1:])
    assert one != two


@pytest.mark.parametrize("kind", ["classifier", "masked"])
def test_check_rc_tells_equivariant_models_from_others(kind: str, run: Run, tmp_path: Path) -> None:
    for equivariant in (True, False):
        folder = tmp_path / f"m{equivariant}"
        if kind == "classifier":
            a_classifier(folder, equivariant=equivariant)
        else:
            config = heads.EncoderModelConfig(
                encoder="bert", encoder_config={"d_model": 16, "n_layer": 1}, complement=DNA_COMPLEMENT,
                equivariant=equivariant,
            )  # fmt: skip
            model = heads.MaskedLM(config, seed=0)
            with torch.no_grad():
                model.encoder.embedding.weight.mul_(20)  # type: ignore[union-attr, operator]
            save_model(model, folder, DnaTokenizer().model_dump(mode="json"), "card")
        code, out, err = run("check-rc", folder)
        assert code == (0 if equivariant else 1), err
        assert f"The model {'is' if equivariant else 'is not'} reverse-complement equivariant" in out
        assert out.count("PASS") + out.count("FAIL") == 7
        assert run("check-rc", folder, "--average", "--length", 30)[0] == 0
    shown = json.loads(run("check-rc", folder, "--json", "--length", 30)[1])
    assert (shown["equivariant"], len(shown["checks"])) == (False, 2)


def test_figures_are_those_of_the_formulas() -> None:
    generator = np.random.default_rng(0)
    chances = np.log(generator.dirichlet((1, 1, 1), 200))
    labels = generator.integers(0, 3, 200)
    figures = figures_of(chances, labels)
    said = chances.argmax(1)
    table_ = np.array([[((labels == i) & (said == j)).sum() for j in range(3)] for i in range(3)])
    assert figures.confusion == tuple(map(tuple, table_.tolist()))
    assert figures.accuracy == pytest.approx(np.trace(table_) / 200)
    true, guessed = table_.sum(1), table_.sum(0)
    assert figures.f1 == pytest.approx(np.mean(2 * np.diag(table_) / (true + guessed)))
    covariance = np.trace(table_) * 200 - true @ guessed  # Gorodkin's R_K
    assert figures.mcc == pytest.approx(
        covariance / math.sqrt((200**2 - (true**2).sum()) * (200**2 - (guessed**2).sum()))
    )
    assert figures.loss == pytest.approx(-np.mean([row[label] for row, label in zip(chances, labels, strict=True)]))


def labelled(lengths: list[int]) -> Labelled:
    sequences = [DnaTokenizer().encode(random_dna(length, i).encode()) for i, length in enumerate(lengths)]
    names = [f"s{i}" for i in range(len(lengths))]
    return Labelled(sequences, [str(i % 2) for i in range(len(lengths))], names, list(range(len(lengths))), "x")


@pytest.mark.parametrize("same", [True, False])
def test_an_epoch_has_every_sequence_once_in_batches_of_like_length(same: bool, tmp_path: Path) -> None:
    lengths = [40] * 150 if same else np.random.default_rng(0).integers(5, 200, 150).tolist()
    train = labelled(lengths)
    card = ModelCard("t", "d", "r")
    task = ClassificationTask(
        train, train, train.classes(), DnaTokenizer(), 16, 3, False, 4, {}, card, tmp_path / "b", 10_000
    )
    assert task.steps_per_epoch == 10
    epochs = [[name for step in range(e * 10, e * 10 + 10) for name, _, _ in task.batch(step).where] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(train.names)
    assert epochs[0] != epochs[1]
    batch = task.batch(7)
    assert torch.equal(batch.tensors["tokens"], task.batch(7).tensors["tokens"])
    assert ("real" in batch.tensors) == (not same)
    if not same:
        assert np.mean([np.ptp(task.batch(s).tensors["real"].sum(1).numpy()) for s in range(10)]) < 30
        row = batch.tensors["tokens"][0][batch.tensors["real"][0]].numpy()
        assert np.array_equal(row, train.sequences[train.names.index(batch.where[0][0])])


def test_batches_for_prediction_hold_all_rows_within_the_limit() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 77).tolist()
    batches = list(batches_of_like_length(lengths, 300))
    assert sorted(row for batch in batches for row in batch) == list(range(77))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 300 for batch in batches)
    assert [len(batch) for batch in batches_of_like_length([500, 500], 300)] == [1, 1]


def test_the_kmer_baseline_learns_what_kmers_tell() -> None:
    texts = [random_dna(60, i, b"ACGT" if i % 2 else b"AACGT") for i in range(300)]
    sequences = [DnaTokenizer().encode(text.encode()) for text in texts]
    everything = Labelled(sequences, [str(i % 2) for i in range(300)], texts, list(range(300)), "x")
    train, rest = everything.hold_out(0.4, 0)
    valid, test = rest.hold_out(0.5, 1)
    assert kmer_baseline(train, valid, test, train.classes(), k=2)[1].mcc > 0.3


def test_options_settings_and_defaults_agree() -> None:
    defaults = TrainClassifierConfig(data="x").model_dump()
    options = {option.name: option for option in train_classifier.params}
    assert set(options) - {"out", "resume", "config", "as_json", "debug"} == set(defaults) - {"model"}
    for name, option in options.items():
        text = getattr(option, "help", None) or ""
        if name in defaults and "[default: " in text and name not in ("valid", "threads"):
            shown = text.split("[default: ")[1].rstrip("]")
            assert type(defaults[name])(shown) == defaults[name], name
    assert tuple(heads.POOLINGS) == POOLINGS
    assert set(TrainClassifierConfig.model_fields["encoder"].annotation.__args__[0].__args__) == {*ENCODERS, "mamba"}  # type: ignore[union-attr]
