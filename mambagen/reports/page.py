"""A report as one HTML file: text, tables, figures and sounds, with nothing to load from anywhere.

page = Page("Spoken digits", lead="What the model says when asked.")
page.table(["metric", "value"], [["FID", "1.32"]], caption="64 samples")
page.audio(samples, 16_000, "seven")
page.write("report.html")
"""

import base64
import contextlib
import io
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mambagen import __version__
from mambagen.errors import ResourceError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPECTROGRAM_RANGE = 80.0  # dB under the loudest
CLIP_HEIGHT = 1.1  # inches of the pictures beside a player

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --text: #1b1f24; --soft: #5b6570; --line: #d5dae0; --back: #ffffff; --raised: #f5f7f9 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ec; --soft: #9aa5b1; --line: #39424c; --back: #14181d; --raised: #1d2329 }
  .picture { background: #ffffff; border-radius: 4px }
}
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; color: var(--text); background: var(--back);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.75rem; margin: 0 0 .25rem } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem }
.lead { color: var(--soft); font-size: 1.1rem; margin: 0 0 1.5rem } p { max-width: 46rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .75rem 0 }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 600 } .number { text-align: right }
caption, figcaption { color: var(--soft); font-size: .9rem; text-align: left; caption-side: bottom; padding-top: .35rem }
figure { margin: 1rem 0 } .picture { max-width: 100%; height: auto; display: block }
pre { background: var(--raised); padding: .8rem 1rem; overflow-x: auto; border-radius: 4px; font-size: .875rem }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem }
.clip { background: var(--raised); border-radius: 4px; padding: .6rem; margin: 0 } .clip audio, .clip .picture { width: 100% }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if lead %}<p class="lead">{{ lead }}</p>{% endif %}
{% for part in parts %}{% if part.kind == "heading" %}<h2>{{ part.text }}</h2>
{% elif part.kind == "text" %}<p>{{ part.text }}</p>
{% elif part.kind == "code" %}<pre><code>{{ part.text }}</code></pre>
{% elif part.kind == "table" %}<div class="wide"><table>{% if part.caption %}<caption>{{ part.caption }}</caption>{% endif %}
<thead><tr>{% for name in part.columns %}<th{% if loop.index0 in part.numbers %} class="number"{% endif %} scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in part.rows %}<tr>{% for cell in row %}<td{% if loop.index0 in part.numbers %} class="number"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% elif part.kind == "figure" %}<figure><img class="picture" alt="{{ part.caption }}" src="{{ part.source }}"><figcaption>{{ part.caption }}</figcaption></figure>
{% elif part.kind == "clips" %}<div class="clips">{% for clip in part.clips %}<figure class="clip">{% if clip.picture %}<img class="picture" alt="waveform and spectrogram of {{ clip.caption }}" src="{{ clip.picture }}">{% endif %}
<audio controls preload="metadata" src="{{ clip.sound }}"></audio><figcaption>{{ clip.caption }}</figcaption></figure>
{% endfor %}</div>
{% endif %}{% endfor %}<footer>mambagen {{ version }}</footer>
</body>
</html>
"""  # noqa: E501 (the lines of a page)


class Page:
    """A page that is built from top to bottom; all text is escaped."""

    def __init__(self, title: str, lead: str = "") -> None:
        self.title, self.lead = title, lead
        self._parts: list[dict[str, object]] = []

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append({"kind": "heading", "text": text})

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append({"kind": "text", "text": text})

    def code(self, text: str) -> None:
        """Commands or other text whose lines and blanks matter."""
        self._parts.append({"kind": "code", "text": text})

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[object]],
        caption: str = "",
        number_columns: Iterable[int] | None = None,
    ) -> None:
        """A table; cells are shown as `str` has them.

        Args:
            number_columns: which columns are set to the right; by default those in which every cell begins as a number.
        """
        cells = [[str(cell) for cell in row] for row in rows]
        for row in cells:
            if len(row) != len(columns):
                raise ValueError(f"a row of {len(row)} cells in a table of {len(columns)} columns: {row}")
        if number_columns is None:
            number_columns = [
                i for i in range(len(columns)) if cells and all(_NUMBER.match(row[i]) or not row[i] for row in cells)
            ]
        self._parts.append(
            {"kind": "table", "columns": columns, "rows": cells, "caption": caption, "numbers": set(number_columns)}
        )

    def figure(self, figure: "Figure", caption: str) -> None:
        """A matplotlib figure as vector graphics; it is closed."""
        self._parts.append({"kind": "figure", "source": _svg(figure), "caption": caption})

    def audio(self, samples: NDArray[np.float32], rate: int, caption: str, figures: bool = True) -> None:
        """A player; clips that follow each other stand side by side.

        Args:
            samples: (frames,), between -1 and 1.
            rate: frames a second.
            figures: with waveform and spectrogram.
        """
        clip = {
            "caption": caption,
            "sound": _data_url("audio/flac", _flac(samples, rate)),
            "picture": _clip_picture(samples, rate) if figures else "",
        }
        last = self._parts[-1] if self._parts else {}
        if last.get("kind") == "clips":
            last["clips"].append(clip)  # type: ignore[attr-defined]
        else:
            self._parts.append({"kind": "clips", "clips": [clip]})

    def html(self) -> str:
        """The page as text."""
        import jinja2

        template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE)
        return template.render(title=self.title, lead=self.lead, parts=self._parts, version=__version__)

    def write(self, path: Path | str) -> None:
        """Write the page, whole or not at all; ResourceError where it cannot be written."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(self.html(), encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise ResourceError(f"{path}: cannot write the report: {error.strerror or error}") from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


_NUMBER = re.compile(r"[-+−]?(\d|\.\d|-$|nan$)")


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _svg(figure: "Figure") -> str:
    """Of a figure; the same bytes for the same figure."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "mambagen", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    figure.clear()
    return _data_url("image/svg+xml", buffer.getvalue())


def _flac(samples: NDArray[np.float32], rate: int) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(samples, -1.0, 1.0), rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _clip_picture(samples: NDArray[np.float32], rate: int) -> str:
    """Waveform over spectrogram, as a small PNG: a spectrogram's picture is large as vectors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4, 1.8 * CLIP_HEIGHT), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    wave, spectrum = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2])
    seconds = len(samples) / rate
    columns = min(len(samples), 600)
    edges = np.linspace(0, len(samples), columns + 1).astype(int)[:-1]
    if columns:
        low, high = np.minimum.reduceat(samples, edges), np.maximum.reduceat(samples, edges)
        wave.fill_between(edges / rate, low, high, color="#4878a8", linewidth=0.6, edgecolor="#4878a8")
    loudest = 1.05 * max(float(np.abs(samples).max(initial=0.0)), 1e-3)
    wave.set_ylim(-loudest, loudest)
    wave.axis("off")
    spectrum.imshow(
        spectrogram(samples, rate),
        origin="lower", aspect="auto", cmap="magma", vmin=-SPECTROGRAM_RANGE, vmax=0.0,
        extent=(0.0, max(seconds, 1e-6), 0.0, rate / 2000),
    )  # fmt: skip
    spectrum.tick_params(labelsize=6)
    spectrum.set_ylabel("kHz", fontsize=6)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return _data_url("image/png", buffer.getvalue())


def spectrogram(samples: NDArray[np.float32], rate: int) -> NDArray[np.float64]:
    """Power in dB against the loudest, (frequencies up to rate / 2, frames): windows of 32 ms, 8 ms apart."""
    window = max(2, int(0.032 * rate))
    hop = max(1, window // 4)
    frames = 1 + max(0, len(samples) - window) // hop
    padded = np.pad(samples.astype(np.float64), (0, max(0, window - len(samples))))
    pieces = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop][:frames] * np.hanning(window)
    power = np.abs(np.fft.rfft(pieces, axis=1).T) ** 2
    return np.maximum(10 * np.log10(np.maximum(power, 1e-30) / max(power.max(), 1e-20)), -SPECTROGRAM_RANGE)
