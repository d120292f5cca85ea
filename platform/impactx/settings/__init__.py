"""Every setting of an experiment: its type, its default and where the default comes from.

The classes hold values and check them; they read no file and import neither torch nor ray.
`impactx.configuration` builds them from the YAML files and the command line. A description
that says "paper N.N" names the section of arXiv 2502.12222 that prescribes a value; "ours" marks
a choice where the paper is silent (docs/METHOD.md gives the reasons).
"""

from impactx.settings.base import (
    Precision,
    Settings,
    settable,
)
from impactx.settings.cell import (
    AugmentationSettings,
    DatasetSettings,
    GridSettings,
    ModelSettings,
    TrainingSettings,
)
from impactx.settings.extensions import AttributionSettings
from impactx.settings.job import (
    ClusterSettings,
    EvaluationSettings,
    ExperimentSettings,
    ExplainSettings,
    TrackingSettings,
)
from impactx.settings.maps import MapSettings
from impactx.settings.resources import (
    Device,
    MapsResources,
    ModelResources,
    ProcessResources,
    TrainingResources,
)

__all__ = [
    "AttributionSettings",
    "AugmentationSettings",
    "ClusterSettings",
    "DatasetSettings",
    "Device",
    "EvaluationSettings",
    "ExperimentSettings",
    "ExplainSettings",
    "GridSettings",
    "MapSettings",
    "MapsResources",
    "ModelResources",
    "ModelSettings",
    "Precision",
    "ProcessResources",
    "Settings",
    "TrackingSettings",
    "TrainingResources",
    "TrainingSettings",
    "settable",
]
