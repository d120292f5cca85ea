"""Final models as MLflow models with a signature, in the model registry.

A model is the checkpoint (weights only), this package's source, and the name of the loader
`impactx.serving`; nothing of it is a pickled object. Only `MlflowClient` is used, so a job in the
same process keeps its own active run.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from impactx.approaches.checkpoint import Loaded, load_checkpoint
from impactx.explain.attribution import Attribution
from impactx.models import map_kind
from impactx.models.preprocess import SERVED_IMAGES
from impactx.run.tracker import FinalModel
from impactx.tracking.checkpoints import CHECKPOINT
from impactx.tracking.client import search
from impactx.tracking.points import KEY, clean_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature

log = logging.getLogger("impactx.tracking")

LOADER, WEIGHTS = "impactx.serving", "impactx.weights"
# What `impactx.serving` imports, directly or not; pinned to the versions here.
REQUIREMENTS = ("mlflow", "torch", "torchvision", "timm", "numba", "numpy", "pillow", "pyarrow",
                "pydantic", "filelock")
# Of modules that attributions import and that are installed by another name.
DISTRIBUTIONS = {"cv2": "opencv-python-headless"}


@dataclass(frozen=True)
class Origin:
    """Where a logged model belongs: MLflow's ids of its run and of itself, its files' address."""

    run_id: str
    model_id: str
    location: str


def register(client: MlflowClient, experiment_id: str, name: str, model: FinalModel) -> str:
    """Log a checkpoint as a model of its run, and as the next version of a registered model.

    There is one version for each checkpoint: where its weights are registered already, nothing is
    done.

    Args:
        client: MLflow's client.
        experiment_id: The experiment's id.
        name: The name of the registered model.
        model: The model.

    Returns:
        The version of the registered model that has these weights.

    Raises:
        LookupError: The server does not have the model's run.
    """
    from mlflow.entities import LoggedModelOutput

    runs = search(client, experiment_id, f"tags.`{KEY}` = '{model.run_key}'")
    if not runs:
        raise LookupError(f"the model's run {model.run_key!r} is not there")
    run_id, tags = runs[-1].info.run_id, clean_tags({**model.tags, WEIGHTS: model.weights})
    _create_registered_model(client, name)
    for version in client.search_model_versions(f"name = '{name}'", max_results=1000):
        if version.tags.get(WEIGHTS) == model.weights:
            return str(version.version)
    logged = _logged_model(client, experiment_id, run_id, name, tags)
    if str(logged.status) != "READY":
        with tempfile.TemporaryDirectory(prefix="impactx-") as folder:
            save(Path(folder, "model"), model.read_checkpoint(),
                 Origin(run_id, logged.model_id, logged.artifact_location))
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
            client.log_model_artifacts(logged.model_id, str(Path(folder, "model")))
        client.finalize_logged_model(logged.model_id, "READY")
    # By its location: models:/<id> would be looked up at mlflow's global address, which is not set.
    created = client.create_model_version(name, logged.artifact_location, run_id, tags,
                                          model_id=logged.model_id)
    client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": json.dumps([
        {"name": name, "version": created.version}])})
    return str(created.version)


def _logged_model(client: MlflowClient, experiment_id: str, run_id: str, name: str,
                  tags: dict[str, str]) -> LoggedModel:
    """Return the run's logged model with these weights: an earlier try may have created it."""
    where = f"tags.`{WEIGHTS}` = '{tags[WEIGHTS]}'"
    for model in client.search_logged_models([experiment_id], where):
        if model.source_run_id == run_id:
            return model
    return client.create_logged_model(experiment_id, name.replace(".", "-"), run_id, tags,
                                      model_type="impactx")


def save(folder: Path, content: bytes, origin: Origin | None = None) -> None:
    """Write a checkpoint as an MLflow model into a folder.

    Args:
        folder: The folder, which is created.
        content: The bytes of the checkpoint.
        origin: Where the model belongs on a server; None if it belongs to none.
    """
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import Model

    with tempfile.TemporaryDirectory(prefix="impactx-") as parts:
        checkpoint, source = Path(parts, CHECKPOINT), Path(parts, "impactx")
        checkpoint.write_bytes(content)
        shutil.copytree(Path(__file__).parents[1], source,
                        ignore=shutil.ignore_patterns("__pycache__", "configs"))
        loaded = load_checkpoint(checkpoint)
        metadata = {"class_names": loaded.class_names, "map_scale": loaded.map_scale,
                    "kind": loaded.kind, "map_kind": map_kind(loaded.model, loaded.weight),
                    "images": SERVED_IMAGES}
        if origin is None:
            model = Model(metadata=metadata)
        else:
            model = Model(artifact_path=origin.location, model_uuid=origin.model_id,
                          run_id=origin.run_id, model_id=origin.model_id, metadata=metadata)
        mlflow.pyfunc.save_model(
            folder, loader_module=LOADER, data_path=str(checkpoint), code_paths=[str(source)],
            mlflow_model=model, signature=signature(loaded),
            input_example=np.full((1, *loaded.image_size, 3), 128, np.uint8),
            pip_requirements=requirements(loaded))


def requirements(loaded: Loaded) -> list[str]:
    """Return the packages that a machine must have installed to use the model.

    Each is pinned to the version that is installed here, or just named if none is.
    """
    # A model that takes maps as input (WAE) makes one of each image by its attribution.
    attribution = loaded.approach.own_attribution
    takes_maps = getattr(loaded.model, "takes_maps", False)
    imported = attribution.requires if takes_maps and isinstance(attribution, Attribution) else ()
    names = [*REQUIREMENTS, *(DISTRIBUTIONS.get(name, name) for name in imported)]
    return [_pinned(name) for name in names]


def _pinned(name: str) -> str:
    try:
        return f"{name}=={importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:  # the nodes that explain had it
        return name


def signature(loaded: Loaded) -> ModelSignature:
    """Return the shapes and types that `impactx.serving.ServedModel.predict` takes and returns.

    It takes images, (N, H, W, 3) in uint8, and returns labels, (N,) in int64, scores, (N, classes)
    in float32, and, if the model has maps, maps, (N, channels, H, W) in float32.
    """
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    size = tuple(loaded.image_size)
    outputs: list[ColSpec | TensorSpec] = [
        TensorSpec(np.dtype("int64"), (-1,), "label"),
        TensorSpec(np.dtype("float32"), (-1, loaded.num_classes), "scores")]
    if map_kind(loaded.model, loaded.weight):
        outputs.append(TensorSpec(np.dtype("float32"), (-1, -1, *size), "map"))
    images = TensorSpec(np.dtype("uint8"), (-1, *size, 3))
    return ModelSignature(Schema([images]), Schema(outputs))


def _create_registered_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=(
            "The final models of one approach in one cell (data set and classifier), repeat 0 of "
            "each job; a version for each, the same weights only once. Images: "
            f"{SERVED_IMAGES}."))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
