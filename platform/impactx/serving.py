"""A final model as MLflow loads it (`mlflow.pyfunc`, `mlflow models serve`): weights only, no pickled code.

`impactx.tracking.models` names this module as the loader of what it logs and puts the package's own source beside the
checkpoint, so the loading machine needs neither Ray nor an installed impactx.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from impactx.api import TrainedModel, load_model
from impactx.models.preprocess import SERVED_IMAGES

log = logging.getLogger("impactx")


class ServedModel:
    """A trained model behind MLflow's interface."""

    def __init__(self, model: TrainedModel) -> None:
        self.model = model

    def predict(self, images: Any) -> dict[str, np.ndarray]:
        """label: int64 (N,); scores: float32 (N, K), probabilities; map: float32 (N, C, H, W), where it has maps.

        Which it has, and what they are, `models.map_kind` tells; one trained with lambda = 0 has none.

        images: uint8 (N, H, W, 3) of the model's size; MLflow checks it against the signature before. Images without
        a value above 1 are warned of: they may be fractions, see SERVED_IMAGES.
        """
        if np.size(images) and np.max(images) <= 1:
            log.warning("no pixel of these %d images has a value above 1: if they are not black, send %s", len(images),
                        SERVED_IMAGES)
        found = self.model.predict(np.ascontiguousarray(images))
        output = {"label": found.labels, "scores": found.probabilities}
        return output if found.maps is None else output | {"map": found.maps}


def _load_pyfunc(path: str) -> ServedModel:
    """MLflow's name for a loader's function; path: of the checkpoint."""
    return ServedModel(load_model(path))
