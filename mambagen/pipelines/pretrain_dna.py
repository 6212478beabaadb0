"""Train a Mamba language model on DNA: configure, read, hold out, fit the baselines, train, report.

From Python:

    from mambagen.pipelines.pretrain_dna import PretrainDnaConfig, pretrain_dna
    result = pretrain_dna(PretrainDnaConfig(data=("genome.fa.gz",), size="7m", minutes=60))
"""

import logging
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field, ValidationError, field_validator

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.genome import Genome, Stretches
from mambagen.data_manifests import default_splits, load_manifest, manifest_names, resolve_dna
from mambagen.errors import DivergedError, InterruptedRun, ModelError, UsageError
from mambagen.models import MAMBA_SIZES, MambaConfig, MambaLM, load_model
from mambagen.models.encoders import count_parameters, match_parameters
from mambagen.models.files import first_fault
from mambagen.models.heads import EncoderModelConfig, MaskedLM
from mambagen.pipelines.dna_language_model import DnaLanguageTask, ModelCard, fit_baselines
from mambagen.pipelines.dna_masked_model import DNA_COMPLEMENT, MaskedDnaTask, fit_masked_baselines
from mambagen.reports.loss_plot import draw_loss
from mambagen.training.checkpoint import Checkpoint, newest_checkpoint
from mambagen.training.config import TrainConfig, configure, overlaid, read_toml, validated
from mambagen.training.loop import choose_device, set_threads, train
from mambagen.training.progress import Progress
from mambagen.training.run_folder import RunFolder, read_metrics

log = logging.getLogger("mambagen")
T = TypeVar("T")

# What a run cannot change when it goes on: it would be another model, or other data in another order.
SAME_MODEL = ("size", "model", "objective", "encoder", "equivariant", "lower_case", "n")
FIXED = (
    *("data", *SAME_MODEL, "context", "batch_tokens", "seed", "reverse_complement"),
    *("valid_fraction", "valid_records"),
)

# The peak learning rate where none is given; the default of the configuration is Mamba's.
ENCODER_LR = {"bigs": 2e-3, "bigs-stack": 2e-3, "bimamba": 4e-3, "bert": 1e-3}
DEFAULT_ENCODER = "bigs"


class PretrainDnaConfig(TrainConfig):
    """All settings of `mambagen pretrain-dna`; the keys of its TOML file."""

    data: tuple[str, ...] = Field(("demo",), min_length=1)  # names of data sets, FASTA or GenBank files, "-"
    size: str = "250k"
    model: dict[str, Any] = Field(default_factory=dict)  # changes to the size's MambaConfig, such as d_state
    objective: Literal["ar", "mlm"] = "ar"  # predict the next base, or masked bases from both sides
    encoder: Literal["bigs", "bigs-stack", "bimamba", "bert"] | None = None  # of masked models; None: bigs
    equivariant: bool = False  # of masked models: the other strand's answer is the answer's other strand, exactly
    start_from: str | None = None  # a model folder whose weights the run begins with
    context: int = Field(1024, ge=1)
    batch_tokens: int = Field(8192, ge=1)
    reverse_complement: bool = False
    lower_case: Literal["same", "n"] = "same"
    n: Literal["ignore", "predict"] = "ignore"
    valid_fraction: float | None = Field(None, ge=0, lt=1)  # default: the data set's own split, else a tenth
    valid_records: tuple[str, ...] = ()
    valid_tokens: int = Field(1 << 18, ge=1)

    @field_validator("size")
    @classmethod
    def _known_size(cls, size: str) -> str:
        if size not in MAMBA_SIZES:
            raise ValueError(f"it must be one of {', '.join(MAMBA_SIZES)}")
        return size

    def tokenizer(self) -> DnaTokenizer:
        """The policy for letters."""
        return DnaTokenizer(lower_case=self.lower_case, n=self.n)

    def mamba(self) -> MambaConfig:
        """The architecture; UsageError where `model` has what a MambaConfig does not know."""
        try:
            return MambaConfig(**MAMBA_SIZES[self.size].model_dump() | self.model)
        except ValidationError as error:
            raise UsageError(f"[model] of the configuration: {first_fault(error)}") from error

    def architecture(self) -> MambaConfig | EncoderModelConfig:
        """Of the objective's model. An encoder has as many parameters as the Mamba of that size, within 3 %.

        Raises:
            UsageError: settings of masked models for another, or fields that the architecture does not know.
        """
        if self.objective == "ar":
            if self.encoder or self.equivariant:
                option = "--encoder" if self.encoder else "--equivariant"
                raise UsageError(f"{option} belongs to masked models: add --objective mlm")
            return self.mamba()
        name = self.encoder or DEFAULT_ENCODER
        shape = dict(self.model)
        try:
            if not {"d_model", "n_layer"} <= shape.keys():
                wanted = count_parameters("mamba", MAMBA_SIZES[self.size].model_dump())
                rest = {key: value for key, value in shape.items() if key not in ("d_model", "n_layer")}
                shape = match_parameters(name, wanted, fixed=rest) | shape
            return EncoderModelConfig(
                encoder=name, encoder_config=shape, equivariant=self.equivariant, complement=DNA_COMPLEMENT
            )
        except ValidationError as error:
            raise UsageError(f"[model] of the configuration: {first_fault(error)}") from error
        except ValueError as error:
            raise UsageError(f"--size {self.size}: {error}") from error

    def new_model(self) -> MambaLM | MaskedLM:
        """A model with first weights, or those of `start_from`."""
        architecture = self.architecture()
        model: MambaLM | MaskedLM
        if isinstance(architecture, EncoderModelConfig):
            model = MaskedLM(architecture, seed=self.seed)
        else:
            model = MambaLM(architecture, seed=self.seed)
        if self.start_from is not None:
            given, _ = load_model(self.start_from, kinds=[model.kind])
            if given.config != architecture:
                raise ModelError(
                    f"{self.start_from}: holds another architecture than these settings describe (objective, encoder, "
                    f"size and [model] must be those that it was trained with)"
                )
            model.load_state_dict(given.state_dict())
        return model

    def model_name(self) -> str:
        """For titles and tables."""
        name = "Mamba" if self.objective == "ar" else self.encoder or DEFAULT_ENCODER
        own = ", equivariant" if self.equivariant else ""
        return f"{name} {self.size}{own}, changed" if self.model else f"{name} {self.size}{own}"

    def rows(self) -> int:
        """Windows a step; UsageError where not even one fits."""
        if self.batch_tokens < self.context:
            raise UsageError(
                f"--batch-tokens {self.batch_tokens} is less than one window of --context {self.context} bases"
            )
        return self.batch_tokens // self.context


@dataclass(frozen=True)
class PretrainDnaResult:
    """What came out; losses are in nats a base on the held-out data, None where nothing is held out."""

    run: Path
    checkpoint: Path
    name: str
    parameters: int
    loss: float | None
    targets: int
    baselines: dict[int, float]  # Markov order -> loss (see `objective`)
    uniform: float  # loss of a guess among the letters that are predicted
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    held_out: str
    objective: str = "ar"  # where it is "mlm", the keys of `baselines` are bases on either side
    accuracy: float | None = None  # of masked bases


def pretrain_dna(
    config: PretrainDnaConfig, out: Path | None = None, progress: Progress | None = None
) -> PretrainDnaResult:
    """Begin a run in the folder `out` (default: runs/pretrain-dna-DATE-TIME), train, and measure it.

    Raises:
        InputError, UsageError, ResourceError, DivergedError, InterruptedRun: see the exit codes in docs/training.md.
    """
    progress = progress or Progress()
    config = resolved(config)
    place = RunFolder.vacant(out, "pretrain-dna")  # said before the data are read, made after
    model = config.new_model()
    job = prepare(config, progress)
    run = RunFolder.create(place)
    with run.lock():
        run.write_config(to_keep(config).model_dump())
        return _train_and_report(config, job, run, model, None, progress)


def resume_pretrain_dna(
    folder: Path,
    options: Mapping[str, Any],
    config_file: Path | None = None,
    progress: Progress | None = None,
    out: Path | None = None,
) -> PretrainDnaResult:
    """Go on with the run in `folder` from its newest whole checkpoint, bit for bit on a CPU.

    With another context a run of masked models is a new run that begins with the weights of that checkpoint, as no
    encoder has a fixed length; its optimiser and schedule begin anew, and its data may be others.

    Args:
        options: settings to change; those that would make it another model or other data are refused.
        out: the folder of such a new run (default: that of the run with -contextN after its name).

    Raises:
        UsageError: such a setting. ModelError: no whole checkpoint, or data or architecture are not the run's.
    """
    progress = progress or Progress()
    run = RunFolder.open(folder)
    given = dict(read_toml(config_file) if config_file else {})
    given.update(options)
    before = configure(PretrainDnaConfig, run.config_file, {})
    changes = validated(PretrainDnaConfig, overlaid(before.model_dump(exclude_none=True), given), options, config_file)
    config = resolved(changes)
    longer = config.objective == "mlm" and config.context != before.context
    for name in SAME_MODEL if longer else FIXED:
        was, wanted = getattr(before, name), getattr(to_keep(config), name)
        if was != wanted:
            raise UsageError(
                f"--{name.replace('_', '-')} cannot change when a run goes on: {folder} has {was!r}, not {wanted!r}; "
                f"leave it out, or begin a new run"
            )
    if longer:
        weights = newest_checkpoint(run.checkpoints).path
        place = out or run.path.with_name(f"{run.path.name}-context{config.context}")
        return pretrain_dna(config.model_copy(update={"start_from": str(weights)}), place, progress)
    if out:
        raise UsageError("--out and --resume go together with another --context only: a run goes on in its own folder")
    with run.lock():
        checkpoint = newest_checkpoint(run.checkpoints)
        model, _ = load_model(checkpoint.path)
        if model.config != config.architecture():
            raise ModelError(f"{checkpoint.path}: holds another architecture than {run.config_file} describes")
        job = prepare(config, progress)
        for name, value in job.task.identity.items():
            if checkpoint.identity.get(name) != value:
                raise ModelError(f"{folder}: the {name} is not what the run began with; begin a new run with --out")
        run.write_config(to_keep(config).model_dump())
        return _train_and_report(config, job, run, model, checkpoint, progress)


def resolved(config: PretrainDnaConfig) -> PretrainDnaConfig:
    """The configuration with threads and budget filled in; what cannot be is said here, before the data are read.

    Raises:
        UsageError: no such device, a batch that is less than a window, an impossible architecture.
    """
    choose_device(config.device)
    config.rows()
    config.architecture()
    if config.objective == "mlm" and "lr" not in config.model_fields_set:
        config = config.model_copy(update={"lr": ENCODER_LR[config.encoder or DEFAULT_ENCODER]})
    cores = os.cpu_count() or 1
    threads = config.threads or torch.get_num_threads()
    if threads > cores:
        log.warning("%d threads on %d cores: using %d", threads, cores, cores)
    return config.model_copy(update={"threads": min(threads, cores)}).with_budget()


def to_keep(config: PretrainDnaConfig) -> PretrainDnaConfig:
    """The same for config.toml: files by their absolute paths, so that a run can go on from any folder."""
    names = manifest_names()
    data = (given if given in names or given == "-" else os.path.abspath(given) for given in config.data)
    start_from = None if config.start_from is None else os.path.abspath(config.start_from)
    return config.model_copy(update={"data": tuple(data), "start_from": start_from})


@dataclass(frozen=True)
class Job:
    """What is ready before training: the data divided, and the losses to beat."""

    task: DnaLanguageTask | MaskedDnaTask
    train: Stretches
    baselines: Future[dict[int, float]]
    held_out: str


def prepare(config: PretrainDnaConfig, progress: Progress) -> Job:
    """Read the data, hold a part out, fit the baselines on the rest."""
    set_threads(config.threads or 1)
    progress.state("reading the data ...")
    genome = Genome.from_files(resolve_dna(config.data), config.tokenizer())
    if config.valid_records:
        train_part, valid_part = genome.hold_out(records=config.valid_records)
    elif config.valid_fraction is not None:
        train_part, valid_part = genome.hold_out(config.valid_fraction, seed=config.seed)
    else:
        train_part, valid_part = genome.hold_out(0.1, seed=config.seed, intervals=default_splits(config.data))
    rows = config.rows()
    identity = {
        "training data": train_part.fingerprint(),
        "held-out data": valid_part.fingerprint(),
        "tokenizer": config.tokenizer().model_dump(mode="json"),
        "architecture": config.architecture().model_dump(mode="json"),
        "order of the data": [config.context, rows, config.seed, config.reverse_complement],
    }
    task = (MaskedDnaTask if config.objective == "mlm" else DnaLanguageTask)(
        train_part,
        valid_part,
        config.context,
        rows,
        config.seed,
        config.reverse_complement,
        config.valid_tokens,
        identity,
        _card(config, genome, train_part),
        rows_at_once=max(1, rows // config.accumulate),
        steps=config.steps,
    )
    baselines = _background(lambda: _fit_baselines(task, train_part, config.reverse_complement))
    if choose_device(config.device).type == "cpu":  # where training needs the cores; beside a GPU they have time
        progress.state("fitting the baselines ...")
        baselines.result()
    pieces = len(valid_part)
    masked = "masked " if config.objective == "mlm" else ""
    described = f"{task.held_out.targets:,} {masked}bases in {pieces} stretch{'es' if pieces != 1 else ''}"
    return Job(task, train_part, baselines, described)


def _fit_baselines(
    task: DnaLanguageTask | MaskedDnaTask, train_part: Stretches, both_strands: bool
) -> dict[int, float]:
    if isinstance(task, MaskedDnaTask):
        return fit_masked_baselines(train_part, task.held_out, both_strands)
    return fit_baselines(train_part, task.held_out, both_strands=both_strands)


def _train_and_report(
    config: PretrainDnaConfig,
    job: Job,
    run: RunFolder,
    model: MambaLM | MaskedLM,
    checkpoint: Checkpoint | None,
    progress: Progress,
) -> PretrainDnaResult:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = config.model_name()
    where = f"{choose_device(config.device)}" + (f" after step {checkpoint.position.step}" if checkpoint else "")
    progress.note(f"{name} ({parameters:,} parameters) on {where}; the run is in {run.path}")
    progress.note(f"{job.train.bases:,} bases to train on; held out: {job.held_out}")
    title = f"{name} on {_data_names(config)}, context {config.context:,}"
    uniform = math.log(4 if config.objective == "mlm" else len(config.tokenizer().letters))  # N is never masked
    try:
        result = train(model, job.task, config, run, checkpoint, progress)
    except (InterruptedRun, DivergedError):
        known = job.baselines.result() if job.baselines.done() else {}
        draw_loss(run.loss_plot, read_metrics(run.metrics_file), _lines(config, known, uniform), title)
        raise
    baselines = job.baselines.result()
    draw_loss(run.loss_plot, read_metrics(run.metrics_file), _lines(config, baselines, uniform), title)
    return PretrainDnaResult(
        run=run.path,
        checkpoint=result.checkpoint,
        name=name,
        parameters=parameters,
        loss=result.held_out.get("loss"),
        targets=int(result.held_out.get("targets", 0)),
        baselines=baselines,
        uniform=uniform,
        steps=result.position.step,
        tokens=result.position.tokens,
        seconds=result.position.seconds,
        tokens_per_second=result.tokens_per_second,
        held_out=job.held_out,
        objective=config.objective,
        accuracy=result.held_out.get("accuracy"),
    )


def _background(work: Callable[[], T]) -> "Future[T]":
    """Do the work on a thread that does not hold up the end of the process (as an executor's would)."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="chains", daemon=True).start()
    return future


def _lines(config: PretrainDnaConfig, baselines: Mapping[int, float], uniform: float) -> dict[str, float]:
    """The losses to beat, for the plot."""
    name = "{} either side" if config.objective == "mlm" else "order-{} Markov"
    return {name.format(key): loss for key, loss in baselines.items()} | {"uniform": uniform}


def _data_names(config: PretrainDnaConfig) -> str:
    names = [Path(given).name if given != "-" else "stdin" for given in config.data]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _card(config: PretrainDnaConfig, genome: Genome, train_part: Stretches) -> ModelCard:
    data = [f"{_data_names(config)}: {train_part.bases:,} of {genome.bases:,} bases in {len(genome.records)} records."]
    for given in config.data:
        if given in manifest_names():
            manifest = load_manifest(given)
            data.append(f"{manifest.title}. {manifest.provenance}. Licence: {manifest.licence}.")
    goal = "masked bases" if config.objective == "mlm" else "next base"
    recipe = (
        f"`mambagen pretrain-dna`: {goal}, context {config.context}, {config.rows() * config.context:,} tokens a step, "
        f"AdamW with peak learning rate {config.lr:g}, warmup {config.warmup:g} of the budget, cosine to zero, "
        f"weight decay {config.weight_decay:g}, gradient clipped at {config.clip:g}, seed {config.seed}. All settings "
        f"are in the run's config.toml."
    )
    return ModelCard(f"{config.model_name()} on {_data_names(config)}", "\n\n".join(data), recipe)
