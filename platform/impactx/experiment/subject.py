"""A finished model, the test images on which it is judged, and maps of them: its own, and those of explainers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from impactx.evaluation.fidelity import mean_maps
from impactx.experiment.model_source import open_model
from impactx.experiment.units import Unit, WorkError
from impactx.experiment.work import split_of
from impactx.experiment.workplace import Workplace
from impactx.explain.attribution import Attribution, AttributionError
from impactx.explain.maps.scale import largest_scale, map_scale
from impactx.explain.maps.store import MapStore
from impactx.settings import EvaluationSettings, extensions
from impactx.settings.masker import MaskerError


@dataclass
class Subject:
    """A model and the images on which its maps are judged.

    rows: int64 (n,), places in the test set; labels, predicted: int64 (n,); images: uint8 (n, H, W, C); maps: by
    order, float32 (n, C, H, W); seconds, evaluations: of one such map, where it was made here.
    """

    unit: Unit
    place: Workplace
    device: torch.device
    settings: EvaluationSettings
    rows: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    evaluations: dict[str, int | None] = field(default_factory=dict)

    @property
    def pixels(self) -> Tensor:
        """float32 (n, C, H, W) in [0, 1], on the device."""
        whole = torch.from_numpy(np.array(self.images)).to(self.device)
        return whole.permute(0, 3, 1, 2).float().div_(255).contiguous()

    @property
    def batch_size(self) -> int:
        """Images a forward."""
        most = 4096 if self.device.type == "cuda" else 250
        return max(1, min(most, self.place.memory_bytes // (32 * self.images[0].size)))

    def explain(self, name: str, attribution: Attribution, model: nn.Module, classes: np.ndarray,
                known: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """Add the maps of an attribution for these classes. known: classes and maps of the same model that need not
        be made again."""
        again = np.ones(len(classes), bool) if known is None else classes != known[0]
        found = np.array(known[1]) if known is not None else np.empty(
            (len(classes), self.images.shape[3], *self.images.shape[1:3]), np.float32)
        if again.any():
            started = time.perf_counter()
            try:
                found[again] = attribution.explain(
                    model, self.images[again], classes[again], device=self.device,
                    memory_bytes=self.place.memory_bytes, indices=self.rows[again]).maps
            except (AttributionError, MaskerError) as error:
                raise WorkError(f"{self.unit.name}: maps by {attribution.method}, on test images: {error}") from error
            self.seconds[name] = (time.perf_counter() - started) / int(again.sum())
        self.evaluations[name] = attribution.evaluations(self.images.shape[1:3])
        self.maps[name] = found


@dataclass(frozen=True)
class Learned:
    """What stage 2 was trained on: the attribution of its store, the scale, and mean maps in scaled units."""

    attribution: Attribution
    how: str
    scale: float | None  # None: each map by its own largest value
    mean: np.ndarray
    by_class: np.ndarray

    @classmethod
    def of(cls, unit: Unit, place: Workplace) -> Learned | None:
        """Of the store that the unit names; None where the model learned from none. Raises StoreError."""
        if "maps" not in unit.inputs:
            return None
        data = place.dataset(unit.inputs["dataset"])
        store = MapStore.open(place.artifacts.storage, unit.inputs["maps"], unit.recipe["maps"])
        maps, split, how = place.map_array(store, data), split_of(unit, data), unit.recipe["scale"]
        scale = map_scale(maps, split.train, how)
        mean, by_class = mean_maps(maps, data.train.labels, split.train, data.num_classes, scale)
        return cls(extensions.attribution.parse(store.spec.recipe["attribution"]), how,
                   None if isinstance(scale, np.ndarray) else scale, mean, by_class)

    def scaled(self, maps: np.ndarray) -> np.ndarray:
        """Other maps of the same kind in the units that were learned."""
        if self.scale is not None:
            return maps * np.float32(self.scale)
        return maps * largest_scale(maps)[:, None, None, None]


def own_network(subject: Subject) -> nn.Module:
    """The whole model as its checkpoint holds it, on the CPU, in eval mode, frozen."""
    model = subject.place.checkpoint(subject.unit.inputs["checkpoint"], subject.unit.recipe["weights"]).model
    return model.eval().requires_grad_(False)


@torch.no_grad()
def network_maps(model: Any, subject: Subject) -> np.ndarray:
    """What a model with `with_maps` makes of the images, float32 (n, C, H, W); moves the model to the device."""
    model = model.to(subject.device)
    parts = [model.with_maps(part)[1] for part in subject.pixels.split(subject.batch_size)]
    return torch.cat(parts).float().cpu().numpy()


def wants_own_maps(unit: Unit) -> bool:
    """Whether what a model that makes maps makes itself is judged: not a decoder that was trained with lambda = 0,
    which is as random as at its start and explains nothing."""
    return unit.params.get("lambda") != 0 and "own" in EvaluationSettings.model_validate(
        unit.recipe["evaluation"]).orders


def add_own_maps(subject: Subject) -> str | None:
    """Add what the model itself makes, in the units in which it makes it; the name of the order, or None."""
    model = own_network(subject)
    if not hasattr(model, "with_maps") or not wants_own_maps(subject.unit):
        return None
    name = "decoder" if hasattr(model, "decoder") else "attention"
    started = time.perf_counter()
    subject.maps[name] = network_maps(model, subject)
    subject.seconds[name] = (time.perf_counter() - started) / len(subject.rows)
    subject.evaluations[name] = 1
    return name


@dataclass(frozen=True)
class Order:
    """Maps of an explainer that are judged.

    of_a: made of A, and not of the model itself; classes: predicted or true; beside: the order of the same model and
    attribution whose maps need not be made again where its classes are the same.
    """

    name: str
    attribution: Attribution
    classes: Literal["predicted", "true"]
    of_a: bool = False
    beside: str | None = None


def orders_of(unit: Unit, taught: Attribution | None) -> list[Order]:
    """The explainers' maps that a judgement compares. taught: whose maps the model learned; None: of none."""
    settings = EvaluationSettings.model_validate(unit.recipe["evaluation"])
    main, found = extensions.attribution.parse(unit.recipe["attribution"]), []
    predicted = f"{main.title}_predicted"
    if "predicted" in settings.orders:
        found.append(Order(predicted, main, "predicted"))
    if "true" in settings.orders:
        found.append(Order(f"{main.title}_true", main, "true", beside=predicted if found else None))
    if "of_a" in settings.orders and "a" in unit.inputs:
        found.append(Order(f"{(taught or main).title}_of_a", taught or main, "true", of_a=True))
    for number, other in enumerate(settings.attributions, 1):
        name = f"{other.title}_predicted"
        known = {order.name for order in found}
        found.append(Order(name if name not in known else f"{name}_{number}", other, "predicted"))
    return found


def add_explained_maps(subject: Subject, model: nn.Module, learned: Learned | None) -> None:
    """Add the maps of explainers that the settings name. model: the subject's, as a classifier, on the device."""
    unit = subject.unit
    for order in orders_of(unit, learned.attribution if learned is not None else None):
        explained = model
        if order.of_a:
            a = open_model({"kind": "unit", "folder": unit.inputs["a"]}, subject.place, unit.recipe["a"])
            explained = a.to(subject.device)
        known = None if order.beside is None else (subject.predicted, subject.maps[order.beside])
        subject.explain(order.name, order.attribution, explained,
                        subject.predicted if order.classes == "predicted" else subject.labels, known)
