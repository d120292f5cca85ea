"""Final models as MLflow models with a signature, in the model registry, and checkpoints back from there.

A model is the checkpoint (weights only), this package's source, and the name of the loader `impactx.serving`; nothing
of it is a pickled object.  Only `MlflowClient` is used, so a job in the same process keeps its own active run.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from impactx.approaches.checkpoint import Loaded, load_checkpoint
from impactx.experiment.tracker import TrackingError
from impactx.models import map_kind
from impactx.models.preprocess import SERVED_IMAGES
from impactx.tracking.addresses import addresses, redact
from impactx.tracking.client import connect, search
from impactx.tracking.record import KEY, clean_tags

log = logging.getLogger("impactx.tracking")

LOADER, CHECKPOINT, WEIGHTS = "impactx.serving", "checkpoint.pt", "impactx.weights"
# What `impactx.serving` imports, directly or not; pinned to the versions here.
REQUIREMENTS = ("mlflow", "torch", "torchvision", "timm", "numba", "numpy", "pillow", "pyarrow", "pydantic", "filelock")
# What the attributions import on top, where a model has to be given maps (WAE): it makes one of each image by them.
OF_ATTRIBUTIONS = dict.fromkeys(("integrated_gradients", "gradient_shap", "occlusion", "grad_cam"), ("captum",)) | {
    "partition": (), "shap_partition": ("shap", "opencv-python-headless")}


def register(client: Any, experiment_id: str, run_key: str, name: str, content: bytes, about: Mapping[str, Any]) -> str:
    """Log a checkpoint as a model of the run with this key, as the next version of the registered model `name`.

    Returns the version. There is one for each checkpoint: where its weights are registered already, that one is
    returned and nothing is done. Raises LookupError where the run is not there.
    """
    from mlflow.entities import LoggedModelOutput

    runs = search(client, experiment_id, f"tags.`{KEY}` = '{run_key}'")
    if not runs:
        raise LookupError(f"the model's run {run_key!r} is not there")
    run_id, weights = runs[-1].info.run_id, str(about[WEIGHTS])
    _registered_model(client, name)
    for version in client.search_model_versions(f"name = '{name}'", max_results=1000):
        if version.tags.get(WEIGHTS) == weights:
            return str(version.version)
    logged = _logged(client, experiment_id, run_id, name, clean_tags(about))
    if str(logged.status) != "READY":
        with tempfile.TemporaryDirectory(prefix="impactx-") as folder:
            save(Path(folder, "model"), content, run_id=run_id, model_id=logged.model_id,
                 location=logged.artifact_location)
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
            client.log_model_artifacts(logged.model_id, str(Path(folder, "model")))
        client.finalize_logged_model(logged.model_id, "READY")
    # By its location: models:/<id> would be looked up at mlflow's global address, which nobody has set.
    made = client.create_model_version(name, logged.artifact_location, run_id, clean_tags(about),
                                       model_id=logged.model_id)
    client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": json.dumps([
        {"name": name, "version": made.version}])})
    return str(made.version)


def _logged(client: Any, experiment_id: str, run_id: str, name: str, tags: dict[str, str]) -> Any:
    """The run's logged model with these weights: an earlier try may have stopped half-way."""
    found = client.search_logged_models([experiment_id], f"tags.`{WEIGHTS}` = '{tags[WEIGHTS]}'")
    mine = [model for model in found if model.source_run_id == run_id]
    return mine[0] if mine else client.create_logged_model(experiment_id, name.replace(".", "-"), run_id, tags,
                                                           model_type="impactx")


def save(folder: Path, content: bytes, **origin: str) -> None:
    """Write a checkpoint as an MLflow model into a folder. origin: run_id, model_id, location on a server."""
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import Model

    with tempfile.TemporaryDirectory(prefix="impactx-") as parts:
        checkpoint, source = Path(parts, CHECKPOINT), Path(parts, "impactx")
        checkpoint.write_bytes(content)
        shutil.copytree(Path(__file__).parents[1], source, ignore=shutil.ignore_patterns("__pycache__", "configs"))
        loaded = load_checkpoint(checkpoint)
        about = {"class_names": loaded.class_names, "map_scale": loaded.map_scale, "kind": loaded.kind,
                 "map_kind": map_kind(loaded.model, loaded.weight), "images": SERVED_IMAGES}
        model = Model(artifact_path=origin["location"], model_uuid=origin["model_id"], run_id=origin["run_id"],
                      model_id=origin["model_id"], metadata=about) if origin else Model(metadata=about)
        mlflow.pyfunc.save_model(
            folder, loader_module=LOADER, data_path=str(checkpoint), code_paths=[str(source)], mlflow_model=model,
            signature=signature(loaded), input_example=np.full((1, *loaded.image_size, 3), 128, np.uint8),
            pip_requirements=requirements(loaded))


def requirements(loaded: Loaded) -> list[str]:
    """What a machine must have installed to use the model: pinned, or where it is not installed here, its name."""
    attribution = loaded.approach.own_attribution
    given = getattr(loaded.model, "takes_maps", False) and attribution is not None
    return [_pinned(name) for name in (*REQUIREMENTS, *(OF_ATTRIBUTIONS[attribution.method] if given else ()))]


def _pinned(name: str) -> str:
    try:
        return f"{name}=={importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:  # the nodes that explain had it
        return name


def signature(loaded: Loaded) -> Any:
    """What goes in and comes out of `impactx.serving.ServedModel.predict`."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    size = tuple(loaded.image_size)
    outputs = [TensorSpec(np.dtype("int64"), (-1,), "label"),
               TensorSpec(np.dtype("float32"), (-1, loaded.num_classes), "scores")]
    if map_kind(loaded.model, loaded.weight):
        outputs.append(TensorSpec(np.dtype("float32"), (-1, -1, *size), "map"))
    return ModelSignature(Schema([TensorSpec(np.dtype("uint8"), (-1, *size, 3))]), Schema(outputs))


def _registered_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=(
            "The final models of one approach in one cell (data set and classifier), repeat 0 of each job; "
            f"a version for each, the same weights only once. Images: {SERVED_IMAGES}."))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def fetch_checkpoint(address: str, uri: str | None, output: str = "results") -> bytes:
    """The checkpoint of a model in MLflow, downloaded; no code that came with it is executed.

    address: models:/NAME/VERSION, models:/NAME/latest, models:/NAME@ALIAS, models:/m-ID, or
    runs:/RUN_ID/checkpoint.pt; uri: of the tracking server, None: the database in the folder `output`.
    Raises TrackingError.
    """
    uri = addresses(uri, output)[0]
    try:
        client = connect(uri)
        with tempfile.TemporaryDirectory(prefix="impactx-") as folder:
            scheme, _, path = address.partition(":/")
            if scheme == "runs":
                run_id, _, file = path.partition("/")
                return Path(client.download_artifacts(run_id, file or CHECKPOINT, folder)).read_bytes()
            return _download(f"{_location(client, path)}/data/{CHECKPOINT}", uri, folder)
    except Exception as error:
        # `from None`: the original message may hold the password of the address.
        raise TrackingError(redact(f"{address} cannot be had from MLflow at {uri}: {error}; --tracking or "
                                   "MLFLOW_TRACKING_URI name another server", uri)) from None


def _download(location: str, uri: str, folder: str) -> bytes:
    from mlflow.artifacts import download_artifacts

    return Path(download_artifacts(artifact_uri=location, dst_path=folder, tracking_uri=uri)).read_bytes()


def _location(client: Any, path: str) -> str:
    """Where the files of NAME/VERSION, NAME/latest, NAME@ALIAS or m-ID lie."""
    name, _, which = path.partition("/")
    if "@" in name:
        version = client.get_model_version_by_alias(*name.split("@", 1))
    elif not which:
        return str(client.get_logged_model(name).artifact_location)
    elif which == "latest":
        found = client.search_model_versions(f"name = '{name}'", max_results=1000)
        if not found:
            raise LookupError(f"no registered model {name!r}")
        version = max(found, key=lambda v: int(v.version))
    else:
        version = client.get_model_version(name, which)
    if version.model_id:
        return str(client.get_logged_model(version.model_id).artifact_location)
    return str(client.get_model_version_download_uri(version.name, version.version))
