"""Settings of what a cell is and how it is searched: data set, model, training, grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from impactx.settings.base import (
    BatchSize,
    Fraction,
    LearningRate,
    Positive,
    Settings,
    axis,
    expand_range,
)
from impactx.settings.extensions import AnySource, SourceSettings
from impactx.settings.extensions import source as sources


def _named(value: Any) -> Any:
    """Return the mapping for which a bare name stands: the source with its default settings."""
    return {"kind": value} if isinstance(value, str) else value


if TYPE_CHECKING:
    NamedSource = SourceSettings  # mypy accepts no annotation that is made at run time
else:
    NamedSource = Annotated[AnySource, BeforeValidator(_named)]


class AugmentationSettings(Settings):
    """How every image is changed anew in each epoch. Images and their maps are moved together."""

    flip: bool = Field(True, description="Images are mirrored left-right with probability 1/2.")
    shift: int = Field(2, ge=0, le=64, description=(
        "Images are moved by up to this many pixels each way; zeros move in."))


class DatasetSettings(Settings):
    """A data set and where its images come from."""

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$", description=(
        "The name in results, and of the default folder below data_root."))
    source: NamedSource = Field(
        default_factory=lambda: sources.parse({"kind": "auto"}), description=(
            "How the images are stored: the name of a source, or a mapping with its settings, "
            "{kind: torchvision, dataset: CIFAR10}."))
    path: str | None = Field(None, description=(
        "The folder or s3:// address of the files; null: data_root/<name>."))
    num_classes: int | None = Field(None, ge=2, description=(
        "The number of classes, checked against the labels; null: they are counted."))
    train_images: int | None = Field(None, ge=1, description=(
        "The size of the training part, for --dry-run only, while the data are not here yet."))
    image_size: int | None = Field(None, ge=8, le=1024, description=(
        "Every image is resized to a square of this side in pixels; null: all images must have one "
        "size."))
    test_fraction: Fraction | None = Field(0.2, description=(
        "The share that is drawn as test part, stratified by split_seed, if the source has none of "
        "its own; null: none is drawn, which is the default of jobs/explain.py for a folder."))
    split_seed: int = Field(0, ge=0, description=(
        "The seed of that draw and of subset. It is not the seed of a repeat."))
    subset: int | None = Field(None, ge=20, description=(
        "Only this many training images are used, drawn stratified by split_seed; for trials of a "
        "set-up."))
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

    def described(self) -> dict[str, Any]:
        """Return the settings that change what comes out of a training, as plain data."""
        return self.model_dump(mode="json", exclude={
            "eval_batch_size", "keep_trial_weights", "compile", "memory_mb"})


class GridSettings(Settings):
    """Table 1's search for A, and how much of it is done."""

    learning_rate: axis(LearningRate) = expand_range({"start": 0.0001, "stop": 0.01, "step": 0.0005})
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
