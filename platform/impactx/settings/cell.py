"""Settings of a cell (a data set with a model), of a training, and of the search for A."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from impactx.settings.base import (
    Axis,
    BatchSize,
    Fraction,
    LearningRate,
    Name,
    Positive,
    Settings,
    expand_range,
)
from impactx.settings.extensions import AnySource, SourceSettings
from impactx.settings.extensions import source as sources
from impactx.settings.resources import ModelResources


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

    name: Name = Field(description=(
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
    noticed_by: Literal["size_and_time", "contents"] = Field("size_and_time", description=(
        "By what a changed file of the data set is noticed, whose images are then decoded anew. "
        "size_and_time: by its size and the time of its last change; contents: by its SHA-256 as "
        "well, for which every node reads all files once a job."))
    augmentation: AugmentationSettings = Field(AugmentationSettings(), description=(
        "How every training image is changed anew in each epoch."))


class ModelSettings(Settings):
    """The classifier A (paper 4.3): LeNet-5, or any model of timm by its name."""

    name: Name = Field(description=(
        "The name of the model in results and in the names of cells."))
    architecture: str = Field(min_length=1, description=(
        "lenet5, or the name of a model that timm knows."))
    weights: str = Field("random", min_length=1, description=(
        "The weights at the start of stage 1. random: drawn by the seed; hub: the pre-trained ones "
        "that timm downloads; else a .pth or .safetensors file (local path or s3:// address)."))
    weights_match: Literal["names", "order"] = Field("names", description=(
        "How the tensors of a file are assigned to the model: by their names, or in the order of "
        "their keys. Shapes must agree."))
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = Field(
        None, description=(
            "The SHA-256 of that file in hex; wherever another one is found, it is refused. null: "
            "that of the file as the job finds it when it begins."))
    input_size: int | None = Field(None, ge=8, le=1024, description=(
        "The side in pixels to which the model itself resizes its input; null: the images keep "
        "their size."))
    mean: tuple[float, float, float] | None = Field(None, description=(
        "The mean of each colour channel, for values in [0, 1], that the model subtracts from its "
        "input; null: timm's for the model, 0.5 for LeNet-5."))
    std: tuple[Positive, Positive, Positive] | None = Field(None, description=(
        "The standard deviation of each colour channel by which the model then divides; null: "
        "timm's for the model, 0.5 for LeNet-5."))
    resources: ModelResources = ModelResources()

    @model_validator(mode="after")
    def _lenet_has_no_hub(self) -> ModelSettings:
        if self.architecture == "lenet5" and self.weights == "hub":
            raise ValueError("weights 'hub' with architecture 'lenet5': nobody publishes them; use "
                             "random or a file")
        return self


class TrainingSettings(Settings):
    """The one training loop of both stages and all approaches.

    The paper names none of these values; all defaults are ours.
    """

    epochs: int = Field(100, ge=1, le=100_000, description=(
        "A training ends after this many epochs at the latest."))
    patience: int = Field(8, ge=1, description=(
        "A training ends once this many epochs in a row brought no better validation accuracy."))
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description=(
        "The optimiser, by its name in torch.optim; sgd has Nesterov momentum 0.9."))
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description=(
        "The optimiser's weight decay. torch.optim's default for adam and sgd."))
    precision: Literal["auto", "float32", "float64", "bfloat16"] = Field("auto", description=(
        "The type of numbers in forward passes. bfloat16 is autocast, with float32 weights; auto: "
        "bfloat16 on a GPU, float32 on a CPU."))
    eval_batch_size: int = Field(500, ge=1, description=(
        "Images in a batch of a forward pass without training."))
    compile: Literal["never", "always"] = Field("never", description=(
        "Whether torch.compile compiles the training step."))
    memory_mb: int = Field(4096, ge=64, description=(
        "Megabytes of images and maps that a training keeps on its device. A larger data set stays "
        "memory-mapped on the host, and each batch is gathered there."))
    keep_trial_weights: bool = Field(False, description=(
        "Whether the best weights of every trial are kept as well, and not only its metrics."))

    def described(self) -> dict[str, Any]:
        """Return the settings that change what comes out of a training, as plain data."""
        return self.model_dump(mode="json", exclude={
            "eval_batch_size", "keep_trial_weights", "compile", "memory_mb"})


class GridSettings(Settings):
    """The search for A: Table 1's grid, and how much of it is tried."""

    learning_rate: Axis[LearningRate] = Field(
        expand_range({"start": 0.0001, "stop": 0.01, "step": 0.0005}), description=(
            "The learning rates that are tried (Table 1)."))
    batch_size: Axis[BatchSize] = Field([16, 32, 64], description=(
        "The numbers of images in a training batch that are tried (Table 1)."))
    validation_fraction: Axis[Fraction] = Field([0.05, 0.1, 0.2], description=(
        "The shares of the training images held out for validation that are tried (Table 1)."))
    select_on: Literal["common", "own"] = Field("common", description=(
        "The images on which the validation accuracies of trials are compared. common: those of "
        "the smallest validation part, which all larger ones contain; own: each trial's own "
        "validation part, as the paper seems to do."))
    strategy: Literal["grid", "random", "asha"] = Field("grid", description=(
        "How the grid is searched. grid: every point is trained to its end, as in the paper; "
        "random: max_trials points are drawn by the seed; asha: every point is begun, in a drawn "
        "order, and trials that fall behind are stopped early (asynchronous successive halving, "
        "Li et al. 2018)."))
    max_trials: int | None = Field(None, ge=1, description=(
        "A budget: at most this many points of each cell are tried, drawn by the seed; null: all."))
    max_hours: float | None = Field(None, gt=0, allow_inf_nan=False, description=(
        "A budget: once the trials of a cell have trained for this many hours, summed over trials, "
        "no further one is begun. Points are then tried in an order drawn by the seed. null: no "
        "limit."))
    grace_epochs: int = Field(4, ge=1, description=(
        "With asha, no trial is stopped before it has trained this many epochs. Ours."))
    reduction: float = Field(3, gt=1, allow_inf_nan=False, description=(
        "With asha, trials are compared after grace_epochs times each power of this number (a "
        "rung), and about one in this many goes on. Ours."))

    @model_validator(mode="after")
    def _random_needs_a_number(self) -> GridSettings:
        if self.strategy == "random" and self.max_trials is None:
            raise ValueError("strategy 'random' needs max_trials: how many points are drawn")
        return self
