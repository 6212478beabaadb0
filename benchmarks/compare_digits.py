"""Generators of spoken digits on equal terms: Mamba U-Net, SaShiMi (S4) and WaveNet, the same clips and minutes each.

    python -m benchmarks.compare_digits --data runs/digits/prepared/real --minutes 2 --clips 512 --out runs/compare

Each row is trained for the minutes by the same loop, recipe and order of clips, makes clips at temperature 1 without
classes, and is judged by the same judge beside the same reference; rows of real training and test digits stand beside.
OUT/rows.json keeps what is done, and OUT/NAME what was done of a row: its run (a training that was stopped goes on),
trained.json, the clips. So the same command goes on where it stopped, and nothing is done twice (`--only NAME` runs one
row). Each row leaves OUT/NAME/judged/report.html to listen to.

With several --lr each generator is first trained for --trial-minutes with each of them, and takes the one by which its
held-out clips are likeliest.

--data is what `pretrain-audio` takes, prepared shards included. With --real (a Speech Commands folder, a table of
clips, or `sc09`) the reference is made of it, and the likelihood is also taken of its test clips.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import nn

from benchmarks.common import print_table, write_json
from benchmarks.wavenet import WaveNet
from mambagen.data.audio_files import resample
from mambagen.data.quantise import Quantiser
from mambagen.data.spoken_words import DIGITS, RATE
from mambagen.models.files import Writer, list_checkpoints
from mambagen.models.saving import WEIGHTS, read_tensors, write_tensors
from mambagen.pipelines.audio_language_model import AudioTask
from mambagen.pipelines.eval_sc09 import eval_sc09
from mambagen.pipelines.model_cards import ModelCard
from mambagen.pipelines.pretrain_audio import (
    PretrainAudioConfig,
    pretrain_audio,
    read_audio_data,
    resolved,
    resume_pretrain_audio,
    with_recipe,
)
from mambagen.pipelines.sc09_data import read_words
from mambagen.pipelines.sc09_generation import Generator, Made, Sampling
from mambagen.pipelines.sc09_report import own_rows, with_interval
from mambagen.pipelines.sc09_results import EvalSc09Config
from mambagen.training.checkpoint import newest_checkpoint
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
    """What a row's training left, as it stands in trained.json."""

    checkpoint: str
    loss: float | None  # nats a sample, of the held-out clips of the training data
    steps: int
    seconds: float


class WaveNetTask(AudioTask):
    """The same job; a WaveNet is no kind of model that the package knows, so its checkpoints hold weights alone."""

    def model_files(self, model: nn.Module) -> dict[str, Writer]:
        return {WEIGHTS: lambda path: write_tensors(path, model.state_dict())}


class WaveNetGenerator(Generator):
    """Likelihoods as of any model, clips by the WaveNet's own steps."""

    def __init__(self, model: WaveNet, quantiser: Quantiser, device: torch.device) -> None:
        self.model = self.wavenet = model.eval()  # type: ignore[assignment]
        self.quantiser, self.device = quantiser, device
        self.digits, self.conditional = [], False
        self.parameters = sum(p.numel() for p in model.parameters())

    def make(self, count: int, seed: int, sampling: Sampling, done: Callable[[int], None] | None = None) -> Made:
        """Clips at temperature 1, all at once."""
        began = time.monotonic()
        tokens = self.wavenet.generate(count, self.quantiser.rate, seed).cpu().numpy()
        seconds = time.monotonic() - began
        nats = self.log_likelihoods(tokens, np.full(count, tokens.shape[1]), None) / tokens.shape[1]
        samples = np.stack([resample(self.quantiser.decode(row), self.quantiser.rate, RATE) for row in tokens])
        return Made(samples, np.full(count, -1), nats, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--real")
    parser.add_argument("--minutes", type=float, default=2.0, help="of training, each")
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--n-layer", type=int, default=8, help="of the U-Nets, a stage")
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3])
    parser.add_argument(
        "--trial-minutes", type=float, default=0.25, help="of each learning rate, where there are several"
    )
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
    """The rows of real data and that of a model: trained, asked, judged; what is there already is not done again."""
    place = arguments.out / name
    place.mkdir(parents=True, exist_ok=True)
    settings = {
        "data": arguments.data, "labels": DIGITS, "minutes": arguments.minutes, "batch": arguments.batch,
        "n_layer": arguments.n_layer, "lr": arguments.lr, "samples": 0, **MODELS[name],
    }  # fmt: skip
    trials = {"trial_minutes": arguments.trial_minutes} if len(arguments.lr) > 1 else {}
    begun_with = json.loads(json.dumps(settings | trials))  # tuples are lists there
    if kept(place / "settings.json", lambda: begun_with) != begun_with:
        raise SystemExit(f"{place}: was begun with other settings (settings.json); give another --out, or remove it")

    def configured(lr: float, minutes: float) -> PretrainAudioConfig:
        given = {"data": tuple(arguments.data), "device": arguments.device, "lr": lr, "minutes": minutes}
        return with_recipe(None, {**settings, **given})

    with Progress() as progress:
        train_one = train_wavenet if name == "wavenet" else train_unet

        def chosen() -> dict[str, Any]:
            losses = {}
            for lr in arguments.lr:
                shutil.rmtree(place / "trial", ignore_errors=True)
                losses[lr] = train_one(configured(lr, arguments.trial_minutes), place / "trial", progress).loss
                report(name, f"learning rate {lr:g}: {losses[lr]} nats a sample")
            shutil.rmtree(place / "trial")
            return {"lr": min(losses, key=lambda lr: losses[lr] or math.inf), "losses": list(losses.values())}

        lr = kept(place / "lr.json", chosen)["lr"] if trials else arguments.lr[0]
        config = configured(lr, arguments.minutes)
        trained = Trained(**kept(place / "trained.json", lambda: asdict(train_one(config, place / "run", progress))))
        report(name, f"{trained.steps:,} steps in {trained.seconds:.0f} s")
        generator = open_generator(name, Path(trained.checkpoint), config, progress)
    clips = place / "clips"
    if len(list(clips.glob("*.wav"))) != arguments.clips:
        (place / "made.json").unlink(missing_ok=True)
    seconds = kept(place / "made.json", lambda: {"seconds": make_clips(generator, arguments.clips, clips)})["seconds"]
    report(name, f"{arguments.clips} clips in {seconds:.1f} s")
    nll = None
    if arguments.real:
        words = read_words(arguments.real)
        nll = with_interval(generator.likelihood(words.select(words.where(split="test", labels=DIGITS))).interval, 3)
    shutil.rmtree(place / "judged", ignore_errors=True)  # of a judgement that was stopped
    judged = eval_sc09(
        EvalSc09Config(samples=str(clips), data=arguments.real, judge=arguments.judge, device=arguments.device),
        place / "judged",
    )
    ours, *real = own_rows(judged)

    def row(cells: list[str], **facts: Any) -> dict[str, Any]:
        figures = dict(zip(("FID", "IS", "mIS", "AM"), cells[3:], strict=True))
        names = ("parameters", "lr", "steps", "minutes", "valid NLL", "test NLL", "s to make", "clips/s")
        return {"clips of": cells[0], **{k: facts.get(k) for k in names}, "N": cells[1], **figures}

    ours[0] = name
    return [row(cells) for cells in real], row(
        ours,
        parameters=generator.parameters,
        lr=lr,
        steps=trained.steps,
        minutes=round(trained.seconds / 60, 2),
        **{
            "valid NLL": trained.loss,
            "test NLL": nll,
            "s to make": round(seconds, 1),
            "clips/s": arguments.clips / seconds,
        },
    )


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file holds; where there is none it is made first."""
    if not file.exists():
        text = json.dumps(make(), indent=1)
        partial = file.with_suffix(".part")
        partial.write_text(text, "utf-8")
        partial.replace(file)
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def report(name: str, text: str) -> None:
    print(f"{name}: {text}", file=sys.stderr, flush=True)


def train_unet(config: PretrainAudioConfig, run: Path, progress: Progress) -> Trained:
    """A U-Net by `pretrain-audio`, from where it stopped; the weights at the end of the budget."""
    if list_checkpoints(run / "checkpoints"):
        again = {"data": config.data, "device": config.device}
        result = resume_pretrain_audio(run, again, None, progress)
    else:
        shutil.rmtree(run, ignore_errors=True)  # stopped before it had begun
        result = pretrain_audio(config, run, progress)
    return Trained(str(result.checkpoint), result.loss, result.steps, result.seconds)


def train_wavenet(config: PretrainAudioConfig, place: Path, progress: Progress) -> Trained:
    """A WaveNet by the same loop, on the same batches, from where it stopped."""
    config = resolved(config)
    shards, quantiser = read_audio_data(config, progress)
    run = RunFolder.create(place)
    card = ModelCard("WaveNet", "", "")
    task = WaveNetTask(
        shards, quantiser, config.lengths, config.rows(), config.seed, {}, card, valid_samples=config.valid_samples
    )
    model = WaveNet(seed=config.seed)
    before = newest_checkpoint(run.checkpoints) if list_checkpoints(run.checkpoints) else None
    if before:
        model.load_state_dict(read_tensors(before.path / WEIGHTS))
    result = train(model, task, config, run, before, progress)
    return Trained(str(result.checkpoint), result.held_out.get("loss"), result.position.step, result.position.seconds)


def open_generator(name: str, checkpoint: Path, config: PretrainAudioConfig, progress: Progress) -> Generator:
    """The model of a checkpoint."""
    device = choose_device(config.device)
    if name != "wavenet":
        return Generator(checkpoint, device)
    _, quantiser = read_audio_data(resolved(config), progress)
    model = WaveNet()
    model.load_state_dict(read_tensors(checkpoint / WEIGHTS))
    return WaveNetGenerator(model.to(device), quantiser, device)


def make_clips(generator: Generator, count: int, folder: Path) -> float:
    """Write clips as WAV files; the seconds that making them took."""
    made = generator.make(count, 0, Sampling())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, clip in enumerate(np.clip(made.samples, -1, 1)):
        soundfile.write(folder / f"{number:05d}.wav", clip, RATE, subtype="PCM_16")
    return made.seconds


if __name__ == "__main__":
    main()
