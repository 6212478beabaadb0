"""Reference statistics: what is needed of real data to judge generated clips, as one small safetensors file.

Tensors `mean` (d,), `covariance` (d, d) and `mean_prediction` (digits,) in float64; the rest is JSON in the header's
metadata under "mambagen": see `Reference`. They belong to one judge, whose fingerprint they carry.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mambagen.data.whole_file import whole_file
from mambagen.errors import ModelError, ResourceError
from mambagen.models.files import first_fault
from mambagen.models.saving import write_tensors
from mambagen.pipelines.sc09_judge import Judged
from mambagen.pipelines.sc09_metrics import Moments, Scores

HEADER = "mambagen"
Figure = tuple[float, float, float]  # value, low, high


class RealRow(BaseModel):
    """The figures of a part of the real data, beside the training part."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    count: Annotated[int, Field(ge=2)]
    figures: dict[str, Figure]  # of FID, IS, mIS, AM
    fid_unbiased: float

    @classmethod
    def of(cls, name: str, scores: Scores) -> "RealRow":
        """Scores as a row."""
        figures = {key: (i.value, i.low, i.high) for key, i in scores.intervals.items()}
        return cls(name=name, count=scores.count, figures=figures, fid_unbiased=scores.fid_unbiased)


class ReferenceFacts(BaseModel):
    """What the header says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    name: str  # of the data
    description: str
    licence: str
    judge: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    data_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    count: Annotated[int, Field(ge=2)]
    test_count: int | None = None
    digits: tuple[str, ...]
    rows: tuple[RealRow, ...] = ()  # training and test data, judged like generated clips


@dataclass(frozen=True)
class Reference:
    """Moments of the training data's features and their mean prediction."""

    facts: ReferenceFacts
    moments: Moments
    mean_prediction: NDArray[np.float64]


def moments_and_prediction(judged: Judged) -> tuple[Moments, NDArray[np.float64]]:
    """What a reference keeps of judged clips."""
    return Moments.of(judged.features), np.exp(judged.log_p).mean(0)


def save_reference(reference: Reference, path: Path | str) -> None:
    """Write the file, whole or not at all; ResourceError where it cannot be written."""
    arrays = {
        "mean": reference.moments.mean,
        "covariance": reference.moments.covariance,
        "mean_prediction": reference.mean_prediction,
    }
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
    with whole_file(path) as partial:
        try:
            write_tensors(partial, tensors, {HEADER: json.dumps(reference.facts.model_dump())})
        except OSError as error:
            raise ResourceError(f"{path}: cannot be written: {error.strerror or error}") from error


def load_reference(path: Path | str, judge: str | None = None) -> Reference:
    """Read the file.

    Args:
        judge: the fingerprint of the judge that it is to be used with.

    Raises:
        ModelError: missing, damaged, or made with another judge.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, "np") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {}).get(HEADER, "null"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = ReferenceFacts.model_validate(header)
        mean, covariance = arrays["mean"], arrays["covariance"]
        if covariance.shape != (len(mean), len(mean)) or len(arrays["mean_prediction"]) != len(facts.digits):
            raise ValueError("the shapes of its tensors do not fit together")
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("it holds numbers that are not finite")
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; make one with mambagen sc09-stats") from None
    except ValidationError as error:
        raise ModelError(f"{path}: is no file of mambagen sc09-stats: {first_fault(error)}") from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: is no file of mambagen sc09-stats or damaged: {error}") from None
    if judge is not None and facts.judge != judge:
        raise ModelError(
            f"{path}: was made with another judge; give real digits with --data, or statistics that mambagen "
            f"sc09-stats --judge made with this one"
        )
    return Reference(facts, Moments(mean, covariance, facts.count), arrays["mean_prediction"])
