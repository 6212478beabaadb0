"""The settings of `mambagen pretrain-dna`: defaults, what fits together, and the model and lengths they describe."""

import logging
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.errors import ModelError, UsageError
from mambagen.models import MAMBA_SIZES, MambaConfig, MambaLM, load_model
from mambagen.models.encoders import count_parameters, match_parameters
from mambagen.models.files import first_fault
from mambagen.models.heads import EncoderModelConfig, MaskedLM
from mambagen.pipelines.dna_masked_model import DNA_COMPLEMENT
from mambagen.pipelines.length_warmup import Stage, length_stages
from mambagen.pipelines.recipes import RECIPES
from mambagen.training.config import TrainConfig, overlaid

log = logging.getLogger("mambagen")

# The peak learning rate where none is given; the default of the configuration is Mamba's.
ENCODER_LR = {"bigs": 2e-3, "bigs-stack": 2e-3, "bimamba": 4e-3, "bert": 1e-3}
DEFAULT_ENCODER = "bigs"


class PretrainDnaConfig(TrainConfig):
    """All settings of `mambagen pretrain-dna`; the keys of its TOML file."""

    recipe: str | None = None  # published settings, which all others win over
    data: tuple[str, ...] = Field(("demo",), min_length=1)  # names of data sets, FASTA, GenBank or 2bit files, "-"
    size: str = "250k"
    model: dict[str, Any] = Field(default_factory=dict)  # changes to the size's MambaConfig, such as d_state
    objective: Literal["ar", "mlm"] = "ar"  # predict the next base, or masked bases from both sides
    encoder: Literal["bigs", "bigs-stack", "bimamba", "bert"] | None = None  # of masked models; None: bigs
    equivariant: bool = False  # of masked models: the other strand's answer is the answer's other strand, exactly
    start_from: str | None = None  # a model folder whose weights the run begins with
    tokens: int | None = Field(None, ge=1)  # a budget in place of steps or minutes
    context: int = Field(1024, ge=1)
    length_warmup: int | None = Field(None, ge=1)  # windows begin so long and double until they have the context
    length_shares: tuple[float, ...] = ()  # of the steps at each length; () is alike
    batch_tokens: int = Field(8192, ge=1)
    reverse_complement: bool = False
    lower_case: Literal["same", "n"] = "same"
    n: Literal["ignore", "predict"] = "ignore"
    windows: Literal["stretches", "intervals"] = "stretches"  # anywhere in the training part, or around its intervals
    strict_split: bool = True  # windows around intervals never touch what is held out
    splits: str | None = None  # a BED file of record, start, end, split
    valid_fraction: float | None = Field(None, ge=0, lt=1)  # default: the data set's own split, else a tenth
    valid_records: tuple[str, ...] = ()
    valid_tokens: int = Field(1 << 18, ge=1)
    recompute: Literal["auto", "always", "never"] = "auto"  # activations in the backward, to save memory

    @model_validator(mode="before")
    @classmethod
    def _over_the_recipe(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("recipe") is None:
            return values
        if values["recipe"] not in RECIPES:
            raise ValueError(f"the recipe must be one of {', '.join(RECIPES)}, not {values['recipe']!r}")
        return overlaid(RECIPES[values["recipe"]].settings, {k: v for k, v in values.items() if v is not None})

    @model_validator(mode="after")
    def _fitting(self) -> "PretrainDnaConfig":
        if self.tokens is not None and (self.steps is not None or self.minutes is not None):
            raise ValueError("tokens, steps and minutes are budgets: give one of them")
        if self.splits is not None and (self.valid_fraction is not None or self.valid_records):
            raise ValueError("splits say what is held out: leave out valid_fraction and valid_records")
        if self.length_shares and self.length_warmup is None:
            raise ValueError("length_shares belong to length_warmup: give the length to begin with")
        return self

    @field_validator("length_shares", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value

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

    def stages(self) -> list[Stage]:
        """The lengths of the windows and the steps they end at, where the length warms up; else none.

        Raises:
            UsageError: a budget in minutes, or lengths, tokens and shares that do not fit together.
        """
        if self.length_warmup is None:
            return []
        if self.steps is None:
            raise UsageError(
                "--length-warmup follows the steps: give the budget by --steps or --tokens, not in minutes"
            )
        return length_stages(self.length_warmup, self.context, self.batch_tokens, self.steps, self.length_shares)

    def in_steps(self) -> Self:
        """The same with a budget in tokens as the nearest number of whole steps, with a warning where that differs."""
        if self.tokens is None:
            return self
        each = self.rows() * self.context
        steps = max(1, round(self.tokens / each))
        if steps * each != self.tokens:
            log.warning(
                "%s tokens are no whole number of steps of %s: training on %s",
                *(f"{number:,}" for number in (self.tokens, each, steps * each)),
            )
        return self.model_copy(update={"tokens": None, "steps": steps})
