"""What a run of audio training lets one see and hear: clips made on the way, and a page with them and the figures."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mambagen.data.audio_files import read_audio
from mambagen.data.quantise import Quantiser
from mambagen.data.wav import to_int16, write_wav
from mambagen.errors import InputError
from mambagen.models.audio_stepper import Stepper
from mambagen.models.audio_unet import AudioUNet
from mambagen.pipelines.audio_language_model import BITS
from mambagen.reports.loss_plot import HELD_OUT, TRAINING, draw_loss, smoothed
from mambagen.reports.page import Page
from mambagen.training.progress import Progress
from mambagen.training.run_folder import RunFolder, read_metrics

log = logging.getLogger("mambagen")

EAGER_SAMPLES = 4000  # of each clip at most, where a model cannot be stepped by a compiled loop: 111 samples/s
LOOKS_HEARD = 4  # of the looks on the way, evenly spread, are in the report; the last one with all its clips


class RunSamples:
    """Makes clips after each look at held-out data, in SAMPLES/look-01/0.wav and so on."""

    def __init__(
        self,
        folder: Path,
        quantiser: Quantiser,
        count: int,
        seconds: float,
        looks: int,
        seed: int,
        progress: Progress,
    ) -> None:
        """`looks` were made before (the run goes on)."""
        self.folder, self.quantiser, self.count, self.seconds = folder, quantiser, count, seconds
        self.looks, self._seed, self._progress = looks, seed, progress

    def evaluated(self, model: AudioUNet, quick: bool) -> None:
        """Make the clips of this look; without a compiled loop only at the end, and short ones."""
        self.looks += 1
        if not self.count:
            return
        stepper = Stepper(model, self.count)
        steps = max(1, round(self.seconds * self.quantiser.rate))
        if stepper.backend in ("eager", "reference"):
            if quick:
                return
            steps = min(steps, EAGER_SAMPLES)
        self._progress.state("making samples to be heard ...")
        classes = self.classes()
        if classes is not None:
            stepper.prefill(classes=classes)
        made = stepper.generate(steps, seeds=[self._seed + i for i in range(self.count)]).cpu().numpy()
        place = self.folder / f"look-{self.looks:02d}"
        place.mkdir(parents=True, exist_ok=True)
        for i, tokens in enumerate(made):
            write_wav(place / f"{i}.wav", to_int16(self.quantiser.decode(tokens)), self.quantiser.rate)

    def classes(self) -> torch.Tensor | None:
        """The class of each clip, in turn."""
        names = self.quantiser.classes
        return torch.arange(self.count) % len(names) if names else None

    def caption(self, i: int) -> str:
        """What a clip was meant to be."""
        names = self.quantiser.classes
        return f"{names[i % len(names)]}" if names else f"clip {i + 1}"


def write_run_report(
    run: RunFolder,
    settings: Mapping[str, str],
    best: Mapping[str, float],
    baselines: Mapping[int, float],
    quantiser: Quantiser,
    samples: RunSamples,
    warning: str | None = None,
) -> Path:
    """RUN/report.html and RUN/loss.png out of what the run has left so far.

    `best` holds a name and the loss of the best model on all held-out samples, where the last one may be worse.
    """
    rows = read_metrics(run.metrics_file)
    looks = [row for row in rows if "valid_loss" in row]
    title = f"Audio run {run.path.name}"
    names = {f"order-{order} chain": loss for order, loss in baselines.items()}
    draw_loss(run.loss_plot, rows, names, f"{settings['model']}", unit="sample")
    page = Page(title, _lead(looks))
    if warning:
        page.text(f"Warning: {warning}.")
    page.heading("Held-out sound")
    figures = [("the model", looks[-1]["valid_loss"])] if looks else []
    figures += [*best.items()]
    figures += [(f"Markov chain of order {order} over bytes", loss) for order, loss in baselines.items()]
    figures += [("uniform", float(np.log(quantiser.levels)))]
    page.table(
        ["", "nats a sample", "bits a byte"], [(name, f"{loss:.4f}", f"{loss * BITS:.4f}") for name, loss in figures]
    )
    if any(row.get("loss") is not None for row in rows):
        page.figure(_loss_figure(rows, looks), "Loss in bits a byte over the samples seen in training")
    heard = _heard(samples)
    if heard:
        page.heading("Samples")
        for look in heard:
            after = f" after step {looks[look - 1]['step']:,}" if look <= len(looks) else ""
            page.text(f"Look {look}{after}")
            for file in sorted((samples.folder / f"look-{look:02d}").glob("*.wav"), key=lambda file: int(file.stem)):
                try:
                    clip = read_audio(file, None)
                except InputError:  # half written by a process that was killed
                    continue
                page.audio(clip.samples, clip.rate, samples.caption(int(file.stem)))
    page.heading("Settings")
    page.table(["", ""], list(settings.items()), number_columns=())
    page.code(run.config_file.read_text("utf-8"))
    target = run.path / "report.html"
    page.write(target)
    return target


def _lead(looks: Sequence[Mapping[str, Any]]) -> str:
    if not looks:
        return "Nothing was measured on held-out sound yet."
    loss, step = looks[-1]["valid_loss"], looks[-1]["step"]
    return f"{loss:.4f} nats a sample ({loss * BITS:.4f} bits a byte) on held-out sound after {step:,} steps."


def _heard(samples: RunSamples) -> list[int]:
    """Looks whose clips the report plays: some on the way, and the last."""
    made = [look for look in range(1, samples.looks + 1) if (samples.folder / f"look-{look:02d}").is_dir()]
    if len(made) <= LOOKS_HEARD:
        return made
    places = np.linspace(0, len(made) - 1, LOOKS_HEARD).round().astype(int)
    return [made[place] for place in places]


def _loss_figure(rows: Sequence[Mapping[str, Any]], looks: Sequence[Mapping[str, Any]]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    steps = [row for row in rows if row.get("loss") is not None]
    at = {row["step"]: row["tokens"] for row in rows if "tokens" in row}
    thin = max(1, len(steps) // 2000)  # a vector picture of every step would be megabytes
    seen = np.array([row["tokens"] for row in steps], dtype=float)
    bits = smoothed(np.array([row["loss"] for row in steps], dtype=float)) * BITS
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(seen[::thin], bits[::thin], color=TRAINING, linewidth=1.4, label="training (smoothed)")
    held = [row for row in looks if row["step"] in at]
    if held:
        axes.plot(
            [at[row["step"]] for row in held],
            [row["valid_loss"] * BITS for row in held],
            color=HELD_OUT, marker="o", markersize=4, linewidth=1.4, label="held out",
        )  # fmt: skip
    top = float(np.quantile(bits, 0.98))
    if held:  # a rise is seen, as far as what knows nothing
        top = max(top, min(max(row["valid_loss"] for row in held) * BITS, np.log2(256)))
    low = min([float(bits.min()), *(row["valid_loss"] * BITS for row in held)])
    axes.set_ylim(0.95 * low, 1.05 * top)
    axes.set_xlabel("samples seen in training")
    axes.set_ylabel("bits a byte")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.legend(frameon=False, fontsize=8)
    return figure
