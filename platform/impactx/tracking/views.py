"""The view of a job's trainings that is saved in MLflow's pages."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from impactx.tracking.record import ROOT, now_ms

# What the saved view of a job shows, by the names that impactx.experiment gives them.
VIEW_PARAMS = ["dataset", "model", "stage", "approach", "repeat", "learning_rate", "batch_size",
               "validation_fraction", "lambda"]
VIEW_ONLY = "approach"  # of the runs that have this parameter: trials, final models, their tests
VIEW_METRICS = ["best_val_accuracy", "test_accuracy", "paper_accuracy", "best_epoch", "train_seconds"]
VIEW_AXES = ["learning_rate", "batch_size", "validation_fraction"]
VIEW_CURVES = ["val_accuracy", "val_loss", "train_loss"]
VIEW_PREFIX, MAX_VIEWS = "impactx-", 30


def save_view(client: Any, experiment_id: str, root_key: str) -> None:
    """Save a view of the job's trainings in the experiment: MLflow's pages show none of our columns else.

    Views are tags of the experiment, as the pages themselves save them; the oldest of ours go.
    """
    section = {"display": True, "isReordered": False, "deleted": False, "isGenerated": False}
    chart = {"deleted": False, "isGenerated": False, "metricSectionId": "impactx", "runsCountToCompare": 50}
    state = {
        "selectedColumns": [*(f"params.`{name}`" for name in VIEW_PARAMS),
                            *(f"metrics.`{name}`" for name in VIEW_METRICS), "attributes.`Duration`"],
        "searchFilter": f"tags.`{ROOT}` = '{root_key}' and params.`{VIEW_ONLY}` != ''",
        "orderByKey": f"metrics.`{VIEW_METRICS[0]}`", "orderByAsc": False, "startTime": "ALL",
        "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs",
        "runsHiddenMode": "SHOW_ALL",
        "compareRunSections": [section | {"uuid": "impactx", "name": "Comparison of trainings"}],
        "compareRunCharts": [
            chart | {"uuid": "impactx-parallel", "type": "PARALLEL", "selectedParams": VIEW_AXES,
                     "selectedMetrics": VIEW_METRICS[:1], "showAllRuns": True},
            *(chart | {"uuid": f"impactx-{name}", "type": "LINE", "metricKey": name,
                       "selectedMetricKeys": [name]} for name in VIEW_CURVES)]}
    now, prefix = now_ms(), "mlflow.sharedViewState."
    tags = client.get_experiment(experiment_id).tags
    ours = sorted((key for key in tags if key.startswith(f"{prefix}{VIEW_PREFIX}")),
                  key=lambda key: json.loads(tags[key])["updatedAt"])
    for key in ours[:-MAX_VIEWS]:
        client.delete_experiment_tag(experiment_id, key)
    client.set_experiment_tag(experiment_id, prefix + view_key(root_key), json.dumps({
        "name": f"job {root_key}", "createdAt": now, "updatedAt": now, "state": json.dumps(state)}))


def view_key(root_key: str) -> str:
    """The name of a job's saved view in MLflow's tags and addresses."""
    return VIEW_PREFIX + hashlib.sha256(root_key.encode()).hexdigest()[:12]
