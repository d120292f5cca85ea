"""The settings that both ways of computing SHAP's partition values have in common."""

from __future__ import annotations

import abc
from typing import ClassVar, Literal

from pydantic import Field

from impactx.explain.attribution import Attribution
from impactx.settings.base import MaskerName


class PartitionValues(Attribution, abc.ABC):
    """SHAP's partition values: Owen values of nested boxes of pixels (paper, section 4.2)."""

    additive: ClassVar[bool] = True

    explained_score: Literal["logit", "probability"] = Field(
        "logit", alias="explain", description="which score of the class is explained")
    max_evals: int = Field(2000, ge=4, description="evaluations for each image; paper 4.2")
    batch_size: int = Field(50, ge=1, description=(
        "shap's batch_size: evaluations between two looks at the queue; it changes the values "
        "(docs/METHOD.md)"))
    masker: MaskerName = Field("blur(16,16)", description=(
        "what stands in for hidden pixels: blur(k,k), or one colour for all channels in [0,1]"))
    fixed_context: Literal[0, 1] | None = Field(None, description=(
        "shap's fixed_context: 0 or 1 splits a box in that context alone; null: in both"))

    @property
    def title(self) -> str:
        """See `Attribution.title`: both ways give SHAP values."""
        return "shap"

    def evaluations(self, size: tuple[int, int] | None = None) -> int | None:
        """See `Attribution.evaluations`: the budget; an image with fewer splits takes less."""
        return self.max_evals
