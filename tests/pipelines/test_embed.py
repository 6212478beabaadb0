"""Vectors of sequences: against transformers, in chunks and batches, for every kind of model and of file."""

import builtins
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mambagen import cli
from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.sequence_store import SequenceStore
from mambagen.errors import UsageError
from mambagen.models import save_model
from mambagen.models.heads import ClassifierConfig, EncoderModelConfig, MaskedLM, SequenceClassifier
from mambagen.pipelines.dna_masked_model import DNA_COMPLEMENT
from mambagen.pipelines.embed import Embedder
from mambagen.pipelines.likelihood import Span
from tests.data.helpers import random_dna
from tests.pipelines.dna_models import in_transformers, other_strand, small_folder, small_model

DNA = random_dna(300, 4, b"ACGTN")


def ids(text: str) -> torch.Tensor:
    return torch.from_numpy(DnaTokenizer().encode(text.encode()).astype(np.int64))[None]


@pytest.mark.parametrize("layer", [None, 0, 2, 3])
def test_causal_vectors_are_the_hidden_states_of_transformers(layer: int | None) -> None:
    theirs = in_transformers(small_model()).backbone
    with torch.no_grad():
        states = theirs(ids(DNA), output_hidden_states=True)
        inputs: list[torch.Tensor] = []
        for block in theirs.layers:  # what goes into a layer is what came out of the one before
            block.register_forward_hook(
                lambda module, given, out: inputs.append(out[0] if isinstance(out, tuple) else out)
            )
        theirs(ids(DNA))
    if layer is None:
        expected = states.last_hidden_state
    else:
        expected = theirs.embeddings(ids(DNA)) if layer == 0 else inputs[layer - 1]
    expected = expected[0].detach().numpy()
    for batch_tokens in (37, 4096):
        ask = Embedder(small_model(), layer, "cpu", batch_tokens)
        np.testing.assert_allclose(ask.embed(DNA.encode(), "none"), expected, atol=1e-5)
        np.testing.assert_allclose(ask.embed(DNA.encode()), expected.mean(0), atol=1e-5)
        np.testing.assert_allclose(ask.embed(DNA.encode(), "last"), expected[-1], atol=1e-5)


def an_encoder(name: str, equivariant: bool = False, classifier: bool = False) -> Any:
    shape = {"d_model": 32, "n_layer": 2}
    fields = {"encoder": name, "encoder_config": shape, "equivariant": equivariant, "complement": DNA_COMPLEMENT}
    if classifier:
        return SequenceClassifier(ClassifierConfig(**fields, classes=("a", "b")), seed=1).eval()
    return MaskedLM(EncoderModelConfig(**fields), seed=1).eval()


@pytest.mark.parametrize("name", ["bigs", "bimamba", "bert", "mamba"])
def test_encoders_give_a_sequence_in_a_batch_what_they_give_it_alone(name: str) -> None:
    model = an_encoder(name, classifier=name == "mamba")
    lengths = [5, 130, 0, 64, 200, 1]
    texts = [random_dna(length, i, b"ACGTN") for i, length in enumerate(lengths)]
    ask = Embedder(model, None, "cpu", 256)
    with SequenceStore(DnaTokenizer()) as store:
        records = [store.put(f"r{i}", store.tokenizer.encode(t.encode())) for i, t in enumerate(texts)]
        found = list(ask.spans(store, [Span(r, 0, len(r)) for r in records], "mean"))
    assert [at for at, _, _ in found] == list(range(6))
    for (_, _, vectors), text in zip(found, texts, strict=True):
        assert vectors.shape == (1, 32)
        if text:
            with torch.no_grad():
                alone = model.encoder(ids(text)).mean(1).numpy()
            np.testing.assert_allclose(vectors, alone, atol=1e-5)
        else:
            assert np.isnan(vectors).all()


def test_a_layer_of_an_encoder_and_windows_side_by_side() -> None:
    model = an_encoder("bimamba")
    seen: list[torch.Tensor] = []
    model.encoder.layers[0].register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        for at in range(0, 300, 128):
            model.encoder(ids(DNA[at : at + 128]))
    expected = torch.cat([out[0] for out in seen]).numpy()
    ask = Embedder(model, 1, "cpu", window=128)
    np.testing.assert_allclose(ask.embed(DNA.encode(), "none"), expected, atol=1e-5)
    np.testing.assert_allclose(ask.embed(DNA.encode()), expected.mean(0), atol=1e-5)
    np.testing.assert_allclose(ask.embed(DNA.encode(), "last"), expected[-1], atol=1e-5)


def test_an_equivariant_model_gives_both_strands_the_same_mean() -> None:
    ask = Embedder(an_encoder("bimamba", equivariant=True), None, "cpu")
    here, there = ask.embed(DNA.encode(), "none"), ask.embed(other_strand(DNA).encode(), "none")
    np.testing.assert_allclose(here, there[::-1], atol=1e-5)
    plain = Embedder(an_encoder("bimamba"), None, "cpu")
    assert np.abs(plain.embed(DNA.encode()) - plain.embed(other_strand(DNA).encode())).max() > 1e-3


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def genome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    small_folder(tmp_path / "m")
    (tmp_path / "g.fa").write_text(f">chr/1 x\n{DNA}\n>empty\n>b\n{random_dna(40)}\n")
    return tmp_path / "g.fa"


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.run(["embed", *map(str, arguments)])
    return code, *capsys.readouterr()


def read(path: str) -> dict[str, Any]:
    """What a file of vectors holds, by the library of its format."""
    if path.endswith(".npz"):
        with np.load(path) as file:
            return dict(file)
    if path.endswith(".h5"):
        import h5py

        with h5py.File(path) as file:
            return {name: values.asstr()[:] if values.dtype == object else values[:] for name, values in file.items()}
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    columns = {name: np.array(table[name].to_pylist()) for name in table.column_names}
    return columns | {"about": json.loads(table.schema.metadata[b"mambagen"])}


@pytest.mark.parametrize("suffix", ["npz", "h5", "parquet"])
def test_files_hold_a_row_a_record_or_a_base(suffix: str, genome: Path, capsys) -> None:
    for package in {"h5": ["h5py"], "parquet": ["pyarrow"]}.get(suffix, []):
        pytest.importorskip(package)
    ask = Embedder("m", None, "cpu")
    code, out, err = run(capsys, genome, "--model", "m", "--out", f"e.{suffix}", "--batch-tokens", 100)
    assert (code, out) == (0, "")
    assert "'empty' is empty" in err
    found = read(f"e.{suffix}")
    assert list(found["record"]) == ["chr/1", "empty", "b"]
    assert list(found["end"]) == [300, 0, 40]
    np.testing.assert_allclose(found["embedding"][0], ask.embed(DNA.encode()), atol=1e-5)
    assert np.isnan(found["embedding"][1]).all()
    assert run(capsys, genome, "--model", "m", "--out", f"n.{suffix}", "--pool", "none", "--batch-tokens", 64)[0] == 0
    found = read(f"n.{suffix}")
    np.testing.assert_allclose(found["embedding"][:300], ask.embed(DNA.encode(), "none"), atol=1e-5)
    np.testing.assert_allclose(found["embedding"][300:], ask.embed(random_dna(40).encode(), "none"), atol=1e-5)
    if suffix == "parquet":
        assert list(found["start"]) == [*range(300), *range(40)]
        assert found["about"] == {"model": "m", "layer": None, "pool": "none"}
    else:
        assert list(found["offset"]) == [0, 300, 300, 340]


def test_regions_have_a_row_each_in_their_order(genome: Path, capsys) -> None:
    (genome.parent / "r.bed").write_text("b\t0\t9\tlast\nchr/1\t10\t200\nchr/1\t15\t30\t.\n")
    assert run(capsys, genome, "--model", "m", "--bed", "r.bed", "--pool", "last", "--out", "e.npz")[0] == 0
    found = read("e.npz")
    assert list(found["name"]) == ["last", "chr/1:10-200", "chr/1:15-30"]
    ask = Embedder("m", None, "cpu")
    np.testing.assert_allclose(found["embedding"][1], ask.embed(DNA[10:200].encode(), "last"), atol=1e-5)


def test_errors_are_one_line_and_leave_no_file(genome: Path, capsys, monkeypatch) -> None:
    (genome.parent / "bad.fa").write_text(">x\nACGT\nACQT\n")
    cases = [
        (2, [genome, "--out", "x.csv"], "x.csv: the name must end in .npz"),
        (2, [genome, "--out", "x.npz", "--layer", 4], "--layer 4: the model has layers 1 to 3"),
        (2, [genome, "--out", "x.npz", "--pool", "max"], "'max' is not one of"),
        (3, ["bad.fa", "--out", "x.npz"], "bad.fa:3: record 'x': 'Q' is no DNA letter"),
        (3, ["none.fa", "--out", "x.npz"], "none.fa: no such file"),
        (5, [genome, "--out", "no/x.npz"], "no/x.npz: cannot be written"),
        (4, [genome, "--out", "x.npz", "--model", "nowhere"], "nowhere: no such model folder"),
    ]
    for code, arguments, what in cases:
        given = arguments if "--model" in arguments else [*arguments, "--model", "m"]
        got, out, err = run(capsys, *given)
        assert (got, out) == (code, ""), err
        assert what in err.splitlines()[-1]
    code, _, err = run(capsys, "bad.fa", genome, "--model", "m", "--out", "e.npz")
    assert code == 3  # the good file is done, the bad one named
    assert list(read("e.npz")["record"]) == ["chr/1", "empty", "b"]
    assert sorted(path.name for path in genome.parent.iterdir()) == ["bad.fa", "e.npz", "g.fa", "m"]

    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] in ("h5py", "pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in ("h5py", "pyarrow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for suffix, package in (("h5", "h5py"), ("parquet", "pyarrow")):
        code, _, err = run(capsys, genome, "--model", "m", "--out", f"x.{suffix}")
        assert (code, len(err.splitlines())) == (2, 1)
        assert f"pip install {package}" in err


def test_hdf5_on_a_full_disk_is_an_error_and_no_crash(tmp_path: Path) -> None:
    """In a process of its own: the limit is one of the process, and HDF5 ended it by a segmentation fault."""
    pytest.importorskip("h5py")
    code = (
        "import errno, resource, numpy as np\n"
        "from pathlib import Path\n"
        "from mambagen.data.sequence_store import SequenceStore\n"
        "from mambagen.pipelines.embedding_files import open_embeddings\n"
        "from mambagen.pipelines.likelihood import Span\n"
        "store = SequenceStore(None)\n"
        "spans = [Span(store.put('a', np.zeros(200_000, dtype=np.uint8)), 0, 200_000)]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "try:\n"
        "    with open_embeddings(Path('e.h5'), 'h5', spans, 64, False, {}) as file:\n"
        "        for start in range(0, 200_000, 1000):\n"
        "            file.write(0, start, np.ones((1000, 64), dtype=np.float32))\n"
        "except OSError as error:\n"
        "    print(error.errno == errno.EFBIG, start)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[0] == "True"
    assert int(done.stdout.split()[1]) < 100_000  # said soon after it happened, not at the end


def test_an_unknown_pool_is_a_usage_error_in_python_too() -> None:
    with pytest.raises(UsageError, match="mean, last, none"):
        Embedder(small_model(), None, "cpu").embed(b"ACGT", "max")  # type: ignore[arg-type]


def test_models_on_disk_of_each_kind_can_be_asked(tmp_path: Path) -> None:
    for name, model in (("masked", an_encoder("bert")), ("classes", an_encoder("bimamba", classifier=True))):
        save_model(model, tmp_path / name, DnaTokenizer().model_dump(mode="json"), "# m\n")
        expected = Embedder(model, None, "cpu").embed(b"ACGTAC")
        np.testing.assert_array_equal(Embedder(tmp_path / name, None, "cpu").embed(b"ACGTAC"), expected)
