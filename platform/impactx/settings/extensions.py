"""The kinds of extensions, their registries, and the settings that each kind has in common.

They stand here and not beside the extensions themselves, so that the settings of an experiment can
hold any of them. What an extension does stands in the room of its kind:
`impactx.explain.attribution`, `impactx.approaches.base` and so on.
"""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any

from impactx.settings.base import Settings
from impactx.settings.registry import Registry


class AttributionSettings(Settings):
    """Common to all attributions: the method's name."""

    method: str


class ApproachSettings(Settings):
    """Common to all approaches: the name of the kind of approach."""

    kind: str


class SourceSettings(Settings):
    """Common to all data sources: the name of the kind of source."""

    kind: str


class MapMetricSettings(Settings):
    """Common to all metrics by which maps are judged: the metric's name."""

    metric: str


attribution: Registry[AttributionSettings] = Registry(
    "attribution", "method", ["impactx.explain.methods"])
approach: Registry[ApproachSettings] = Registry(
    "approach", "kind", ["impactx.approaches"], default="impactx")
source: Registry[SourceSettings] = Registry("data source", "kind", ["impactx.datasets.sources"])
map_metric: Registry[MapMetricSettings] = Registry(
    "metric of maps", "metric", ["impactx.evaluation.metrics"])
KINDS: tuple[Registry[Any], ...] = (attribution, approach, source, map_metric)

_KINDS: dict[type[Settings], Registry[Any]] = {
    AttributionSettings: attribution, ApproachSettings: approach, SourceSettings: source,
    MapMetricSettings: map_metric}


def registry_of(annotation: Any) -> Registry[Any] | None:
    """Return the registry of the extensions that a field of settings holds.

    Args:
        annotation: The field's annotation, such as `AnyAttribution`; an optional one is the same.

    Returns:
        The registry, or None where the field holds no extension.
    """
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [one for one in typing.get_args(annotation) if one is not type(None)]
        return registry_of(members[0]) if len(members) == 1 else None
    return _KINDS.get(annotation) if isinstance(annotation, type) else None


def tagged(annotation: Any) -> dict[str, type[Settings]]:
    """Return the classes that a field may hold by their tag; an empty dict for another field.

    Args:
        annotation: The annotation of a field that holds any extension of a kind, or of a union of
            settings with a tag (their `method` or `kind`); or such a one or null.
    """
    if (registry := registry_of(annotation)) is not None:
        return dict(registry.classes())
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return {}
    members = [one for one in typing.get_args(annotation) if one is not type(None)]
    if len(members) == 1:
        return tagged(members[0])
    classes: dict[str, type[Settings]] = {}
    for member in members:
        if isinstance(member, type) and issubclass(member, Settings):
            for name in {"method", "kind"} & set(member.model_fields):
                classes[member.model_fields[name].default] = member
    return classes


AnyAttribution = attribution.field(AttributionSettings)
AnyApproach = approach.field(ApproachSettings)
AnySource = source.field(SourceSettings)
AnyMapMetric = map_metric.field(MapMetricSettings)
