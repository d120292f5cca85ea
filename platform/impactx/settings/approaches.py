"""Settings of the compared approaches: IMPACTX and its controls, ABN, WAE, the ensemble, single-stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    TypeAdapter,
)

from impactx.settings.base import (
    BatchSize,
    Lambda,
    LearningRate,
    Positive,
    Settings,
    axis,
    expand_range,
)
from impactx.settings.extensions import AnyAttribution


class _ApproachBase(Settings):
    """What every approach answers."""

    # No part of a recipe: what is searched (the point that is trained is in it), and the maker of maps (their
    # store's key is in it). Settings younger than finished runs are left out at these values, or what was
    # computed before there was such a setting would be computed again.
    _searched: ClassVar[frozenset[str]] = frozenset({"learning_rate", "batch_size", "attribution"})
    _younger: ClassVar[Mapping[str, Any]] = {}

    def described(self) -> dict[str, Any]:
        """The settings as plain data for a fingerprint: what a network depends on, but the point and the maps."""
        described = self.model_dump(mode="json", exclude=set(self._searched))
        return {k: v for k, v in described.items() if k not in self._younger or v != self._younger[k]}


class _TrainedBase(_ApproachBase):
    learning_rate: LearningRate | None = Field(None, description="None: the one selected for A")
    batch_size: BatchSize | None = Field(None, description="None: the one selected for A")


Lambdas = axis(Lambda)
_TABLE_1 = expand_range({"start": 0.2, "stop": 1.4, "step": 0.2})
_FACTORS = Field([1.0], description=(
    "candidates, times learning_rate: as many as IMPACTX has lambdas make its search and this one equal"))


class ImpactxSettings(_TrainedBase):
    """IMPACTX's second stage (paper 3.3, 4.3), and with other lambdas or maps its controls."""

    kind: Literal["impactx"] = "impactx"
    lambdas: Lambdas = _TABLE_1
    learning_rate_factors: axis(Positive) = Field([1.0], description=(
        "candidates as well, times learning_rate: lambda = 0 has nothing else to search"))
    m: Literal["logits", "penultimate"] = Field("logits", description="paper 3.1: m are the K scores")
    latent: int = Field(512, ge=1, description="units of the LEP's last layer, paper 4.3")
    lep_start: Literal["as_stage1", "from_stage1"] = Field("as_stage1", description=(
        "as_stage1: the LEP starts where A started (random or pre-trained); from_stage1: at A's trained layers"))
    maps: Literal["own", "shuffled", "shuffled_in_class", "mean", "class_mean"] = Field("own", description=(
        "what the decoder is taught. own: each image's map; the controls: another image's (shuffled, "
        "shuffled_in_class), or the mean of the training part's maps (mean, class_mean) for every image"))
    attribution: AnyAttribution | None = Field(None, description=(
        "makes the maps, in a store of its own; None: the experiment's"))

    _searched: ClassVar[frozenset[str]] = _ApproachBase._searched | {"lambdas", "learning_rate_factors"}
    _younger: ClassVar[Mapping[str, Any]] = {"maps": "own"}


class AbnSettings(_TrainedBase):
    """Attention Branch Network (Fukui et al. 2019, the paper's [16]; DESIGN section 6)."""

    kind: Literal["abn"] = "abn"
    learning_rate_factors: axis(Positive) = _FACTORS

    _searched: ClassVar[frozenset[str]] = _ApproachBase._searched | {"learning_rate_factors"}


class WaeSettings(_TrainedBase):
    """Weighted average explanations (Apicella et al. 2023, the paper's [7]): test images need maps as well."""

    kind: Literal["wae"] = "wae"
    learning_rate_factors: axis(Positive) = _FACTORS
    m: Literal["logits", "penultimate"] = Field("logits", description="as IMPACTX's")
    latent: int = Field(512, ge=1, description="units of the encoder's last layer, as the LEP's")
    encoder_start: Literal["as_stage1", "from_stage1"] = Field("as_stage1", description="as IMPACTX's lep_start")
    attribution: AnyAttribution | None = Field(None, description="makes the class maps; None: the experiment's")

    _searched: ClassVar[frozenset[str]] = _ApproachBase._searched | {"learning_rate_factors"}


class EnsembleSettings(_ApproachBase):
    """Control: the mean probabilities of two classifiers A of equal cost, from two seeds."""

    kind: Literal["ensemble"] = "ensemble"


class SingleStageSettings(_TrainedBase):
    """IMPACTX trained in a single stage (paper 3.3): M too, on maps of IMPACTX itself, made anew as it learns."""

    kind: Literal["single_stage"] = "single_stage"
    lambdas: Lambdas = _TABLE_1
    m: Literal["logits", "penultimate"] = Field("logits", description="as IMPACTX's")
    latent: int = Field(512, ge=1, description="as IMPACTX's")
    explain_every: int = Field(1, ge=1, description="epochs between two rounds of maps; paper: 1")
    explain_share: float = Field(1.0, gt=0, le=1, description=(
        "share of the training images explained in a round, drawn anew; the others keep the map they have, or have "
        "no part in the MSE until their first"))
    auxiliary: float = Field(0.0, ge=0, allow_inf_nan=False, description=(
        "weight of a cross entropy of M's own scores; 0: M learns through C alone"))
    attribution: AnyAttribution | None = Field(None, description="makes the maps; None: the experiment's")

    _searched: ClassVar[frozenset[str]] = _ApproachBase._searched | {"lambdas"}


ApproachSettings = Annotated[
    ImpactxSettings | AbnSettings | WaeSettings | EnsembleSettings | SingleStageSettings, Field(discriminator="kind")]


def parse_approach(described: Mapping[str, Any]) -> ApproachSettings:
    """Settings from plain data, as a unit's inputs hold them. Raises pydantic's ValidationError."""
    return TypeAdapter(ApproachSettings).validate_python(dict(described))
