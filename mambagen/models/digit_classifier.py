"""The judge of spoken digits: a convolutional network on log-mel pictures that gives class scores and features.

Two architectures: `small`, a residual network that a CPU trains in minutes and that ships with the package, and
`resnext29`, the ResNeXt-29 8x64d (Xie et al., arXiv 1611.05431) that the published SC09 figures were judged by, with
its 1,024 features. What a clip becomes before it gets here is kept in the model folder (see mambagen.data.mel).
"""

from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from mambagen.models.heads import seeded
from mambagen.models.optimiser_groups import parameter_groups

Architecture = Literal["small", "resnext29"]


class DigitClassifierConfig(BaseModel):
    """Shape and classes. The digits come first; classes after them exist so that what is no digit has a place."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    arch: Architecture = "small"
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    digits: Annotated[int, Field(ge=2)] = 10  # how many of the classes are judged by
    widths: Annotated[tuple[int, ...], Field(min_length=1)] = (32, 64, 128)  # of `small`: channels of its stages
    blocks: Annotated[int, Field(ge=1)] = 2  # of `small`: residual blocks a stage
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2  # before the head, in training

    @model_validator(mode="after")
    def _classes_fit(self) -> Self:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have the same name")
        if len(self.classes) < self.digits:
            raise ValueError(f"{len(self.classes)} classes are fewer than the {self.digits} that are judged by")
        return self

    @property
    def feature_size(self) -> int:
        """Numbers in a clip's feature vector."""
        return 1024 if self.arch == "resnext29" else self.widths[-1]

    @property
    def description(self) -> str:
        """For a model card."""
        shape = "ResNeXt-29 8x64d" if self.arch == "resnext29" else f"residual network of widths {self.widths}"
        return f"{shape}, {self.feature_size} features, {len(self.classes)} classes"


class DigitClassifier(nn.Module):
    """Class scores and features of log-mel pictures; with a `seed` the weights are a function of it and the config."""

    kind = "digit-classifier"  # what a model folder's config.json calls it

    def __init__(self, config: DigitClassifierConfig, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        with seeded(seed):
            self.trunk = _resnext29() if config.arch == "resnext29" else _small(config)
            self.head = nn.Linear(config.feature_size, len(config.classes))
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out")
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of all classes."""
        return self.config.classes

    @property
    def digits(self) -> tuple[str, ...]:
        """Names of the classes that are judged by."""
        return self.config.classes[: self.config.digits]

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores (batch, classes) in float32 for log-mel pictures (batch, mels, frames) in dB, 0 at most."""
        return self.scores(self.features(pictures))

    def features(self, pictures: Tensor) -> Tensor:
        """(batch, feature_size) in float32: the mean over the picture of the last feature maps."""
        maps = self.trunk((pictures[:, None] + 40) / 20)  # 80 dB down to 0 become -2 to 2
        return maps.mean((-2, -1), dtype=torch.float32)

    def scores(self, features: Tensor) -> Tensor:
        """The head alone, with its dropout in training."""
        dropped = F.dropout(features, self.config.dropout, self.training)
        return F.linear(dropped.to(self.head.weight.dtype), self.head.weight, self.head.bias).float()

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimiser; see `mambagen.models.optimiser_groups`."""
        return parameter_groups(self, weight_decay)


def digit_log_probabilities(scores: Tensor, digits: int) -> tuple[Tensor, Tensor]:
    """log p(digit | it is one of them) (batch, digits), and the probability that it is one (batch,).

    With no classes beside the digits the latter is 1.
    """
    everything = scores.log_softmax(-1)
    return scores[:, :digits].log_softmax(-1), everything[:, :digits].exp().sum(-1)


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    norm.num_batches_tracked = None  # a counter that nothing reads; all stored tensors are real numbers
    return norm


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the picture's size (divided by the stride), and its norm."""
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, _norm(outputs))


class Residual(nn.Module):
    """relu(inner(x) + shortcut(x)), the shortcut a 1x1 convolution where shapes differ."""

    def __init__(self, inner: nn.Module, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.inner = inner
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) -> (batch, outputs, height / stride, width / stride)."""
        return F.relu(self.inner(x) + self.shortcut(x))


def _small(config: DigitClassifierConfig) -> nn.Sequential:
    """Basic residual blocks; every stage but the first halves the picture."""
    layers: list[nn.Module] = [_conv(1, config.widths[0], 3), nn.ReLU()]
    inputs = config.widths[0]
    for stage, outputs in enumerate(config.widths):
        for block in range(config.blocks):
            stride = 2 if stage and not block else 1
            inner = nn.Sequential(_conv(inputs, outputs, 3, stride), nn.ReLU(), _conv(outputs, outputs, 3))
            layers.append(Residual(inner, inputs, outputs, stride))
            inputs = outputs
    return nn.Sequential(*layers)


def _resnext29(cardinality: int = 8, base_width: int = 64) -> nn.Sequential:
    """Three stages of three bottleneck blocks with grouped convolutions, to 256, 512 and 1,024 channels."""
    layers: list[nn.Module] = [_conv(1, 64, 3), nn.ReLU()]
    inputs = 64
    for stage, outputs in enumerate((256, 512, 1024)):
        width = cardinality * base_width * 2**stage
        for block in range(3):
            stride = 2 if stage and not block else 1
            inner = nn.Sequential(
                _conv(inputs, width, 1),
                nn.ReLU(),
                _conv(width, width, 3, stride, groups=cardinality),
                nn.ReLU(),
                _conv(width, outputs, 1),
            )
            layers.append(Residual(inner, inputs, outputs, stride))
            inputs = outputs
    return nn.Sequential(*layers)
