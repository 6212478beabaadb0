"""What the README of a model says that a run has trained."""

from dataclasses import dataclass

from torch import nn

from mambagen.models.saving import model_card

LICENCE = "That of the data above, where it says anything about models; otherwise the trainer's choice."


@dataclass(frozen=True)
class ModelCard:
    """What it says beside the figures; see `mambagen.models.saving.model_card`."""

    title: str
    data: str
    recipe: str
    licence: str = LICENCE

    def text(self, model: nn.Module, quality: str, extra: str = "") -> str:
        """The whole README."""
        return model_card(model, self.title, self.data, self.licence, self.recipe, quality, extra)
