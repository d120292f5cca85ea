"""Checkpoints: one trained model with all that rebuilds it; reading one runs no code."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from impactx.approaches.base import Approach
from impactx.approaches.baseline import Baseline
from impactx.models.weights import CHECKPOINT_FORMAT, compare_tensors, first_line, on_cpu
from impactx.settings import ModelSettings
from impactx.settings.extensions import approach as registry

VERSION = 2
_KEYS = {"kind", "model", "approach", "class_names", "num_classes", "image_size", "channels",
         "map_scale", "weight", "extra", "state"}


class CheckpointError(ValueError):
    """Something is no usable checkpoint; the message names what is wrong and what to do."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model as it was saved (on the CPU, in eval mode) and what belongs to it.

    Attributes:
        model: The network.
        approach: The approach that it was trained by.
        model_settings: The settings of A's architecture.
        class_names: K names in the order of the labels.
        num_classes: Number of classes K.
        image_size: Native (height, width) in pixels.
        map_scale: What its maps are multiplied by to be in the attribution's units; None where it
            makes none, or raw ones.
        weight: The lambda that it was trained with, None where it has none.
        extra: Further plain values.
    """

    model: nn.Module
    approach: Approach
    model_settings: ModelSettings
    class_names: list[str]
    num_classes: int
    image_size: tuple[int, int]
    map_scale: float | None
    weight: float | None
    extra: dict[str, Any]

    @property
    def kind(self) -> str:
        """The kind of the approach."""
        return self.approach.kind


def save_checkpoint(model: nn.Module, *, model_settings: ModelSettings, class_names: list[str],
                    approach: Approach | None = None, map_scale: float | None = None,
                    weight: float | None = None, extra: Mapping[str, Any] | None = None) -> bytes:
    """Return the content of a checkpoint file.

    Args:
        model: The network, on whatever device.
        model_settings: The settings of A's architecture.
        class_names: K names in the order of the labels.
        approach: The approach that trained it; None: the baseline.
        map_scale: See `Loaded`.
        weight: The lambda that it was trained with, None where it has none.
        extra: Plain values (None, bool, int, float, str, tensors; lists and dicts of them).

    Raises:
        TypeError: The model is not the approach's network, or still wrapped for training; or a
            value in `extra` is not plain.
        ValueError: There are not K class names, or parameters are of different float types.
    """
    approach = Baseline() if approach is None else approach
    if type(model) is not approach.network:
        raise TypeError(
            f"a checkpoint of kind {approach.kind} holds a {approach.network.__name__}, this is a "
            f"{type(model).__name__}: give the approach that trained it, and unwrap a compiled or "
            "data-parallel model first")
    network: Any = model
    state = {name: on_cpu(tensor) for name, tensor in model.state_dict().items()}
    if len({tensor.dtype for tensor in state.values() if tensor.is_floating_point()}) != 1:
        raise ValueError("a checkpoint holds a model of one float type, this one has parts in "
                         "different ones")
    if len(class_names) != network.num_classes:
        raise ValueError(f"the model has {network.num_classes} classes, but {len(class_names)} "
                         "class names were given")
    payload = {
        "format": CHECKPOINT_FORMAT, "version": VERSION, "kind": approach.kind,
        "torch": str(torch.__version__), "model": model_settings.model_dump(mode="json"),
        "approach": approach.model_dump(mode="json"),
        "class_names": [str(name) for name in class_names], "num_classes": network.num_classes,
        "image_size": list(network.image_size), "channels": approach.map_channels(model),
        "map_scale": None if map_scale is None else float(map_scale),
        "weight": None if weight is None else float(weight),
        "extra": _plain(dict(extra or {}), "extra"), "state": state}
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def load_checkpoint(source: bytes | str | Path, *, kind: str | None = None,
                    architecture: str | None = None, num_classes: int | None = None) -> Loaded:
    """Rebuild a saved model on the CPU, in eval mode, without asking a hub or a weights file.

    Args:
        source: The content, or a local path. Nothing in it is executed.
        kind: The kind of approach that the caller needs; another one is an error.
        architecture: The architecture that the caller needs.
        num_classes: The number of classes that the caller needs.

    Raises:
        CheckpointError: It is absent, no checkpoint, truncated or damaged, of another format
            version, of an unknown kind, not what was asked for, or its settings or tensors cannot
            be used by this version of the package.
    """
    where, payload = _read(source)
    if payload["kind"] not in registry.names():
        raise CheckpointError(
            f"{where} is of the kind {payload['kind']!r}, known here: "
            f"{', '.join(registry.names())}; use the version of impactx that wrote it, or import "
            "the file that defines the approach")
    for what, wanted, given in (
            ("kind", kind, payload["kind"]),
            ("architecture", architecture, payload["model"].get("architecture")),
            ("num_classes", num_classes, payload["num_classes"])):
        if wanted is not None and wanted != given:
            raise CheckpointError(
                f"{where} is a checkpoint of another model: its {what} is {given!r}, {wanted!r} "
                "was asked for; give the checkpoint of that model")
    image_size = (payload["image_size"][0], payload["image_size"][1])
    try:
        model_settings = ModelSettings(**payload["model"])
        approach: Approach = registry.parse(payload["approach"])
    except ValidationError as error:
        raise CheckpointError(f"{where} holds settings that this version of impactx does not know: "
                              f"{error}") from error
    try:
        model = approach.rebuild(model_settings, payload["num_classes"], image_size,
                                 payload["channels"])
    except ValueError as error:
        raise CheckpointError(f"{where}: its model cannot be rebuilt: {error}") from error
    misfit = compare_tensors(model.state_dict(), payload["state"])
    if misfit:
        raise CheckpointError(
            f"{where}: its tensors do not fit {model_settings.architecture} as built here (another "
            f"version of timm or impactx wrote it?):\n{misfit}")
    model.to(next(t.dtype for t in payload["state"].values() if t.is_floating_point()))
    model.load_state_dict(payload["state"])
    weights = {candidate.weight for candidate in approach.candidates()}
    weight = payload["weight"]
    if weight is None and len(weights) == 1:
        weight = weights.pop()
    return Loaded(model.eval(), approach, model_settings, payload["class_names"],
                  payload["num_classes"], image_size, payload["map_scale"], weight,
                  payload["extra"])


def _plain(value: Any, where: str) -> Any:
    """Return a value with its tensors on the CPU.

    Raises:
        TypeError: Something in it is not plain; the message names its place.
    """
    if isinstance(value, Tensor):
        return on_cpu(value)
    if type(value) is dict:
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{where}: the key {key!r} is neither a string nor an integer")
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{where} is a {type(value).__module__}.{type(value).__name__}: a checkpoint "
                    "takes None, bool, int, float, str, tensors, and lists and dicts of them")


def _read(source: bytes | str | Path) -> tuple[str, dict[str, Any]]:
    """Return a name for messages, and the verified payload."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        where, content = "the given content", bytes(source)
    else:
        where = str(source)
        try:
            content = Path(source).read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"cannot read the checkpoint {where}: {error.strerror or error}") from error
    if not content.startswith(b"PK"):
        raise CheckpointError(f"{where} is no checkpoint: it "
                              f"{'is empty' if not content else 'has another format'}")
    remedy = "copy it again, or delete it so that it is made again"
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{where} is truncated ({len(content)} bytes): {remedy}") from error
    if damaged:
        raise CheckpointError(f"{where} is damaged (at {damaged}): {remedy}")
    try:
        payload = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no one class for "a zip, but not mine"
        raise CheckpointError(f"{where} is no checkpoint of impactx: {first_line(error)}"
                              ) from error
    if not isinstance(payload, dict) or payload.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{where} is no checkpoint of impactx; bare weights are given by a "
                              "model's setting weights")
    if payload.get("version") != VERSION:
        raise CheckpointError(
            f"{where} has the format version {payload.get('version')!r}, this impactx reads "
            f"{VERSION}: use the version that wrote it, or train again")
    if missing := sorted(_KEYS - set(payload)):
        raise CheckpointError(f"{where} is incomplete: it lacks {', '.join(missing)}")
    return where, payload
