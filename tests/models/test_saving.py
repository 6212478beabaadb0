"""Model folders: what goes in comes out, and what is damaged or foreign is refused with the file's name."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import mambagen
from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.errors import ModelError, ResourceError, UsageError
from mambagen.models import MambaConfig, MambaLM, load_model, model_card, model_writers, save_model
from mambagen.models.files import verify_folder, write_folder_atomically

CONFIG = MambaConfig(d_model=16, n_layer=2)
TOKENIZER = DnaTokenizer(lower_case="n").model_dump()


@pytest.fixture(params=["tied", "untied"])
def model(request):
    return MambaLM(CONFIG.model_copy(update={"tie_embeddings": request.param == "tied"}), seed=0)


@pytest.fixture
def folder(tmp_path):
    save_model(MambaLM(CONFIG, seed=0), tmp_path / "model", TOKENIZER, "# A card\n")
    return tmp_path / "model"


def test_a_model_comes_back_bit_for_bit(model, tmp_path):
    save_model(model, tmp_path / "model", TOKENIZER, "# A card")
    again, config = load_model(tmp_path / "model")
    assert again.config == model.config
    assert not again.training
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert (again.lm_head.weight is again.backbone.embedding.weight) is model.config.tie_embeddings
    assert config["kind"] == "mamba-lm"
    assert DnaTokenizer.model_validate(config["tokenizer"]).lower_case == "n"


def test_the_folder_holds_what_others_can_read(folder):
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
        "manifest.json",
    }
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in ("format", "kind")} == {"format": 1, "kind": "mamba-lm"}
    assert config["model"] == CONFIG.model_dump()
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors  # tied: the embedding is there once
    assert tensors["backbone.layers.1.mixer.conv1d.weight"].shape == (32, 1, 4)
    assert (folder / "README.md").read_text() == "# A card\n"
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # the weights are for others as the rest is


def test_load_gives_model_and_tokenizer(folder):
    model, tokenizer = mambagen.load(str(folder))
    assert tokenizer == DnaTokenizer(lower_case="n")
    ids = torch.from_numpy(tokenizer.encode(b"ACGTNacgt"))[None]
    assert model(ids)[0].shape == (1, 9, 16)


def test_the_callers_random_numbers_are_not_touched_by_loading(folder):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_model(folder)
    assert torch.equal(torch.rand(3), expected)


def test_low_precision_weights_come_back_as_float32(tmp_path):
    model = MambaLM(CONFIG, seed=0).bfloat16()
    save_model(model, tmp_path / "model", TOKENIZER, "")
    again, _ = load_model(tmp_path / "model")
    weight = again.backbone.layers[0].mixer.in_proj.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, model.backbone.layers[0].mixer.in_proj.weight.float())


def test_a_checkpoint_with_more_in_it_loads_as_a_model(tmp_path):
    model = MambaLM(CONFIG, seed=0)
    writers = {**model_writers(model, TOKENIZER, ""), "training.bin": lambda path: path.write_bytes(b"state")}
    write_folder_atomically(tmp_path / "step-10", writers, unlisted=["README.md"])
    assert "training.bin" in verify_folder(tmp_path / "step-10").files
    (tmp_path / "step-10" / "training.bin").unlink()  # not needed to use the model
    again, _ = load_model(tmp_path / "step-10")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_the_card_may_be_edited(folder):
    (folder / "README.md").write_text("better words")
    load_model(folder)


def test_an_existing_folder_is_replaced_only_when_asked(folder):
    other = MambaLM(CONFIG, seed=1)
    with pytest.raises(UsageError, match="already exists"):
        save_model(other, folder, TOKENIZER, "")
    save_model(other, folder, TOKENIZER, "", replace=True)
    assert torch.equal(load_model(folder)[0].lm_head.weight, other.lm_head.weight)


def test_a_full_disk_is_an_error_of_the_disk_also_inside_safetensors(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = MambaLM(MambaConfig(d_model=64, n_layer=2), seed=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(ResourceError, match=r"model: cannot be written: .*File too large"):
            save_model(model, tmp_path / "model", TOKENIZER, "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def rewrite(folder, **changes):
    """Write the folder again with other files under a right manifest, as a foreign writer would."""
    kept = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors", "README.md")}
    kept |= {name.replace("_", "."): data for name, data in changes.items()}
    writers = {n: (lambda path, d=d: path.write_bytes(d)) for n, d in kept.items() if d is not None}
    write_folder_atomically(folder, writers, replace=True)


CONFIG_DAMAGE = [
    (lambda c: c.update(format=2), r"config\.json: format 2 is not known"),
    (lambda c: c.pop("format"), r"config\.json: format None is not known"),
    (lambda c: c.update(kind="sashimi"), r"config\.json: a model of kind 'sashimi'; this mambagen knows mamba-lm"),
    (lambda c: c.update(optimizer={}), r"config\.json: unknown key optimizer"),
    (lambda c: c["model"].update(dropout=0.1), r"config\.json: unknown key dropout"),
    (lambda c: c["model"].pop("d_model"), r"config\.json: d_model: Field required"),
    (lambda c: c["model"].update(d_state=0), r"config\.json: d_state: Input should be greater than or equal to 1"),
    (lambda c: c.pop("tokenizer"), r"config\.json: tokenizer: Field required"),
    (lambda c: c.update(model=[1]), r"config\.json: model: Input should be a valid dictionary"),
]


@pytest.mark.parametrize(("change", "message"), CONFIG_DAMAGE, ids=[message for _, message in CONFIG_DAMAGE])
def test_a_config_of_another_kind_or_version_is_refused(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    rewrite(folder, config_json=json.dumps(config).encode())
    with pytest.raises(ModelError, match=message):
        load_model(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\x80\x81", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(folder, text):
    rewrite(folder, config_json=text)
    with pytest.raises(ModelError, match=r"config\.json(:1)?: damaged"):
        load_model(folder)


TENSOR_DAMAGE = [
    (lambda t: t.pop("backbone.norm_f.weight"), r"tensor backbone\.norm_f\.weight is missing"),
    (
        lambda t: [t.pop(n) for n in list(t) if n.endswith("A_log")],
        r"layers\.0\.mixer\.A_log \(and 1 more\) is missing",
    ),
    (lambda t: t.update(head=torch.zeros(3)), r"tensor head is none of the model's"),
    (
        lambda t: t.update({"backbone.norm_f.weight": torch.ones(17)}),
        r"norm_f\.weight is torch\.float32 \(17,\); .*\(16,\)",
    ),
    (lambda t: t.update({"backbone.norm_f.weight": torch.ones(16).long()}), r"norm_f\.weight is torch\.int64"),
]


@pytest.mark.parametrize(("change", "message"), TENSOR_DAMAGE, ids=[message for _, message in TENSOR_DAMAGE])
def test_tensors_that_do_not_fit_the_config_are_refused(folder, tmp_path, change, message):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "changed")
    rewrite(folder, model_safetensors=(tmp_path / "changed").read_bytes())
    with pytest.raises(ModelError, match=r"model\.safetensors: the .*" + message):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, 5000, -1])
def test_truncated_weights_are_refused_with_and_without_a_right_manifest(folder, keep):
    data = (folder / "model.safetensors").read_bytes()[:keep]
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.safetensors: cut off: \d+ bytes"):
        load_model(folder)
    rewrite(folder, model_safetensors=data)
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        load_model(folder)


def test_a_flipped_bit_in_the_weights_is_found(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged or edited"):
        load_model(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"kind": "audio"}, "kind"), ({"lower_case": "drop"}, "lower_case"), ({"extra": 1}, "unknown key extra")],
)
def test_a_tokenizer_that_is_not_known_is_refused(folder, fields, message):
    config = json.loads((folder / "config.json").read_text())
    config["tokenizer"] |= fields
    rewrite(folder, config_json=json.dumps(config).encode())
    with pytest.raises(ModelError, match=rf"config\.json: tokenizer: .*{message}"):
        mambagen.load(folder)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    save_model(MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=20), seed=0), tmp_path / "model", TOKENIZER, "")
    with pytest.raises(ModelError, match="12 tokens, but a model of 20"):
        mambagen.load(tmp_path / "model")


def test_the_card_says_what_was_given_and_counts_the_parameters():
    model = MambaLM(MambaConfig(d_model=64, n_layer=8))
    card = model_card(model, "Human DNA", "hg38", "CC0", "`mambagen pretrain-dna`", "perplexity 3.2 on chr1")
    assert card.startswith("# Human DNA\n")
    for text in ("262,720 parameters", "8 layers", "## Data\nhg38", "## Licence\nCC0", "perplexity 3.2 on chr1"):
        assert text in card
    assert mambagen.__version__ in card


def test_importing_the_package_and_its_sizes_does_not_import_torch():
    code = "import sys, mambagen; from mambagen.models import MAMBA_SIZES; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
