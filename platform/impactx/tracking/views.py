"""The view of a job's trainings that is saved in MLflow's pages."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from impactx.tracking.points import ROOT, now_ms

if TYPE_CHECKING:
    from mlflow import MlflowClient

# The columns and charts of a saved view, by the names that an experiment's runs log.
VIEW_PARAMS = ["dataset", "model", "stage", "approach", "repeat", "learning_rate", "batch_size",
               "validation_fraction", "lambda"]
VIEW_ONLY = "approach"  # of the runs that have this parameter: trials, final models, their tests
VIEW_METRICS = ["best_val_accuracy", "test_accuracy", "paper_accuracy", "best_epoch",
                "train_seconds"]
VIEW_AXES = ["learning_rate", "batch_size", "validation_fraction"]
VIEW_CURVES = ["val_accuracy", "val_loss", "train_loss"]
# The prefix of MLflow's tags that hold saved views, and of our views' names among them.
TAG_PREFIX, VIEW_PREFIX = "mlflow.sharedViewState.", "impactx-"
MAX_VIEWS = 30  # of ours in an experiment, beside the one that is saved


def save_view(client: MlflowClient, experiment_id: str, root_key: str) -> None:
    """Save a view of the job's trainings in the experiment: MLflow's pages lack our columns.

    Views are tags of the experiment, as the pages themselves save them. The oldest of ours are
    deleted.

    Args:
        client: MLflow's client.
        experiment_id: The experiment's id.
        root_key: The key of the job's run.
    """
    tags = client.get_experiment(experiment_id).tags
    ours = sorted((key for key in tags if key.startswith(f"{TAG_PREFIX}{VIEW_PREFIX}")),
                  key=lambda key: float(json.loads(tags[key])["updatedAt"]))
    for key in ours[:-MAX_VIEWS]:
        client.delete_experiment_tag(experiment_id, key)
    now = now_ms()
    client.set_experiment_tag(experiment_id, TAG_PREFIX + view_key(root_key), json.dumps({
        "name": f"job {root_key}", "createdAt": now, "updatedAt": now,
        "state": json.dumps(_state(root_key))}))


def _state(root_key: str) -> dict[str, object]:
    """Return the state of MLflow's page of runs, in the page's own form."""
    section = {"uuid": "impactx", "name": "Comparison of trainings", "display": True,
               "isReordered": False, "deleted": False, "isGenerated": False}
    chart = {"deleted": False, "isGenerated": False, "metricSectionId": "impactx",
             "runsCountToCompare": 50}
    axes: dict[str, object] = {
        "uuid": "impactx-parallel", "type": "PARALLEL", "selectedParams": VIEW_AXES,
        "selectedMetrics": VIEW_METRICS[:1], "showAllRuns": True}
    curves = [{"uuid": f"impactx-{name}", "type": "LINE", "metricKey": name,
               "selectedMetricKeys": [name]} for name in VIEW_CURVES]
    return {
        "selectedColumns": [*(f"params.`{name}`" for name in VIEW_PARAMS),
                            *(f"metrics.`{name}`" for name in VIEW_METRICS),
                            "attributes.`Duration`"],
        "searchFilter": f"tags.`{ROOT}` = '{root_key}' and params.`{VIEW_ONLY}` != ''",
        "orderByKey": f"metrics.`{VIEW_METRICS[0]}`", "orderByAsc": False, "startTime": "ALL",
        "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs",
        "runsHiddenMode": "SHOW_ALL",
        "compareRunSections": [section],
        "compareRunCharts": [chart | axes, *(chart | curve for curve in curves)],
    }


def view_key(root_key: str) -> str:
    """Return the name of a job's saved view in MLflow's tags and addresses."""
    return VIEW_PREFIX + hashlib.sha256(root_key.encode()).hexdigest()[:12]
