"""What eval-sc09 is asked and what it found."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from mambagen.data.generated_clips import Note
from mambagen.pipelines.sc09_generation import Likelihood
from mambagen.pipelines.sc09_judge import BUILTIN
from mambagen.pipelines.sc09_metrics import Scores
from mambagen.pipelines.sc09_published import SashimiScores
from mambagen.pipelines.sc09_reference import Reference

REPORT = "report.html"


class EvalSc09Config(BaseModel):
    """All settings of `mambagen eval-sc09`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None  # a model folder or the name of a built-in one; None without samples: the built-in one
    samples: str | None = None  # a folder of clips
    data: str | None = None  # real digits: the reference, and what the model's likelihood is taken of
    count: Annotated[int, Field(ge=2)] | None = None
    protocol: Literal["standard", "sashimi"] = "standard"
    judge: str = BUILTIN
    stats: str | None = None  # a file of sc09-stats
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None  # the model's own, as generate-audio takes it
    nll_clips: Annotated[int, Field(ge=1)] | None = None
    shown: Annotated[int, Field(ge=0)] = 6  # clips a digit on the page
    device: str = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None
    strict: bool = False
    report: bool = True


@dataclass(frozen=True)
class EvalSc09Result:
    """What was found."""

    folder: Path
    name: str  # of what was judged
    reference: Reference
    scores: Scores
    sashimi: SashimiScores | None
    sashimi_threshold: SashimiScores | None
    nll: Likelihood | None
    asked_right: float | None  # share of clips in which the digit that was asked for was heard
    heard: tuple[int, ...]
    findings: tuple[str, ...]
    fid_biased: bool
    notes: tuple[Note, ...]
    files: int  # that were looked at, those left out included
    generated: bool = False  # by a model, not found in a folder

    def numbers(self, config: EvalSc09Config) -> dict[str, Any]:
        """As JSON values."""
        facts = self.reference.facts
        return {
            "name": self.name,
            "protocol": config.protocol,
            "clips": self.scores.count,
            "files": self.files,
            "figures": {name: asdict(interval) for name, interval in self.scores.intervals.items()},
            "fid_unbiased": self.scores.fid_unbiased,
            "fid_biased": self.fid_biased,
            "bootstrap_draws": self.scores.draws,
            "sashimi": None if self.sashimi is None else asdict(self.sashimi),
            "sashimi_threshold": None if self.sashimi_threshold is None else asdict(self.sashimi_threshold),
            "nll": None if self.nll is None else asdict(self.nll) | {"bits": self.nll.bits},
            "asked_right": self.asked_right,
            "heard": dict(zip(facts.digits, self.heard, strict=True)),
            "findings": list(self.findings),
            "reference": facts.model_dump(),
            "notes": [asdict(note) for note in self.notes],
            "report": str(self.folder / REPORT) if config.report else None,
            "settings": config.model_dump(),
        }


@dataclass(frozen=True)
class Candidates:
    """The clips that are judged, whoever made them."""

    samples: NDArray[np.float32]
    names: tuple[str, ...]
    asked: NDArray[np.int64]
    log_likelihood: NDArray[np.float64] | None
    notes: tuple[Note, ...]
    name: str
    files: int
    seconds: float | None = None  # that generating took
    guidance: float = 1.0  # by which they were generated
