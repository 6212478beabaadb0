"""Train the judge of eval-sc09: read labelled words, train until validation gets no better, measure on other speakers.

From Python:

    from mambagen.pipelines.train_sc09_classifier import TrainJudgeConfig, train_judge
    result = train_judge(TrainJudgeConfig(data="speech_commands"))
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError

from mambagen.data.augmentation import Augmentation
from mambagen.data.mel import LogMel, MelSettings
from mambagen.data.spoken_words import DIGITS, SILENCE, SpokenWords
from mambagen.errors import InputError, UsageError
from mambagen.models import load_model
from mambagen.models.digit_classifier import DigitClassifier, DigitClassifierConfig
from mambagen.models.files import first_fault
from mambagen.models.saving import CARD
from mambagen.pipelines.digit_classification import DigitTask, JudgeCard, judge_figures
from mambagen.pipelines.model_cards import LICENCE
from mambagen.pipelines.sc09_data import lasting, read_words
from mambagen.pipelines.sequence_classification import Figures
from mambagen.training.checkpoint import Checkpoint, newest_checkpoint
from mambagen.training.config import TrainConfig
from mambagen.training.loop import choose_device, set_threads, train
from mambagen.training.progress import Progress
from mambagen.training.resume import changed_settings, refuse_changes, refuse_other_data
from mambagen.training.run_folder import RunFolder, read_metrics

BEST = "model"  # the folder of a run that holds its best model
RANDOM_SPEAKERS = 0.1  # of a table without splits: this share of the speakers each for validation and test

# What a run cannot change when it goes on.
FIXED = ("data", "arch", "widths", "blocks", "words", "dropout", "batch", "seed", "augmentation", "masks")


class TrainJudgeConfig(TrainConfig):
    """All settings of `mambagen train-sc09-classifier`; the keys of its TOML file."""

    data: str  # a Speech Commands or SC09 folder, or a table of clips
    arch: Literal["small", "resnext29"] = "small"
    widths: tuple[int, ...] = (16, 32, 64, 128)  # of `small`
    blocks: int = Field(2, ge=1)
    dropout: float = Field(0.2, ge=0, lt=1)
    words: bool = True  # words that are no digits are further classes
    augmentation: float = Field(1.0, ge=0, le=3)  # how much clips are changed
    masks: float = Field(1.0, ge=0, le=2)  # how much of the pictures is covered up
    smoothing: float = Field(0.1, ge=0, lt=1)  # of the labels
    digit_share: float = Field(0.6, gt=0, lt=1)  # of the clips in a batch
    batch: int = Field(64, ge=2)
    patience: int = Field(5, ge=1)  # evaluations, of ten a run, without a better one before training ends
    licence: str = LICENCE
    lr: float = Field(3e-3, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.05, ge=0, allow_inf_nan=False)
    steps: int | None = Field(None, ge=1)


DEFAULT_STEPS = 3000


@dataclass(frozen=True)
class TrainJudgeResult:
    """What came out: the best model on validation, and its figures by part of the data."""

    run: Path
    model: Path
    arch: str
    parameters: int
    digits: tuple[str, ...]
    other_classes: int
    train_clips: int
    figures: dict[str, Figures]  # validation, test
    steps: int
    seconds: float
    stopped_early: bool


@dataclass(frozen=True)
class JudgeData:
    """Clips to train on (words included), and digits of other speakers to choose and to measure by."""

    train: SpokenWords
    valid: SpokenWords
    test: SpokenWords | None
    classes: tuple[str, ...]


def train_judge(
    config: TrainJudgeConfig, out: Path | None = None, progress: Progress | None = None
) -> TrainJudgeResult:
    """Begin a run in the folder `out` (default: runs/train-sc09-classifier-DATE-TIME), train, measure the best model.

    Raises:
        InputError, UsageError, ModelError, ResourceError, DivergedError, InterruptedRun: see docs/training.md.
    """
    progress = progress or Progress()
    choose_device(config.device)
    place = RunFolder.vacant(out, "train-sc09-classifier")
    data = read_data(config, progress)
    config = with_steps(config)
    model = new_model(config, data.classes)
    run = RunFolder.create(place)
    with run.lock():
        run.write_config(to_keep(config).model_dump())
        return _train_and_report(config, data, run, model, None, progress)


def resume_train_judge(
    folder: Path, options: Mapping[str, Any], config_file: Path | None = None, progress: Progress | None = None
) -> TrainJudgeResult:
    """Go on with the run in `folder` from its newest whole checkpoint.

    Raises:
        UsageError: a setting that would make it another model or other data. ModelError: no whole checkpoint.
    """
    progress = progress or Progress()
    run = RunFolder.open(folder)
    before, config = changed_settings(TrainJudgeConfig, run, options, config_file)
    refuse_changes(folder, before, to_keep(config), FIXED)
    with run.lock():
        checkpoint = newest_checkpoint(run.checkpoints)
        model, _ = load_model(checkpoint.path, kinds=[DigitClassifier.kind])
        data = read_data(config, progress)
        refuse_other_data(folder, checkpoint, identity(config, data))
        run.write_config(to_keep(config).model_dump())
        return _train_and_report(config, data, run, model, checkpoint, progress)


def read_data(config: TrainJudgeConfig, progress: Progress) -> JudgeData:
    """Read and divide the clips; InputError where a digit has none to train on or nothing is held out."""
    progress.state("reading the clips ...")
    set_threads(min(config.threads or torch.get_num_threads(), os.cpu_count() or 1))
    clips = read_words(config.data)
    if set(clips.splits) == {"train"}:
        clips = clips.with_splits(held_out_speakers(clips, config.seed))
    train = clips.select(clips.where(split="train", labels=None if config.words else [*DIGITS, SILENCE]))
    valid = clips.select(clips.where(split="valid", labels=DIGITS))
    test = clips.select(clips.where(split="test", labels=DIGITS))
    missing = [digit for digit in DIGITS if digit not in set(train.labels)]
    if missing:
        raise InputError.at(config.data, None, f"has no training clips of {', '.join(missing)}")
    if not len(valid):
        raise InputError.at(config.data, None, "has no validation clips of digits; hold some speakers out as valid")
    others = sorted(set(train.labels) - {*DIGITS, SILENCE})
    return JudgeData(train, valid, test if len(test) else None, (*DIGITS, SILENCE, *others))


def held_out_speakers(clips: SpokenWords, seed: int) -> tuple[str, ...]:
    """A split for each clip of a table that has none: a share of the speakers each for validation and test."""
    speakers = sorted(set(clips.speakers))
    if len(speakers) < 3:
        raise InputError.at(clips.path, None, "has no splits, and too few speakers to hold any out; add a column split")
    order = np.random.default_rng(seed).permutation(len(speakers))
    count = max(1, round(RANDOM_SPEAKERS * len(speakers)))
    part = {speakers[i]: "valid" for i in order[:count]} | {speakers[i]: "test" for i in order[count : 2 * count]}
    return tuple(part.get(speaker, "train") for speaker in clips.speakers)


def new_model(config: TrainJudgeConfig, classes: tuple[str, ...]) -> DigitClassifier:
    """A classifier with first weights; UsageError for a shape that there is not."""
    try:
        shape = DigitClassifierConfig(
            arch=config.arch, classes=classes, widths=config.widths, blocks=config.blocks, dropout=config.dropout
        )
    except ValidationError as error:
        raise UsageError(f"the judge's shape: {first_fault(error)}") from error
    return DigitClassifier(shape, seed=config.seed)


def with_steps(config: TrainJudgeConfig) -> TrainJudgeConfig:
    """The default budget, where none is given."""
    if config.steps is None and config.minutes is None:
        return config.model_copy(update={"steps": DEFAULT_STEPS})
    return config


def to_keep(config: TrainJudgeConfig) -> TrainJudgeConfig:
    """The same for config.toml: the data by their absolute path, so that a run can go on from any folder."""
    return config.model_copy(update={"data": lasting(config.data)})


def identity(config: TrainJudgeConfig, data: JudgeData) -> dict[str, Any]:
    """What a checkpoint has to share to be gone on from."""
    return {
        "training data": data.train.fingerprint(),
        "validation data": data.valid.fingerprint(),
        "classes": list(data.classes),
        "order of the data": [config.batch, config.seed, config.augmentation, config.masks, config.digit_share],
    }


def _train_and_report(
    config: TrainJudgeConfig,
    data: JudgeData,
    run: RunFolder,
    model: DigitClassifier,
    checkpoint: Checkpoint | None,
    progress: Progress,
) -> TrainJudgeResult:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    history = []
    if checkpoint:
        rows = [row for row in read_metrics(run.metrics_file) if row["step"] <= checkpoint.position.step]
        history = [row["valid_loss"] for row in rows if "valid_loss" in row]
    card = _card(config, data)
    best = run.path / BEST
    task = DigitTask(
        data.train,
        data.valid,
        data.classes,
        MelSettings(),
        config.batch,
        config.seed,
        Augmentation().scaled(config.augmentation),
        config.masks,
        config.smoothing,
        config.digit_share,
        config.patience,
        card,
        best,
        identity(config, data),
        history,
    )
    progress.note(
        f"{config.arch} ({parameters:,} parameters) on {choose_device(config.device)}; the run is in {run.path}"
    )
    progress.note(f"{len(data.train):,} clips of {len(data.classes)} classes; {len(data.valid):,} for validation")
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    result = train(model, task, config, run, checkpoint, progress)
    chosen, _ = load_model(best, device=choose_device(config.device), kinds=[DigitClassifier.kind])
    progress.state("measuring the best model ...")
    log_mel = LogMel()
    figures = {"validation": judge_figures(chosen, log_mel, data.valid, data.valid.indices(data.classes))}
    if data.test is not None:
        figures["test"] = judge_figures(chosen, log_mel, data.test, data.test.indices(data.classes))
    others = {name: value for name, value in figures.items() if name != "validation"}
    (best / CARD).write_text(card.text(chosen, figures["validation"], others), "utf-8")
    return TrainJudgeResult(
        run=run.path,
        model=best,
        arch=config.arch,
        parameters=parameters,
        digits=chosen.digits,
        other_classes=len(data.classes) - len(chosen.digits),
        train_clips=len(data.train),
        figures=figures,
        steps=result.position.step,
        seconds=result.position.seconds,
        stopped_early=task.done and result.position.step != config.steps,
    )


def _card(config: TrainJudgeConfig, data: JudgeData) -> JudgeCard:
    rows = data.train.where(labels=DIGITS)
    digits, speakers = len(rows), len({data.train.speakers[row] for row in rows.tolist()})
    recipe = (
        f"`mambagen train-sc09-classifier`: {config.batch} clips a step, AdamW with peak learning rate {config.lr:g}, "
        f"warmup {config.warmup:g} of the budget, cosine to zero, weight decay {config.weight_decay:g}, dropout "
        f"{config.dropout:g}, labels smoothed by {config.smoothing:g}, clips changed in rate, place, band, room and "
        f"noise (strength {config.augmentation:g}), pictures masked ({config.masks:g}), seed {config.seed}; the best "
        "on validation of ten looks. Every digit is drawn equally often."
    )
    where = Path(config.data).name
    return JudgeCard(
        f"Judge of spoken digits ({config.arch})",
        f"{where}: {digits:,} clips of digits by {speakers:,} speakers and "
        f"{len(data.train) - digits:,} other clips to train on; {len(data.valid):,} digits of other speakers for "
        "validation. No speaker is in two parts.",
        config.licence,
        recipe,
    )
