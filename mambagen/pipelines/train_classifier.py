"""Train a classifier of sequences: read, divide, train until validation gets no better, measure beside k-mers.

From Python:

    from mambagen.pipelines.train_classifier import TrainClassifierConfig, train_classifier
    result = train_classifier(TrainClassifierConfig(data="train.csv", test="test.csv", start_from="runs/bigs/..."))
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.labelled import Labelled, RecordLabels, read_labelled
from mambagen.errors import InputError, UsageError
from mambagen.models import MAMBA_SIZES, load_model
from mambagen.models.encoders import count_parameters, match_parameters
from mambagen.models.files import first_fault
from mambagen.models.heads import ClassifierConfig, Pooling, SequenceClassifier, copy_encoder, encoder_of
from mambagen.pipelines.dna_masked_model import DNA_COMPLEMENT
from mambagen.pipelines.model_cards import ModelCard
from mambagen.pipelines.run_reports import report_classifier
from mambagen.pipelines.sequence_classification import (
    ClassificationTask,
    Figures,
    kmer_baseline,
    measure,
)
from mambagen.training.checkpoint import Checkpoint, newest_checkpoint
from mambagen.training.config import TrainConfig
from mambagen.training.loop import choose_device, set_threads, train
from mambagen.training.progress import Progress
from mambagen.training.resume import changed_settings, refuse_changes, refuse_other_data
from mambagen.training.run_folder import RunFolder, read_metrics

log = logging.getLogger("mambagen")

DEFAULT_ENCODER = "bigs"
BEST = "model"  # the folder of a run that holds its best model

# What a run cannot change when it goes on.
FIXED = (
    *("data", "labels", "valid", "valid_fraction", "sequence_column", "label_column", "encoder", "size", "model"),
    *("pooling", "equivariant", "dropout", "batch", "seed", "reverse_complement", "lower_case", "start_from"),
)


class TrainClassifierConfig(TrainConfig):
    """All settings of `mambagen train-classifier`; the keys of its TOML file."""

    data: str  # a table, or a FASTA file with `labels`
    labels: str | None = None
    valid: str | None = None  # a second file like `data`; None: a share of `data`
    test: str | None = None  # a third, measured at the end
    valid_fraction: float = Field(0.1, gt=0, lt=1)
    sequence_column: str = "sequence"
    label_column: str = "label"
    encoder: Literal["bigs", "bigs-stack", "bimamba", "bert", "mamba"] | None = None  # None: that of `start_from`
    size: Literal["250k", "700k", "1.4m", "3.5m", "7m", "19m", "41m"] = "250k"
    model: dict[str, Any] = Field(default_factory=dict)  # changes to the encoder's config, such as n_layer
    start_from: str | None = None  # a model folder whose encoder is gone on with
    pooling: Pooling | None = None  # None: mean, and last for the causal mamba
    equivariant: bool = False
    dropout: float = Field(0.1, ge=0, lt=1)
    batch: int = Field(64, ge=1)  # sequences an update
    epochs: int = Field(10, ge=1)  # where neither steps nor minutes are given
    patience: int = Field(4, ge=1)  # evaluations, of ten a run, without a better one before training ends
    reverse_complement: bool = False  # read half of the sequences from the other strand
    lower_case: Literal["same", "n"] = "same"
    baseline: bool = True  # fit a logistic regression on k-mers beside it
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False)

    def tokenizer(self) -> DnaTokenizer:
        """The policy for letters."""
        return DnaTokenizer(lower_case=self.lower_case)


@dataclass(frozen=True)
class TrainClassifierResult:
    """What came out: the best model on validation, and its figures."""

    run: Path
    model: Path
    name: str
    parameters: int
    classes: tuple[str, ...]
    train_rows: int
    valid: Figures
    test: Figures | None
    baseline_valid: Figures | None
    baseline_test: Figures | None
    steps: int
    seconds: float
    stopped_early: bool


def train_classifier(
    config: TrainClassifierConfig, out: Path | None = None, progress: Progress | None = None
) -> TrainClassifierResult:
    """Begin a run in the folder `out` (default: runs/train-classifier-DATE-TIME), train, and measure the best model.

    Raises:
        InputError, UsageError, ModelError, ResourceError, DivergedError, InterruptedRun: see docs/training.md.
    """
    progress = progress or Progress()
    choose_device(config.device)
    place = RunFolder.vacant(out, "train-classifier")
    data = read_data(config, progress)
    config = with_steps(config, data)
    model = new_model(config, data.classes)
    run = RunFolder.create(place)
    with run.lock():
        run.write_config(to_keep(config).model_dump())
        return _train_and_report(config, data, run, model, None, progress)


def resume_train_classifier(
    folder: Path, options: Mapping[str, Any], config_file: Path | None = None, progress: Progress | None = None
) -> TrainClassifierResult:
    """Go on with the run in `folder` from its newest whole checkpoint, bit for bit on a CPU.

    Raises:
        UsageError: a setting that would make it another model or other data. ModelError: no whole checkpoint.
    """
    progress = progress or Progress()
    run = RunFolder.open(folder)
    before, config = changed_settings(TrainClassifierConfig, run, options, config_file, {"epochs": "steps"})
    refuse_changes(folder, before, to_keep(config), FIXED)
    with run.lock():
        checkpoint = newest_checkpoint(run.checkpoints)
        model, _ = load_model(checkpoint.path, kinds=[SequenceClassifier.kind])
        data = read_data(config, progress)
        config = with_steps(config, data)
        refuse_other_data(folder, checkpoint, identity(config, data))
        run.write_config(to_keep(config).model_dump())
        return _train_and_report(config, data, run, model, checkpoint, progress)


@dataclass(frozen=True)
class Data:
    """What is trained on, what training is judged by, and what nobody looks at before the end."""

    train: Labelled
    valid: Labelled
    test: Labelled | None
    classes: tuple[str, ...]


def read_data(config: TrainClassifierConfig, progress: Progress) -> Data:
    """Read the files; InputError where a label of validation or test is none of the training data's."""
    progress.state("reading the data ...")
    set_threads(min(config.threads or torch.get_num_threads(), os.cpu_count() or 1))

    labels = None if config.labels is None else RecordLabels.read(config.labels)

    def read(path: str) -> Labelled:
        return read_labelled(path, labels, config.tokenizer(), config.sequence_column, config.label_column)

    train_part = read(config.data)
    classes = train_part.classes()
    if len(classes) < 2:
        raise InputError.at(train_part.path, None, f"all rows have the label '{classes[0]}'; a classifier needs two")
    if config.valid is not None:
        valid_part = read(config.valid)
    else:
        train_part, valid_part = train_part.hold_out(config.valid_fraction, config.seed)
        if not len(valid_part):
            raise InputError.at(
                train_part.path, None, f"{len(train_part)} rows are too few to hold any out; give --valid a file"
            )
    test_part = None if config.test is None else read(config.test)
    for part in (valid_part, test_part):
        if part is not None:
            part.indices(classes)  # says which label is unknown before anything is trained
    if labels is not None:
        _warn_of_unused(labels, [part for part in (train_part, valid_part, test_part) if part is not None])
    return Data(train_part, valid_part, test_part, classes)


def _warn_of_unused(labels: RecordLabels, parts: list[Labelled]) -> None:
    """A label without its record is mostly a name that is spelt otherwise in the FASTA, or a wrong file."""
    unused = sorted(labels.of.keys() - {name for part in parts for name in part.names})
    if unused:
        named = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        log.warning("%s: %d of its names are no record of the sequence files: %s", labels.path, len(unused), named)


def new_model(config: TrainClassifierConfig, classes: tuple[str, ...]) -> SequenceClassifier:
    """A classifier with first weights, its encoder that of `start_from` where one is given.

    Raises:
        UsageError, ModelError: settings that no encoder has, or that are not those of the given one.
    """
    source, name, shape = None, config.encoder or DEFAULT_ENCODER, dict(config.model)
    if config.start_from is not None:
        source, _ = load_model(config.start_from)
        name, trained, _ = encoder_of(source)
        if config.encoder not in (None, name):
            raise UsageError(f"--encoder {config.encoder}: {config.start_from} holds a {name}; leave --encoder out")
        shape = trained | shape
    try:
        if not {"d_model", "n_layer"} <= shape.keys():
            wanted = count_parameters("mamba", MAMBA_SIZES[config.size].model_dump())
            rest = {key: value for key, value in shape.items() if key not in ("d_model", "n_layer")}
            shape = match_parameters(name, wanted, fixed=rest) | shape
        architecture = ClassifierConfig(
            encoder=name,
            encoder_config=shape,
            classes=classes,
            pooling=config.pooling or ("last" if name == "mamba" else "mean"),
            dropout=config.dropout,
            equivariant=config.equivariant,
            complement=DNA_COMPLEMENT,
        )
    except ValidationError as error:
        raise UsageError(f"[model] of the configuration: {first_fault(error)}") from error
    except ValueError as error:
        raise UsageError(f"--size {config.size}: {error}") from error
    model = SequenceClassifier(architecture, seed=config.seed)
    if source is not None:
        copy_encoder(source, model)
    return model


def with_steps(config: TrainClassifierConfig, data: Data) -> TrainClassifierConfig:
    """The epochs as steps, where no other budget is given."""
    if config.steps is not None or config.minutes is not None:
        return config
    rows = min(config.batch, len(data.train))
    return config.model_copy(update={"steps": config.epochs * -(-len(data.train) // rows)})


def to_keep(config: TrainClassifierConfig) -> TrainClassifierConfig:
    """The same for config.toml: files by their absolute paths, so that a run can go on from any folder."""
    paths = {name: getattr(config, name) for name in ("data", "labels", "valid", "test", "start_from")}
    return config.model_copy(update={name: os.path.abspath(path) for name, path in paths.items() if path is not None})


def identity(config: TrainClassifierConfig, data: Data) -> dict[str, Any]:
    """What a checkpoint has to share to be gone on from."""
    return {
        "training data": data.train.fingerprint(),
        "validation data": data.valid.fingerprint(),
        "classes": list(data.classes),
        "tokenizer": config.tokenizer().model_dump(mode="json"),
        "order of the data": [config.batch, config.seed, config.reverse_complement],
    }


def _train_and_report(
    config: TrainClassifierConfig,
    data: Data,
    run: RunFolder,
    model: SequenceClassifier,
    checkpoint: Checkpoint | None,
    progress: Progress,
) -> TrainClassifierResult:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = f"{model.config.encoder} {'from ' + config.start_from if config.start_from else config.size}"
    longest = max(len(sequence) for sequence in data.train.sequences)
    at_once = max(config.batch * longest // config.accumulate, longest)
    history = []
    if checkpoint:
        rows = [row for row in read_metrics(run.metrics_file) if row["step"] <= checkpoint.position.step]
        history = [(row["valid_mcc"], row["valid_loss"]) for row in rows if "valid_mcc" in row]
    best = run.path / BEST
    task = ClassificationTask(
        data.train,
        data.valid,
        data.classes,
        config.tokenizer(),
        config.batch,
        config.seed,
        config.reverse_complement,
        config.patience,
        identity(config, data),
        _card(config, data, model),
        best,
        at_once,
        history,
    )
    progress.note(f"{name} ({parameters:,} parameters) on {choose_device(config.device)}; the run is in {run.path}")
    progress.note(f"{len(data.train):,} sequences of {len(data.classes)} classes; {len(data.valid):,} for validation")
    result = train(model, task, config, run, checkpoint, progress)
    device = choose_device(config.device)
    chosen, _ = load_model(best, device=device, kinds=[SequenceClassifier.kind])
    progress.state("measuring the best model ...")
    valid = measure(chosen, data.valid.sequences, data.valid.indices(data.classes), at_once)
    test = None
    if data.test is not None:
        test = measure(chosen, data.test.sequences, data.test.indices(data.classes), at_once)
    baseline: tuple[Figures | None, Figures | None] = (None, None)
    if config.baseline:
        progress.state("fitting the k-mer baseline ...")
        fitted = kmer_baseline(data.train, data.valid, data.test or data.valid, data.classes)
        baseline = fitted[0], fitted[1] if data.test is not None else None
    finished = TrainClassifierResult(
        run=run.path,
        model=best,
        name=name,
        parameters=parameters,
        classes=data.classes,
        train_rows=len(data.train),
        valid=valid,
        test=test,
        baseline_valid=baseline[0],
        baseline_test=baseline[1],
        steps=result.position.step,
        seconds=result.position.seconds,
        stopped_early=task.done and result.position.step != config.steps,
    )
    report_classifier(finished, read_metrics(run.metrics_file), to_keep(config).model_dump())
    return finished


def _card(config: TrainClassifierConfig, data: Data, model: SequenceClassifier) -> ModelCard:
    begun = f"from {Path(config.start_from).name}" if config.start_from else "from scratch"
    recipe = (
        f"`mambagen train-classifier` {begun}: {config.batch} sequences a step, AdamW with peak learning rate "
        f"{config.lr:g}, warmup {config.warmup:g} of the budget, cosine to zero, weight decay {config.weight_decay:g}, "
        f"dropout {config.dropout:g} before the head, seed {config.seed}; the best on validation of ten looks. All "
        f"settings are in the run's config.toml."
    )
    where = Path(config.data).name
    return ModelCard(
        f"Classifier of {where} ({model.config.encoder})",
        f"{where}: {len(data.train):,} sequences to train on, {len(data.valid):,} for validation.",
        recipe,
    )
