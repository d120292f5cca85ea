"""Settings of the attributions that make maps, and of the store that keeps them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    TypeAdapter,
    model_validator,
)

from impactx.settings.base import MaskerName, Positive, Precision, Settings


class _AttributionBase(Settings):
    """What all attributions answer; none of it is a setting."""

    @property
    def hidden_by(self) -> tuple[str, ...]:
        """What stands in for a hidden pixel: the maskers (`explain.masking`) that it uses."""
        return (self.masker,) if hasattr(self, "masker") else ()

    def described(self) -> dict[str, Any]:
        """The settings as plain data for a fingerprint: all that the maps' values depend on."""
        return self.model_dump(mode="json")

    def evaluations(self, size: tuple[int, int] | None = None) -> int | None:
        """Cost of one map of an image of `size` (height, width), in forward passes of one image.

        A gradient counts as three of them. None where it depends on the size and that is not known.
        """
        raise NotImplementedError


class _PartitionBase(_AttributionBase):
    explain: Literal["logit", "probability"] = Field("logit", description="which score of the true class")
    max_evals: int = Field(2000, ge=4)
    batch_size: int = Field(50, ge=1, description="shap's batch_size: it changes the values (docs/METHOD.md)")
    masker: MaskerName = Field("blur(16,16)", description="blur(k,k), or one colour for all channels in [0,1]")
    fixed_context: Literal[0, 1] | None = None

    def evaluations(self, size: tuple[int, int] | None = None) -> int | None:
        """The budget; an image with fewer splits takes less."""
        return self.max_evals


class PartitionSettings(_PartitionBase):
    """SHAP's partition explainer (paper 4.2: 2000 evaluations; the rest ours), computed in batches."""

    method: Literal["partition"] = "partition"
    precision: Precision = Field("float32", description=(
        "of the model's forward: float32 is exact; tf32 and bfloat16 are faster on a GPU and give other values, whose "
        "distance from float32's is measured in every shard and reported"))

    def described(self) -> dict[str, Any]:
        """See _AttributionBase. Maps made before there was a choice of precision are float32's."""
        return super().described() if self.precision != "float32" else self.model_dump(
            mode="json", exclude={"precision"})


class ShapPartitionSettings(_PartitionBase):
    """The same by the shap package itself, one image at a time: the reference. CPU or GPU, 4 and more times slower."""

    method: Literal["shap_partition"] = "shap_partition"


class IntegratedGradientsSettings(_AttributionBase):
    """Integrated gradients (Sundararajan et al. 2017), by captum; sums to f(image) - f(baseline) approximately."""

    method: Literal["integrated_gradients"] = "integrated_gradients"
    explain: Literal["logit", "probability"] = Field("logit", description="which score of the true class")
    masker: MaskerName = Field("0", description="the baseline: a colour in [0,1] (0: black, their choice) or blur(k,k)")
    steps: int = Field(50, ge=1, le=10_000, description="points of the Gauss-Legendre rule, captum's default")
    tolerance: Positive | None = Field(None, description=(
        "a map whose sum misses f(image) - f(baseline) by more than this share of its absolute values' sum is an "
        "error; None: the gap is reported only"))

    def evaluations(self, size: tuple[int, int] | None = None) -> int | None:
        """A gradient a step, and both ends."""
        return 3 * self.steps + 2


class GradientShapSettings(_AttributionBase):
    """Gradient SHAP (expected gradients; Lundberg and Lee 2017), by captum; additive in expectation only."""

    method: Literal["gradient_shap"] = "gradient_shap"
    explain: Literal["logit", "probability"] = Field("logit", description="which score of the true class")
    maskers: list[MaskerName] = Field(["0", "1"], min_length=1, description=(
        "the baselines that are drawn from, each a colour in [0,1] or blur(k,k)"))
    samples: int = Field(50, ge=1, le=100_000, description="random points an image")
    noise: float = Field(0.0, ge=0, allow_inf_nan=False, description=(
        "standard deviation of the noise added to each sample's image, in units of [0,1]; captum's default"))
    seed: int = Field(0, ge=0, lt=2**31, description="of the draws; each image has its own, whoever explains it")

    @property
    def hidden_by(self) -> tuple[str, ...]:
        """The baselines."""
        return tuple(self.maskers)

    def evaluations(self, size: tuple[int, int] | None = None) -> int | None:
        """A gradient a sample, the image and its baselines."""
        return 3 * self.samples + 1 + len(self.maskers)


class OcclusionSettings(_AttributionBase):
    """Occlusion (Zeiler and Fergus 2014), by captum: what hiding a square costs, averaged over the squares."""

    method: Literal["occlusion"] = "occlusion"
    explain: Literal["logit", "probability"] = Field("logit", description="which score of the true class")
    masker: MaskerName = Field("0.5", description=(
        "what stands in the square: grey, as theirs, another colour, or blur(k,k)"))
    window: int = Field(8, ge=1, description="side of the square in pixels, all channels hidden together")
    stride: int = Field(4, ge=1, description="pixels between two squares; at most window")

    @model_validator(mode="after")
    def _no_gaps(self) -> OcclusionSettings:
        if self.stride > self.window:
            raise ValueError(f"stride {self.stride} is above window {self.window}: pixels between the squares would "
                             "never be hidden")
        return self

    def evaluations(self, size: tuple[int, int] | None = None) -> int | None:
        """One a square, and the image itself."""
        if size is None:
            return None
        return math.prod(1 + math.ceil(max(side - self.window, 0) / self.stride) for side in size) + 2


class GradCamSettings(_AttributionBase):
    """Grad-CAM (Selvaraju et al. 2017), by captum, upsampled to the image; only for models with convolutions."""

    method: Literal["grad_cam"] = "grad_cam"
    explain: Literal["logit", "probability"] = Field("logit", description="which score of the true class")
    layer: str | None = Field(None, description="name of a convolutional layer; None: the last that the model uses")
    relu: bool = Field(True, description="only what speaks for the class, as theirs; false: signed maps")

    def evaluations(self, size: tuple[int, int] | None = None) -> int | None:
        """One gradient, and the image itself."""
        return 4


AttributionSettings = Annotated[
    PartitionSettings | ShapPartitionSettings | IntegratedGradientsSettings | GradientShapSettings
    | OcclusionSettings | GradCamSettings, Field(discriminator="method")]


def parse_attribution(described: Mapping[str, Any]) -> AttributionSettings:
    """Settings from plain data, as a unit's inputs hold them. Raises pydantic's ValidationError."""
    return TypeAdapter(AttributionSettings).validate_python(dict(described))


class MapSettings(Settings):
    """How the store of maps is cut and scaled."""

    shard_size: int = Field(500, ge=1, description="images a Parquet file; part of the store's layout")
    scale: Literal["std", "max_abs", "raw"] = Field("std", description=(
        "std: divided by the training maps' standard deviation, one number a store; "
        "max_abs: each map by its largest absolute value, a map of zeros stays one; raw: as they are"))
