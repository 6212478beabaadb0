"""Reference statistics of a set of spoken digits: judge its parts once, keep what judging generated clips needs.

From Python:

    from mambagen.pipelines.sc09_stats import sc09_stats
    sc09_stats("speech_commands_v0.02", "sc09.safetensors", name="SC09")
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mambagen.data.spoken_words import SpokenWords
from mambagen.errors import InputError
from mambagen.models.builtin import find_model
from mambagen.pipelines.sc09_data import read_words
from mambagen.pipelines.sc09_judge import BUILTIN, DigitJudge, Judged
from mambagen.pipelines.sc09_metrics import score
from mambagen.pipelines.sc09_reference import (
    RealRow,
    Reference,
    ReferenceFacts,
    load_reference,
    moments_and_prediction,
    save_reference,
)
from mambagen.training.progress import Progress

SHIPPED = "reference.safetensors"  # in a judge's folder: the statistics that come with it
LEAST = 20  # clips of a part that figures are given for


def sc09_stats(
    data: Path | str,
    out: Path | str,
    name: str | None = None,
    description: str = "",
    licence: str = "",
    judge: Path | str = BUILTIN,
    device: str = "auto",
    progress: Progress | None = None,
) -> Reference:
    """Write the statistics of a folder or table of spoken digits to the file `out`.

    Raises:
        InputError, ModelError, ResourceError, UsageError.
    """
    progress = progress or Progress()
    asked = DigitJudge(judge, device)
    progress.state("reading the clips ...")
    words = read_words(data)
    reference = make_reference(asked, words, name or Path(data).name, description, licence, progress.state)
    save_reference(reference, out)
    return reference


def make_reference(
    judge: DigitJudge,
    words: SpokenWords,
    name: str,
    description: str = "",
    licence: str = "",
    said: Callable[[str], None] | None = None,
) -> Reference:
    """The statistics of the training digits, with the figures of the training and test digits as rows beside them.

    Where the data have no test part, the validation part takes its place.

    Raises:
        InputError: too few clips of digits.
    """
    parts: dict[str, Judged] = {}
    digits = {
        split: words.select(words.where(split=split, labels=judge.digits)) for split in ("train", "valid", "test")
    }
    if len(digits["train"]) < LEAST:
        raise InputError.at(
            words.path, None, f"has {len(digits['train'])} training clips of digits; {LEAST} are needed"
        )
    held_out = "test" if len(digits["test"]) >= LEAST else "valid"
    for split in ("train", held_out):
        if len(digits[split]) >= LEAST:
            if said is not None:
                said(f"judging the {split} clips ...")
            parts[split] = judge.judge_cached(digits[split].one_second(np.arange(len(digits[split]))))
    moments, mean_prediction = moments_and_prediction(parts["train"])
    rows = tuple(
        RealRow.of(f"{split} data", score(judged.features, judged.log_p, moments, mean_prediction))
        for split, judged in parts.items()
    )
    facts = ReferenceFacts(
        name=name,
        description=description or f"{len(digits['train']):,} training clips of {words.path}",
        licence=licence or "that of the data",
        judge=judge.fingerprint,
        data_sha256=digits["train"].fingerprint(),
        count=len(digits["train"]),
        test_count=len(parts[held_out]) if held_out in parts else None,
        digits=judge.digits,
        rows=rows,
    )
    return Reference(facts, moments, mean_prediction)


def shipped_reference(judge: DigitJudge) -> Reference:
    """The statistics in the judge's own folder, or else those of the built-in judge.

    Raises:
        ModelError: there are none for this judge.
    """
    own = find_model(judge.name) / SHIPPED
    return load_reference(own if own.is_file() else find_model(BUILTIN) / SHIPPED, judge.fingerprint)
