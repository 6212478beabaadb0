"""Models that come with the package are found by name, folders by path."""

from pathlib import Path

import pytest

import mambagen
from mambagen.errors import ModelError
from mambagen.models.builtin import WEIGHTS_HOME, builtin_models, find_model


def test_the_judge_is_built_in() -> None:
    assert "digit-judge" in builtin_models()
    assert find_model("digit-judge") == WEIGHTS_HOME / "digit-judge"


def test_a_folder_of_that_name_counts_where_it_holds_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digit-judge").mkdir()  # somebody's sounds
    assert find_model("digit-judge") == WEIGHTS_HOME / "digit-judge"
    Path("digit-judge/config.json").write_text("{}")
    assert find_model("digit-judge") == Path("digit-judge")


def test_the_folder_of_a_run_stands_for_its_model(tmp_path: Path) -> None:
    for name in ("step-00000009", "step-00000010", "damaged-step-00000011", ".step-00000012.partial-ab"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert find_model(tmp_path) == tmp_path / "checkpoints/step-00000010"
    (tmp_path / "model").mkdir()  # the best, of the jobs that keep it
    assert find_model(tmp_path) == tmp_path / "model"
    assert find_model(tmp_path / "checkpoints") == tmp_path / "checkpoints"  # in which no manifest will be found


def test_what_is_not_there_is_an_error_that_names_what_is(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no such model folder.*digit-judge"):
        find_model(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="is a file"):
        find_model(tmp_path / "file")


def test_the_judge_is_opened_by_its_own_class() -> None:
    with pytest.raises(ModelError, match="DigitJudge"):
        mambagen.load("digit-judge")


def test_the_built_in_species_tell_the_embedded_human_pieces() -> None:
    from mambagen.data_manifests import resolve_dna
    from mambagen.pipelines.classify_species import SpeciesReader

    human = [path for path in resolve_dna(("demo",)) if "hg38" in str(path)]
    rows = list(SpeciesReader("species").files(human))
    assert [row.species for row in rows] == ["human", "human"]
    assert rows[0].probability is not None
    assert rows[0].probability > 0.99
