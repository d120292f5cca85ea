"""Checkpoints of models in MLflow, downloaded by the address of a model or a run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from impactx.run.tracker import TrackingError
from impactx.tracking.addresses import addresses, redact
from impactx.tracking.client import connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHECKPOINT = "checkpoint.pt"  # the name of the checkpoint among a model's or a run's artifacts


def fetch_checkpoint(address: str, uri: str | None, output: str = "results") -> bytes:
    """Download the checkpoint of a model in MLflow; no code that came with it is executed.

    Args:
        address: models:/NAME/VERSION, models:/NAME/latest, models:/NAME@ALIAS, models:/m-ID, or
            runs:/RUN_ID/checkpoint.pt.
        uri: The address of the tracking server; None for the database in the output folder.
        output: The output folder of a job.

    Returns:
        The bytes of the checkpoint.

    Raises:
        TrackingError: The checkpoint cannot be downloaded.
    """
    uri = addresses(uri, output)[0]
    try:
        client = connect(uri)
        with tempfile.TemporaryDirectory(prefix="impactx-") as folder:
            scheme, _, path = address.partition(":/")
            if scheme == "runs":
                run_id, _, file = path.partition("/")
                local = client.download_artifacts(run_id, file or CHECKPOINT, folder)
                return Path(local).read_bytes()
            return _download(f"{_location(client, path)}/data/{CHECKPOINT}", uri, folder)
    except Exception as error:
        # `from None`: the original message may hold the password of the address.
        raise TrackingError(redact(
            f"{address} cannot be had from MLflow at {uri}: {error}; --tracking or "
            "MLFLOW_TRACKING_URI name another server", uri)) from None


def _download(location: str, uri: str, folder: str) -> bytes:
    from mlflow.artifacts import download_artifacts

    local = download_artifacts(artifact_uri=location, dst_path=folder, tracking_uri=uri)
    return Path(local).read_bytes()


def _location(client: MlflowClient, path: str) -> str:
    """Return the address of the files of NAME/VERSION, NAME/latest, NAME@ALIAS or m-ID."""
    name, _, which = path.partition("/")
    if "@" in name:
        version = client.get_model_version_by_alias(*name.split("@", 1))
    elif not which:
        return str(client.get_logged_model(name).artifact_location)
    elif which == "latest":
        versions = client.search_model_versions(f"name = '{name}'", max_results=1000)
        if not versions:
            raise LookupError(f"no registered model {name!r}")
        version = max(versions, key=lambda v: int(v.version))
    else:
        version = client.get_model_version(name, which)
    if version.model_id:
        return str(client.get_logged_model(version.model_id).artifact_location)
    return str(client.get_model_version_download_uri(version.name, version.version))
