"""Build the model `digits` that comes with the package: prepare the audio, train in parts, choose, measure, write.

    python -m benchmarks.build_digits prepare --data speech_index.csv          # needs the audio; a minute on a CPU
    python -m benchmarks.build_digits train --minutes 9 [--export DIR]         # again and again, until it says done
    python -m benchmarks.build_digits listen MODEL [--guidance 1 2 3]          # does it heed what is asked?
    python -m benchmarks.build_digits copies MODEL                             # are its clips those it was trained on?
    python -m benchmarks.build_digits finish [--last] [--judge digit-judge] [--export DIR]

Everything lies in runs/digits (--work): `prepared/` may be carried to a machine that has not the audio. Training is in
two phases, each a run of `pretrain-audio --recipe digits` with a clock of its own:

  spoken   espeak-ng's digits in many voices, and other words by people, which have no class   (--spoken-minutes)
  real     the digits of people, from the best weights of `spoken`                             (--real-minutes)

`train` goes on where it stopped, trains for at most --minutes and saves; the learning rate follows the phase's own
clock, not the parts. With --export the best model of the phase at hand, its report and its log (six files) are copied
there; a checkpoint with its optimiser stays in runs/digits. On a new machine `train --from-export DIR/spoken` begins
the phase `real` with the exported weights; `--begin MODEL` gives weights to the first phase, of a model without classes
too.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mambagen.data.audio_files import read_audio
from mambagen.data.audio_shards import AudioShards, prepare_shards
from mambagen.data.audio_sources import ClipSource, find_clips
from mambagen.data.quantise import MuLaw
from mambagen.data.spoken_words import DIGITS, SECOND
from mambagen.errors import InterruptedRun
from mambagen.models import load_model
from mambagen.models.builtin import WEIGHTS_HOME
from mambagen.models.files import list_checkpoints, write_folder_atomically
from mambagen.models.saving import CARD, Generation, model_card, model_writers, save_model
from mambagen.pipelines.audio_language_model import BITS
from mambagen.pipelines.generate_audio import AudioVoice, GenerateAudioConfig, MadeClip
from mambagen.pipelines.pretrain_audio import pretrain_audio, resume_pretrain_audio, with_recipe
from mambagen.pipelines.sc09_generation import Generator
from mambagen.pipelines.sc09_judge import DigitJudge
from mambagen.training.checkpoint import newest_checkpoint
from mambagen.training.loop import choose_device
from mambagen.training.progress import Progress
from mambagen.training.run_folder import read_metrics

WORK = Path("runs/digits")
PHASES = ("spoken", "real")
VOICES = 220  # of espeak-ng; each says the ten digits
WORDS = 900  # clips of other words by people, in the first phase
CARRIED = 60_000_000  # bytes that prepared/ may have, to travel
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
HELD_OUT_ROWS = 256  # clips of like lengths, of which the generator takes some at once
TRIMMED = 10 ** (-45 / 20)  # quieter than this at a word's ends is cut off
SURE = 0.9  # of the classifier, that it hears a digit
UNLIKE_SPEECH = ("whisper", "croak", "demonic", "robo", "zac", "announce", "klatt", "shelby", "storm", "travis")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK)
    parts = parser.add_subparsers(required=True)
    first = parts.add_parser("prepare")
    first.add_argument(
        "--data", required=True, help="a table of clips: path, start_frame, n_frames, digit, label, split"
    )
    first.add_argument("--voices", type=int, default=VOICES)
    first.set_defaults(run=prepare)
    second = parts.add_parser("train")
    second.add_argument("--minutes", type=float, default=9.0, help="of this part")
    second.add_argument("--spoken-minutes", type=float, default=8.0)
    second.add_argument("--real-minutes", type=float, default=10.0)
    second.add_argument("--device", default="auto")
    second.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the configuration, as JSON")
    second.add_argument("--begin", help="a model folder whose weights the first phase begins with")
    second.add_argument("--from-export", type=Path, help="begin the phase `real` with this model folder")
    second.add_argument("--export", type=Path)
    second.set_defaults(run=train)
    heed = parts.add_parser("listen")
    heed.add_argument("model", type=Path)
    heed.add_argument("--judge", nargs="+", default=["digit-judge"])
    heed.add_argument("--clips", type=int, default=300)
    heed.add_argument("--held-out", type=int, default=300, help="clips whose likelihood is asked for under all classes")
    heed.add_argument("--temperature", type=float, nargs="+", default=[1.0])
    heed.add_argument("--top-p", type=float, nargs="+", default=[1.0])
    heed.add_argument("--guidance", type=float, nargs="+", default=[1.0])
    heed.add_argument("--seed", type=int, default=0)
    heed.add_argument("--device", default="auto")
    heed.set_defaults(run=listen)
    same = parts.add_parser("copies")
    same.add_argument("model", type=Path)
    same.add_argument("--clips", type=int, default=40)
    same.add_argument("--seed", type=int, default=1)
    same.add_argument("--device", default="auto")
    same.set_defaults(run=copies)
    third = parts.add_parser("finish")
    third.add_argument("--last", action="store_true", help="the weights of the end, not those of the best look")
    third.add_argument("--judge", help="a digit classifier's folder or name, which tells what it hears")
    third.add_argument("--clips", type=int, default=500, help="to be judged, all digits alike")
    third.add_argument("--temperature", type=float, default=1.0)
    third.add_argument("--top-p", type=float, default=1.0)
    third.add_argument("--guidance", type=float, default=1.0, help="also what clips are made with by default")
    third.add_argument("--note", default="", help="a sentence for the card on how the model was made")
    third.add_argument("--device", default="auto")
    third.add_argument("--out", type=Path, default=WEIGHTS_HOME / "digits")
    third.add_argument("--export", type=Path)
    third.set_defaults(run=finish)
    arguments = parser.parse_args()
    arguments.run(arguments)


# ---- the audio


def prepare(arguments: argparse.Namespace) -> None:
    """Shards of both phases in prepared/, each held against the same clips of people."""
    place = arguments.work / "prepared"
    clips = find_clips([arguments.data])
    people = [one_second(clip) for clip in clips if clip.label in DIGITS]
    held_out = [clip for clip in people if clip.split == "valid"]
    words = [clip for clip in clips if clip.label not in DIGITS and clip.split == "train"]
    step = max(1, len(words) // WORDS)
    with tempfile.TemporaryDirectory() as scratch:
        spoken = speak(Path(scratch), arguments.voices)
        sets = {
            "spoken": [*spoken, *words[::step][:WORDS], *held_out],
            "real": [c for c in people if c.split != "test"],
        }
        for phase in PHASES:
            shutil.rmtree(place / phase, ignore_errors=True)
            shards = prepare_shards(sets[phase], place / phase, MuLaw(), source=f"digits, phase {phase}")
            for line in shards.index.remarks:
                print(f"{phase}: {line}", file=sys.stderr)
            counts = {split: (entry.clips, entry.samples) for split, entry in shards.index.splits.items()}
            print(f"{phase}: {counts}")
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    print(f"{place}: {size:,} bytes" + (f", more than the {CARRIED:,} that travel" if size > CARRIED else ""))


def one_second(clip: ClipSource) -> ClipSource:
    """Of a clip of more than a second the one with most energy: a window would cut the word anywhere."""
    if clip.frames is None or clip.frames <= SECOND:
        return clip
    samples = read_audio(clip.path, None, start=clip.start, frames=clip.frames).samples
    energy = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
    start = int((energy[SECOND:] - energy[:-SECOND]).argmax())
    return replace(clip, start=clip.start + start, frames=SECOND)


def speak(folder: Path, voices: int) -> list[ClipSource]:
    """The digits by espeak-ng in many voices, as WAV files; none where it is not installed."""
    program = shutil.which("espeak-ng")
    if program is None:
        print("espeak-ng is not installed: the first phase has other words only (Debian: apt-get install espeak-ng)")
        return []
    listed = subprocess.run([program, "--voices=variant"], capture_output=True, text=True, check=True).stdout
    variants = [line.split("!v/")[1].split()[0] for line in listed.splitlines() if "!v/" in line]
    variants = [name for name in variants if not any(part in name.lower() for part in UNLIKE_SPEECH)]
    random = np.random.default_rng(0)
    jobs: list[tuple[list[str], Path, str, str]] = []
    for voice in range(voices):
        name = f"{ACCENTS[voice % len(ACCENTS)]}+{variants[int(random.integers(len(variants)))]}"
        speed, pitch = int(random.integers(110, 210)), int(random.integers(20, 85))
        for digit in DIGITS:
            file = folder / f"{voice:04d}-{digit}.wav"
            order = [program, "-v", name, "-s", str(speed), "-p", str(pitch), "-w", str(file), digit]
            jobs.append((order, file, digit, f"espeak-{voice:04d}"))

    def work(job: tuple[list[str], Path, str, str]) -> ClipSource | None:
        order, file, digit, speaker = job
        if subprocess.run(order, capture_output=True, check=False).returncode or not file.exists():
            return None
        return ClipSource(file, file.name, label=digit, speaker=speaker, split="train") if trim(file) else None

    with ThreadPoolExecutor(2) as workers:
        return [clip for clip in workers.map(work, jobs) if clip is not None]


def trim(file: Path) -> bool:
    """Cut the silence at both ends, and give each clip the loudness of somebody at some distance; False if silent."""
    import soundfile

    samples, rate = soundfile.read(file, dtype="float32")
    heard = np.flatnonzero(np.abs(samples) > TRIMMED)
    if len(heard) < rate // 20:
        return False
    margin = round(0.03 * rate)
    samples = samples[max(0, heard[0] - margin) : heard[-1] + margin]
    random = np.random.default_rng(list(file.name.encode()))
    level = 10 ** (random.uniform(-30, -15) / 20)
    samples = samples * (level / np.sqrt(np.mean(samples**2)))
    hiss = random.normal(0, level * 10 ** (-random.uniform(30, 50) / 20), len(samples))
    soundfile.write(file, np.clip(samples + hiss, -1, 1), rate)
    return True


# ---- training in parts


def train(arguments: argparse.Namespace) -> None:
    """At most --minutes of the phases, from where they stand; exits with 3 while something is left to do."""
    settings = {key: json.loads(value) for key, value in (text.split("=", 1) for text in arguments.set)}

    def over(number: int, frame: object) -> None:  # where the loop, which saves first, is not at work
        raise InterruptedRun("the part is over")

    before = signal.signal(signal.SIGTERM, over)
    stop = threading.Timer(60 * arguments.minutes, os.kill, (os.getpid(), signal.SIGTERM))
    stop.daemon = True
    stop.start()
    try:
        train_phases(arguments, settings)
    finally:
        stop.cancel()
        signal.signal(signal.SIGTERM, before)


def train_phases(arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Each phase that is not done, from where it stands."""
    budgets = {"spoken": arguments.spoken_minutes, "real": arguments.real_minutes}
    for phase in PHASES:
        if budgets[phase] <= 0 or (phase == "spoken" and arguments.from_export):
            continue
        run = arguments.work / phase
        if (run / "done").exists():
            continue
        if run.exists() and not list_checkpoints(run / "checkpoints"):  # stopped before it had begun
            shutil.rmtree(run)
        data = str(arguments.work / "prepared" / phase)
        given = {"data": (data,), "minutes": budgets[phase], "device": arguments.device, **settings}
        try:
            with Progress() as progress:
                if (run / "config.toml").exists():
                    result = resume_pretrain_audio(run, {"data": (data,), "device": arguments.device}, None, progress)
                else:
                    weights = arguments.from_export or arguments.work / "spoken" / "best"
                    begin = {"start_from": str(weights)} if phase == "real" and weights.is_dir() else {}
                    if not begin and arguments.begin:
                        begin = {"start_from": arguments.begin}
                    config = with_recipe(None, {"recipe": "digits", **begin, **given})
                    result = pretrain_audio(config, run, progress)
        except InterruptedRun as interrupted:
            print(f"{phase}: {interrupted}; run the same again", flush=True)
            export(arguments, phase)
            sys.exit(3)
        (run / "done").write_text("")
        speed = result.samples_per_second
        print(
            f"{phase}: {result.steps:,} steps, {result.samples:,} samples, {speed:,.0f} samples/s, loss {result.loss}"
        )
    export(arguments, PHASES[-1])
    print("done: now python -m benchmarks.build_digits finish")


def export(arguments: argparse.Namespace, phase: str) -> None:
    """The best model of a phase and what was seen of it, a few files that fit through a small door."""
    if arguments.export is None:
        return
    run, target = arguments.work / phase, arguments.export / phase
    target.mkdir(parents=True, exist_ok=True)
    for source in (run / "best", run):
        for name in ("config.json", "model.safetensors", CARD, "manifest.json", "metrics.jsonl", "report.html"):
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)


# ---- measuring and writing


def finish(arguments: argparse.Namespace) -> None:
    """The best model of the last phase, with a card of its figures, to the package."""
    run = next(
        (arguments.work / phase for phase in reversed(PHASES) if (arguments.work / phase / "best").is_dir()), None
    )
    if run is None:
        sys.exit(f"{arguments.work}: holds no trained model; train first")
    place = run / "best"
    if arguments.last:
        place = newest_checkpoint(run / "checkpoints").path
    model, fields = load_model(place)
    with torch.no_grad():  # what is measured is what is written: weights as bfloat16 holds them
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    rounded = arguments.work / "rounded"
    shutil.rmtree(rounded, ignore_errors=True)
    save_model(model, rounded, fields["quantiser"], "# measured\n")
    looks = [row for row in read_metrics(run / "metrics.jsonl") if "valid_loss" in row]
    shards = AudioShards(arguments.work / "prepared" / "real")
    figures: dict[str, Any] = {"held-out clips": len(shards["valid"]), "looks": len(looks)}
    figures |= held_out_figures(rounded, shards, arguments.device)
    if arguments.judge:
        figures |= judged(arguments, rounded)
    print(json.dumps(figures, indent=1))
    card = model_card(
        model,
        title="Spoken digits",
        data=data_words(shards),
        licence="Weights: CC BY-SA 4.0, as the Free Spoken Digit Dataset asks of what is made from it. Named are the "
        "sources above.",
        recipe=f"{recipe_words(arguments.work, arguments.last)} {arguments.note}".strip(),
        quality=quality_words(figures, arguments),
    ).replace('"path/to/this/folder"', '"digits"')
    own = Generation(guidance=arguments.guidance) if arguments.guidance != 1 else None
    files = model_writers(model.bfloat16(), fields["quantiser"], card, own)
    write_folder_atomically(arguments.out, files, unlisted=[CARD], replace=arguments.out.exists())
    size = (arguments.out / "model.safetensors").stat().st_size
    print(f"{arguments.out}: {size:,} bytes of weights")
    if arguments.export:
        shutil.copytree(arguments.out, arguments.export / "digits", dirs_exist_ok=True)


def listen(arguments: argparse.Namespace) -> None:
    """Print what the model makes of classes: how likely it finds held-out clips, and what is heard in its own."""
    if arguments.held_out:
        shards = AudioShards(arguments.work / "prepared" / "real")
        print(json.dumps(class_figures(arguments.model, shards, arguments.device, arguments.held_out)), flush=True)
    voice = AudioVoice(arguments.model, arguments.device)
    judges = {name: DigitJudge(name, arguments.device) for name in arguments.judge}
    for temperature, top_p, guidance in itertools.product(arguments.temperature, arguments.top_p, arguments.guidance):
        config = GenerateAudioConfig(
            count=arguments.clips, classes=DIGITS, temperature=temperature, top_p=top_p, guidance=guidance,
            seed=arguments.seed,
        )  # fmt: skip
        clips = make(voice, config)
        heard = {name: heard_as(judge, clips)["heard as asked"] for name, judge in judges.items()}
        print(
            f"temperature {temperature:g}, top-p {top_p:g}, guidance {guidance:g}: heard as asked {heard}", flush=True
        )


def copies(arguments: argparse.Namespace) -> None:
    """Print how like a training clip the model's clips are, and new speakers', and training clips beside the others."""
    shards = AudioShards(arguments.work / "prepared" / "real")
    decode, train, valid = shards.quantiser.decode, shards["train"], shards["valid"]
    spectra = np.stack([unit_spectrum(decode(train.clip(row))) for row in range(len(train))])
    voice = AudioVoice(arguments.model, arguments.device)
    made = make(voice, GenerateAudioConfig(count=arguments.clips, classes=voice.quantiser.classes, seed=arguments.seed))
    random = np.random.default_rng(0)
    own = random.permutation(len(train))[: arguments.clips].tolist()
    others = random.permutation(len(valid))[: arguments.clips].tolist()
    for name, found in {
        "the model's": [likeness(spectra, clip.samples / np.float32(32768)) for clip in made],
        "held-out speakers'": [likeness(spectra, decode(valid.clip(row))) for row in others],
        "training clips, beside the others": [likeness(spectra, decode(train.clip(row)), row) for row in own],
    }.items():
        print(f"{name}: median {np.median(found):.2f}, nine of ten below {np.quantile(found, 0.9):.2f}, "
              f"the highest {max(found):.2f}")  # fmt: skip


def unit_spectrum(samples: NDArray[np.floating]) -> NDArray[np.complex64]:
    """Of the first second, without its mean and of norm 1, padded so that no shift wraps round."""
    first = np.asarray(samples[:SECOND], np.float32)
    first = first - first.mean()
    return np.fft.rfft(first / (np.linalg.norm(first) + 1e-9), 2 * SECOND).astype(np.complex64)


def likeness(spectra: NDArray[np.complex64], samples: NDArray[np.floating], without: int | None = None) -> float:
    """The largest normalised cross-correlation with any row at any shift; 1 of a copy, however loud."""
    own = np.conj(unit_spectrum(samples))
    best = 0.0
    for row, spectrum in enumerate(spectra):
        if row != without:
            best = max(best, float(np.abs(np.fft.irfft(spectrum * own)).max()))
    return best


def class_figures(folder: Path, shards: AudioShards, device: str, at_most: int) -> dict[str, float]:
    """Of held-out clips: nats a clip that the own class gains over another, how often it is the likeliest of all."""
    generator = Generator(folder, choose_device(device))
    clips = shards["valid"]
    chosen = np.unique(np.linspace(0, len(clips) - 1, min(at_most, len(clips))).astype(int))
    right, gain = 0, 0.0
    for row in chosen:
        tokens = clips.clip(int(row))
        own = DIGITS.index(shards.labels[clips.label[row]])
        each = generator.log_likelihoods(
            np.tile(tokens, (len(DIGITS), 1)), np.full(len(DIGITS), len(tokens)), np.arange(len(DIGITS))
        )
        right += int(each.argmax() == own)
        gain += float(each[own] - np.delete(each, own).mean())
    return {"clips": len(chosen), "own class is the likeliest": right / len(chosen), "nats a clip": gain / len(chosen)}


def held_out_figures(folder: Path, shards: AudioShards, device: str) -> dict[str, float]:
    """Nats a sample on the clips of people who were not trained on, each clip whole, with its class if it has one."""
    generator = Generator(folder, choose_device(device))
    clips, nats, count = shards["valid"], 0.0, 0
    rows = sorted(range(len(clips)), key=lambda row: int(clips.length[row]))  # like lengths together
    for at in range(0, len(rows), HELD_OUT_ROWS):
        some = [clips.clip(row) for row in rows[at : at + HELD_OUT_ROWS]]
        labels = [DIGITS.index(shards.labels[clips.label[row]]) for row in rows[at : at + HELD_OUT_ROWS]]
        lengths = np.array([len(tokens) for tokens in some])
        padded = np.stack([np.pad(tokens, (0, lengths.max() - len(tokens)), constant_values=128) for tokens in some])
        own = np.array(labels) if generator.conditional else None
        nats -= float(generator.log_likelihoods(padded, lengths, own).sum())
        count += int(lengths.sum())
    return {"nats a sample": nats / count, "bits a byte": nats / count * BITS, "samples": count}


def judged(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """What an independent classifier hears in clips of the model, and how many the guard took back."""
    voice = AudioVoice(folder, arguments.device)
    config = GenerateAudioConfig(
        count=arguments.clips,
        classes=DIGITS if voice.quantiser.classes else (),
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        guidance=arguments.guidance,
    )
    made = make(voice, config)
    again = sum(clip.takes > 1 for clip in made)
    found = heard_as(DigitJudge(arguments.judge, arguments.device), made)
    return {"judged clips": len(made), **found, "taken back by the guard": again}


def make(voice: AudioVoice, config: GenerateAudioConfig) -> list[MadeClip]:
    """The clips, and a line on the time they took."""
    began = time.monotonic()
    with Progress() as progress:
        made = list(voice.clips(config, progress.state))
    print(f"{len(made)} clips in {time.monotonic() - began:.1f} s", flush=True)
    return made


def heard_as(judge: DigitJudge, made: list[MadeClip]) -> dict[str, float]:
    """How many of the asked digits are heard; without classes, how sure the judge is of any digit."""
    judgement = judge.judge(np.stack([clip.samples.astype(np.float32) / 32768 for clip in made]))
    heard = judgement.heard
    if not made[0].label:
        shares = np.bincount(heard, minlength=len(DIGITS)) / len(heard)
        sure = float((judgement.log_p.max(1) >= np.log(SURE)).mean())
        return {"sure": sure, "rarest": float(shares.min())}
    right = np.array([judge.digits[int(h)] == clip.label for h, clip in zip(heard, made, strict=True)])
    each = {digit: float(right[[clip.label == digit for clip in made]].mean()) for digit in DIGITS}
    return {"heard as asked": float(right.mean()), **each}


def data_words(shards: AudioShards) -> str:
    seconds = {split: int(shards[split].length.sum()) / shards.quantiser.rate for split in shards.index.splits}
    return (
        f"{len(shards['train']):,} clips of the digits zero to nine by people ({seconds['train'] / 60:.0f} minutes): "
        "the Free Spoken Digit Dataset (CC BY-SA 4.0, Z. Jackson and contributors; telephone band), a part of Speech "
        "Commands (CC BY 4.0, P. Warden, Google), recordings by F. Chen (MIT). Before that, in the first phase, the "
        "digits as spoken by espeak-ng, a synthesiser, in many of its voices, and other words of Speech Commands "
        f"without their labels. Held out: {len(shards['valid']):,} clips of other speakers."
    )


def recipe_words(work: Path, last: bool) -> str:
    lines = ["`python -m benchmarks.build_digits`, two phases of `mambagen pretrain-audio --recipe digits`:"]
    for phase in PHASES:
        rows = [row for row in read_metrics(work / phase / "metrics.jsonl") if "tokens" in row]
        if rows:
            end = rows[-1]
            lines.append(
                f"{phase}: {end['step']:,} steps, {end['tokens']:,} samples in {end['seconds'] / 60:.1f} minutes;"
            )
    which = "that of the end" if last else "the best of the looks at held-out clips"
    return " ".join(lines).rstrip(";") + f". The model is {which}."


def quality_words(figures: dict[str, Any], arguments: argparse.Namespace) -> str:
    text = (
        f"{figures['nats a sample']:.4f} nats a sample ({figures['bits a byte']:.4f} bits a byte) over "
        f"{figures['held-out clips']:,} clips of speakers who were not trained on."
    )
    if "sure" in figures:
        text += (
            f" It knows no classes: which digit it says is left to chance. Of {figures['judged clips']:,} clips made "
            f"at temperature {arguments.temperature:g}, top-p {arguments.top_p:g} the digit classifier "
            f"{arguments.judge} is at least {SURE:.0%} sure of some digit in {figures['sure']:.1%}; the rarest "
            f"digit is heard in {figures['rarest']:.1%}; the guard took {figures['taken back by the guard']} back."
        )
    if "heard as asked" in figures:
        worst = min(DIGITS, key=lambda digit: figures[digit])
        text += (
            f" Of {figures['judged clips']:,} clips made at temperature {arguments.temperature:g}, top-p "
            f"{arguments.top_p:g}, guidance {arguments.guidance:g}, the digit classifier {arguments.judge} hears the "
            f"digit that was asked for in {figures['heard as asked']:.1%} (worst: {worst}, {figures[worst]:.0%}); the "
            f"guard took {figures['taken back by the guard']} back."
        )
    return text


if __name__ == "__main__":
    main()
