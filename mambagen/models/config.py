"""The shape of a Mamba model, and the sizes of the published DNA experiments."""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class MambaConfig(BaseModel):
    """What determines the weights of a Mamba stack; the names are the published ones (docs/models.md has the symbols).

    Unknown keys and impossible values raise pydantic.ValidationError. Instances do not change and can be compared.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    d_model: Count  # channels of the residual stream (D)
    n_layer: Count  # Mamba layers; the paper's "blocks" of the DNA models are two of these each
    vocab_size: Count = 12  # tokens that exist; the embedding has a few rows more
    pad_vocab_size_multiple: Count = 8  # embedding rows are rounded up to a multiple of this
    tie_embeddings: bool = True  # the head uses the embedding's weight
    d_state: Annotated[int, Field(ge=1, le=256)] = 16  # states a channel (N)
    d_conv: Annotated[int, Field(ge=1, le=8)] = 4  # width of the causal convolution
    expand: Count = 2  # inner channels a residual channel (E / D)
    dt_rank: Count | Literal["auto"] = "auto"  # rank of the step size's projection; "auto" is ceil(D / 16)
    dt_min: Positive = 1e-3  # step sizes begin log-uniform in [dt_min, dt_max]
    dt_max: Positive = 1e-1
    norm_epsilon: Positive = 1e-5

    @model_validator(mode="after")
    def _range_of_dt(self) -> "MambaConfig":
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} is larger than dt_max {self.dt_max}")
        return self

    @property
    def d_inner(self) -> int:
        """Channels of the convolution and the scan (E)."""
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """`dt_rank` as a number."""
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and columns of the logits."""
        multiple = self.pad_vocab_size_multiple
        return math.ceil(self.vocab_size / multiple) * multiple


# The DNA models of the Mamba paper (arXiv 2312.00752, section 4.3): a "block" as named there is two layers here.
MAMBA_SIZES: dict[str, MambaConfig] = {
    "250k": MambaConfig(d_model=64, n_layer=8),
    "700k": MambaConfig(d_model=96, n_layer=10),
    "1.4m": MambaConfig(d_model=128, n_layer=12),
    "3.5m": MambaConfig(d_model=192, n_layer=14),
    "7m": MambaConfig(d_model=256, n_layer=16),
    "19m": MambaConfig(d_model=384, n_layer=20),
    "41m": MambaConfig(d_model=512, n_layer=24),
}
