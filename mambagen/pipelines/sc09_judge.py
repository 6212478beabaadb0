"""The judge at work: clips to features and probabilities, in batches, kept in a cache by the content of the clips."""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from mambagen.data.mel import LogMel, MelSettings
from mambagen.data.whole_file import whole_file
from mambagen.data_manifests import cache_home
from mambagen.errors import ModelError, ResourceError
from mambagen.models.builtin import find_model
from mambagen.models.digit_classifier import DigitClassifier, digit_log_probabilities
from mambagen.models.files import first_fault, read_manifest
from mambagen.models.saving import CONFIG, WEIGHTS, load_model, read_tensors, write_tensors
from mambagen.training.loop import choose_device

log = logging.getLogger("mambagen")

BUILTIN = "digit-judge"
INPUT_KIND = "log-mel"
BATCH = {"cpu": 64, "cuda": 1024}


@dataclass(frozen=True)
class Judged:
    """What the judge makes of N clips."""

    features: NDArray[np.float32]  # (N, feature_size)
    log_p: NDArray[np.float64]  # (N, digits) log-probabilities, given that it is a digit
    is_digit: NDArray[np.float32]  # (N,) probability that it is one

    def __len__(self) -> int:
        return len(self.features)

    @property
    def heard(self) -> NDArray[np.int64]:
        """(N,) the likeliest digit."""
        return np.asarray(self.log_p.argmax(1))

    def rows(self, rows: NDArray[np.int64]) -> "Judged":
        """These clips alone."""
        return Judged(self.features[rows], self.log_p[rows], self.is_digit[rows])


def input_policy(settings: MelSettings) -> dict[str, Any]:
    """What a judge's config.json says of its input."""
    return {"kind": INPUT_KIND, **settings.model_dump()}


class DigitJudge:
    """A model of train-sc09-classifier, ready to be asked."""

    def __init__(self, folder: Path | str = BUILTIN, device: str = "auto", batch: int | None = None) -> None:
        """Raises ModelError where the folder is no digit classifier."""
        self.device = choose_device(device)
        self.model: DigitClassifier
        self.model, fields = load_model(folder, self.device, kinds=[DigitClassifier.kind])
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.batch = batch or BATCH[self.device.type]
        self.name = str(folder)
        policy = dict(fields["tokenizer"])
        where = find_model(folder) / CONFIG
        if policy.pop("kind", None) != INPUT_KIND:
            raise ModelError(f"{where}: does not say how clips become {INPUT_KIND} pictures; train the judge again")
        try:
            self.settings = MelSettings.model_validate(policy)
        except ValidationError as error:
            raise ModelError(f"{where}: tokenizer: {first_fault(error)}") from None
        self.log_mel = LogMel(self.settings)
        self.fingerprint = fingerprint_of(folder)

    @property
    def digits(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the probabilities."""
        return self.model.digits

    def judge(self, clips: NDArray[np.float32], done: Callable[[int], None] | None = None) -> Judged:
        """Features and probabilities of clips (N, samples); the result does not depend on the batch beyond rounding.

        Args:
            done: is told how many clips are done.
        """
        if not len(clips):
            empty = np.zeros((0, self.model.config.feature_size), np.float32)
            return Judged(empty, np.zeros((0, len(self.digits))), np.zeros(0, np.float32))
        starts = range(0, len(clips), self.batch)
        found = []
        with _map(self.device, len(starts)) as each:
            for at, part in zip(starts, each(lambda at: self._batch(clips[at : at + self.batch]), starts), strict=True):
                found.append(part)
                if done is not None:
                    done(min(at + self.batch, len(clips)))
        features, scores = (torch.cat(tensors) for tensors in zip(*found, strict=True))
        log_p, is_digit = digit_log_probabilities(scores, len(self.digits))
        return Judged(features.numpy(), log_p.numpy(), is_digit.float().numpy())

    @torch.no_grad()
    def _batch(self, clips: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
        features = self.model.features(self.log_mel(torch.from_numpy(clips).to(self.device)))
        return features.cpu(), self.model.scores(features).double().cpu()

    def judge_cached(self, clips: NDArray[np.float32], done: Callable[[int], None] | None = None) -> Judged:
        """The same, kept in the cache folder under the hash of judge and clips; a cache that fails costs only time."""
        file = cache_home() / "judged" / f"{self.fingerprint[:16]}-{content_hash(clips)[:32]}.safetensors"
        if file.is_file():
            try:
                kept = read_tensors(file)
                found = Judged(*(kept[name].numpy() for name in ("features", "log_p", "is_digit")))
                if len(found) == len(clips):
                    return found
            except (ModelError, KeyError) as error:
                log.warning("%s: not used: %s", file, error)
        judged = self.judge(clips, done)
        _keep(file, judged)
        return judged


@contextlib.contextmanager
def _map(device: torch.device, batches: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """`map` for batches; on a CPU they are spread over the cores, each by one thread.

    The network is so small that threads inside an operation mostly wait for one another: where other programs keep the
    cores busy they make it slower than one thread is.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or batches == 1:
        yield map
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as workers:
            yield workers.map
    finally:
        torch.set_num_threads(threads)


def fingerprint_of(folder: Path | str) -> str:
    """SHA-256 of a judge: of its weights and its config."""
    files = read_manifest(find_model(folder)).files
    return hashlib.sha256((files[WEIGHTS].sha256 + files[CONFIG].sha256).encode()).hexdigest()


def content_hash(clips: NDArray[np.float32]) -> str:
    """SHA-256 of clips (N, samples) in their order."""
    found = hashlib.sha256(str(clips.shape).encode())
    found.update(np.ascontiguousarray(clips).view(np.uint8).data)
    return found.hexdigest()


def _keep(file: Path, judged: Judged) -> None:
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in vars(judged).items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as partial:
            write_tensors(partial, tensors)
    except (OSError, ResourceError) as error:
        log.warning("features are not kept: %s", error)
