"""The kinds of extensions, their registries, and the settings that each kind has in common.

They stand here and not beside the extensions themselves, so that the settings of an experiment can
hold any of them. What an extension does stands in the room of its kind:
`impactx.explain.attribution`, `impactx.approaches.base` and so on.
"""

from __future__ import annotations

from typing import Any

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
approach: Registry[ApproachSettings] = Registry("approach", "kind", ["impactx.approaches"])
source: Registry[SourceSettings] = Registry("data source", "kind", ["impactx.datasets.sources"])
map_metric: Registry[MapMetricSettings] = Registry(
    "metric of maps", "metric", ["impactx.evaluation.metrics"])
KINDS: tuple[Registry[Any], ...] = (attribution, approach, source, map_metric)

AnyAttribution = attribution.field(AttributionSettings)
AnyApproach = approach.field(ApproachSettings)
AnySource = source.field(SourceSettings)
AnyMapMetric = map_metric.field(MapMetricSettings)
