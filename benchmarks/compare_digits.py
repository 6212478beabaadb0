"""Generators of spoken digits on equal terms: Mamba U-Net, SaShiMi (S4) and WaveNet, the same clips and minutes each.

    python -m benchmarks.compare_digits --data runs/digits/prepared/real --minutes 2 --clips 512 --out runs/compare

Each row is trained for the minutes by the same loop, recipe and order of clips, makes clips at temperature 1 without
classes, and is judged by the same judge beside the same reference; rows of real training and test digits stand beside.
OUT/rows.json keeps what is done: a row that is there is not run again, so the same command goes on where it stopped
(`--only NAME` runs one). Each row leaves OUT/NAME/judged/report.html to listen to.

--data is what `pretrain-audio` takes, prepared shards included. With --real (a Speech Commands folder, a table of
clips, or `sc09`) the reference is made of it, and the likelihood is also taken of its test clips.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import nn

from benchmarks.common import print_table, write_json
from benchmarks.wavenet import WaveNet
from mambagen.data.quantise import Quantiser
from mambagen.data.spoken_words import DIGITS
from mambagen.models.files import Writer
from mambagen.models.saving import write_tensors
from mambagen.pipelines.audio_language_model import AudioTask
from mambagen.pipelines.eval_sc09 import eval_sc09
from mambagen.pipelines.model_cards import ModelCard
from mambagen.pipelines.pretrain_audio import (
    PretrainAudioConfig,
    pretrain_audio,
    read_audio_data,
    resolved,
    with_recipe,
)
from mambagen.pipelines.sc09_data import read_words
from mambagen.pipelines.sc09_generation import Generator, Sampling
from mambagen.pipelines.sc09_report import own_rows
from mambagen.pipelines.sc09_results import EvalSc09Config
from mambagen.training.loop import choose_device, train
from mambagen.training.progress import Progress
from mambagen.training.run_folder import RunFolder

MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"outer": "mamba", "centre": "mamba"},
    "sashimi": {"outer": "s4+mlp", "centre": "s4+mlp"},
    "wavenet": {},
}


@dataclass(frozen=True)
class Trained:
    """What a row's training left."""

    generator: Generator
    loss: float | None  # nats a sample, of the held-out clips of the training data
    steps: int
    seconds: float


class WaveNetTask(AudioTask):
    """The same job; a WaveNet is no kind of model that the package knows, so its checkpoints hold weights alone."""

    def model_files(self, model: nn.Module) -> dict[str, Writer]:
        return {"model.safetensors": lambda path: write_tensors(path, model.state_dict())}


class WaveNetGenerator(Generator):
    """Likelihoods as of any model, clips by the WaveNet's own steps."""

    def __init__(self, model: WaveNet, quantiser: Quantiser, device: torch.device) -> None:
        self.model = model.eval()  # type: ignore[assignment]
        self.quantiser, self.device = quantiser, device
        self.digits, self.conditional = [], False
        self.parameters = sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--real")
    parser.add_argument("--minutes", type=float, default=2.0, help="of training, each")
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--n-layer", type=int, default=8, help="of the U-Nets, a stage")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--judge", default="digit-judge")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", choices=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("runs/compare-digits"))
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "rows.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))["rows"] if file.exists() else []
    for name in [arguments.only] if arguments.only else MODELS:
        if all(row["clips of"] != name for row in rows):
            real, row = measure(arguments, name)
            rows = [*(r for r in rows if r["clips of"] in MODELS), row, *real]
            write_json(file, f"spoken digits, {arguments.minutes:g} minutes of training each", rows)
    print_table(rows)


def measure(arguments: argparse.Namespace, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of real data and that of a model, trained, asked and judged."""
    place = arguments.out / name
    settings = {
        "data": tuple(arguments.data), "labels": DIGITS, "minutes": arguments.minutes, "batch": arguments.batch,
        "n_layer": arguments.n_layer, "lr": arguments.lr, "device": arguments.device, "samples": 0, **MODELS[name],
    }  # fmt: skip
    config = with_recipe(None, settings)
    with Progress() as progress:
        trained = train_wavenet(config, place, progress) if name == "wavenet" else train_unet(config, place, progress)
    nll = None
    if arguments.real:
        words = read_words(arguments.real)
        nll = trained.generator.likelihood(words.select(words.where(split="test", labels=DIGITS))).nats
    seconds = make_clips(trained.generator, arguments.clips, place / "clips")
    judged = eval_sc09(
        EvalSc09Config(
            samples=str(place / "clips"), data=arguments.real, judge=arguments.judge, device=arguments.device
        ),
        place / "judged",
    )
    ours, *real = own_rows(judged)

    def row(cells: list[str], **facts: Any) -> dict[str, Any]:
        figures = dict(zip(("FID", "IS", "mIS", "AM"), cells[3:], strict=True))
        names = ("parameters", "steps", "minutes", "valid NLL", "test NLL", "clips/s")
        return {"clips of": cells[0], **{k: facts.get(k) for k in names}, "N": cells[1], **figures}

    ours[0] = name
    return [row(cells) for cells in real], row(
        ours,
        parameters=trained.generator.parameters,
        steps=trained.steps,
        minutes=round(trained.seconds / 60, 2),
        **{"valid NLL": trained.loss, "test NLL": nll, "clips/s": arguments.clips / seconds},
    )


def train_unet(config: PretrainAudioConfig, place: Path, progress: Progress) -> Trained:
    """A U-Net by `pretrain-audio`; the weights at the end of the budget."""
    result = pretrain_audio(config, place / "run", progress)
    generator = Generator(result.checkpoint, choose_device(config.device))
    return Trained(generator, result.loss, result.steps, result.seconds)


def train_wavenet(config: PretrainAudioConfig, place: Path, progress: Progress) -> Trained:
    """A WaveNet by the same loop, on the same batches."""
    config = resolved(config)
    shards, quantiser = read_audio_data(config, progress)
    run = RunFolder.create(place / "run")
    card = ModelCard("WaveNet", "", "")
    task = WaveNetTask(
        shards, quantiser, config.lengths, config.rows(), config.seed, {}, card, valid_samples=config.valid_samples
    )
    model = WaveNet(seed=config.seed)
    result = train(model, task, config, run, progress=progress)
    generator = WaveNetGenerator(model, quantiser, choose_device(config.device))
    return Trained(generator, result.held_out.get("loss"), result.position.step, result.position.seconds)


def make_clips(generator: Generator, count: int, folder: Path) -> float:
    """Write clips as WAV files; the seconds that making them took."""
    import time

    rate = generator.quantiser.rate
    began = time.monotonic()
    if isinstance(generator.model, WaveNet):
        clips = generator.quantiser.decode(generator.model.generate(count, rate).cpu().numpy())
    else:
        clips = generator.make(count, 0, Sampling()).samples
    seconds = time.monotonic() - began
    folder.mkdir(parents=True, exist_ok=True)
    for number, clip in enumerate(np.clip(clips, -1, 1)):
        soundfile.write(folder / f"{number:05d}.wav", clip, rate, subtype="PCM_16")
    return seconds


if __name__ == "__main__":
    main()
