"""Train a model that tells species apart: read, divide, train, calibrate on validation, measure on test, report.

From Python:

    from mambagen.pipelines.train_species import TrainSpeciesConfig, train_species
    result = train_species(TrainSpeciesConfig(data=("genomes",), splits="splits.bed", steps=2000))
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, field_validator

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.species import SpeciesParts
from mambagen.data.species_windows import MOST_UNKNOWN, SpeciesSampler, draw_evaluation
from mambagen.errors import InputError, UsageError
from mambagen.models import MAMBA_SIZES, load_model
from mambagen.models.encoders import count_parameters, match_parameters
from mambagen.models.files import first_fault
from mambagen.models.heads import Pooling, copy_encoder, encoder_of
from mambagen.models.saving import save_model
from mambagen.models.species_classifier import SpeciesClassifier, SpeciesConfig
from mambagen.pipelines.dna_masked_model import DNA_COMPLEMENT
from mambagen.pipelines.length_warmup import length_stages
from mambagen.pipelines.species_data import SpeciesSource, lower_as_unknown
from mambagen.pipelines.species_figures import Baseline, TestFigures, baselines, calibrate, measure_species
from mambagen.pipelines.species_report import card_quality, species_card, write_report
from mambagen.pipelines.species_task import LengthPlan, SpeciesTask
from mambagen.training.checkpoint import Checkpoint, newest_checkpoint
from mambagen.training.config import TrainConfig
from mambagen.training.loop import choose_device, set_threads, train
from mambagen.training.progress import Progress
from mambagen.training.resume import changed_settings, refuse_changes, refuse_other_data
from mambagen.training.run_folder import RunFolder, read_metrics

BEST = "model"  # the folder of a run that holds its best model
PATCH = 32  # bases a position, where nothing else is said
SHAPE = {"d_model": 128, "n_layer": 2}  # of the encoder over patches

# What a run cannot change when it goes on.
DATA = (
    *("data", "splits", "species", "valid_fraction", "test_fraction", "valid_records", "test_records"),
    *("simulated_species", "simulated_length", "divergence"),
)
FIXED = (
    *(*DATA, "encoder", "size", "model", "pooling", "equivariant", "dropout", "patch", "k", "start_from", "context"),
    *("shortest", "length_warmup", "batch_tokens", "by_record", "seed", "reverse_complement", "shuffled"),
)


class TrainSpeciesConfig(TrainConfig):
    """All settings of `mambagen train-species`; the keys of its TOML file."""

    data: tuple[str, ...] = ()  # folders, files, data sets by name; none: simulated species
    splits: str | None = None  # BED: record, start, end, split, and the species where a file holds several
    species: tuple[str, ...] = ()  # of the data; none: all
    valid_fraction: float = Field(0.1, ge=0, lt=1)  # where there are no splits
    test_fraction: float = Field(0.1, ge=0, lt=1)
    valid_records: tuple[str, ...] = ()  # or whole records, such as chr5
    test_records: tuple[str, ...] = ()
    simulated_species: int = Field(5, ge=2)
    simulated_length: int = Field(500_000, ge=20_000)  # bases a species
    divergence: float = Field(0.05, gt=0)
    encoder: Literal["bigs", "bigs-stack", "bimamba", "bert", "mamba"] | None = None  # None: bimamba, or start_from's
    size: Literal["250k", "700k", "1.4m", "3.5m", "7m", "19m", "41m"] | None = None  # of encoders over bases
    model: dict[str, Any] = Field(default_factory=dict)  # changes to the encoder's config, such as n_layer
    start_from: str | None = None  # a model folder whose encoder is gone on with
    pooling: Pooling | None = None  # None: mean, and last for the causal mamba
    equivariant: bool = False
    dropout: float = Field(0.1, ge=0, lt=1)
    patch: int | None = Field(None, ge=1)  # bases a position; None: 32 for a bimamba of its own, else 1
    k: int = Field(7, ge=1, le=8)  # of the k-mers that a patch is made of
    context: int = Field(4096, ge=16)  # bases in the longest windows, which are the model's
    shortest: int = Field(256, ge=16)  # steps have windows from this length, doubling, to the context
    length_warmup: int | None = Field(None, ge=16)  # length of the first windows, doubled in even stages
    batch_tokens: int = Field(65536, ge=16)
    by_record: Literal["bases", "uniform"] = "bases"  # how the records of a species are drawn
    reverse_complement: bool = True
    shuffled: bool = False  # train on labels drawn at random: a control that must not learn
    patience: int = Field(10, ge=1)
    valid_windows: int = Field(40, ge=1)  # of a species and length
    test_windows: int = Field(100, ge=1)
    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536, 262144)  # of test records
    baselines: bool = False  # fit what the accuracy is to be held against, at every length
    baseline_windows: int = Field(400, ge=10)  # of a species, to fit them on
    lr: float = Field(4e-3, gt=0, allow_inf_nan=False)

    @field_validator("lengths")
    @classmethod
    def _positive(cls, lengths: tuple[int, ...]) -> tuple[int, ...]:
        if not lengths or min(lengths) < 16:
            raise ValueError("lengths are 16 bases or more")
        return lengths

    def source(self) -> SpeciesSource:
        """The data as they were asked for."""
        return SpeciesSource(seed=self.seed, **{name: getattr(self, name) for name in DATA})

    def plan(self) -> LengthPlan:
        """Lengths by step; UsageError for a length warmup that does not fit."""
        shortest = min(self.shortest, self.context)
        if self.batch_tokens < self.context:
            raise UsageError(
                f"--batch-tokens {self.batch_tokens} is less than one window of --context {self.context} bases"
            )
        if self.length_warmup is None:
            return LengthPlan(self.context, shortest)
        if self.steps is None:
            raise UsageError("--length-warmup needs a budget in --steps: its stages are shares of them")
        stages = length_stages(self.length_warmup, self.context, self.batch_tokens, self.steps)
        return LengthPlan(self.context, shortest, tuple(stages))


@dataclass(frozen=True)
class TrainSpeciesResult:
    """What came out: the best model on validation, calibrated, and its figures on test."""

    run: Path
    model: Path
    report: Path
    name: str
    parameters: int
    species: tuple[str, ...]
    train_bases: int
    test: TestFigures | None
    baselines: tuple[Baseline, ...]
    temperature: float
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    stopped_early: bool


def train_species(
    config: TrainSpeciesConfig, out: Path | None = None, progress: Progress | None = None
) -> TrainSpeciesResult:
    """Begin a run in the folder `out` (default: runs/train-species-DATE-TIME), train, calibrate and measure.

    Raises:
        InputError, UsageError, ModelError, ResourceError, DivergedError, InterruptedRun: see docs/training.md.
    """
    progress = progress or Progress()
    choose_device(config.device)
    config = config.with_budget()
    config.plan()
    place = RunFolder.vacant(out, "train-species")
    parts = read_data(config, progress)
    model = new_model(config, parts.species)
    sampler_of(config, parts).check(config.plan().all())
    run = RunFolder.create(place)
    with run.lock():
        run.write_config(to_keep(config).model_dump())
        return _train_and_report(config, parts, run, model, None, progress)


def resume_train_species(
    folder: Path, options: Mapping[str, Any], config_file: Path | None = None, progress: Progress | None = None
) -> TrainSpeciesResult:
    """Go on with the run in `folder` from its newest whole checkpoint, bit for bit on a CPU; a finished run is measured
    and reported again.

    Raises:
        UsageError: a setting that would make it another model or other data. ModelError: no whole checkpoint.
    """
    progress = progress or Progress()
    run = RunFolder.open(folder)
    before, config = changed_settings(TrainSpeciesConfig, run, options, config_file)
    refuse_changes(folder, before, to_keep(config), FIXED)
    with run.lock():
        checkpoint = newest_checkpoint(run.checkpoints)
        model, _ = load_model(checkpoint.path, kinds=[SpeciesClassifier.kind])
        parts = read_data(config, progress)
        refuse_other_data(folder, checkpoint, identity(config, parts))
        run.write_config(to_keep(config).model_dump())
        return _train_and_report(config, parts, run, model, checkpoint, progress)


def read_data(config: TrainSpeciesConfig, progress: Progress) -> SpeciesParts:
    """The genomes, divided; InputError where nothing is held out for validation."""
    progress.state("reading the genomes ..." if config.data else "simulating genomes ...")
    set_threads(min(config.threads or torch.get_num_threads(), os.cpu_count() or 1))
    parts = config.source().read(DnaTokenizer())
    if not any(stretches.bases for stretches in parts.valid):
        raise InputError("no species has validation sequence; a model is chosen and calibrated on it")
    return parts


def new_model(config: TrainSpeciesConfig, species: tuple[str, ...]) -> SpeciesClassifier:
    """A classifier with first weights, its encoder that of `start_from` where one is given.

    Raises:
        UsageError, ModelError: settings that no encoder has, or that are not those of the given one.
    """
    source, shape = None, dict(config.model)
    name: str = config.encoder or "bimamba"
    patch = config.patch
    if config.start_from is not None:
        source, _ = load_model(config.start_from)
        name, trained, _ = encoder_of(source)
        if config.encoder not in (None, name):
            raise UsageError(f"--encoder {config.encoder}: {config.start_from} holds a {name}; leave --encoder out")
        if config.patch not in (None, 1):
            raise UsageError("--patch: a pretrained encoder reads one position a base; leave --patch out")
        shape = trained | shape
        patch = 1
    if patch is None:
        patch = PATCH if name == "bimamba" and config.size is None else 1
    try:
        if not {"d_model", "n_layer"} <= shape.keys():
            if patch > 1 and config.size is None:
                shape = SHAPE | shape
            else:
                wanted = count_parameters("mamba", MAMBA_SIZES[config.size or "250k"].model_dump())
                rest = {key: value for key, value in shape.items() if key not in ("d_model", "n_layer")}
                shape = match_parameters(name, wanted, fixed=rest) | shape
        architecture = SpeciesConfig(
            encoder=name,
            encoder_config=shape,
            classes=species,
            pooling=config.pooling or ("last" if name == "mamba" else "mean"),
            dropout=config.dropout,
            equivariant=config.equivariant,
            complement=DNA_COMPLEMENT,
            window=config.context,
            patch=patch,
            k=config.k,
        )
    except ValidationError as error:
        raise UsageError(f"the model's settings: {first_fault(error)}") from error
    except ValueError as error:
        raise UsageError(f"--size {config.size}: {error}") from error
    model = SpeciesClassifier(architecture, seed=config.seed)
    if source is not None:
        copy_encoder(source, model)
    return model


def sampler_of(config: TrainSpeciesConfig, parts: SpeciesParts) -> SpeciesSampler:
    """Draws the windows of a run."""
    return SpeciesSampler(
        parts.train, parts.species, config.seed, config.reverse_complement, MOST_UNKNOWN, config.by_record
    )


def fit_baselines(config: TrainSpeciesConfig, parts: SpeciesParts, progress: Progress) -> list[Baseline]:
    """What the accuracy is to be held against, on the same test windows; no model is needed for it."""
    return baselines(
        parts,
        lower_as_unknown(config.source()),
        config.lengths,
        config.baseline_windows,
        config.test_windows,
        config.seed,
        say=progress.state,
    )


def to_keep(config: TrainSpeciesConfig) -> TrainSpeciesConfig:
    """The same for config.toml: files by their absolute paths, so that a run can go on from any folder."""
    data, splits = config.source().absolute()
    start_from = None if config.start_from is None else os.path.abspath(config.start_from)
    return config.model_copy(update={"data": data, "splits": splits, "start_from": start_from})


def identity(config: TrainSpeciesConfig, parts: SpeciesParts) -> dict[str, Any]:
    """What a checkpoint has to share to be gone on from."""
    return {
        "training data": parts.fingerprints("train"),
        "validation data": parts.fingerprints("valid"),
        "order of the data": [config.context, config.shortest, config.length_warmup, config.batch_tokens, config.seed],
    }


def _train_and_report(
    config: TrainSpeciesConfig,
    parts: SpeciesParts,
    run: RunFolder,
    model: SpeciesClassifier,
    checkpoint: Checkpoint | None,
    progress: Progress,
) -> TrainSpeciesResult:
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    title = f"Species of {config.source().title()}"
    best = run.path / BEST
    history = []
    if checkpoint:
        rows = [row for row in read_metrics(run.metrics_file) if row["step"] <= checkpoint.position.step]
        history = [(row["valid_accuracy"], row["valid_loss"]) for row in rows if "valid_accuracy" in row]
    at_once = max(config.batch_tokens // config.accumulate, config.context)
    lengths = sorted({config.context, max(16, config.context // 4), max(16, config.context // 16)})
    valid = [draw_evaluation(parts.valid, length, config.valid_windows, config.seed) for length in lengths]

    def card(chosen: SpeciesClassifier, quality: str) -> str:
        return species_card(config, parts, chosen, title, quality)

    task = SpeciesTask(
        sampler=sampler_of(config, parts),
        plan=config.plan(),
        batch_tokens=config.batch_tokens,
        valid=[windows for windows in valid if len(windows)],
        tokenizer=DnaTokenizer(),
        patience=config.patience,
        identity=identity(config, parts),
        card=card,
        best=best,
        tokens_at_once=at_once,
        shuffled=config.shuffled,
        history=history,
    )
    if not task.valid:
        raise InputError(f"no validation stretch has {lengths[0]} bases; hold out more, or take a smaller --context")
    bases = sum(stretches.bases for stretches in parts.train)
    progress.note(f"{parameters:,} parameters on {choose_device(config.device)}; the run is in {run.path}")
    progress.note(f"{len(parts.species)} species, {bases:,} bases to train on")
    result = train(model, task, config, run, checkpoint, progress)

    chosen, _ = load_model(best, device=choose_device(config.device), kinds=[SpeciesClassifier.kind])
    progress.state("calibrating ...")
    chosen.calibrated(calibrate(chosen, parts, config.valid_windows, config.seed, at_once, None))
    figures = measure_species(
        chosen, parts, config.lengths, config.test_windows, config.seed, at_once, say=progress.state
    )
    found = fit_baselines(config, parts, progress) if config.baselines else []
    save_model(
        chosen,
        best,
        DnaTokenizer().model_dump(mode="json"),
        card(chosen, card_quality(figures, chosen)),
        replace=True,
    )
    report = write_report(
        run=run.path,
        title=title,
        model=chosen,
        parts=parts,
        figures=figures,
        found=found,
        rows=read_metrics(run.metrics_file),
        position=result.position,
        settings=to_keep(config).model_dump(),
    )
    return TrainSpeciesResult(
        run=run.path,
        model=best,
        report=report,
        name=f"{chosen.config.encoder} over patches of {chosen.config.patch}"
        if chosen.config.patch > 1
        else chosen.config.encoder,
        parameters=parameters,
        species=parts.species,
        train_bases=bases,
        test=figures,
        baselines=tuple(found),
        temperature=chosen.config.calibration.temperature,
        steps=result.position.step,
        tokens=result.position.tokens,
        seconds=result.position.seconds,
        tokens_per_second=result.tokens_per_second,
        stopped_early=task.done and result.position.step != config.steps,
    )
