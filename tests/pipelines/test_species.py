"""train-species and classify-species through the command line."""

import csv
import gzip
import io
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from mambagen.commands.train_species import train_species
from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.genome import Stretches
from mambagen.data.species_windows import draw_evaluation
from mambagen.data_manifests import folder_of, load_manifest
from mambagen.models.saving import load_model, save_model
from mambagen.models.species_classifier import Calibration, SpeciesClassifier, SpeciesConfig
from mambagen.pipelines.classify_species import SpeciesReader
from mambagen.pipelines.dna_masked_model import DNA_COMPLEMENT
from mambagen.pipelines.length_warmup import length_stages
from mambagen.pipelines.species_figures import Accuracy, fit_calibration, reliability, wilson
from mambagen.pipelines.species_task import Answers, LengthPlan
from mambagen.pipelines.train_species import TrainSpeciesConfig
from mambagen.training.run_folder import read_metrics
from tests.data.helpers import a_genome, random_dna

Run = Callable[..., tuple[int, str, str]]
TINY = """
threads = 1
save_every = "1000"
steps = 30
context = 256
shortest = 64
batch_tokens = 4096
patch = 8
k = 3
lr = 0.01
valid_windows = 20
test_windows = 20
lengths = [128, 1024]
[model]
d_model = 16
n_layer = 1
"""
SPECIES = {"alpha": b"AATTCG", "beta": b"ACGT", "gamma": b"ACCGGT"}  # letters that a genome is drawn from


@pytest.fixture
def run(tmp_path: Path, command: Run) -> Run:
    """`run("classify-species", ...)` -> (exit code, stdout, stderr) in a folder with tiny.toml and genomes."""
    (tmp_path / "tiny.toml").write_text(TINY)
    return command


@pytest.fixture
def genomes(tmp_path: Path) -> Path:
    """A folder with a FASTA for each of three species that differ in composition, 24 kb each in two records."""
    folder = tmp_path / "genomes"
    folder.mkdir()
    for i, (name, letters) in enumerate(SPECIES.items()):
        text = "".join(f">{name}.chr{c}\n{random_dna(12_000, 10 * i + c, letters)}\n" for c in (1, 2))
        (folder / f"{name}.fa.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def a_model(folder: Path, **settings: object) -> Path:
    """An untrained model with window 128 whose answers differ from record to record."""
    config = SpeciesConfig(
        encoder="bimamba", encoder_config={"d_model": 16, "n_layer": 1}, complement=DNA_COMPLEMENT,
        classes=("a", "b", "c"), patch=8, k=3,
        calibration=Calibration(temperature=0.02, within=0.1, across=0.4), **{"window": 128, **settings},  # type: ignore[arg-type]
    )  # fmt: skip
    save_model(SpeciesClassifier(config, seed=0), folder, DnaTokenizer().model_dump(mode="json"), "card")
    return folder


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text), delimiter="\t"))


# ---- training -------------------------------------------------------------------------------------------------------


def test_species_are_learnt_measured_reported_and_told_in_new_records(run: Run, genomes: Path, tmp_path: Path) -> None:
    code, out, err = run(
        "train-species", "--config", "tiny.toml", "--data", genomes, "--baselines", "--baseline-windows", 20,
        "--steps", 40, "--out", "r", "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert result["species"] == ["alpha", "beta", "gamma"]
    by_length = {row["length"]: row for row in result["test"]["by_length"]}
    assert by_length[1024]["accuracy"] > 0.9
    assert by_length[1024]["accuracy"] > by_length[128]["accuracy"] > 0.5
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in by_length.values())
    assert result["test"]["after"]["loss"] <= result["test"]["before"]["loss"]

    found = {(row["name"], row["accuracy"]["length"]): row for row in result["baselines"]}
    assert found["composition", 1024]["accuracy"]["accuracy"] > 0.9  # that is how these species differ
    for length in (128, 1024):
        low, high = found["share of N", length]["chance"]
        for name in ("share of N", "share of lower case"):
            assert low <= found[name, length]["accuracy"]["accuracy"] <= high, name
        shuffled = found["4-mers, labels shuffled", length]["accuracy"]
        assert shuffled["low"] <= 1 / 3 <= shuffled["high"]
        digits = {found[name, length]["accuracy"]["windows"] for name in ("5-mers", "composition")}
        assert digits == {by_length[length]["windows"]}  # of the same windows as the model

    page = Path("r/report.html").read_text("utf-8")
    for text in ("alpha", "Confusions", "Calibration", "labels shuffled", "How to repeat", "train-species --config"):
        assert text in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'src="data:' in page
    fields = load_model("r/model")[1]
    assert fields["model"]["calibration"]["temperature"] == pytest.approx(result["temperature"])
    assert "| 1,024 |" in Path("r/model/README.md").read_text("utf-8")

    new = "".join(f">{name}{i}\n{random_dna(900, 99 + i, SPECIES[name])}\n" for name in SPECIES for i in range(5))
    Path("new.fa").write_text(new)
    code, out, err = run("classify-species", "--model", "r/model", "new.fa")
    assert code == 0, err
    rows = table(out)
    assert np.mean([row["record"].startswith(row["species"]) for row in rows]) > 0.9
    assert {row["windows"] for row in rows} == {"4"}


def test_labels_that_mean_nothing_teach_nothing(run: Run, genomes: Path) -> None:
    code, out, err = run("train-species", "--config", "tiny.toml", "--data", genomes, "--shuffled", "--json")
    assert code == 0, err
    row = json.loads(out)["test"]["by_length"][0]
    low, high = wilson(1 / 3, row["independent"])
    assert low <= row["accuracy"] <= high


def test_simulated_species_are_the_default_and_the_table_is_for_people(run: Run) -> None:
    code, out, err = run(
        "train-species", "--config", "tiny.toml", "--simulated-species", 3, "--simulated-length", 30_000,
        "--steps", 3, "--lengths", "256,1024,1000000",
    )  # fmt: skip
    assert code == 0, err
    assert "3 species, " in out
    assert "classify-species --model runs/train-species-" in out
    assert [line.split()[0] for line in out.splitlines()[3:6]] == ["bases", "256", "1,024"]
    report = next(Path("runs").iterdir()) / "report.html"
    assert "No test window of 1,000,000 bases: sp1, sp2, sp3." in report.read_text("utf-8")


def test_a_run_gone_on_with_equals_one_left_alone(run: Run, genomes: Path) -> None:
    common = ("train-species", "--config", "tiny.toml", "--data", genomes, "--steps", 6, "--save-every", 3)
    assert run(*common, "--keep", 9, "--out", "whole")[0] == 0
    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/checkpoints/step-00000006")
    shutil.rmtree("cut/model")
    code, _, err = run("train-species", "--resume", "cut")
    assert code == 0, err

    def rows(folder: str) -> list[tuple[object, ...]]:
        found = read_metrics(Path(folder) / "metrics.jsonl")
        return [(row["step"], row.get("loss"), row.get("grad_norm"), row.get("valid_loss")) for row in found]

    assert rows("cut") == rows("whole")
    one, two = (load_model(f"{name}/checkpoints/step-00000006")[0].state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    code, _, err = run("train-species", "--resume", "cut", "--context", 128)
    assert (code, "--context cannot change when a run goes on" in err) == (2, True)
    (genomes / "beta.fa.gz").write_bytes(gzip.compress(f">beta.chr1\n{random_dna(9000, 5)}\n".encode()))
    code, _, err = run("train-species", "--resume", "cut")
    assert (code, "the training data is not what the run began with" in err) == (4, True)


def test_a_pretrained_language_model_is_gone_on_with(run: Run, genomes: Path, tmp_path: Path) -> None:
    from mambagen.models import MambaConfig, MambaLM

    source = MambaLM(MambaConfig(d_model=16, n_layer=2), seed=4)
    save_model(source, tmp_path / "pre", DnaTokenizer().model_dump(mode="json"), "card")
    plain = tmp_path / "plain.toml"
    plain.write_text(TINY.split("[model]")[0].replace("patch = 8\n", ""))
    common = ("train-species", "--config", plain, "--data", genomes, "--from", "pre", "--steps", 1)
    code, _, err = run(*common, "--out", "r")
    assert code == 0, err
    begun, _ = load_model("r/checkpoints/step-00000000")
    assert begun.config.pooling == "last"
    for name, value in source.backbone.state_dict().items():
        assert torch.equal(begun.encoder.state_dict()[name], value)
    code, _, err = run(*common, "--patch", 8)
    assert (code, "leave --patch out" in err) == (2, True)
    code, _, err = run(*common, "--encoder", "bigs")
    assert (code, "--encoder bigs: pre holds a mamba" in err) == (2, True)


def test_a_data_set_by_name_is_divided_by_its_chromosomes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAMBAGEN_HOME", str(tmp_path / "home"))
    names = ("ape", "bat")
    files = "".join(
        f'[[files]]\nname = "{name}.fa"\nurls = ["https://example.org/{name}.fa"]\nrole = "sequence"\n'
        'sha256 = "unknown: pin at first fetch"\n'
        for name in names
    )
    Path("mine.toml").write_text(
        'name = "mine"\ntitle = "t"\nkind = "dna"\nlicence = "l"\nprovenance = "p"\n'
        f'{files}[splits.chromosomes]\ntrain = ["1"]\nvalid = ["2"]\ntest = ["3"]\n'
    )
    folder = folder_of(load_manifest("mine.toml"))
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        records = [("chr1", 3000), ("chr2", 2000), ("chr3", 1000), ("scaffold_7", 500)]
        texts = (f">{record}\n{random_dna(n, 10 * i + k)}\n" for k, (record, n) in enumerate(records))
        (folder / f"{name}.fa").write_text("".join(texts))
    parts = TrainSpeciesConfig(data=("mine.toml",)).source().read()
    assert parts.species == names
    assert [[s.bases for s in part] for part in (parts.train, parts.valid, parts.test)] == [[n, n] for n in (3000, 2000, 1000)]  # fmt: skip  # noqa: E501
    records = TrainSpeciesConfig(data=("mine.toml",), test_records=("chr1",), valid_records=("chr2",)).source().read()
    assert [s.bases for s in records.test] == [3000, 3000]
    assert [s.bases for s in records.train] == [1500, 1500]


def test_windows_grow_with_length_warmup_and_mixed_lengths_halve() -> None:
    plan = LengthPlan(1024, None, tuple(length_stages(256, 1024, 4096, 30)))
    assert [plan.at(step, 0) for step in (0, 9, 10, 19, 20, 29, 500)] == [256, 256, 512, 512, 1024, 1024, 1024]
    mixed = LengthPlan(1024, 200)
    assert mixed.all() == [256, 512, 1024]
    drawn = [mixed.at(step, 3) for step in range(600)]
    assert np.bincount(np.log2(drawn).astype(int))[8:].tolist() == pytest.approx([200] * 3, abs=50)
    assert drawn == [mixed.at(step, 3) for step in range(600)]


@pytest.mark.parametrize(
    ("files", "arguments", "code", "told"),
    [
        ({}, ["--data", "nowhere"], 3, "nowhere: no such file, and no data set of this name"),
        ({"d/x.txt": "hello"}, ["--data", "d"], 3, "d: no sequence file in it"),
        ({"d/a.fa": ">x\nACGT\n"}, ["--data", "d"], 3, "only a has training sequence"),
        ({"d/a.fa": ">x\nACGT\n", "d/b.fa": ">x\nMKVL\n"}, ["--data", "d"], 3, "d/b.fa:2: record 'x': 'L' is no DNA"),
        ({"d/a.fa": "", "d/b.fa": ">x\nA\n"}, ["--data", "d"], 3, "d/a.fa: the file is empty"),
        ({"d/a.fa": ">x\nAC GT\n", "d/b.fa": ">x\nA\n"}, ["--data", "d"], 3, "a blank inside the sequence"),
        ({"d/a.fa": ">x\nAC\0GT\n", "d/b.fa": ">x\nA\n"}, ["--data", "d"], 3, "a NUL byte in the sequence"),
        ({"d/a.fa": ">x\nA\n>x\nC\n", "d/b.fa": ">x\nA\n"}, ["--data", "d"], 3, "d/a.fa:3: record 'x' occurs twice"),
        ({"s.bed": "alpha.chr1 5 2 train\n"}, ["--splits", "s.bed"], 3, "s.bed:1: start 5 is not before end 2"),
        ({"s.bed": "alpha.chr1 0 2 learn\n"}, ["--splits", "s.bed"], 3, "s.bed:1: the split must be train, valid"),
        ({"s.bed": "q 0 2 train\n"}, ["--splits", "s.bed"], 3, "the splits name no record of the data"),
        ({"s.bed": "alpha.chr1 0 99999 train\n"}, ["--splits", "s.bed"], 3, "does not fit its record of 12000 bases"),
        ({"s.bed": "x"}, ["--splits", "t.bed"], 3, "t.bed"),
        ({}, ["--species", "alpha,omega"], 2, "no species 'omega' among the data; there are alpha, beta, gamma"),
        ({}, ["--species", "omega"], 2, "no species 'omega' among the data"),
        ({}, ["--species", "alpha"], 3, "only alpha has training sequence"),
        ({}, ["--test-records", "chr9"], 2, "no record 'chr9' to hold out"),
        ({}, ["--context", 20_000, "--batch-tokens", 40_000], 3, "species alpha has no window of 10,000 bases"),
        ({}, ["--batch-tokens", 128], 2, "--batch-tokens 128 is less than one window of --context 256"),
        ({}, ["--length-warmup", 100], 2, "--length-warmup 100: doubling it must lead to --context 256"),
        ({}, ["--encoder", "bert"], 2, "patches are read by a bimamba, not by bert"),
        ({}, ["--lengths", "1k"], 2, "--lengths 1k: give whole numbers"),
        ({}, ["--valid-fraction", 0, "--test-fraction", 0.5], 3, "no species has validation sequence"),
        ({}, ["--from", "nowhere"], 4, "nowhere: no such"),
        ({"s.bed": "# none\n"}, ["--splits", "s.bed"], 3, "s.bed: no row in it"),
    ],
    ids=lambda value: str(value[:3]) if isinstance(value, list) else None,
)
def test_what_cannot_be_trained_on_is_one_line_and_leaves_no_run(
    files: dict[str, str], arguments: list[object], code: int, told: str, run: Run, genomes: Path
) -> None:
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    data = [] if "--data" in arguments else ["--data", genomes]
    found, out, err = run("train-species", "--config", "tiny.toml", *data, *arguments)
    assert (found, out) == (code, ""), err
    assert told in err
    assert not Path("runs").exists()
    assert len(err.splitlines()) == 1 or "warning" in err


# ---- use ------------------------------------------------------------------------------------------------------------


def by_hand(model: SpeciesClassifier, text: str) -> np.ndarray:
    """Probabilities of a record, each window by itself, by the formula."""
    ids = DnaTokenizer().encode(text.encode())
    total, bases = np.zeros(3), 0
    for start in range(0, len(ids), 128):
        known = ids[start : start + 128]
        known = known[known < 11]
        with torch.no_grad():
            total += len(known) * model(torch.from_numpy(known.copy())[None]).double().log_softmax(-1)[0].numpy()
        bases += len(known)
    size = bases / 128
    scaled = total / bases * size ** (0.4 if size > 1 else 0.1) / 0.02
    return np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()


def test_rows_are_the_formula_whatever_the_batch(run: Run, tmp_path: Path) -> None:
    folder = a_model(tmp_path / "m")
    model, _ = load_model(folder)
    lengths = [1, 5, 60, 127, 128, 129, 300, 1000, 20, 5000]
    texts = [random_dna(length, length) for length in lengths]
    texts[6] = texts[6][:100] + "N" * 40 + texts[6][140:]
    Path("x.fa").write_text("".join(f">r{i} about\n{text.lower()}\n" for i, text in enumerate(texts)))
    code, out, err = run("classify-species", "--model", folder, "x.fa", "--json")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    for row, text in zip(rows, texts, strict=True):
        expected = by_hand(model, text)
        assert list(row["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
        assert row["species"] == row["best"] == "abc"[int(expected.argmax())]
        assert row["probability"] == pytest.approx(expected.max(), abs=1e-5)
        assert row["runner_up_probability"] == pytest.approx(np.sort(expected)[1], abs=1e-5)
        assert (row["windows"], row["length"]) == (-(-len(text) // 128), len(text))
    assert rows[6]["share_n"] == pytest.approx(40 / 300)
    assert len({row["species"] for row in rows}) > 1
    for size in (1, 300, 100_000):
        again = run("classify-species", "--model", folder, "x.fa", "--json", "--batch-tokens", size)[1]
        for one, two in zip(rows, map(json.loads, again.splitlines()), strict=True):
            assert list(two["probabilities"].values()) == pytest.approx(list(one["probabilities"].values()), abs=1e-5)


def test_long_records_are_sampled_evenly_and_all_windows_read_everything(run: Run, tmp_path: Path) -> None:
    folder = a_model(tmp_path / "m")
    text = random_dna(128 * 40 + 50, 1)
    Path("x.fa").write_text(f">long\n{text}\n>short\n{text[:100]}\n")
    code, out, err = run("classify-species", "--model", folder, "x.fa", "--max-windows", 8, "--per-window", "w.tsv")
    assert code == 0, err
    assert [row["windows"] for row in table(out)] == ["6", "1"]
    track = table(Path("w.tsv").read_text())
    assert [int(row["start"]) for row in track] == [0, 1024, 2048, 3072, 4096, 5120, 0]
    assert [row["end"] for row in track][-2:] == ["5170", "100"]
    assert {row["record"] for row in track} == {"long", "short"}
    code, out, _ = run("classify-species", "--model", folder, "x.fa", "--all-windows", "--per-window", "w.tsv")
    assert [row["windows"] for row in table(out)] == ["41", "1"]
    track = table(Path("w.tsv").read_text())
    assert [int(row["start"]) for row in track if row["record"] == "long"] == list(range(0, 5170, 128))
    model, _ = load_model(folder)
    for row in track[:3]:
        alone = by_hand(model, text[int(row["start"]) : int(row["end"])])
        assert (row["species"], float(row["probability"])) == (
            "abc"[alone.argmax()],
            pytest.approx(alone.max(), abs=2e-6),
        )


def test_many_short_contigs_go_through_the_model_in_few_batches(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_model(tmp_path / "m")
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 60, 3000)
    big = random_dna(200_000, 0)
    Path("c.fa").write_text("".join(f">c{i}\n{big[i : i + n]}\n" for i, n in enumerate(lengths.tolist())))
    calls: list[int] = []
    forward = SpeciesClassifier.forward

    def counted(self: SpeciesClassifier, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        calls.append(tokens.numel())
        return forward(self, tokens, mask)

    monkeypatch.setattr(SpeciesClassifier, "forward", counted)
    code, out, err = run("classify-species", "--model", folder, "c.fa", "--batch-tokens", 8192)
    assert code == 0, err
    rows = table(out)
    assert [row["record"] for row in rows] == [f"c{i}" for i in range(3000)]
    assert [int(row["length"]) for row in rows] == lengths.tolist()
    assert len(calls) < 30
    assert sum(calls) < 1.3 * lengths.sum()  # little of it is padding
    assert max(calls) <= 8192


def test_a_record_of_any_length_passes_in_constant_memory(tmp_path: Path) -> None:
    import tracemalloc

    folder = a_model(tmp_path / "m", window=8192)
    line = random_dna(1 << 20, 0)

    def peak(lines: int, at_most: int | None) -> int:
        path = tmp_path / f"{lines}.fa"
        with open(path, "w") as stream:
            stream.write(">one\n")
            for _ in range(lines):
                stream.write(line)  # no line ends: one line of many megabytes
            stream.write("\n")
        reader = SpeciesReader(folder, "cpu", max_windows=at_most)
        tracemalloc.start()
        (row,) = reader.files([path])
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        path.unlink()
        assert row.length == lines << 20
        return found

    assert peak(40, 16) < 1.25 * peak(10, 16)


def test_unsure_answers_and_records_without_bases_are_called_unknown(run: Run, tmp_path: Path) -> None:
    folder = a_model(tmp_path / "m")
    Path("x.fa").write_text(f">r\n{random_dna(300, 3)}\n>empty\n>gap\n{'N' * 500}\n>r2\n{random_dna(200, 4)}\n")
    code, out, err = run("classify-species", "--model", folder, "x.fa")
    assert code == 0, err
    rows = {row["record"]: row for row in table(out)}
    assert list(rows) == ["r", "empty", "gap", "r2"]
    assert rows["empty"] == {
        "record": "empty", "length": "0", "species": "unknown", "probability": "NA", "runner_up": "NA",
        "runner_up_probability": "NA", "windows": "0", "share_n": "NA",
    }  # fmt: skip
    assert (rows["gap"]["species"], rows["gap"]["share_n"]) == ("unknown", "1.000000")
    assert "record 'empty' is empty" in err
    assert "record 'gap' is N for the most part" in err
    best = float(rows["r"]["probability"])
    for limit, said in ((best - 1e-4, rows["r"]["species"]), (min(1, best + 1e-4), "unknown")):
        out = run("classify-species", "--model", folder, "x.fa", "--min-confidence", limit, "--json")[1]
        row = json.loads(out.splitlines()[0])
        assert (row["species"], row["best"]) == (said, rows["r"]["species"])


def test_rna_is_read_as_dna_and_said_unless_it_is_meant(run: Run, tmp_path: Path) -> None:
    folder = a_model(tmp_path / "m")
    text = random_dna(200, 0)
    Path("dna.fa").write_text(f">r\n{text}\n")
    Path("rna.fa").write_text(f">r\n{text.replace('T', 'U')}\n")
    plain = run("classify-species", "--model", folder, "dna.fa")
    warned = run("classify-species", "--model", folder, "rna.fa")
    meant = run("classify-species", "--model", folder, "rna.fa", "--rna")
    assert plain[1] == warned[1] == meant[1]
    assert "rna.fa:1: record 'r' holds U, which is read as T; say --rna" in warned[2]
    assert plain[2] == meant[2] == ""


def bgzip(text: bytes, end: bool = True) -> bytes:
    """One block of BGZF, with its end marker or without."""
    packed = bytearray(gzip.compress(text, mtime=0))
    packed[3] = 4  # FEXTRA
    size = len(packed) + 8
    packed[10:10] = b"\x06\x00BC\x02\x00" + (size - 1).to_bytes(2, "little")
    marker = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
    return bytes(packed) + (marker if end else b"")


GOOD = b">r1 a record\nACGTACGTAC\nACGTT\n>r2\nGGGTTTAA\n"


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        GOOD.lower().replace(b">r1 a record", b">r1 A record"),
        GOOD.replace(b"\n", b"\r"),
        GOOD.replace(b"\n", b"\r\n"),
        GOOD.replace(b"ACGTAC\n", b"ACGTAC  \n"),
        b"\xef\xbb\xbf\n\n" + GOOD,
        GOOD.replace(b"\nACGTT", b"ACGTT"),
        gzip.compress(GOOD),
        bgzip(GOOD),
        bgzip(GOOD, end=False),
        GOOD.rstrip(b"\n"),
    ],
    ids=[
        *("plain", "lower case", "CR only", "CRLF", "blanks at line ends", "byte order mark", "one line", "gzip"),
        *("bgzip", "bgzip without end marker", "no last line end"),
    ],
)
def test_fasta_in_any_dress_has_the_same_rows(content: bytes, run: Run, tmp_path: Path) -> None:
    folder = a_model(tmp_path / "m")
    Path("plain.fa").write_bytes(GOOD)
    Path("x.fa").write_bytes(content)
    Path("x.fa.fai").write_text("stale\t9\t9\t9\t9\n")  # of another file: it is not looked at
    expected = run("classify-species", "--model", folder, "plain.fa")
    assert [row["record"] for row in table(expected[1])] == ["r1", "r2"]
    code, out, err = run("classify-species", "--model", folder, "x.fa")
    assert (code, out) == (0, expected[1]), err
    assert ("no end marker" in err) == (content == bgzip(GOOD, end=False))


@pytest.mark.parametrize(
    ("content", "told", "rows"),
    [
        (b"", "the file is empty", 0),
        (b"ACGT\n", "no header", 0),
        (b">a\nACGT\n>b\nAC GT\n>c\nA\n", "x.fa:4: record 'b': a blank inside the sequence", 1),
        (b">a\nACGT\n>b\nAC\0GT\n", "x.fa:4: record 'b': a NUL byte", 1),
        (b">a\nACGT\n>b\nMKVLE\n", "x.fa:4: record 'b': 'L' is no DNA letter; this looks like protein", 1),
        (b">a\nACGT\n>a\nACGT\n", "x.fa:3: record 'a' occurs twice (line 1 too)", 1),
        (b">a\nACGT\n>\nACGT\n", "x.fa:3: a record without a name", 1),
        (b">a\n>b\n", "it holds no sequence: all of its 2 records are empty", 2),
        (b"@a\nACGT\n+\nIIII\n", "this looks like FASTQ", 0),
        (b"<!DOCTYPE html>\n<html></html>\n", "a web page", 0),
        (gzip.compress(b">a\nACGT\n>b\nACGTAC\n")[:-12], "the gzip file is cut off", 0),
        (b"\x1f\x8b\x08\x00broken", "gzip file", 0),
        (b"BZh91AY", "compressed by bzip2", 0),
        (b">a\nAC\xc3\xa9GT\n", "byte 0xc3 is not ASCII", 0),
        (b">a\nAC-GT\n", "a gap '-'", 0),
    ],
    ids=[
        *(
            "empty file",
            "no header",
            "blank inside",
            "NUL",
            "protein",
            "duplicate",
            "no name",
            "empty records",
            "FASTQ",
        ),
        *("web page", "gzip cut off", "gzip damaged", "bzip2", "not ASCII", "alignment"),
    ],
)
def test_bad_files_are_named_and_the_others_are_done(
    content: bytes, told: str, rows: int, run: Run, tmp_path: Path
) -> None:
    folder = a_model(tmp_path / "m")
    Path("x.fa").write_bytes(content)
    Path("good.fa").write_bytes(GOOD)
    code, out, err = run("classify-species", "--model", folder, "x.fa", "good.fa", "nowhere.fa", "--out", "o.tsv")
    assert (code, out) == (3, "")
    assert told in err
    assert "nowhere.fa: no such file" in err
    assert "Traceback" not in err
    found = [row["record"] for row in table(Path("o.tsv").read_text())]
    assert found[-2:] == ["r1", "r2"]
    assert len(found) == 2 + rows
    if rows and "all of its" not in told:
        those = "record before it has its row" if rows == 1 else f"{rows} records before it have their rows"
        assert f"the {those}; what follows it was not read" in err


def test_names_need_not_be_ascii_and_stdin_is_read(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_model(tmp_path / "m")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(">größe_ß\nACGTAC\n".encode())))
    code, out, err = run("classify-species", "--model", folder, "-")
    assert code == 0, err
    assert table(out)[0]["record"] == "größe_ß"


def test_usage_and_models_that_do_not_fit(run: Run, tmp_path: Path) -> None:
    folder = a_model(tmp_path / "m")
    Path("x.fa").write_bytes(GOOD)
    for arguments, code, told in (
        (("--model", "nowhere", "x.fa"), 4, "nowhere: no such"),
        (("--model", folder, "x.fa", "--min-confidence", 2), 2, "--min-confidence 2"),
        (("--model", folder, "x.fa", "--min-confidence", "nan"), 2, "--min-confidence nan"),
        (("--model", folder, "x.fa", "--all-windows", "--max-windows", 3), 2, "do not go together"),
        (("--model", folder, "x.fa", "--out", "o", "--per-window", "o"), 2, "give them two files"),
        (("--model", folder, "x.fa", "--device", "tpu"), 2, "--device tpu"),
        (("--model", folder, "-", "-"), 2, "'-' is given twice"),
        (("--model", folder, "x.fa", "--out", "no/such/o.tsv"), 5, "no/such"),
        ((), 2, "Missing argument"),
    ):
        found, out, err = run("classify-species", *arguments)
        assert (found, out) == (code, ""), err
        assert told in err
    (folder / "model.safetensors").write_bytes(b"damaged")
    code, _, err = run("classify-species", "--model", folder, "x.fa")
    assert code == 4, err


# ---- figures --------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_wilson() -> None:
    for right, trials in ((0, 5), (3, 10), (87, 100), (40, 40)):
        expected = stats.binomtest(right, trials).proportion_ci(0.95, method="wilson")
        assert wilson(right / trials, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_every_species_counts_alike_whatever_number_of_windows_it_has() -> None:
    genome = a_genome(random_dna(100_000, 0), random_dna(2000, 1))
    parts = [Stretches(genome.records, [(i, 0, n)], genome.tokenizer) for i, n in ((0, 100_000), (1, 2000))]
    drawn = draw_evaluation(parts, 1000, 90, seed=0)
    assert np.bincount(drawn.label).tolist() == [90, 4]
    found = Accuracy.of(drawn, np.zeros(94, dtype=np.int64))  # all are called the first
    assert found.accuracy == 0.5
    one, two = drawn.independent().tolist()
    assert (one > 50, two) == (True, 2)
    assert found.independent == round(4 / (1 / one + 1 / two))
    assert (found.low, found.high) == pytest.approx(wilson(0.5, 4 / (1 / one + 1 / two)))


def test_calibration_error_is_the_gap_between_saying_and_being_right() -> None:
    chances = np.log(np.array([[0.95, 0.05]] * 10 + [[0.35, 0.65]] * 10))
    label = np.array([0] * 9 + [1] + [1] * 5 + [0] * 5)
    found = reliability(chances, label)
    assert found.error == pytest.approx((10 * abs(0.95 - 0.9) + 10 * abs(0.65 - 0.5)) / 20)
    assert (found.counts[9], found.counts[6]) == (10, 10)
    assert found.right[6] == pytest.approx(0.5)
    assert found.loss == pytest.approx(-np.mean([row[i] for row, i in zip(chances, label, strict=True)]))


def test_the_fit_finds_the_calibration_that_made_the_labels() -> None:
    generator = np.random.default_rng(0)
    truth = Calibration(temperature=0.5, within=0.3, across=0.6)
    bases = 128 * 2.0 ** generator.integers(-4, 7, 30_000)
    mean = generator.normal(0, 0.4, (30_000, 4))
    mean -= np.log(np.exp(mean).sum(1, keepdims=True))
    chances = np.exp(truth.log_probabilities(mean, bases, 128))
    label = (chances.cumsum(1) < generator.random((30_000, 1))).sum(1)
    found = fit_calibration(Answers(mean, bases, label), np.ones(30_000), 128)
    assert (found.temperature, found.within, found.across) == pytest.approx((0.5, 0.3, 0.6), abs=0.05)
    after = reliability(found.log_probabilities(mean, bases, 128), label)
    before = reliability(Calibration(across=1).log_probabilities(mean, bases, 128), label)
    assert after.error < 0.02 < before.error


def test_options_settings_and_defaults_agree() -> None:
    defaults = TrainSpeciesConfig().model_dump()
    options = {option.name: option for option in train_species.params}
    assert set(options) - {"out", "resume", "config", "as_json", "debug", "more_data"} == set(defaults) - {"model"}
    for name, option in options.items():
        text = getattr(option, "help", None) or ""
        if name in defaults and "[default: " in text and name not in ("data", "threads", "minutes", "patch", "lengths"):
            shown = text.split("[default: ")[1].rstrip("]")
            assert type(defaults[name])(shown) == defaults[name], name


def test_the_log_is_quiet(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    folder = a_model(tmp_path / "m")
    (tmp_path / "x.fa").write_bytes(GOOD)
    with caplog.at_level(logging.WARNING, logger="mambagen"):
        assert len(list(SpeciesReader(folder).files([tmp_path / "x.fa"]))) == 2
    assert not caplog.records
