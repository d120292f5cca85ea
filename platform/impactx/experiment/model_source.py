"""Where an explained model comes from: a unit's checkpoint, a checkpoint file, timm with weights, or an import path.

A source is plain data, so it travels with a unit to every process; each opens the model for itself:

    {"kind": "unit", "folder": "models/<key>"}                  of the same output
    {"kind": "checkpoint", "path": "/a/checkpoint.pt" or "s3://..."}
    {"kind": "timm", "model": ModelSettings, "num_classes": K, "image_size": [H, W]}
    {"kind": "import", "path": "package.module:function", "folder": where it is looked for as well}
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from impactx.code import code_fingerprint, is_users_own
from impactx.experiment.units import WorkError
from impactx.models import (
    CheckpointError,
    Classifier,
    Loaded,
    Preprocess,
    load_checkpoint,
    seeded,
    weights_fingerprint,
)
from impactx.models.backbones import check_architecture, normalisation
from impactx.models.logits import Logits
from impactx.models.weights import WeightsError, first_line, load_trunk_file
from impactx.settings import ModelSettings
from impactx.storage import Storage

if TYPE_CHECKING:
    from impactx.experiment.workplace import Workplace


def open_model(source: Mapping[str, Any], place: Workplace, weights: str | None = None) -> nn.Module:
    """The model to be explained: float (B, 3, H, W) in [0, 1] -> logits (B, K); on the CPU, in eval mode, frozen.

    weights: the fingerprint that it must have, None for whatever is found. Raises WorkError where the model cannot
    be had or is another one.
    """
    return open_source(source, place, weights)[0]


def open_source(source: Mapping[str, Any], place: Workplace, weights: str | None = None
                ) -> tuple[nn.Module, str, dict[str, Any]]:
    """As `open_model`, with the weights' fingerprint and what a recipe says of the model beside them."""
    kind, model, about = source["kind"], None, {}
    if kind == "unit" and weights is not None:
        model, about = _of_checkpoint(place.checkpoint(source["folder"], weights))
    elif kind == "checkpoint":
        model, about = _of_checkpoint(_read_checkpoint(source["path"]))
    elif kind == "timm":
        settings = ModelSettings.model_validate(source["model"])
        height, width = source["image_size"]
        model = timm_classifier(settings, source["num_classes"], (height, width))
        about = {"timm": settings.architecture, "input_size": settings.input_size}
    elif kind == "import":
        model = imported(source["path"], source["folder"])
        about = {"import": source["path"], "code": code_fingerprint(_modules_of(source["path"], model)).digest}
    if model is None:
        raise ValueError(f"no such source of a model: {dict(source)!r}")
    found = weights_fingerprint(model)
    if weights is not None and found != weights:
        raise WorkError(f"the model of {describe(source)} has weights {found} here, the plan's are {weights}: give "
                        "every node the same files (a function must load its weights, not draw them)")
    if getattr(model, "takes_maps", False):
        raise WorkError(f"the model of {describe(source)} needs a map for every image, so it has no score of an image "
                        "alone that could be explained: explain the classifier that it was built around")
    usable = model if kind in ("timm", "import") or isinstance(model, Classifier) else Logits(model)
    return usable.eval().requires_grad_(False), found, about


def _modules_of(path: str, model: nn.Module) -> set[str]:
    """Return the imported module and the user's modules that define the classes of a model's parts.

    Weights do not say what a forward pass does with them: a mean that is written into the code changes the maps, and
    no tensor. Scores of a fixed batch would show it, but their last bits differ between machines.
    """
    first = path.partition(":")[0]
    files = {kind.__module__: getattr(sys.modules.get(kind.__module__), "__file__", None)
             for part in model.modules() for kind in type(part).__mro__}
    return {first} | {name for name, file in files.items() if file and (
        name.partition(".")[0] in (first.partition(".")[0], "impactx") or is_users_own(Path(file)))}


def describe(source: Mapping[str, Any]) -> str:
    """A source in a few words."""
    if source["kind"] == "timm":
        return f"timm {source['model']['architecture']}, weights {source['model']['weights']}"
    return str(source.get("path") or source.get("folder"))


def _of_checkpoint(loaded: Loaded) -> tuple[nn.Module, dict[str, Any]]:
    # The same as a plan says of A: maps of an experiment's model are found again by whoever explains it.
    settings = loaded.model_settings
    about = {"architecture": settings.architecture, "input_size": settings.input_size}
    return loaded.model, about if loaded.kind == "classifier" else about | {"kind": loaded.kind}


def _read_checkpoint(path: str) -> Loaded:
    folder, _, name = path.rpartition("/")
    try:
        return load_checkpoint(Storage(folder or "/").read(name) if "://" in path else path)
    except FileNotFoundError as error:
        raise WorkError(f"the checkpoint {path} does not exist") from error
    except CheckpointError as error:
        raise WorkError(f"{path}: {error}" if "://" in path else str(error)) from error


def timm_classifier(settings: ModelSettings, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """A whole timm model, its classification layer included, behind its own resize and normalisation.

    weights: random, hub, or a file that holds all tensors of the model with `num_classes` classes. Raises WorkError.
    """
    import timm

    name = settings.architecture
    try:
        check_architecture(name)
    except ValueError as error:
        raise WorkError(str(error)) from error
    if name == "lenet5":
        raise WorkError("lenet5 is no model of timm: give the checkpoint that impactx wrote, or an import path")
    pretrained = settings.weights == "hub"
    known = getattr(timm.get_pretrained_cfg(name), "num_classes", None)
    if pretrained and known != num_classes:
        raise WorkError(f"the hub's weights of {name} know {known} classes, the images have {num_classes}: their "
                        "labels are others; give a file with weights for these classes")
    try:
        with seeded(0, "timm"):
            net = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    except Exception as error:
        if not pretrained:
            raise
        raise WorkError(f"the weights of {name} cannot be loaded from the hub ({first_line(error)}): give the file "
                        "itself") from error
    if settings.weights not in ("hub", "random"):
        try:
            load_trunk_file(net, settings.weights, settings.weights_match, model_name=f"{name} ({num_classes} classes)")
        except (WeightsError, OSError) as error:
            raise WorkError(str(error)) from error
    mean, std = normalisation(name)
    size = image_size if settings.input_size is None else (settings.input_size,) * 2
    return nn.Sequential(Preprocess(image_size, size, settings.mean or mean, settings.std or std), net)


def imported(path: str, folder: str) -> nn.Module:
    """The module that package.module:function returns, called without arguments and with torch's seed 0.

    Looked for where Python looks, in the process's working folder, and in `folder`. Raises WorkError.
    """
    module_name, _, function = path.partition(":")
    if not module_name or not function:
        raise WorkError(f"--import {path!r}: write it as package.module:function")
    for place in (folder, os.getcwd()):
        if Path(place).is_dir() and place not in sys.path:
            sys.path.insert(0, place)
    try:
        build: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise WorkError(f"--import {path}: {error}; looked in {os.getcwd()}, {folder} and Python's own path") from error
    for part in function.split("."):
        if not hasattr(build, part):
            raise WorkError(f"--import {path}: {module_name} has no {function}")
        build = getattr(build, part)
    with seeded(0, "import"):
        model = build()
    if not isinstance(model, nn.Module):
        raise WorkError(f"--import {path}: it returned a {type(model).__name__}, and must return a torch.nn.Module")
    return model.cpu()


@torch.no_grad()
def check_scores(model: nn.Module, image: Tensor, num_classes: int, source: Mapping[str, Any]) -> int:
    """Prove on one image (1, 3, H, W) that the model gives finite scores for all classes; returns how many it gives.

    Raises WorkError.
    """
    try:
        scores = model(image)
    except Exception as error:
        raise WorkError(f"the model of {describe(source)} cannot take images of {tuple(image.shape[2:])} pixels: "
                        f"{first_line(error)}") from error
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != 1 or not scores.is_floating_point():
        raise WorkError(f"the model of {describe(source)} returned {shape} for one image: it must return floating "
                        "point logits (B, K)")
    if scores.shape[1] < num_classes:
        raise WorkError(f"the model of {describe(source)} gives {scores.shape[1]} scores, the images have "
                        f"{num_classes} classes")
    if not torch.isfinite(scores).all():
        raise WorkError(f"the model of {describe(source)} gives scores that are not finite: {scores[0].tolist()[:10]}")
    return scores.shape[1]
