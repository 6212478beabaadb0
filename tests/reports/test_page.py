"""Report pages: escaped, self-contained, whole or not there."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mambagen.errors import ResourceError
from mambagen.reports.page import Page, spectrogram

RATE = 16_000


def tone(hertz: float, seconds: float = 0.5) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def test_all_text_is_escaped() -> None:
    page = Page("<script>alert(1)</script>", lead="a & b")
    page.heading("<h>")
    page.text("1 < 2")
    page.code("x > y")
    page.table(["<c>"], [["<d>"]], caption="<e>")
    page.audio(tone(440), RATE, '"><script>', figures=False)
    html = page.html()
    assert "<script" not in html
    for text in ("&lt;h&gt;", "1 &lt; 2", "x &gt; y", "&lt;c&gt;", "&lt;d&gt;", "&lt;e&gt;", "a &amp; b"):
        assert text in html


def test_nothing_is_loaded_from_anywhere() -> None:
    from matplotlib.figure import Figure

    page = Page("report")
    figure = Figure()
    figure.subplots().plot([1, 2, 3])
    page.figure(figure, "a line")
    page.audio(tone(440), RATE, "a tone")
    sources = re.findall(r'(?:src|href)="([^"]*)"', page.html())
    assert len(sources) == 3
    assert all(source.startswith("data:") for source in sources)


def test_a_player_holds_the_samples() -> None:
    page = Page("report")
    page.audio(tone(440), RATE, "a tone", figures=False)
    (sound,) = re.findall(r"data:audio/flac;base64,([A-Za-z0-9+/=]+)", page.html())
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(sound)), dtype="float32")
    assert rate == RATE
    np.testing.assert_allclose(samples, tone(440), atol=1 / 32768)


def test_clips_that_follow_each_other_stand_in_one_grid() -> None:
    page = Page("report")
    for word in ("one", "two"):
        page.audio(tone(440, 0.05), RATE, word, figures=False)
    page.text("between")
    page.audio(tone(440, 0.05), RATE, "three", figures=False)
    assert page.html().count('class="clips"') == 2
    assert page.html().count("<audio") == 3


def test_columns_of_numbers_are_set_to_the_right_and_rows_must_fit() -> None:
    page = Page("report")
    page.table(["model", "loss"], [["mamba", "1.85"], ["wavenet", "-"]])
    assert page.html().count('class="number"') == 3
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2 columns"):
        page.table(["a", "b"], [["1"]])


def test_a_spectrogram_peaks_where_the_tone_is() -> None:
    power = spectrogram(tone(3000), RATE)
    assert power.shape[0] == 257
    assert power.max() == 0.0
    assert abs(power.mean(1).argmax() * RATE / 512 - 3000) < 32


@pytest.mark.parametrize("frames", [0, 1, 100])
def test_short_and_silent_clips_have_pictures(frames: int) -> None:
    page = Page("report")
    page.audio(np.zeros(frames, np.float32), RATE, "silence")
    assert "image/png" in page.html()


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(ResourceError, match="cannot write the report"):
        Page("report").write(tmp_path / "file" / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_same_page_is_the_same_bytes(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    for name in ("a.html", "b.html"):
        page = Page("report")
        figure = Figure()
        figure.subplots().plot([1, 2, 3])
        page.figure(figure, "a line")
        page.write(tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
