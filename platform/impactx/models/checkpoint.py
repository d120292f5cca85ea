"""Checkpoints: one trained model with all that is needed to rebuild it, readable without running code."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from impactx.models.abn import Abn, build_abn
from impactx.models.classifier import Classifier, build_classifier
from impactx.models.ensemble import Ensemble
from impactx.models.impactx import Impactx, build_impactx
from impactx.models.single_stage import SingleStageImpactx, build_single_stage
from impactx.models.wae import Wae, build_wae
from impactx.models.weights import CHECKPOINT_FORMAT, compare_tensors, first_line
from impactx.settings import (
    AbnSettings,
    EnsembleSettings,
    ImpactxSettings,
    ModelSettings,
    Settings,
    SingleStageSettings,
    WaeSettings,
)

VERSION = 1
WEIGHT = "lambda"  # in what is extra: checkpoints of before it was kept are read as well
_KEYS = {"kind", "model", "approach", "class_names", "num_classes", "image_size", "channels", "map_scale",
         "extra", "state"}


class CheckpointError(ValueError):
    """Something that is no usable checkpoint; the message names what is wrong and what to do."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model as it was saved (on the CPU, in eval mode) and what belongs to it."""

    model: nn.Module
    kind: str
    model_settings: ModelSettings
    approach_settings: Settings | None
    class_names: list[str]
    num_classes: int
    image_size: tuple[int, int]
    map_scale: float | None
    extra: dict[str, Any]

    @property
    def weight(self) -> float | None:
        """The lambda that it was trained with; None: it has none, or an older checkpoint does not say which."""
        if WEIGHT in self.extra:
            return self.extra[WEIGHT]
        candidates = set(getattr(self.approach_settings, "lambdas", ()))
        return candidates.pop() if len(candidates) == 1 else None


@dataclasses.dataclass(frozen=True)
class Kind:
    """How checkpoints of one kind of model are rebuilt.

    build(model_settings, approach_settings, num_classes, image_size, channels) gives the model with any
    weights, asking neither hub nor file; `channels` are those of its maps, None where it makes none.
    channels(model) tells them when it is saved.
    """

    model_class: type[nn.Module]
    settings_class: type[Settings] | None
    build: Callable[[ModelSettings, Any, int, tuple[int, int], int | None], nn.Module]
    channels: Callable[[Any], int | None] = lambda model: None


_kinds: dict[str, Kind] = {}


def register_kind(name: str, kind: Kind) -> None:
    """Make models of one more class storable. Raises ValueError for a name that is taken."""
    if name in _kinds:
        raise ValueError(f"the checkpoint kind {name!r} is registered already")
    _kinds[name] = kind


def _bare_classifier(model: ModelSettings, num_classes: int, image_size: tuple[int, int]) -> Classifier:
    return build_classifier(model, num_classes, image_size, seed=0, load_weights=False)


register_kind("classifier", Kind(
    Classifier, None, lambda model, approach, k, size, channels: _bare_classifier(model, k, size)))
register_kind("impactx", Kind(
    Impactx, ImpactxSettings,
    lambda model, approach, k, size, channels: build_impactx(
        approach, model, _bare_classifier(model, k, size), seed=0, channels=channels, load_weights=False),
    lambda model: model.decoder.channels))
register_kind("abn", Kind(
    Abn, AbnSettings,
    lambda model, approach, k, size, channels: build_abn(approach, model, k, size, seed=0, load_weights=False)))
register_kind("wae", Kind(
    Wae, WaeSettings,
    lambda model, approach, k, size, channels: build_wae(
        approach, model, _bare_classifier(model, k, size), seed=0, load_weights=False)))
register_kind("ensemble", Kind(
    Ensemble, EnsembleSettings,
    lambda model, approach, k, size, channels: Ensemble([_bare_classifier(model, k, size) for _ in range(2)])))
register_kind("single_stage", Kind(
    SingleStageImpactx, SingleStageSettings,
    lambda model, approach, k, size, channels: build_single_stage(
        approach, model, k, size, seed=0, channels=channels, load_weights=False),
    lambda model: model.decoder.channels))


def save_checkpoint(model: nn.Module, *, model_settings: ModelSettings, class_names: list[str],
                    approach_settings: Settings | None = None, map_scale: float | None = None,
                    weight: float | None = None, extra: Mapping[str, Any] | None = None) -> bytes:
    """The checkpoint file's content for a model of a registered kind, from whatever device it is on.

    class_names: K names in the order of the labels.  map_scale: what a map of the model is multiplied with to
    get the attribution's own units (None: it makes no maps, or raw ones).  weight: the lambda that it was trained
    with, None where it has none.  extra: plain values (None, bool, int, float, str, tensors; lists and dicts of them).
    Raises TypeError (a model of no registered kind or still wrapped for training, settings of another class,
    a value in `extra` that is not plain) and ValueError (not K class names, parameters of different float
    types).
    """
    name = next((name for name, kind in _kinds.items() if type(model) is kind.model_class), None)
    if name is None:
        raise TypeError(f"no checkpoint kind for {type(model).__name__}, only for "
                        f"{', '.join(k.model_class.__name__ for k in _kinds.values())}: unwrap a compiled or "
                        "data-parallel model first")
    kind = _kinds[name]
    state = {name: _on_cpu(tensor) for name, tensor in model.state_dict().items()}
    if len({tensor.dtype for tensor in state.values() if tensor.is_floating_point()}) != 1:
        raise ValueError("a checkpoint holds a model of one float type, this one has parts in different ones")
    if type(approach_settings) is not (kind.settings_class or type(None)):
        raise TypeError(f"a checkpoint of kind {name} needs {getattr(kind.settings_class, '__name__', 'no')} "
                        f"approach settings, got {type(approach_settings).__name__}")
    if len(class_names) != model.num_classes:
        raise ValueError(f"the model has {model.num_classes} classes, but {len(class_names)} class names "
                         "were given")
    payload = {
        "format": CHECKPOINT_FORMAT, "version": VERSION, "kind": name, "torch": str(torch.__version__),
        "model": model_settings.model_dump(mode="json"),
        "approach": None if approach_settings is None else approach_settings.model_dump(mode="json"),
        "class_names": [str(name) for name in class_names], "num_classes": model.num_classes,
        "image_size": list(model.image_size), "channels": kind.channels(model),
        "map_scale": None if map_scale is None else float(map_scale),
        "extra": _plain(dict(extra or {}) | ({} if weight is None else {WEIGHT: float(weight)}), "extra"),
        "state": state}
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def load_checkpoint(source: bytes | str | Path, *, kind: str | None = None, architecture: str | None = None,
                    num_classes: int | None = None) -> Loaded:
    """Rebuild a saved model on the CPU, in eval mode, without hub or weights file; nothing in it is executed.

    source: the content, or a local path.  kind, architecture, num_classes: what the caller needs; another one
    is an error.  Raises CheckpointError: absent, no checkpoint, truncated or damaged, another format version,
    an unknown kind, not what was asked for, settings or tensors that this version of the package cannot use.
    """
    where, payload = _read(source)
    if payload["kind"] not in _kinds:
        raise CheckpointError(f"{where} is of the kind {payload['kind']!r}, known here: {', '.join(_kinds)}; "
                              "use the version of impactx that wrote it")
    for what, wanted, found in (("kind", kind, payload["kind"]),
                                ("architecture", architecture, payload["model"].get("architecture")),
                                ("num_classes", num_classes, payload["num_classes"])):
        if wanted is not None and wanted != found:
            raise CheckpointError(f"{where} is a checkpoint of another model: its {what} is {found!r}, "
                                  f"{wanted!r} was asked for; give the checkpoint of that model")
    entry = _kinds[payload["kind"]]
    image_size = (payload["image_size"][0], payload["image_size"][1])
    try:
        model_settings = ModelSettings(**payload["model"])
        approach = None if entry.settings_class is None else entry.settings_class(**payload["approach"])
    except ValidationError as error:
        raise CheckpointError(f"{where} holds settings that this version of impactx does not know: "
                              f"{error}") from error
    try:
        model = entry.build(model_settings, approach, payload["num_classes"], image_size, payload["channels"])
    except ValueError as error:
        raise CheckpointError(f"{where}: its model cannot be rebuilt: {error}") from error
    misfit = compare_tensors(model.state_dict(), payload["state"])
    if misfit:
        raise CheckpointError(f"{where}: its tensors do not fit {model_settings.architecture} as built here "
                              f"(another version of timm or impactx wrote it?):\n{misfit}")
    model.to(next(t.dtype for t in payload["state"].values() if t.is_floating_point()))
    model.load_state_dict(payload["state"])
    return Loaded(model.eval(), payload["kind"], model_settings, approach, payload["class_names"],
                  payload["num_classes"], image_size, payload["map_scale"], payload["extra"])


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of the state dict; device and order do not matter.

    The normalisation is part of it; the size to which the model resizes its input is not: that is a setting.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(_on_cpu(tensor).reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _plain(value: Any, where: str) -> Any:
    """`value` with tensors on the CPU; TypeError naming the place of anything that is not plain."""
    if isinstance(value, Tensor):
        return _on_cpu(value)
    if type(value) is dict:
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{where}: the key {key!r} is neither a string nor an integer")
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{where} is a {type(value).__module__}.{type(value).__name__}: a checkpoint takes None, "
                    "bool, int, float, str, tensors, and lists and dicts of them")


def _read(source: bytes | str | Path) -> tuple[str, dict[str, Any]]:
    """A name for messages, and the verified payload."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        where, content = "the given content", bytes(source)
    else:
        where = str(source)
        try:
            content = Path(source).read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read the checkpoint {where}: {error.strerror or error}") from error
    if not content.startswith(b"PK"):
        raise CheckpointError(f"{where} is no checkpoint: it "
                              f"{'is empty' if not content else 'has another format'}")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{where} is truncated ({len(content)} bytes): copy it again, or delete it so "
                              "that it is made again") from error
    if damaged:
        raise CheckpointError(f"{where} is damaged (at {damaged}): copy it again, or delete it so "
                              "that it is made again")
    try:
        payload = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no one class for "a zip, but not mine"
        raise CheckpointError(f"{where} is no checkpoint of impactx: {first_line(error)}") from error
    if not isinstance(payload, dict) or payload.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{where} is no checkpoint of impactx; bare weights are given by a model's "
                              "setting weights")
    if payload.get("version") == VERSION and not _KEYS <= set(payload):
        raise CheckpointError(f"{where} is incomplete: it lacks {', '.join(sorted(_KEYS - set(payload)))}")
    if payload.get("version") != VERSION:
        raise CheckpointError(f"{where} has the format version {payload.get('version')!r}, this impactx "
                              f"reads {VERSION}: use the version that wrote it, or train again")
    return where, payload
