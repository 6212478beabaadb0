"""Train a model of raw sound: prepare the audio, hold some out, train, measure, sample, report.

From Python:

    from mambagen.pipelines.pretrain_audio import PretrainAudioConfig, pretrain_audio
    result = pretrain_audio(PretrainAudioConfig(data=("recordings/",), minutes=60))
"""

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError, field_validator, model_validator

from mambagen.data.audio_shards import AudioShards
from mambagen.data.audio_windows import Augmentation
from mambagen.data.byte_chains import ByteChains
from mambagen.data.quantise import QUANTISERS, Quantiser
from mambagen.data.spoken_words import DIGITS
from mambagen.data_manifests import load_manifest, manifest_names
from mambagen.errors import DivergedError, InterruptedRun, ModelError, UsageError
from mambagen.models import load_model
from mambagen.models.audio_unet import AudioUNet, AudioUNetConfig, BlockKind
from mambagen.models.files import first_fault
from mambagen.pipelines.audio_best import BEST, BestModel, best_row, compare_best
from mambagen.pipelines.audio_data import AudioRequest, open_audio
from mambagen.pipelines.audio_language_model import BITS, AudioTask
from mambagen.pipelines.audio_run_report import RunSamples, write_run_report
from mambagen.pipelines.model_cards import ModelCard
from mambagen.training.checkpoint import Checkpoint, newest_checkpoint
from mambagen.training.config import TrainConfig, overlaid, read_toml, validated
from mambagen.training.looks import look_loss
from mambagen.training.loop import choose_device, set_threads, train
from mambagen.training.progress import Progress
from mambagen.training.resume import changed_settings, refuse_changes, refuse_other_data
from mambagen.training.run_folder import RunFolder, read_metrics

log = logging.getLogger("mambagen")

# Windows an update at each length of the published study of context: about 2^20 samples always.
PUBLISHED_ROWS = {
    8192: 128, 16384: 64, 30720: 32, 61440: 16, 120832: 8, 239616: 4, 479232: 2, 958464: 1,
}  # fmt: skip
SAMPLES_A_STEP = 1 << 20  # for other lengths from here on
DEFAULT_ROWS = 16
NEW_CLASSES = 0.1  # share of their usual size with which classes begin in a model that was trained without

_PAPER: dict[str, Any] = {"lr": 2e-3, "steps": 200_000, "warmup": 0.1, "weight_decay": 0.1, "clip": 0.1}
# Settings that come below a configuration file and options. What is published stands in docs/audio.md, and what is not.
RECIPES: dict[str, dict[str, Any]] = {
    "sc09": {**_PAPER, "data": ("sc09",), "lengths": (16_000,), "batch": 16},
    "youtubemix": {
        **_PAPER,
        "data": ("youtubemix",),
        "lengths": (958_464,),
        "d_model": 64,
        "n_layer": 3,
        "pool": (16, 16),
    },
    "digits": {
        "lengths": (16_000,),
        "batch": 16,  # the most whose pass is recorded as a CUDA graph
        "n_layer": 4,
        "conditional": True,
        "labels": DIGITS,
        "unconditional": 0.1,
        "class_contrast": 5.0,
        "pad": "silence",
        "gain_db": 6.0,
        "shift": 0.15,
        "speed": 0.08,
        "lr": 2e-3,
        "warmup": 0.1,
        "weight_decay": 0.1,
        "clip": 0.5,
    },
}

# What a run cannot change when it goes on: it would be another model, or other data in another order.
FIXED = (
    *("data", "d_model", "n_layer", "pool", "stages", "outer", "centre", "model", "conditional", "labels"),
    *("quantiser", "rate", "lengths", "batch", "seed", "pad", "unconditional", "gain_db", "shift", "speed"),
    *("class_contrast", "valid_fraction", "start_from"),
)


class PretrainAudioConfig(TrainConfig):
    """All settings of `mambagen pretrain-audio`; the keys of its TOML file."""

    recipe: Literal["sc09", "youtubemix", "digits"] | None = None  # its settings are below all others that are given
    data: tuple[str, ...] = ()  # names of data sets, folders, lists, tables, files, or one folder of shards
    d_model: int = 64
    n_layer: int = 8
    pool: tuple[int, ...] = (4, 4)
    stages: Literal[3, 5] = 5
    outer: BlockKind = "mamba"
    centre: BlockKind = "mamba"
    model: dict[str, Any] = Field(default_factory=dict)  # further fields of an AudioUNetConfig, such as d_state
    start_from: str | None = None  # a model folder whose weights the run begins with
    lengths: Annotated[tuple[Annotated[int, Field(ge=16)], ...], Field(min_length=1)] = (16_000,)
    batch: Annotated[int, Field(ge=1)] | None = None  # windows an update; None: by the length
    conditional: bool = False  # on the clips' labels
    labels: tuple[str, ...] = ()  # only clips of these words (or folders)
    unconditional: float = Field(0.1, ge=0, lt=1)  # share of rows that lose their class, for guidance
    class_contrast: float = Field(0.0, ge=0, allow_inf_nan=False)  # weight of telling classes apart; 0: none
    quantiser: Literal["mu-law", "linear", "min-max"] = "mu-law"
    rate: int = Field(16_000, ge=1000, le=192_000)
    pad: Literal["ignore", "silence"] = "ignore"
    gain_db: float = Field(0.0, ge=0, le=40)
    shift: float = Field(0.0, ge=0, le=10)
    speed: float = Field(0.0, ge=0, lt=0.5)
    valid_fraction: float = Field(0.1, ge=0, lt=1)
    valid_samples: int = Field(1 << 22, ge=1)
    samples: int = Field(4, ge=0, le=64)  # clips that are made on the way and at the end, to be heard
    sample_seconds: float = Field(1.0, gt=0, le=60)
    fix_nan: bool = False
    skip_bad: bool = False
    shards: str | None = None  # where prepared audio is kept; None: the cache
    lr: float = Field(2e-3, gt=0, allow_inf_nan=False)
    clip: float = Field(0.1, gt=0, allow_inf_nan=False)

    @field_validator("labels", mode="before")
    @classmethod
    def _digits(cls, labels: Any) -> Any:
        return DIGITS if labels == "digits" or labels in (["digits"], ("digits",)) else labels

    @model_validator(mode="after")
    def _growing(self) -> "PretrainAudioConfig":
        if len(self.lengths) > 1 and self.steps is None:
            raise ValueError(
                "several lengths share the steps of a run, which minutes do not say: give --steps in place of --minutes"
            )
        if list(self.lengths) != sorted(self.lengths):
            raise ValueError("lengths must grow: give the shortest first")
        return self

    def audio(self, classes: tuple[str, ...] = ()) -> Quantiser:
        """What sound becomes before the model sees it."""
        return QUANTISERS[self.quantiser](rate=self.rate, classes=classes)

    def architecture(self, classes: int) -> AudioUNetConfig:
        """UsageError where the settings describe none."""
        shape = {name: getattr(self, name) for name in ("d_model", "n_layer", "pool", "stages", "outer", "centre")}
        try:
            return AudioUNetConfig(**{**shape, **self.model, "classes": classes})
        except ValidationError as error:
            raise UsageError(f"the architecture: {first_fault(error)}") from error

    def rows(self) -> tuple[int, ...]:
        """Windows an update, for each of the lengths."""
        if self.batch is not None and len(self.lengths) == 1:
            return (self.batch,)
        return tuple(rows_of(length, self.batch) for length in self.lengths)

    def model_name(self) -> str:
        """For titles and tables."""
        inside = self.outer if self.outer == self.centre else f"{self.outer} / {self.centre}"
        pools = ", ".join(map(str, self.pool))
        return f"{inside} U-Net, d_model {self.d_model}, {self.n_layer} layers, pools {pools}"


def rows_of(length: int, batch: int | None = None) -> int:
    """Windows an update: those of the published study, 16 of a second and less, about 2^20 samples otherwise."""
    if length in PUBLISHED_ROWS:
        return PUBLISHED_ROWS[length]
    if length <= 16_000:
        return batch or DEFAULT_ROWS
    return max(1, SAMPLES_A_STEP // length)


def with_recipe(file: Path | None, options: Mapping[str, Any]) -> PretrainAudioConfig:
    """The configuration out of defaults, the recipe's settings, TOML file and options, each over those before.

    Raises:
        UsageError: an unknown key or recipe, or a value that is not allowed.
    """
    table = dict(read_toml(file) if file else {})
    name = options.get("recipe", table.get("recipe"))
    below = RECIPES.get(name, {}) if isinstance(name, str) else {}
    return validated(PretrainAudioConfig, overlaid(overlaid(below, table), options), options, file)


@dataclass(frozen=True)
class PretrainAudioResult:
    """What came out; losses are in nats a sample of held-out sound, None where nothing is held out."""

    run: Path
    checkpoint: Path
    best: BestModel | None  # of the best look, where there was one
    name: str
    parameters: int
    loss: float | None
    targets: int
    baselines: dict[int, float]  # order of a chain over bytes -> loss
    classes: tuple[str, ...]
    steps: int
    samples: int
    seconds: float
    samples_per_second: float
    epochs: float  # times that the run went through the training clips
    held_out: str
    report: Path
    warning: str | None = None  # one line, where the last weights are worse than the best by more than noise

    @property
    def bits_per_byte(self) -> float | None:
        return None if self.loss is None else self.loss * BITS

    @property
    def to_use(self) -> Path:
        """The model to go on with: the last one, or the best where the last is worse by more than noise."""
        return self.best.path if self.best and self.warning else self.checkpoint


def pretrain_audio(
    config: PretrainAudioConfig, out: Path | None = None, progress: Progress | None = None
) -> PretrainAudioResult:
    """Begin a run in the folder `out` (default: runs/pretrain-audio-DATE-TIME), train, and measure it.

    Raises:
        InputError, UsageError, ResourceError, DivergedError, InterruptedRun: see the exit codes in docs/training.md.
    """
    progress = progress or Progress()
    config = resolved(config)
    place = RunFolder.vacant(out, "pretrain-audio")
    shards, quantiser = read_audio_data(config, progress)
    model = new_model(config, quantiser)
    run = RunFolder.create(place)
    with run.lock():
        run.write_config(to_keep(config).model_dump())
        return _train_and_report(config, shards, quantiser, run, model, None, progress)


def resume_pretrain_audio(
    folder: Path, options: Mapping[str, Any], config_file: Path | None = None, progress: Progress | None = None
) -> PretrainAudioResult:
    """Go on with the run in `folder` from its newest whole checkpoint, bit for bit on a CPU.

    Raises:
        UsageError: a setting that would make it another model or other data. ModelError: no whole checkpoint, or the
            audio is not what the run began with.
    """
    progress = progress or Progress()
    run = RunFolder.open(folder)
    before, changes = changed_settings(PretrainAudioConfig, run, options, config_file)
    config = resolved(changes)
    refuse_changes(
        folder, before, to_keep(config), FIXED, {"lengths": "length"}, "leave it out, or begin a new run", _same_setting
    )
    with run.lock():
        checkpoint = newest_checkpoint(run.checkpoints)
        model, _ = load_model(checkpoint.path, kinds=[AudioUNet.kind])
        shards, quantiser = read_audio_data(config, progress)
        refuse_other_data(folder, checkpoint, identity(config, shards, quantiser))
        run.write_config(to_keep(config).model_dump())
        return _train_and_report(config, shards, quantiser, run, model, checkpoint, progress)


def resolved(config: PretrainAudioConfig) -> PretrainAudioConfig:
    """The configuration with threads and budget filled in; what cannot be is said here, before the data are read."""
    choose_device(config.device)
    config.architecture(0)
    if not config.data:
        raise UsageError(
            "no audio is given: add --data with names of data sets (mambagen data list), folders, lists or tables"
        )
    cores = os.cpu_count() or 1
    threads = config.threads or torch.get_num_threads()
    if threads > cores:
        log.warning("%d threads on %d cores: using %d", threads, cores, cores)
    return config.model_copy(update={"threads": min(threads, cores)}).with_budget()


def to_keep(config: PretrainAudioConfig) -> PretrainAudioConfig:
    """The same for config.toml: files by their absolute paths, so that a run can go on from any folder."""
    names = manifest_names()
    data = tuple(given if given in names else os.path.abspath(given) for given in config.data)
    start_from = config.start_from
    if start_from is not None and os.path.isdir(start_from):
        start_from = os.path.abspath(start_from)
    shards = None if config.shards is None else os.path.abspath(config.shards)
    return config.model_copy(update={"data": data, "start_from": start_from, "shards": shards})


def _same_setting(name: str, was: Any, wanted: Any) -> bool:
    """Prepared audio may move: what it holds is compared by its checksum."""
    return bool(was == wanted) or (name == "data" and len(was) == len(wanted) == 1)


def read_audio_data(config: PretrainAudioConfig, progress: Progress) -> tuple[AudioShards, Quantiser]:
    """The prepared audio, and the quantiser with the classes' names."""
    set_threads(config.threads or 1)
    request = AudioRequest(
        config.data,
        config.audio(),
        config.labels,
        config.valid_fraction,
        config.fix_nan,
        config.skip_bad,
    )
    shards = open_audio(request, Path(config.shards) if config.shards else None, progress)
    classes: tuple[str, ...] = ()
    if config.conditional:
        classes = config.labels or shards.labels
        if not classes:
            raise UsageError("--conditional: the clips have no labels; give a folder a word, or a table with labels")
        missing = set(classes) - set(shards.labels)
        if missing:
            log.warning("no clip is labelled %s", ", ".join(sorted(missing)))
    return shards, config.audio(classes)


def new_model(config: PretrainAudioConfig, quantiser: Quantiser) -> AudioUNet:
    """A model with first weights, or those of `start_from`, which may be without the classes."""
    architecture = config.architecture(len(quantiser.classes))
    model = AudioUNet(architecture, seed=config.seed)
    if config.start_from is None:
        return model
    given, fields = load_model(config.start_from, kinds=[AudioUNet.kind])
    if given.config != (architecture if given.config.classes else architecture.model_copy(update={"classes": 0})):
        raise ModelError(
            f"{config.start_from}: holds another architecture ({given.config.description}, {given.config.classes} "
            f"classes) than these settings describe ({architecture.description}, {architecture.classes} classes)"
        )
    names = tuple(fields["quantiser"]["classes"])
    if names and names != quantiser.classes:
        raise ModelError(f"{config.start_from}: its classes are {', '.join(names)}")
    weights = given.state_dict()
    if model.class_embedding is not None and given.class_embedding is None:  # small, as the rest does without them
        weights["class_embedding.weight"] = NEW_CLASSES * model.class_embedding.weight.detach()
    model.load_state_dict(weights)
    return model


def identity(config: PretrainAudioConfig, shards: AudioShards, quantiser: Quantiser) -> dict[str, Any]:
    """What a checkpoint has to share to be gone on from."""
    return {
        "training audio": shards.fingerprint("train"),
        "held-out audio": shards.fingerprint("valid"),
        "quantiser": quantiser.model_dump(mode="json"),
        "architecture": config.architecture(len(quantiser.classes)).model_dump(mode="json"),
        "order of the data": [
            list(config.lengths),
            list(config.rows()),
            config.seed,
            config.pad,
            *(config.unconditional, config.gain_db, config.shift, config.speed),
        ],
    }


def _train_and_report(
    config: PretrainAudioConfig,
    shards: AudioShards,
    quantiser: Quantiser,
    run: RunFolder,
    model: AudioUNet,
    checkpoint: Checkpoint | None,
    progress: Progress,
) -> PretrainAudioResult:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name, rows, device = config.model_name(), config.rows(), choose_device(config.device)
    looks = [row for row in read_metrics(run.metrics_file) if "valid_loss" in row]
    if checkpoint:
        looks = [row for row in looks if row["step"] <= checkpoint.position.step]
    samples = RunSamples(
        run.path / "samples", quantiser, config.samples, config.sample_seconds, len(looks), config.seed, progress
    )
    task = AudioTask(
        shards,
        quantiser,
        config.lengths,
        rows,
        config.seed,
        identity(config, shards, quantiser),
        _card(config, shards),
        config.steps,
        config.pad,
        Augmentation(gain_db=config.gain_db, shift=config.shift, speed=config.speed),
        config.unconditional,
        config.class_contrast,
        config.valid_samples,
        max(1, rows[-1] // config.accumulate),
        samples.evaluated,
        run.path / BEST,
        min(map(look_loss, looks), default=math.inf),
    )
    where = f"{device}" + (f" after step {checkpoint.position.step}" if checkpoint else "")
    progress.note(f"{name} ({parameters:,} parameters) on {where}; the run is in {run.path}")
    clips, held_out = shards["train"], shards["valid"]
    seconds = int(clips.length.sum()) / config.rate
    progress.note(f"{len(clips):,} clips of {seconds / 60:,.1f} min to train on; held out: {len(held_out):,} clips")
    progress.state("counting the chains to beat ...")
    baselines = ByteChains(clips).losses(task.held_out)

    def report(row: Mapping[str, float], warning: str | None = None) -> Path:
        settings = {"model": f"{name}, {parameters:,} parameters", "recipe": config.recipe or "none"}
        settings |= {"data": _data_names(config), "length and windows a step": _schedule(config)}
        return write_run_report(run, settings, row, baselines, quantiser, samples, warning)

    try:
        result = train(model, task, config, run, checkpoint, progress)
    except (InterruptedRun, DivergedError):
        report({})
        raise
    epochs = task.epochs(result.position.step)
    sound = f"{seconds / 60:,.1f} minutes of sound" if seconds >= 60 else f"{seconds:,.3g} seconds of sound"
    best, warning = compare_best(config, task, run, result, sound, epochs, progress)
    if warning:
        log.warning("%s", warning)
    return PretrainAudioResult(
        run=run.path,
        checkpoint=result.checkpoint,
        best=best,
        name=name,
        parameters=parameters,
        loss=result.held_out.get("loss"),
        targets=int(result.held_out.get("targets", 0)),
        baselines=baselines,
        classes=quantiser.classes,
        steps=result.position.step,
        samples=result.position.tokens,
        seconds=result.position.seconds,
        samples_per_second=result.tokens_per_second,
        epochs=epochs,
        held_out=f"{task.held_out.targets:,} samples of {len(held_out):,} clips",
        report=report(best_row(best, result.position.step), warning),
        warning=warning,
    )


def _schedule(config: PretrainAudioConfig) -> str:
    return ", then ".join(f"{n:,} x {r}" for n, r in zip(config.lengths, config.rows(), strict=True))


def _data_names(config: PretrainAudioConfig) -> str:
    names = [given if given in manifest_names() else Path(given).name for given in config.data]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _card(config: PretrainAudioConfig, shards: AudioShards) -> ModelCard:
    clips = shards["train"]
    seconds = int(clips.length.sum()) / config.rate
    data = [f"{_data_names(config)}: {len(clips):,} clips, {seconds / 60:,.1f} minutes at {config.rate:,} Hz."]
    for given in config.data:
        if given in manifest_names():
            manifest = load_manifest(given)
            data.append(f"{manifest.title}. {manifest.provenance}. Licence: {manifest.licence}.")
    begun = f", from the weights of {Path(config.start_from).name}" if config.start_from else ""
    changes = [
        *([f"gain up to {config.gain_db:g} dB"] if config.gain_db else []),
        *([f"up to {config.shift:g} s of silence in front"] if config.shift else []),
        *([f"speed up to {config.speed:.0%} off"] if config.speed else []),
    ]
    recipe = (
        f"`mambagen pretrain-audio`{begun}: {config.quantiser} at {config.rate:,} Hz, length x windows a step "
        f"{_schedule(config)}, "
        + (f"classes dropped in {config.unconditional:.0%} of rows, " if config.conditional else "")
        + (f"augmented ({', '.join(changes)}), " if changes else "")
        + f"AdamW with peak learning rate {config.lr:g}, warmup {config.warmup:g} of the budget, cosine to zero, "
        f"weight decay {config.weight_decay:g}, gradient clipped at {config.clip:g}, seed {config.seed}. All settings "
        f"are in the run's config.toml."
    )
    return ModelCard(f"{config.model_name()} on {_data_names(config)}", "\n\n".join(data), recipe)
