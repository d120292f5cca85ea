"""IMPACTX (arXiv 2502.12222): classifiers that learn to predict their own explanations.

The names below are the package's interface for programs; docs/example.py uses them. Each is
imported when it is first used, so that `import impactx` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from impactx.api import (
        Prediction,
        Schedule,
        TrainedModel,
        explain_dataset,
        load_model,
        train_classifier,
        train_impactx,
    )
    from impactx.approaches.impactx import Impactx
    from impactx.datasets import load_dataset
    from impactx.explain.methods.partition import Partition
    from impactx.settings import (
        AugmentationSettings,
        DatasetSettings,
        ModelSettings,
        TrainingSettings,
    )

_HOMES = {
    "impactx.api": ("Prediction", "Schedule", "TrainedModel", "explain_dataset", "load_model",
                    "train_classifier", "train_impactx"),
    "impactx.approaches.impactx": ("Impactx",),
    "impactx.datasets": ("load_dataset",),
    "impactx.settings": ("AugmentationSettings", "DatasetSettings", "ModelSettings",
                         "TrainingSettings"),
    "impactx.explain.methods.partition": ("Partition",),
}

__all__ = ["AugmentationSettings", "DatasetSettings", "Impactx", "ModelSettings", "Partition",
           "Prediction", "Schedule", "TrainedModel", "TrainingSettings", "explain_dataset",
           "load_dataset", "load_model", "train_classifier", "train_impactx"]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'impactx' has no attribute {name!r}")
