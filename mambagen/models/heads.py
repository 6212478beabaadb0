"""Models on an encoder: masked bases predicted, whole sequences classified; pooling over real positions."""

from typing import Annotated, Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor, nn

from mambagen.errors import ModelError
from mambagen.models.encoders import Encoder, EncoderConfig, build_encoder, encoder_config
from mambagen.models.files import first_fault
from mambagen.models.mamba_lm import MambaLM
from mambagen.models.optimiser_groups import parameter_groups
from mambagen.models.reverse_complement import both_strands, rc_average

Pooling = Literal["mean", "first", "last", "max"]
POOLINGS: tuple[Pooling, ...] = ("mean", "first", "last", "max")


class EncoderModelConfig(BaseModel):
    """An encoder by name and shape, and what is done about the other strand.

    `encoder_config` is kept with every default written in, so that a saved model does not depend on later defaults.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoder: str
    encoder_config: dict[str, Any]
    equivariant: bool = False  # outputs of the reverse complement are the reverse complement of the outputs
    complement: tuple[int, ...] = ()  # of each token id; empty where the tokens have none

    @model_validator(mode="before")
    @classmethod
    def _whole_config(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("encoder"), str):
            try:
                config = encoder_config(values["encoder"], values.get("encoder_config") or {})
            except ValidationError as error:
                raise ValueError(f"encoder_config.{first_fault(error)}") from None
            return {**values, "encoder_config": config.model_dump()}
        return values

    @model_validator(mode="after")
    def _complement_fits(self) -> Self:
        ids, size = self.complement, self.vocab_size
        if ids and (len(ids) != size or any(not 0 <= i < size or ids[i] != k for k, i in enumerate(ids))):
            raise ValueError(f"the complement must pair the {size} token ids")
        if self.equivariant and not ids:
            raise ValueError("an equivariant model needs the complement of each token")
        return self

    @property
    def shape(self) -> EncoderConfig:
        """The encoder's config."""
        return encoder_config(self.encoder, self.encoder_config)

    @property
    def vocab_size(self) -> int:
        """Tokens that exist."""
        return self.shape.vocab_size

    @property
    def description(self) -> str:
        """For a model card."""
        own = ", exactly reverse-complement equivariant" if self.equivariant else ""
        return f"encoder {self.encoder} with {self.shape.n_layer} layers, d_model {self.shape.d_model}{own}"


class EncoderModel(nn.Module):
    """What the models below share: the encoder, drawn from a seed, and its groups for an optimiser."""

    def __init__(self, config: EncoderModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = cast(nn.Module, build_encoder(config.encoder, config.encoder_config))
        self.complement: Tensor
        self.register_buffer("complement", torch.tensor(config.complement, dtype=torch.long), persistent=False)

    @property
    def trunk(self) -> Encoder:
        """The encoder, typed as one."""
        return cast(Encoder, self.encoder)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimiser; see `mambagen.models.optimiser_groups`."""
        return parameter_groups(self, weight_decay)


class MaskedLM(EncoderModel):
    """Predicts tokens from both sides: an encoder and a linear head that is the embedding's weight with a bias.

    With a `seed` the weights are a function of it and the config alone.
    """

    kind = "masked-lm"  # what a model folder's config.json calls it

    def __init__(self, config: EncoderModelConfig, seed: int | None = None) -> None:
        with seeded(seed):
            super().__init__(config)
            self.bias = nn.Parameter(torch.zeros(config.shape.padded_vocab_size))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (batch, length, padded_vocab_size) in float32 for ids (batch, length); see the encoders' contract."""
        if self.config.equivariant:
            return rc_average(self.one_strand, tokens, mask, self.complement, per_position=True)
        return self.one_strand(tokens, mask)

    def one_strand(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The logits of this strand alone."""
        logits = F.linear(self.encoder(tokens, mask), self.trunk.embedding.weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)) + self.bias


class ClassifierConfig(EncoderModelConfig):
    """An encoder, how its hidden vectors become one, and the names of the classes."""

    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    pooling: Pooling = "mean"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1  # before the head, in training

    @field_validator("classes")
    @classmethod
    def _distinct(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(classes)) < len(classes):
            raise ValueError("two classes have the same name")
        return classes

    @property
    def description(self) -> str:
        """For a model card."""
        return f"{super().description}; {self.pooling} pooling over {len(self.classes)} classes"


class SequenceClassifier(EncoderModel):
    """Classes of whole sequences: an encoder, pooling over real positions, a linear head."""

    kind = "sequence-classifier"

    def __init__(self, config: ClassifierConfig, seed: int | None = None) -> None:
        with seeded(seed):
            super().__init__(config)
            self.pooling, self.dropout = config.pooling, config.dropout
            self.classes = config.classes
            self.head = nn.Linear(config.shape.d_model, len(config.classes))
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (batch, classes) in float32 for ids (batch, length); see the encoders' contract."""
        if self.config.equivariant:
            here, there = both_strands(self.pooled, tokens, mask, self.complement)
            vector = (here + there) / 2
        else:
            vector = self.pooled(tokens, mask)
        logits = F.linear(F.dropout(vector, self.dropout, self.training).to(self.head.weight.dtype), self.head.weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)) + self.head.bias

    def pooled(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The vector (batch, d_model) of each sequence on this strand."""
        return pool(self.encoder(tokens, mask), mask, self.pooling)


def pool(hidden: Tensor, mask: Tensor | None, how: Pooling) -> Tensor:
    """(batch, length, d) -> (batch, d) over the real positions of each row, in float32 at least."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if how == "mean":
        if mask is None:
            return hidden.mean(1)
        real = mask.to(hidden.dtype)[..., None]
        return (hidden * real).sum(1) / real.sum(1)
    if how == "max":
        return (hidden if mask is None else hidden.masked_fill(~mask[..., None], -torch.inf)).amax(1)
    if mask is None:
        return hidden[:, 0 if how == "first" else -1]
    first = mask.int().argmax(1)
    at = first if how == "first" else first + mask.sum(1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), at]


def encoder_of(model: nn.Module) -> tuple[str, dict[str, Any], nn.Module]:
    """Name, config and module of the encoder in a trained model: what a classifier can begin from."""
    if isinstance(model, MambaLM):
        return "mamba", model.config.model_dump(), model.backbone
    if isinstance(model, EncoderModel):
        return model.config.encoder, model.config.encoder_config, model.encoder
    raise ModelError(f"a {type(model).__name__} holds no encoder")


def copy_encoder(source: nn.Module, target: EncoderModel) -> None:
    """Give `target` the encoder weights of a trained model of the same architecture.

    Raises:
        ModelError: the encoders are not of one name and config.
    """
    name, config, module = encoder_of(source)
    if (name, config) != (target.config.encoder, target.config.encoder_config):
        ours = target.config.encoder_config
        what = next((key for key in ours if ours[key] != config.get(key)), "encoder")
        raise ModelError(
            f"the weights are of another encoder: {what} is {config.get(what, name)!r} there, "
            f"{ours.get(what, target.config.encoder)!r} here"
        )
    target.encoder.load_state_dict(module.state_dict())


class seeded:
    """While open, torch's CPU generator is at `seed` (None: as it stands); afterwards it is where it was."""

    def __init__(self, seed: int | None) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._state = torch.get_rng_state()
        if self._seed is not None:
            torch.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        if self._seed is not None:
            torch.set_rng_state(self._state)
