"""Where the model that is explained comes from, and how a process opens it.

A source is plain, typed data, so it travels with a step to every process, which opens the model for
itself: a step's checkpoint, a checkpoint file, a timm model with weights, or a user's own function.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from impactx.approaches.checkpoint import CheckpointError, Loaded, load_checkpoint
from impactx.code import code_fingerprint, is_users_own
from impactx.experiment.steps.base import Record, StepError
from impactx.models import Classifier, Preprocess, seeded, weights_fingerprint
from impactx.models.backbones import check_architecture, normalisation
from impactx.models.logits import Logits
from impactx.models.weights import WeightsError, first_line, load_trunk_file
from impactx.settings import ModelSettings
from impactx.storage import Storage

if TYPE_CHECKING:
    from impactx.experiment.steps.maps import ExplainedModel
    from impactx.experiment.workplace import Workplace


class StepSource(Record):
    """The checkpoint of a step of the same output, in its folder."""

    kind: Literal["step"] = "step"
    folder: str

    def __str__(self) -> str:
        return self.folder


class CheckpointSource(Record):
    """A checkpoint file of impactx: a local path or an s3:// address."""

    kind: Literal["checkpoint"] = "checkpoint"
    path: str

    def __str__(self) -> str:
        return self.path


class TimmSource(Record):
    """A whole timm model, its classification layer included.

    Its weights are random, the hub's, or a file's.
    """

    kind: Literal["timm"] = "timm"
    model: ModelSettings
    num_classes: int
    image_size: tuple[int, int]

    def __str__(self) -> str:
        return f"timm {self.model.architecture}, weights {self.model.weights}"


class ImportSource(Record):
    """What a function returns that is called without arguments.

    Attributes:
        path: `package.module:function`.
        folder: Where the module is looked for beside Python's own path.
    """

    kind: Literal["import"] = "import"
    path: str
    folder: str

    def __str__(self) -> str:
        return self.path


ModelSource = Annotated[
    StepSource | CheckpointSource | TimmSource | ImportSource, Field(discriminator="kind")]


@dataclass(frozen=True)
class OpenedModel:
    """A model to explain.

    Attributes:
        module: float32 (B, 3, H, W) in [0, 1] to logits (B, K); on the CPU, in eval mode, frozen.
        weights: The fingerprint of its weights.
        explained: What else its maps depend on.
    """

    module: nn.Module
    weights: str
    explained: ExplainedModel


def open_model(source: ModelSource, place: Workplace, weights: str) -> nn.Module:
    """Return the module of a source; its weights must have the given fingerprint.

    Raises:
        StepError: The model cannot be had, or is another one.
    """
    return open_source(source, place, weights).module


def open_source(source: ModelSource, place: Workplace, weights: str | None = None) -> OpenedModel:
    """Open a model.

    Args:
        source: Where it comes from.
        place: Where steps leave their checkpoints.
        weights: The fingerprint that it must have; None for whatever is there.

    Raises:
        StepError: The model cannot be had, is another one, or cannot be explained.
    """
    from impactx.experiment.steps.maps import ExplainedModel

    if isinstance(source, StepSource):
        if weights is None:
            raise StepError(f"{source}: the weights of a step's model must be named")
        model, explained = _of_checkpoint(place.checkpoint(source.folder, weights))
    elif isinstance(source, CheckpointSource):
        model, explained = _of_checkpoint(_read_checkpoint(source.path))
    elif isinstance(source, TimmSource):
        model = timm_classifier(source.model, source.num_classes, source.image_size)
        explained = ExplainedModel(architecture=source.model.architecture, kind="timm",
                                   input_size=source.model.input_size)
    else:
        model = imported(source.path, source.folder)
        explained = ExplainedModel(
            kind=source.path, code=code_fingerprint(_modules_of(source.path, model)).digest)
    present = weights_fingerprint(model)
    if weights is not None and present != weights:
        raise StepError(
            f"the model of {source} has weights {present} here, the plan's are {weights}: give "
            "every node the same files (a function must load its weights, not draw them)")
    if getattr(model, "takes_maps", False):
        raise StepError(
            f"the model of {source} needs a map for every image, so it has no score of an image "
            "alone that could be explained: explain the classifier that it was built around")
    plain = isinstance(source, (TimmSource, ImportSource)) or isinstance(model, Classifier)
    module = model if plain else Logits(model)
    return OpenedModel(module.eval().requires_grad_(False), present, explained)


def _modules_of(path: str, model: nn.Module) -> set[str]:
    """Return the imported module, and the user's modules that define classes of the model's parts.

    Weights do not say what a forward pass does with them: a mean that is written into the code
    changes the maps, and no tensor. Scores of a fixed batch would show it, but their last bits
    differ between machines.
    """
    first = path.partition(":")[0]
    files = {kind.__module__: getattr(sys.modules.get(kind.__module__), "__file__", None)
             for part in model.modules() for kind in type(part).__mro__}
    return {first} | {name for name, file in files.items() if file and (
        name.partition(".")[0] in (first.partition(".")[0], "impactx")
        or is_users_own(Path(file)))}


def _of_checkpoint(loaded: Loaded) -> tuple[nn.Module, ExplainedModel]:
    from impactx.experiment.steps.maps import ExplainedModel

    # The same as a plan says of A, so that maps of an experiment's model are found again.
    settings = loaded.model_settings
    return loaded.model, ExplainedModel(
        architecture=settings.architecture, input_size=settings.input_size,
        kind=None if isinstance(loaded.model, Classifier) else loaded.kind)


def _read_checkpoint(path: str) -> Loaded:
    folder, _, name = path.rpartition("/")
    try:
        return load_checkpoint(Storage(folder or "/").read(name) if "://" in path else path)
    except FileNotFoundError as error:
        raise StepError(f"the checkpoint {path} does not exist") from error
    except CheckpointError as error:
        raise StepError(f"{path}: {error}" if "://" in path else str(error)) from error


def timm_classifier(settings: ModelSettings, num_classes: int, image_size: tuple[int, int]
                    ) -> nn.Module:
    """Return a whole timm model behind its own resize and normalisation.

    Args:
        settings: weights are random, hub, or a file that holds all tensors of the model.
        num_classes: Of the classification layer.
        image_size: Native height and width of the images.

    Raises:
        StepError: timm has no such model, or the weights cannot be had or do not fit.
    """
    import timm

    name = settings.architecture
    try:
        check_architecture(name)
    except ValueError as error:
        raise StepError(str(error)) from error
    if name == "lenet5":
        raise StepError("lenet5 is no model of timm: give the checkpoint that impactx wrote, or an "
                        "import path")
    pretrained = settings.weights == "hub"
    classes = getattr(timm.get_pretrained_cfg(name), "num_classes", None)
    if pretrained and classes != num_classes:
        raise StepError(
            f"the hub's weights of {name} have {classes} classes, the images have {num_classes}: "
            "their labels are others; give a file with weights for these classes")
    try:
        with seeded(0, "timm"):
            net = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    except Exception as error:
        if not pretrained:
            raise
        raise StepError(f"the weights of {name} cannot be loaded from the hub "
                        f"({first_line(error)}): give the file itself") from error
    if settings.weights not in ("hub", "random"):
        try:
            load_trunk_file(net, settings.weights, settings.weights_match,
                            model_name=f"{name} ({num_classes} classes)")
        except (WeightsError, OSError) as error:
            raise StepError(str(error)) from error
    mean, std = normalisation(name)
    size = image_size if settings.input_size is None else (settings.input_size,) * 2
    prepare = Preprocess(image_size, size, settings.mean or mean, settings.std or std)
    return nn.Sequential(prepare, net)


def imported(path: str, folder: str) -> nn.Module:
    """Return the module that package.module:function returns, called with torch's seed 0.

    It is looked for where Python looks, in the process's working folder, and in `folder`.

    Raises:
        StepError: There is no such function, or it returns something else.
    """
    module_name, _, function = path.partition(":")
    if not module_name or not function:
        raise StepError(f"--import {path!r}: write it as package.module:function")
    for place in (folder, os.getcwd()):
        if Path(place).is_dir() and place not in sys.path:
            sys.path.insert(0, place)
    try:
        build: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise StepError(f"--import {path}: {error}; looked in {os.getcwd()}, {folder} and Python's "
                        "own path") from error
    for part in function.split("."):
        if not hasattr(build, part):
            raise StepError(f"--import {path}: {module_name} has no {function}")
        build = getattr(build, part)
    with seeded(0, "import"):
        model = build()
    if not isinstance(model, nn.Module):
        raise StepError(f"--import {path}: it returned a {type(model).__name__}, and must return a "
                        "torch.nn.Module")
    return model.cpu()


@torch.no_grad()
def check_scores(model: nn.Module, image: Tensor, num_classes: int, source: ModelSource) -> int:
    """Prove on one image that a model gives finite scores for all classes.

    Args:
        model: In eval mode.
        image: float32 (1, 3, H, W) in [0, 1].
        num_classes: Of the images.
        source: Of the model, for messages.

    Returns:
        How many scores it gives, at least num_classes.

    Raises:
        StepError: It does not.
    """
    try:
        scores = model(image)
    except Exception as error:
        raise StepError(f"the model of {source} cannot take images of {tuple(image.shape[2:])} "
                        f"pixels: {first_line(error)}") from error
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    right = isinstance(scores, Tensor) and scores.ndim == 2 and len(scores) == 1
    if not right or not scores.is_floating_point():
        raise StepError(f"the model of {source} returned {shape} for one image: it must return "
                        "floating point logits (B, K)")
    if scores.shape[1] < num_classes:
        raise StepError(f"the model of {source} gives {scores.shape[1]} scores, the images have "
                        f"{num_classes} classes")
    if not torch.isfinite(scores).all():
        raise StepError(f"the model of {source} gives scores that are not finite: "
                        f"{scores[0].tolist()[:10]}")
    return int(scores.shape[1])
