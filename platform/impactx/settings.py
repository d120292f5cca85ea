"""Every setting of an experiment: its type, its default and where the default comes from.

The classes hold values and check them; they read no file and import neither torch nor ray.
`impactx.configuration` builds them from the YAML files and the command line.  A comment
"paper N.N" names the section of arXiv 2502.12222 that prescribes a value; "ours" marks a
choice where the paper is silent (the reasons stand in docs/METHOD.md).
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    field_validator,
    model_validator,
)

SQLITE_DEFAULT = "mlflow.db"


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _expand_range(value: Any) -> Any:
    """Turn {start, stop, step} into the list of its values, the end included if a step meets it."""
    if not isinstance(value, dict):
        return value
    if set(value) != {"start", "stop", "step"} or not all(isinstance(v, (int, float)) for v in value.values()):
        raise ValueError("a range has exactly the numbers start, stop and step")
    start, stop, step = (float(value[key]) for key in ("start", "stop", "step"))
    if not step > 0 or not all(map(math.isfinite, (start, stop, step))):
        raise ValueError("the step of a range must be above 0, its ends finite")
    count = math.floor((stop - start) / step + 1e-9) + 1
    if count > 10_000:
        raise ValueError(f"a range of {count} values: at most 10000")
    # Rounded to 12 digits: 0.2 + 2 * 0.2 must be 0.6, or the same point gets two fingerprints.
    return [round(start + i * step, 12) for i in range(count)]


def _unique(values: list) -> list:
    if len(set(values)) != len(values):
        raise ValueError("holds a value twice")
    return values


def axis(item: Any) -> Any:
    """A grid axis: a list of distinct values, or {start, stop, step} for an arithmetic range."""
    return Annotated[list[item], BeforeValidator(_expand_range), Field(min_length=1), BeforeValidator(
        lambda v: _unique(v) if isinstance(v, list) and all(isinstance(i, (int, float)) for i in v) else v)]


def _colour_as_text(value: Any) -> Any:
    """0.5 and [0.5, 0.4, 0.3] may be written for '0.5' and '0.5,0.4,0.3'."""
    if isinstance(value, (list, tuple)) and value:
        parts = [_colour_as_text(item) for item in value]
        return ",".join(parts) if all(isinstance(p, str) for p in parts) else value
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def tagged(annotation: Any) -> dict[str, type[Settings]]:
    """The classes of a union of settings by their tag (the only value of their `method` or `kind`); else empty.

    Such a union or null is the same union.
    """
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return {}
    members = [member for member in typing.get_args(annotation) if member is not type(None)]
    if len(members) == 1:
        return tagged(members[0])
    found = {}
    for member in members:
        fields = member.model_fields if isinstance(member, type) and issubclass(member, Settings) else {}
        for name in {"method", "kind"} & set(fields):
            found[fields[name].default] = member
    return found


MaskerName = Annotated[str, BeforeValidator(_colour_as_text)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
LearningRate = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
BatchSize = Annotated[int, Field(ge=1, le=65536)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Precision = Literal["float32", "tf32", "bfloat16"]
Lambda = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class AugmentationSettings(Settings):
    """What is drawn anew for every image and epoch; images and maps are moved together. Ours."""

    flip: bool = Field(True, description="mirror left-right with probability 1/2")
    shift: int = Field(2, ge=0, le=64, description="move by up to this many pixels each way, zeros move in")


class DatasetSettings(Settings):
    """Where images come from. The name is the cell's name and the default folder under data_root."""

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    source: Literal["auto", "torchvision", "parquet", "folder", "digits"] = Field(
        "auto", description=(
            "auto: Parquet files in the folder where there are any, else class folders of images, else torchvision"))
    path: str | None = Field(None, description="folder or s3:// address of the files; default: data_root/<name>")
    torchvision_class: Literal["CIFAR10", "CIFAR100", "STL10"] | None = None
    download: bool = Field(True, description="let torchvision download what is absent")
    num_classes: int | None = Field(None, ge=2, description="checked against the labels; None: counted")
    train_images: int | None = Field(None, ge=1, description=(
        "size of the training split: only for --dry-run, while the data are not here yet"))
    image_size: int | None = Field(None, ge=8, le=1024, description=(
        "side in pixels to which every image is resized; None: all images must have one size"))
    test_fraction: Fraction = Field(0.2, description=(
        "share drawn (stratified, by split_seed) as test set where the source has no test split of its own"))
    split_seed: int = Field(0, ge=0, description="seed of that draw and of subset; not the repeats' seed")
    subset: int | None = Field(None, ge=20, description=(
        "use only this many training images, drawn stratified by split_seed; for trials of a set-up"))
    augmentation: AugmentationSettings = AugmentationSettings()


class ModelSettings(Settings):
    """The classifier A (paper 4.3): LeNet-5 or any timm model by its name."""

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$", description="the cell's name")
    architecture: str = Field(min_length=1, description="lenet5, or a model name that timm knows")
    weights: str = Field("random", min_length=1, description=(
        "random, hub, or a .pth/.safetensors file (local path or s3:// address)"))
    weights_match: Literal["names", "order"] = Field("names", description=(
        "how tensors of a file are assigned: by name, or in the order of their keys (shapes must agree)"))
    input_size: int | None = Field(None, ge=8, le=1024, description=(
        "side to which the model itself resizes its input; None: the data set's native size"))
    mean: tuple[float, float, float] | None = Field(None, description="None: timm's value, 0.5 for LeNet-5")
    std: tuple[Positive, Positive, Positive] | None = None

    @model_validator(mode="after")
    def _lenet_has_no_hub(self) -> ModelSettings:
        if self.architecture == "lenet5" and self.weights == "hub":
            raise ValueError("weights 'hub' with architecture 'lenet5': nobody publishes them; use random or a file")
        return self


class TrainingSettings(Settings):
    """One training loop for both stages and every approach. The paper is silent here: all ours."""

    epochs: int = Field(100, ge=1, le=100_000, description="at most this many epochs")
    patience: int = Field(8, ge=1, description="epochs without a better validation accuracy before the end")
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    precision: Literal["auto", "float32", "float64", "bfloat16"] = Field("auto", description=(
        "auto: bfloat16 autocast on a GPU, float32 on a CPU"))
    eval_batch_size: int = Field(500, ge=1)
    compile: Literal["never", "always"] = Field("never", description="torch.compile the step")
    memory_mb: int = Field(4096, ge=64, description=(
        "of images and maps kept on the device; a larger data set stays memory-mapped on the host and is gathered "
        "a batch at a time"))
    keep_trial_weights: bool = Field(False, description="keep the best weights of every trial as well")


class GridSettings(Settings):
    """Table 1's search for A, and how much of it is done."""

    learning_rate: axis(LearningRate) = _expand_range({"start": 0.0001, "stop": 0.01, "step": 0.0005})
    batch_size: axis(BatchSize) = [16, 32, 64]
    validation_fraction: axis(Fraction) = [0.05, 0.1, 0.2]
    select_on: Literal["common", "own"] = Field("common", description=(
        "common: trials are compared on the smallest validation part, which lies in all the others; "
        "own: each on its own part, as the paper seems to do"))
    strategy: Literal["grid", "random", "asha"] = Field("grid", description=(
        "grid: every point, as in the paper; random: max_trials points drawn by the seed; asha: every point, in a "
        "drawn order, and those that fall behind are stopped early (asynchronous successive halving, Li et al. 2018)"))
    max_trials: int | None = Field(None, ge=1, description=(
        "budget: at most so many points of each cell, drawn by the seed; None: all"))
    max_hours: float | None = Field(None, gt=0, allow_inf_nan=False, description=(
        "budget: no trial of a cell is begun once its trials have trained so many hours, summed over trials; points "
        "are then tried in an order drawn by the seed"))
    grace_epochs: int = Field(4, ge=1, description="asha: no trial is stopped before so many epochs")
    reduction: float = Field(3, gt=1, allow_inf_nan=False, description=(
        "asha: of the trials that came to a rung (grace_epochs times a power of this), about one in so many goes on"))

    @model_validator(mode="after")
    def _random_needs_a_number(self) -> GridSettings:
        if self.strategy == "random" and self.max_trials is None:
            raise ValueError("strategy 'random' needs max_trials: how many points are drawn")
        return self


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
        "max_abs: each map by its largest absolute value; raw: as they are"))


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
_TABLE_1 = _expand_range({"start": 0.2, "stop": 1.4, "step": 0.2})
_FACTORS = Field([1.0], description=(
    "candidates, times learning_rate: as many as IMPACTX has lambdas make its search and this one equal"))


class ImpactxSettings(_TrainedBase):
    """IMPACTX's second stage (paper 3.3, 4.3), and with other lambdas or maps its controls."""

    kind: Literal["impactx"] = "impactx"
    lambdas: Lambdas = _TABLE_1
    m: Literal["logits", "penultimate"] = Field("logits", description="paper 3.1: m are the K scores")
    latent: int = Field(512, ge=1, description="units of the LEP's last layer, paper 4.3")
    lep_start: Literal["as_stage1", "from_stage1"] = Field("as_stage1", description=(
        "as_stage1: the LEP starts where A started (random or pre-trained); from_stage1: at A's trained layers"))
    maps: Literal["own", "shuffled", "shuffled_in_class", "mean", "class_mean"] = Field("own", description=(
        "what the decoder is taught. own: each image's map; the controls: another image's (shuffled, "
        "shuffled_in_class), or the mean of the training part's maps (mean, class_mean) for every image"))
    attribution: AttributionSettings | None = Field(None, description=(
        "makes the maps, in a store of its own; None: the experiment's"))

    _searched: ClassVar[frozenset[str]] = _ApproachBase._searched | {"lambdas"}
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
    attribution: AttributionSettings | None = Field(None, description="makes the class maps; None: the experiment's")

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
    attribution: AttributionSettings | None = Field(None, description="makes the maps; None: the experiment's")

    _searched: ClassVar[frozenset[str]] = _ApproachBase._searched | {"lambdas"}


ApproachSettings = Annotated[
    ImpactxSettings | AbnSettings | WaeSettings | EnsembleSettings | SingleStageSettings, Field(discriminator="kind")]


def parse_approach(described: Mapping[str, Any]) -> ApproachSettings:
    """Settings from plain data, as a unit's inputs hold them. Raises pydantic's ValidationError."""
    return TypeAdapter(ApproachSettings).validate_python(dict(described))


MapOrder = Literal["own", "predicted", "true", "of_a", "mean_map"]


class EvaluationSettings(Settings):
    """How finished models and their maps are judged (docs/METHOD.md). Ours; the paper shows single images."""

    resamples: int = Field(10_000, ge=100, le=1_000_000, description="of the bootstrap that gives intervals")
    confidence: Fraction = Field(0.95, description="of the intervals; 1 - confidence is the level of the tests")
    map_images: int = Field(1000, ge=0, description=(
        "test images on which each final model's maps are judged, by MoRF and by their fidelity, drawn stratified, the "
        "same for every model of a data set; more than there are: all; 0: none"))
    seed: int = Field(0, ge=0, lt=2**31, description="of that draw, of the noise, of random orders and of resamples")
    region: int | None = Field(None, ge=1, description=(
        "side in pixels of MoRF's regions; None: an eighth of the image's, rounded down to a power of two (4 at 32, "
        "8 at 96)"))
    orders: Annotated[list[MapOrder], AfterValidator(_unique)] = Field(
        ["own", "predicted", "true", "of_a", "mean_map"], description=(
            "maps that are judged, as far as a model has them: own: what the model itself makes in its forward pass; "
            "predicted, true: of `attribution` for the model's own predicted or the true class; of_a: of the A that it "
            "was trained on, for the true class (what the decoder learns); mean_map: the mean training map for every "
            "image. Random order and the first map's least-relevant-first are always drawn beside"))
    attributions: list[AttributionSettings] = Field([], description=(
        "further attributions whose maps for the predicted class are judged"))
    approaches: list[str] | None = Field(None, description="whose models' maps are judged; None: all, A's as well")


class ClusterSettings(Settings):
    """Where and with what the work is done: never part of a fingerprint."""

    address: str | None = Field(None, description=(
        "of a running Ray cluster; None: RAY_ADDRESS, or a local one that lives as long as the job"))
    num_cpus: int | None = Field(None, ge=1, description="of a local cluster; None: all")
    trial_cpus: float = Field(1, gt=0)
    trial_gpus: float = Field(0, ge=0)
    trial_workers: int = Field(1, ge=1, description=(
        "data-parallel workers of one trial, each with trial_cpus and trial_gpus; more than 1: by Ray Train"))
    max_concurrent_trials: int | None = Field(None, ge=1, description="of all cells together; None: what fits")
    cells_at_once: int = Field(3, ge=1, description=(
        "cells under way at once, which share the cluster; 1: one cell after the other"))
    grows_to_cpus: int | None = Field(None, ge=1, description=(
        "of a cluster that starts nodes on demand: how many CPUs it may come to, so that as much work is asked for; "
        "None: it stays as it is"))
    grows_to_gpus: int | None = Field(None, ge=1, description="the same for GPUs")
    train_workers: int = Field(1, ge=1, description="data-parallel workers of a final training (Ray Train)")
    train_cpus: float = Field(1, gt=0, description="CPUs of one such worker")
    use_gpu: bool = Field(False, description="final trainings on GPUs")
    explain_cpu_actors: int | None = Field(None, ge=0, description="None: one a CPU of the cluster")
    explain_gpu_actors: int | None = Field(None, ge=0, description="None: one a GPU of the cluster")
    explain_memory_mb: int = Field(512, ge=64, description="working memory of one actor's mask batches")
    threads: int = Field(1, ge=1, description="of torch in each process; results on a CPU may depend on it")
    max_failures: int = Field(3, ge=0, description="of one trial or training before it counts as failed")
    storage_patience: float = Field(600, ge=0, allow_inf_nan=False, description=(
        "seconds for which a process waits where the output is full or does not answer; then its work fails"))


class TrackingSettings(Settings):
    """MLflow. The address may hold a password: give it by MLFLOW_TRACKING_URI, not here."""

    enabled: bool = True
    uri: str | None = Field(None, description="None: MLFLOW_TRACKING_URI, else sqlite in the output folder")
    ui: str | None = Field(None, description=(
        "address at which people open the server's pages, where it is not the one that jobs use; None: that one"))
    experiment: str = Field("impactx", min_length=1)


def _names_agree(group: dict[str, Any]) -> dict[str, Any]:
    for key, value in group.items():
        if key != value.name:
            raise ValueError(f"the entry {key!r} has the name {value.name!r}: they must be equal")
    return group


class ExplainSettings(Settings):
    """One job that explains a model of the user's: on which images, how, and where the maps go."""

    output: str = Field("results", min_length=1, description="local folder or s3:// address of the store of maps")
    data_root: str = Field("data", min_length=1, description=(
        "folder of the data sets; or an s3:// address, whose files every node fetches once into its cache"))
    cache: str | None = Field(None, description="local folder of decoded images and unpacked maps, on every node")
    datasets: Annotated[dict[str, DatasetSettings], AfterValidator(_names_agree)]
    attribution: AttributionSettings = PartitionSettings()
    maps: MapSettings = MapSettings()
    cluster: ClusterSettings = ClusterSettings()

    @field_validator("datasets")
    @classmethod
    def _one_data_set(cls, datasets: dict[str, DatasetSettings]) -> dict[str, DatasetSettings]:
        if len(datasets) != 1:
            raise ValueError(f"{len(datasets)} data sets ({', '.join(datasets)}): choose the one whose training images "
                             "are explained, dataset=<name>")
        return datasets

    @property
    def dataset(self) -> DatasetSettings:
        """The data set."""
        return next(iter(self.datasets.values()))


class ExperimentSettings(Settings):
    """One job: cells (data set x model), each with stage 1, maps, stage 2 and the final test."""

    name: str = Field("full_grid", min_length=1, pattern=r"^[\w.-]+$")
    seed: int = Field(0, ge=0, lt=2**31)
    repeats: int = Field(5, ge=1, description="trainings of the selected configuration, each with its own seed")
    output: str = Field("results", min_length=1, description="local folder or s3:// address of all artifacts")
    data_root: str = Field("data", min_length=1, description=(
        "folder of the data sets; or an s3:// address, whose files every node fetches once into its cache"))
    cache: str | None = Field(None, description=(
        "local folder of decoded images and unpacked maps, on every node; None: data_root/.cache, or the user's "
        "cache folder where that cannot be written"))
    datasets: Annotated[dict[str, DatasetSettings], AfterValidator(_names_agree)] = Field(min_length=1)
    models: Annotated[dict[str, ModelSettings], AfterValidator(_names_agree)] = Field(min_length=1)
    grid: GridSettings = GridSettings()
    training: TrainingSettings = TrainingSettings()
    attribution: AttributionSettings = PartitionSettings()
    maps: MapSettings = MapSettings()
    approaches: dict[str, ApproachSettings] = Field(default_factory=dict)
    evaluation: EvaluationSettings = EvaluationSettings()
    cluster: ClusterSettings = ClusterSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _asha_stops_one_worker(self) -> ExperimentSettings:
        if self.grid.strategy == "asha" and self.cluster.trial_workers > 1:
            raise ValueError(f"grid.strategy 'asha' with cluster.trial_workers = {self.cluster.trial_workers}: a trial "
                             "over several workers cannot be stopped early; set trial_workers to 1")
        return self

    @field_validator("approaches", mode="before")
    @classmethod
    def _impactx_by_default(cls, approaches: Any) -> Any:
        if not isinstance(approaches, dict):
            return approaches
        return {name: {"kind": "impactx"} | value if isinstance(value, dict) else value
                for name, value in approaches.items()}

    @field_validator("approaches")
    @classmethod
    def _baseline_is_a(cls, approaches: dict[str, Any]) -> dict[str, Any]:
        if "baseline" in approaches:
            raise ValueError("'baseline' is A itself and always trained: choose another name for the approach")
        return approaches

    @model_validator(mode="after")
    def _judged_approaches_exist(self) -> ExperimentSettings:
        unknown = [name for name in self.evaluation.approaches or [] if name not in ("baseline", *self.approaches)]
        if unknown:
            raise ValueError(f"evaluation.approaches = {unknown}: no such approach in this experiment; there are "
                             f"{', '.join(('baseline', *self.approaches))}")
        return self
