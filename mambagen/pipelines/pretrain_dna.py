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
from typing import Any, TypeVar

import numpy as np
import torch

from mambagen.data.genome import Genome, Stretches
from mambagen.data.intervals import Interval
from mambagen.data.windows import IntervalSampler, StagedSampler, WindowSampler
from mambagen.data_manifests import load_manifest, manifest_names
from mambagen.errors import DivergedError, InputError, InterruptedRun, ModelError, UsageError
from mambagen.models import MambaLM, load_model
from mambagen.models.heads import MaskedLM
from mambagen.models.mamba_block import MambaBlock
from mambagen.pipelines.dna_language_model import DnaLanguageTask, fit_baselines
from mambagen.pipelines.dna_masked_model import MaskedDnaTask, fit_masked_baselines
from mambagen.pipelines.genomes import open_genome, split_rows
from mambagen.pipelines.model_cards import ModelCard
from mambagen.pipelines.pretrain_dna_config import DEFAULT_ENCODER, ENCODER_LR, PretrainDnaConfig
from mambagen.pipelines.run_reports import report_pretraining
from mambagen.reports.loss_plot import draw_loss
from mambagen.training.checkpoint import Checkpoint, newest_checkpoint
from mambagen.training.looks import end_is_worse, look_loss, training_loss_fell
from mambagen.training.loop import TrainResult, choose_device, set_threads, train
from mambagen.training.progress import Progress
from mambagen.training.resume import changed_settings, refuse_changes, refuse_other_data
from mambagen.training.run_folder import RunFolder, read_metrics

__all__ = ["PretrainDnaConfig", "PretrainDnaResult", "pretrain_dna", "resume_pretrain_dna"]

log = logging.getLogger("mambagen")
T = TypeVar("T")

# What a run cannot change when it goes on: it would be another model, or other data in another order.
SAME_MODEL = ("size", "model", "objective", "encoder", "equivariant", "lower_case", "n")
FIXED = (
    *("data", *SAME_MODEL, "context", "length_warmup", "length_shares", "batch_tokens", "seed", "reverse_complement"),
    *("splits", "valid_fraction", "valid_records", "windows", "strict_split"),
)

BASELINE_BASES = 1 << 27  # of the training part at most: counts of 8 bases change little beyond


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
    warning: str | None = None  # one line, where the last weights are worse than those of a look on the way


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
    choose_recompute(model, config.recompute)
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
    before, changes = changed_settings(PretrainDnaConfig, run, options, config_file)
    config = resolved(changes)
    longer = config.objective == "mlm" and config.context != before.context
    fixed = SAME_MODEL if longer else FIXED
    refuse_changes(folder, before, to_keep(config), fixed, advice="leave it out, or begin a new run")
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
        refuse_other_data(folder, checkpoint, job.task.identity)
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
    config = config.in_steps()
    if config.objective == "mlm" and "lr" not in config.model_fields_set:
        config = config.model_copy(update={"lr": ENCODER_LR[config.encoder or DEFAULT_ENCODER]})
    cores = os.cpu_count() or 1
    threads = config.threads or torch.get_num_threads()
    if threads > cores:
        log.warning("%d threads on %d cores: using %d", threads, cores, cores)
    config = config.model_copy(update={"threads": min(threads, cores)}).with_budget()
    config.stages()
    return config


def to_keep(config: PretrainDnaConfig) -> PretrainDnaConfig:
    """The same for config.toml: files by their absolute paths, so that a run can go on from any folder."""
    names = manifest_names()
    data = (given if given in names or given == "-" else os.path.abspath(given) for given in config.data)
    start_from = None if config.start_from is None else os.path.abspath(config.start_from)
    splits = None if config.splits is None else os.path.abspath(config.splits)
    return config.model_copy(update={"data": tuple(data), "start_from": start_from, "splits": splits})


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
    genome = open_genome(config.data, config.tokenizer())
    intervals: list[Interval] = []
    if config.valid_records:
        train_part, valid_part = genome.hold_out(records=config.valid_records)
    elif config.valid_fraction is not None:
        train_part, valid_part = genome.hold_out(config.valid_fraction, seed=config.seed)
    else:
        intervals = split_rows(config.data, genome, config.splits)
        train_part, valid_part = genome.hold_out(0.1, seed=config.seed, intervals=intervals)
    rows = config.rows()
    sampler, order = _sampler(config, train_part, intervals)
    identity = {
        "training data": train_part.fingerprint(),
        "held-out data": valid_part.fingerprint(),
        "tokenizer": config.tokenizer().model_dump(mode="json"),
        "architecture": config.architecture().model_dump(mode="json"),
        "order of the data": [config.context, rows, config.seed, config.reverse_complement, *order],
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
        sampler=sampler,
    )
    fitted_on = train_part.some(BASELINE_BASES)
    baselines = _background(lambda: _fit_baselines(task, fitted_on, config.reverse_complement))
    if choose_device(config.device).type == "cpu":  # where training needs the cores; beside a GPU they have time
        progress.state("fitting the baselines ...")
        baselines.result()
    pieces = len(valid_part)
    masked = "masked " if config.objective == "mlm" else ""
    described = f"{task.held_out.targets:,} {masked}bases in {pieces} stretch{'es' if pieces != 1 else ''}"
    return Job(task, train_part, baselines, described)


def _sampler(
    config: PretrainDnaConfig, train_part: Stretches, intervals: list[Interval]
) -> tuple[WindowSampler | StagedSampler, list[Any]]:
    """What draws the training windows, and what of it a resumed run must share beyond length, rows, seed and strand."""

    def of(context: int, rows: int) -> WindowSampler:
        common = (context, rows, config.seed, config.reverse_complement, np.int8)  # bytes: there may be millions a step
        if config.windows == "intervals":
            return IntervalSampler(train_part, intervals, *common, strict=config.strict_split)
        try:
            return WindowSampler(train_part, *common)
        except InputError as error:
            if not any(row[3] == "train" for row in intervals):
                raise
            hint = "--windows intervals, whose windows may leave the training part"
            raise InputError(f"{error}, or {hint}") from None

    order: list[Any] = ["intervals", config.strict_split] if config.windows == "intervals" else []
    stages = config.stages()
    if not stages:
        return of(config.context, config.rows()), order
    order += [config.length_warmup, list(config.length_shares)]
    return StagedSampler([of(stage.context, stage.rows) for stage in stages], [stage.end for stage in stages]), order


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
    choose_recompute(model, config.recompute)
    try:
        result = train(model, job.task, config, run, checkpoint, progress)
    except (InterruptedRun, DivergedError):
        known = job.baselines.result() if job.baselines.done() else {}
        draw_loss(run.loss_plot, read_metrics(run.metrics_file), _lines(config, known, uniform), title)
        raise
    baselines = job.baselines.result()
    lines, rows = _lines(config, baselines, uniform), read_metrics(run.metrics_file)
    draw_loss(run.loss_plot, rows, lines, title)
    warning = _worse(config, rows, result)
    if warning:
        log.warning("%s", warning)
    finished = PretrainDnaResult(
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
        warning=warning,
    )
    report_pretraining(finished, title, lines, rows, to_keep(config).model_dump())
    return finished


def _worse(config: PretrainDnaConfig, rows: list[dict[str, Any]], result: TrainResult) -> str | None:
    """What is to be said where held-out bases were better known on the way; no weights of then are kept."""
    best = end_is_worse(rows, result.held_out)
    if best is None:
        return None
    why, advice = "and the training loss did not fall", "a lower --lr"
    if training_loss_fell(rows, best["step"]):
        why = "while the training loss fell: the data were learnt by heart"
        fewer = "--minutes" if config.steps is None else "--tokens" if config.tokens else "--steps"
        advice = f"fewer {fewer}, a smaller --size or more data"
    return (
        f"perplexity on the {result.held_out['look_targets']:,} held-out bases of the looks rose from "
        f"{math.exp(look_loss(best)):.4f} at step {best['step']:,} to {math.exp(result.held_out['look_loss']):.4f} at "
        f"step {result.position.step:,} {why}; train again with {advice}"
    )


def choose_recompute(model: torch.nn.Module, recompute: str) -> None:
    """Let blocks compute activations again in the backward "always", "never", or "auto": as a GPU's memory asks."""
    blocks = [module for module in model.modules() if isinstance(module, MambaBlock)]
    if recompute == "always" and not blocks:
        raise UsageError("--recompute always: only Mamba blocks compute again; save memory by a larger --accumulate")
    for block in blocks:
        block.keep = {"auto": "auto", "always": "input", "never": "all"}[recompute]


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
    lengths = f" (windows from {config.length_warmup} on, doubling)" if config.length_warmup else ""
    recipe = (
        f"`mambagen pretrain-dna`: {goal}, context {config.context}{lengths}, {config.rows() * config.context:,} "
        f"tokens a step, AdamW with peak learning rate {config.lr:g}, warmup {config.warmup:g} of the budget, cosine "
        f"to zero, weight decay {config.weight_decay:g}, gradient clipped at {config.clip:g}, seed {config.seed}. All "
        f"settings are in the run's config.toml."
    )
    return ModelCard(f"{config.model_name()} on {_data_names(config)}", "\n\n".join(data), recipe)
