"""Final models as MLflow loads them, by `mlflow.pyfunc` or `mlflow models serve`.

`impactx.tracking.models` names this module as the loader of the models that it logs, and puts the
package's source beside the checkpoint. So the machine that loads one needs neither Ray nor an
installed impactx, and nothing is unpickled but tensors.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from impactx.api import TrainedModel, load_model
from impactx.models.preprocess import SERVED_IMAGES

log = logging.getLogger("impactx")


class ServedModel:
    """A trained model with the interface that MLflow expects.

    Args:
        model: The model.
    """

    def __init__(self, model: TrainedModel) -> None:
        self.model = model

    def predict(self, images: Any) -> dict[str, np.ndarray]:
        """Classify images and make the model's maps of them.

        Images without a value above 1 are logged with a warning: they may be fractions.

        Args:
            images: uint8 (N, H, W, 3) of the model's size; MLflow has checked them against the
                model's signature.

        Returns:
            "label", int64 (N,); "scores", the probabilities, float32 (N, K); and, if the model has
            maps (see `models.map_kind`), "map", float32 (N, C, H, W).
        """
        if np.size(images) and np.max(images) <= 1:
            log.warning("no pixel of these %d images has a value above 1: if they are not black, "
                        "send %s", len(images), SERVED_IMAGES)
        prediction = self.model.predict(np.ascontiguousarray(images))
        output = {"label": prediction.labels, "scores": prediction.probabilities}
        return output if prediction.maps is None else output | {"map": prediction.maps}


def _load_pyfunc(path: str) -> ServedModel:
    """Return the model of a checkpoint's path. The function's name is prescribed by MLflow."""
    return ServedModel(load_model(path))
