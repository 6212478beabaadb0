"""Generated DNA: drawn as the model says, the same whatever the number and the batch; FASTA out; errors."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from Bio import SeqIO

from mambagen import cli
from mambagen.pipelines.generate_dna import Prompt, generate_dna, read_prompts
from tests.data.helpers import random_dna
from tests.pipelines.dna_models import in_transformers, small_folder, small_model

PROMPT = Prompt("p", random_dna(40, 2, b"ACGTN").encode())


def sequences(**options) -> list[str]:
    options = {"model": small_model(), "device": "cpu", "length": 50} | options
    return [made.sequence for made in generate_dna(**options)]


def chances(theirs, text: str) -> np.ndarray:
    """Of A, C, G, T after a text."""
    ids = torch.tensor(["ACGTN".index(letter) + 7 for letter in text])[None]
    with torch.no_grad():
        return theirs(ids).logits[0, -1, 7:11].double().softmax(-1).numpy()


def test_a_sequence_does_not_depend_on_how_many_are_made_or_on_the_batch() -> None:
    for prompts in ([PROMPT], [Prompt("generated", b"")]):
        five = sequences(prompts=prompts, count=5, seed=3)
        assert len(set(five)) == 5
        assert all(len(sequence) == 50 and set(sequence) <= set("ACGT") for sequence in five)
        assert sequences(prompts=prompts, count=2, seed=3) == five[:2]
        for batch in (1, 2, 5):
            assert sequences(prompts=prompts, count=5, seed=3, batch=batch) == five
        assert sequences(prompts=prompts, count=1, seed=3, length=20) == [five[0][:20]]
        assert sequences(prompts=prompts, count=5, seed=4) != five
    both = sequences(prompts=[Prompt("other", b"ACCA"), PROMPT], count=2, seed=3)
    assert both[2:] == sequences(prompts=[PROMPT], count=2, seed=3)  # nor on other prompts


def test_bases_are_drawn_with_the_probabilities_of_the_model() -> None:
    theirs = in_transformers(small_model())
    count = 3000
    drawn = sequences(prompts=[PROMPT], count=count, length=1, batch=500)
    expected = chances(theirs, PROMPT.sequence.decode())
    found = np.array([drawn.count(base) for base in "ACGT"]) / count
    assert (np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / count) + 1e-9).all(), (found, expected)
    first = sequences(count=count, length=1, batch=500)
    assert all(abs(first.count(base) / count - 0.25) < 0.04 for base in "ACGT")


def test_temperature_0_and_top_k_1_take_the_likeliest_base_each_time() -> None:
    theirs = in_transformers(small_model())
    text = PROMPT.sequence.decode()
    for _ in range(12):
        text += "ACGT"[int(chances(theirs, text).argmax())]
    assert sequences(prompts=[PROMPT], length=12, temperature=0.0) == [text[40:]]
    assert sequences(prompts=[PROMPT], length=12, top_k=1) == [text[40:]]
    assert sequences(prompts=[PROMPT], length=12, top_p=1e-6) == [text[40:]]


def test_prompts_are_letters_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.fa").write_text(">x one\nACGT\nAC\n>y\nGG\n")
    assert read_prompts(str(tmp_path / "p.fa")) == [Prompt("x", b"ACGTAC"), Prompt("y", b"GG")]
    (tmp_path / "e.fa").write_text(">x\n>y\nGUu\n")
    assert read_prompts(str(tmp_path / "e.fa")) == [Prompt("x", b""), Prompt("y", b"GTt")]
    assert read_prompts("ACUU") == [Prompt("prompt", b"ACTT")]
    assert read_prompts("acgN") == [Prompt("prompt", b"acgN")]
    assert read_prompts(None) == [Prompt("generated", b"")]


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return small_folder(tmp_path / "m")


def run(capfd, *arguments: object) -> tuple[int, str, str]:
    code = cli.run(["generate-dna", *map(str, arguments)])
    return code, *capfd.readouterr()


def test_fasta_comes_out(model: Path, capfd) -> None:
    (model.parent / "p.fa").write_text(">x\nACGTACGTAA\n>y\nGGN\n")
    code, out, err = run(capfd, "m", "--prompt", "p.fa", "-n", 2, "--length", 100, "--seed", 7, "--with-prompt")
    assert (code, err) == (0, "")
    records = list(SeqIO.parse(io.StringIO(out), "fasta"))
    assert [r.id for r in records] == ["x_1", "x_2", "y_1", "y_2"]
    assert [len(r) for r in records] == [110, 110, 103, 103]
    assert str(records[0].seq).startswith("ACGTACGTAA")
    assert "prompt=x:10 seed=7 temperature=1 model=m" in records[0].description
    assert max(map(len, out.splitlines())) <= 80
    assert run(capfd, "m", "--prompt", "p.fa", "-n", 2, "--length", 100, "--seed", 7, "--out", "o.fa.gz")[:2] == (0, "")
    code, alone, _ = run(capfd, "m", "--prompt", "p.fa", "--length", 100, "--seed", 7, "--batch", 1)
    assert [str(r.seq) for r in SeqIO.parse(io.StringIO(alone), "fasta")] == [
        str(r.seq[-100:]) for r in (records[0], records[2])
    ]


ERRORS = {
    "no model": (4, ["nowhere"], "nowhere: no such model folder"),
    "no prompt": (3, ["m", "--prompt", "p2.fa"], "--prompt p2.fa: no such file, and no DNA sequence"),
    "bad prompt file": (3, ["m", "--prompt", "bad.fa"], "bad.fa:2: record 'x': 'Q' is no DNA letter"),
    "temperature": (2, ["m", "--temperature", "-1"], "temperature -1.0 is no number of 0 or more"),
    "top-k": (2, ["m", "--top-k", "0"], "top_k 0 is less than 1"),
    "top-p": (2, ["m", "--top-p", "1.5"], "top_p 1.5 is outside (0, 1]"),
    "length": (2, ["m", "--length", "0"], "length 0 and number 1: they must be at least 1"),
    "device": (2, ["m", "--device", "tpu"], "--device tpu"),
    "output": (5, ["m", "--out", "no/x.fa"], "no/x.fa: cannot be written"),
}


@pytest.mark.parametrize("case", ERRORS, ids=list(ERRORS))
def test_errors_are_one_line_and_leave_no_file(case: str, model: Path, capfd) -> None:
    (model.parent / "bad.fa").write_text(">x\nACQT\n")
    code, arguments, what = ERRORS[case]
    got, out, err = run(capfd, *arguments, *([] if "--out" in arguments else ["--out", "o.fa"]))
    assert (got, out, len(err.splitlines())) == (code, "", 1), err
    assert what in err
    assert sorted(path.name for path in model.parent.iterdir()) == ["bad.fa", "m"]
