"""Judge one-second clips of spoken digits, a model's or anybody's: figures with intervals, what is wrong, a page.

From Python:

    from mambagen.pipelines.eval_sc09 import EvalSc09Config, eval_sc09
    result = eval_sc09(EvalSc09Config(samples="clips/"))
    print(result.scores.fid, result.findings)
"""

import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambagen.data.generated_clips import GeneratedClips, read_generated
from mambagen.data.spoken_words import DIGITS, RATE, SpokenWords
from mambagen.data.wav import to_int16, write_wav
from mambagen.data.whole_file import whole_file
from mambagen.errors import InputError, UsageError
from mambagen.pipelines.sc09_data import read_words
from mambagen.pipelines.sc09_findings import find_faults
from mambagen.pipelines.sc09_generation import Generator, Likelihood, Sampling
from mambagen.pipelines.sc09_judge import DigitJudge, Judged
from mambagen.pipelines.sc09_metrics import score, spread
from mambagen.pipelines.sc09_published import sashimi_scores, sashimi_scores_with_threshold
from mambagen.pipelines.sc09_reference import Reference, load_reference
from mambagen.pipelines.sc09_report import build_report
from mambagen.pipelines.sc09_results import REPORT, Candidates, EvalSc09Config, EvalSc09Result
from mambagen.pipelines.sc09_stats import make_reference, shipped_reference
from mambagen.reports.sc09_page import sc09_page
from mambagen.training.loop import set_threads
from mambagen.training.progress import Progress
from mambagen.training.run_folder import RunFolder

DEFAULT_MODEL = "digits"
DEFAULT_COUNT = {"cpu": 40, "cuda": 2048}  # clips that a model is asked for
DEFAULT_NLL_CLIPS = {"cpu": 16, "cuda": None}  # real clips that its likelihood is taken of
METRICS, CLIPS, SAMPLES = "metrics.json", "clips.tsv", "samples"


def eval_sc09(config: EvalSc09Config, out: Path | None = None, progress: Progress | None = None) -> EvalSc09Result:
    """Judge clips and write OUT (default: runs/eval-sc09-DATE-TIME) with report.html, metrics.json and clips.tsv.

    Raises:
        InputError: nothing to judge; with `strict` also where a file was not as expected (OUT is written all the same).
        UsageError, ModelError, ResourceError.
    """
    progress = progress or Progress()
    if config.model is not None and config.samples is not None:
        raise UsageError("MODEL and --samples are two things to judge: give one of them")
    place = RunFolder.vacant(out, "eval-sc09")
    if config.threads is not None:
        set_threads(min(config.threads, os.cpu_count() or 1))
    judge = DigitJudge(config.judge, config.device)
    words = read_real(config, progress)
    reference = choose_reference(config, judge, words, progress)
    generator = None if config.samples is not None else Generator(config.model or DEFAULT_MODEL, judge.device)
    candidates = take_clips(config, generator, progress)

    progress.state("judging ...")
    judged = judge.judge_cached(candidates.samples)
    if len(judged) < 2:
        raise InputError(f"{candidates.name}: one clip has no figures; give two at least")
    progress.state("computing the figures ...")
    moments, mean = reference.moments, reference.mean_prediction
    scores = score(judged.features, judged.log_p, moments, mean, config.seed)
    sashimi = threshold = None
    if config.protocol == "sashimi":
        sashimi = sashimi_scores(judged.features, judged.log_p, moments, mean)
        order = by_likelihood(candidates)
        threshold = sashimi_scores_with_threshold(
            judged.features[order], judged.log_p[order], moments, mean, reference.facts.test_count
        )
    biased = scores.count < 2 * judged.features.shape[1]
    result = EvalSc09Result(
        folder=place,
        name=candidates.name,
        reference=reference,
        scores=scores,
        sashimi=sashimi,
        sashimi_threshold=threshold,
        nll=likelihood_of(config, generator, words, progress),
        asked_right=share_right(candidates, judged),
        heard=tuple(spread(judged.log_p).tolist()),
        findings=tuple(find_faults(candidates.samples, judged, moments, judge.digits)),
        fid_biased=biased,
        notes=candidates.notes,
        files=candidates.files,
        generated=generator is not None,
    )
    progress.state("writing the report ...")
    write_results(config, result, candidates, judged)
    if config.strict and result.notes:
        bad = len({note.path for note in result.notes})
        raise InputError(
            f"{candidates.name}: {bad} of {result.files} files are not as expected, the first: {result.notes[0]} "
            f"(--strict; the report is in {place})"
        )
    return result


def read_real(config: EvalSc09Config, progress: Progress) -> SpokenWords | None:
    """The real digits, where --data names some."""
    if config.data is None:
        return None
    progress.state("reading the real digits ...")
    return read_words(config.data)


def choose_reference(
    config: EvalSc09Config, judge: DigitJudge, words: SpokenWords | None, progress: Progress
) -> Reference:
    """Statistics from a file, of the data, or those that come with the judge, in this order."""
    if config.stats is not None:
        return load_reference(config.stats, judge.fingerprint)
    if words is not None:
        return make_reference(judge, words, Path(str(config.data)).name, said=progress.state)
    return shipped_reference(judge)


def take_clips(config: EvalSc09Config, generator: Generator | None, progress: Progress) -> Candidates:
    """The clips of the folder, or new ones of the model."""
    if generator is None:
        assert config.samples is not None
        progress.state("reading the clips ...")
        clips: GeneratedClips = read_generated(config.samples, config.count)
        left_out = sum(note.left_out for note in clips.notes)
        return Candidates(
            clips.samples, clips.names, clips.asked, None, clips.notes, config.samples, len(clips) + left_out
        )
    count = config.count or DEFAULT_COUNT[generator.device.type]
    progress.state(f"generating {count:,} clips ...")
    guidance = generator.guidance if config.guidance is None else config.guidance
    sampling = Sampling(config.temperature, config.top_k, config.top_p, guidance)
    made = generator.make(count, config.seed, sampling, lambda n: progress.state(f"generating: {n:,} of {count:,}"))
    names = tuple(f"{SAMPLES}/{row:05d}.wav" for row in range(count))
    name = config.model or DEFAULT_MODEL
    return Candidates(made.samples, names, made.asked, made.log_likelihood, (), name, count, made.seconds, guidance)


def likelihood_of(
    config: EvalSc09Config, generator: Generator | None, words: SpokenWords | None, progress: Progress
) -> Likelihood | None:
    """The model's NLL of the real test digits, where there are both."""
    if generator is None or words is None:
        return None
    test = words.select(words.where(split="test", labels=DIGITS))
    if not len(test):
        return None
    limit = config.nll_clips or DEFAULT_NLL_CLIPS[generator.device.type]
    limit = None if limit is None else min(limit, len(test))
    return generator.likelihood(test, limit, lambda n: progress.state(f"likelihood of real digits: {n:,}"))


def by_likelihood(candidates: Candidates) -> NDArray[np.int64]:
    """Rows from the least likely to the likeliest clip; in the order of their names where no model made them."""
    if candidates.log_likelihood is None:
        return np.arange(len(candidates.samples))
    return np.argsort(candidates.log_likelihood, kind="stable")


def share_right(candidates: Candidates, judged: Judged) -> float | None:
    """How often the digit that was asked for is heard, over the clips of which it is known."""
    known = candidates.asked >= 0
    return float((judged.heard == candidates.asked)[known].mean()) if known.any() else None


def write_results(config: EvalSc09Config, result: EvalSc09Result, candidates: Candidates, judged: Judged) -> None:
    """The files of the evaluation's folder; the page last, as it is what people open."""
    RunFolder.create(result.folder)
    with whole_file(result.folder / METRICS) as partial:
        partial.write_text(json.dumps(result.numbers(config), indent=1, allow_nan=False) + "\n", "utf-8")
    with whole_file(result.folder / CLIPS) as partial:
        partial.write_text(clips_table(result, candidates, judged), "utf-8")
    if candidates.log_likelihood is not None:
        write_samples(result.folder / SAMPLES, candidates.samples)
    if config.report:
        sc09_page(build_report(config, result, candidates, judged), RATE).write(result.folder / REPORT)


def clips_table(result: EvalSc09Result, candidates: Candidates, judged: Judged) -> str:
    """A row a clip, tab-separated."""
    digits = result.reference.facts.digits
    lines = ["clip\tasked\theard\tprobability\tis_digit\tlog_likelihood"]
    for row, name in enumerate(candidates.names):
        asked = digits[candidates.asked[row]] if candidates.asked[row] >= 0 else ""
        heard = int(judged.heard[row])
        own = "" if candidates.log_likelihood is None else f"{candidates.log_likelihood[row]:.5f}"
        probability = float(np.exp(judged.log_p[row, heard]))
        lines.append(f"{name}\t{asked}\t{digits[heard]}\t{probability:.6f}\t{judged.is_digit[row]:.6f}\t{own}")
    return "\n".join(lines) + "\n"


def write_samples(folder: Path, samples: NDArray[np.float32]) -> None:
    """The generated clips as 16-bit WAV files, the same as generate-audio writes."""
    folder.mkdir(exist_ok=True)
    for row, clip in enumerate(samples):
        write_wav(folder / f"{row:05d}.wav", to_int16(clip), RATE)
