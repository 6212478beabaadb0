"""benchmarks.encoders keeps what it has measured when it is stopped, and its figure needs no GPU."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import encoders

SYSTEM = {"systems": 256, "batch": 128, "length": 1024, "ours ms": 1.0}
ROWS = [
    {"encoder": name, "length": length, "forward Mtok/s": 4.0, "train Mtok/s": speed, "train GB": 12.0}
    for name, speed in (("bigs", 1.0), ("bert", None))
    for length in (128, 256)
]


def test_rows_measured_before_a_stop_are_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "encoders.json"

    def stopped(*_: Any) -> Iterator[dict[str, Any]]:
        assert json.loads(out.read_text())["rows"] == [SYSTEM]  # the S4D part comes first
        yield ROWS[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(encoders, "s4d_rows", lambda tokens: iter([SYSTEM]))
    monkeypatch.setattr(encoders, "encoder_rows", stopped)
    monkeypatch.setattr("sys.argv", ["encoders", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        encoders.main()
    kept = json.loads(out.read_text())
    assert kept["gpu"] == "a GPU"
    assert kept["rows"] == [SYSTEM, ROWS[0]]


def test_the_figure_is_drawn_also_where_memory_did_not_suffice(tmp_path: Path) -> None:
    encoders.draw(ROWS, str(tmp_path / "lengths.png"), "a GPU")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_runs_before_are_drawn_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(encoders, "draw", lambda rows, path, device: drawn.append((rows, path, device)))
    files = []
    for i, rows in enumerate(([SYSTEM, *ROWS[:2]], ROWS[2:])):
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps({"gpu": "a GPU", "rows": rows}))
    monkeypatch.setattr("sys.argv", ["encoders", "--rows", *map(str, files), "--figure", "x.png"])
    encoders.main()
    assert drawn == [(ROWS, "x.png", "a GPU")]
