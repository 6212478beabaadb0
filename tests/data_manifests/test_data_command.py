"""`mambagen data`, as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_manifests.server import Behaviour, serving


def mambagen(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mambagen.cli", "data", *arguments],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        stdin=subprocess.DEVNULL,
        check=False,
    )


def rows(output: str) -> list[dict[str, str]]:
    header, *lines = [line.split("\t") for line in output.splitlines()]
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_list_is_a_table_or_json_on_stdout() -> None:
    table = mambagen("list")
    assert (table.returncode, table.stderr) == (0, "")
    states = {row["name"]: row["state"] for row in rows(table.stdout)}
    assert states.pop("demo") == "embedded"
    assert "hg38" in states
    assert set(states.values()) == {"not fetched"}
    listed = json.loads(mambagen("list", "--json").stdout)
    assert [str(row["title"]) for row in listed] == [row["title"] for row in rows(table.stdout)]


def test_show_tells_origin_licence_and_splits() -> None:
    shown = mambagen("show", "demo").stdout
    for text in (
        "NC_000932.1",
        "chr13:75549820-75605809",
        "Biopython License",
        "split\tNC_000932.1\t60000\t75000\tvalid",
    ):
        assert text in shown
    as_json = json.loads(mambagen("show", "hg38", "--json").stdout)
    assert as_json["files"][0]["sha256"] == "unknown: pin at first fetch"
    assert as_json["files"][0]["here"] is False


def test_verify_of_the_demo_is_a_table_of_good_files() -> None:
    run = mambagen("verify", "demo")
    assert run.returncode == 0
    assert [row["state"] for row in rows(run.stdout)] == ["ok"] * 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("show", "demmo"), 2, "did you mean demo?"),
        (("verify", "hg38"), 5, "run: mambagen data fetch hg38"),
        (("show", "none.toml"), 3, "none.toml: the manifest cannot be read"),
        (("fetch",), 2, "Missing argument"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(arguments: tuple[str, ...], code: int, message: str) -> None:
    run = mambagen(*arguments)
    assert run.returncode == code
    assert run.stderr.startswith("mambagen: error: ")
    assert run.stderr.count("\n") == 1
    assert message in run.stderr


def test_several_are_fetched_and_the_bad_one_is_named_at_the_end(tmp_path: Path) -> None:
    with serving({"/good.fa": Behaviour(b">x\nACGT\n")}) as server:
        paths = []
        for name in ("bad", "good"):
            paths.append(tmp_path / f"{name}.toml")
            paths[-1].write_text(
                f'name="{name}"\ntitle="t"\nkind="dna"\nlicence="none"\nprovenance="here"\n[[files]]\nname="x.fa"\n'
                f'urls=["{server}/{name}.fa"]\nsha256="unknown: pin at first fetch"\nrole="sequence"\n'
            )
        run = mambagen("fetch", *map(str, paths))
        again = mambagen("verify", "--json", str(paths[1]))
    assert run.returncode == 5
    assert [(row["name"], row["state"]) for row in rows(run.stdout)] == [("good", "ok")]
    assert Path(rows(run.stdout)[0]["path"]).read_bytes() == b">x\nACGT\n"
    assert run.stderr.count("\n") == 1  # no progress where stderr is no terminal
    assert "/bad.fa: HTTP 404" in run.stderr
    assert json.loads(again.stdout)[0]["state"] == "ok"
