"""The contents of eval-sc09's page out of its results."""

import shlex

import numpy as np
from numpy.typing import NDArray

from mambagen.data.generated_clips import summary
from mambagen.pipelines.sc09_findings import ENOUGH
from mambagen.pipelines.sc09_judge import Judged
from mambagen.pipelines.sc09_metrics import FEWEST, Interval
from mambagen.pipelines.sc09_published import PUBLISHED, THRESHOLDS, SashimiScores
from mambagen.pipelines.sc09_results import Candidates, EvalSc09Config, EvalSc09Result
from mambagen.reports.sc09_page import Sc09Report, ShownClip

COLUMNS = ("clips of", "N", "NLL (nats)", "FID", "IS", "mIS", "AM")
FIGURES = ("FID", "IS", "mIS", "AM")


def build_report(config: EvalSc09Config, result: EvalSc09Result, candidates: Candidates, judged: Judged) -> Sc09Report:
    """Everything on the page as plain values."""
    facts = result.reference.facts
    digits = facts.digits
    return Sc09Report(
        title=f"Spoken digits of {result.name}",
        lead=f"{result.scores.count:,} clips of one second, judged beside {facts.name} ({facts.count:,} clips).",
        findings=findings(result),
        columns=COLUMNS,
        ours=own_rows(result),
        published=published_rows(),
        table_note=table_note(result),
        digits=digits,
        heard=np.array(result.heard),
        reference=result.reference.mean_prediction,
        confusion=confusion(candidates, judged, len(digits)),
        confidence=np.exp(judged.log_p.max(1)),
        log_likelihood=candidates.log_likelihood,
        clips={digit: shown_clips(config.shown, index, candidates, judged) for index, digit in enumerate(digits)},
        order="the model's own likelihood" if candidates.log_likelihood is not None else "the judge's probability",
        notes=[(note.path, note.text) for note in result.notes],
        run=run_rows(config, result, candidates),
        command=command_line(config),
        extra=sashimi_tables(result),
    )


def findings(result: EvalSc09Result) -> list[str]:
    """What is wrong, what the figures are worth."""
    found = list(result.findings) or [
        "Nothing suspicious was found: the clips are heard as digits, use all of them, and differ from one another."
        if result.scores.count >= ENOUGH
        else f"Nothing suspicious was found, but fewer than {ENOUGH} clips do not tell whether all digits are in use."
    ]
    if result.fid_biased:
        found.append(bias_warning(result))
    if result.nll is None and result.generated:
        found.append("NLL is the model's of real clips: give some with --data.")
    if result.asked_right is not None:
        found.append(f"The digit that was asked for is heard in {result.asked_right:.1%} of the clips.")
    return found


def notes_in_short(result: EvalSc09Result) -> list[str]:
    """One line a kind of file that was not as expected."""
    return summary(result.notes)


def bias_warning(result: EvalSc09Result) -> str:
    """Why FID of few clips is too high, and what it would be."""
    size = len(result.reference.moments.mean)
    warning = f"FID is biased upwards: {result.scores.count:,} clips are fewer than twice the {size} features."
    if result.scores.count < FEWEST:
        return f"{warning} They are too few to say what it is for infinitely many."
    return (
        f"{warning} Extrapolated to infinitely many clips it is {result.scores.fid_unbiased:.2f}, where "
        f"{result.scores.fid.value:.2f} was found."
    )


def own_rows(result: EvalSc09Result) -> list[list[str]]:
    """This evaluation and the real data beside it."""
    nll = "" if result.nll is None else with_interval(result.nll.interval, 3)
    rows = [
        [result.name, f"{result.scores.count:,}", nll]
        + [with_interval(interval) for interval in result.scores.intervals.values()]
    ]
    facts = result.reference.facts
    for row in facts.rows:
        figures = [with_interval(Interval(*row.figures[name])) for name in FIGURES]
        rows.append([f"{facts.name}, {row.name}", f"{row.count:,}", "", *figures])
    return rows


def published_rows() -> list[list[str]]:
    """The published table."""
    return [
        [f"published: {row.name} {row.parameters}".rstrip(), "", "" if row.nll is None else f"{row.nll:.3f}"]
        + [f"{value:.4g}" for value in (row.fid, row.inception, row.modified_inception, row.am)]
        for row in PUBLISHED
    ]


def with_interval(interval: Interval, digits: int = 2) -> str:
    """A figure and its interval."""
    return f"{interval.value:.{digits}f} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def table_note(result: EvalSc09Result) -> str:
    """What the table's numbers are."""
    return (
        f"In brackets 95 % intervals over {result.scores.draws} draws of the clips. NLL is of real test clips. "
        "Published rows are of SC09 with another judge, 1,024 features and IS over samples: compare the order of "
        "rows within one judge, not figures across."
    )


def sashimi_tables(result: EvalSc09Result) -> list[tuple[str, list[str], list[list[str]], str]]:
    """The figures by the published script's arithmetic, where that protocol was asked for."""
    rows = sashimi_rows(result)
    if not rows:
        return []
    caption = (
        "By the arithmetic of the published script: IS over samples instead of classes (it can pass 10), mIS over "
        f"10,000 random pairs. Its threshold is never tuned: clips between the quantiles {THRESHOLDS[0]} and "
        f"{THRESHOLDS[1]} of likelihood in a random half are kept."
    )
    return [("Figures by the published script", ["", "N", *FIGURES], rows, caption)]


def sashimi_rows(result: EvalSc09Result) -> list[list[str]]:
    """With and without its threshold."""

    def row(name: str, s: SashimiScores) -> list[str]:
        return [name, f"{s.count:,}", *(f"{v:.3f}" for v in (s.fid, s.inception, s.modified_inception, s.am))]

    named = (("all clips", result.sashimi), ("with its threshold", result.sashimi_threshold))
    return [row(name, scores) for name, scores in named if scores is not None]


def confusion(candidates: Candidates, judged: Judged, digits: int) -> NDArray[np.int64] | None:
    """(digits, digits) counts of asked and heard, over clips of which the asked one is known."""
    known = candidates.asked >= 0
    if not known.any():
        return None
    table = np.zeros((digits, digits), dtype=np.int64)
    np.add.at(table, (candidates.asked[known], judged.heard[known]), 1)
    return table


def shown_clips(most: int, digit: int, candidates: Candidates, judged: Judged) -> list[ShownClip]:
    """Clips heard as a digit, the likeliest first; of many those at both ends."""
    rows = np.flatnonzero(judged.heard == digit)
    probability = judged.log_p[:, digit]
    key = probability if candidates.log_likelihood is None else candidates.log_likelihood
    rows = rows[np.argsort(-key[rows], kind="stable")]
    if len(rows) > most:
        rows = np.concatenate([rows[: (most + 1) // 2], rows[len(rows) - most // 2 :]])
    shown = []
    for row in rows.tolist():
        caption = f"{candidates.names[row]}: {np.exp(probability[row]):.0%} sure"
        if candidates.log_likelihood is not None:
            caption += f", {candidates.log_likelihood[row]:.3f} nats a sample"
        if candidates.asked[row] >= 0 and candidates.asked[row] != digit:
            caption += ", another digit was asked for"
        shown.append(ShownClip(candidates.samples[row], caption))
    return shown


def run_rows(config: EvalSc09Config, result: EvalSc09Result, candidates: Candidates) -> list[tuple[str, str]]:
    """What was run on what."""
    facts = result.reference.facts
    rows = [
        ("clips", f"{result.scores.count:,} of {result.name}"),
        ("judge", f"{config.judge} ({facts.judge[:12]})"),
        ("reference", f"{facts.name}: {facts.description} (data {facts.data_sha256[:12]}); licence {facts.licence}"),
        ("protocol", config.protocol),
        ("FID for infinitely many clips", f"{result.scores.fid_unbiased:.3f}"),
    ]
    if result.nll is not None:
        rows.append(
            (
                "likelihood of real test digits",
                f"{result.nll.nats:.4f} nats, {result.nll.bits:.4f} bits a sample, over {result.nll.clips:,} clips",
            )
        )
    if candidates.seconds is not None:
        how = f"temperature {config.temperature:g}, guidance {candidates.guidance:g}, seed {config.seed}"
        rows.append(("sampling", how))
        rows.append(("generating took", f"{candidates.seconds:.1f} s"))
    return rows


def command_line(config: EvalSc09Config) -> str:
    """A command that does the same again."""
    words = ["mambagen", "eval-sc09"]
    defaults = EvalSc09Config().model_dump()
    for name, value in config.model_dump().items():
        if value == defaults[name] or value is None:
            continue
        if name == "model":
            words.append(str(value))
        elif name == "count":
            words += ["-n", str(value)]
        elif name == "report":
            words.append("--no-report")
        elif value is True:
            words.append(f"--{name}")
        else:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)
