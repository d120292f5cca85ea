"""Runs in MLflow: the only folder that imports mlflow, and only when something is logged.

One background thread per process does all the talking, so neither a slow nor an absent server holds
up a training: what it logs is buffered, sent every few seconds, and sent again until it arrives;
`finish` waits for the rest, or warns of what could not be logged. Only `MlflowClient` is used,
never mlflow's global state.

A run is found again by its tag `impactx.key`: a job that died and starts again continues its runs.
"""

from __future__ import annotations

from impactx.tracking.mlflow_run import MlflowRun
from impactx.tracking.mlflow_tracker import MlflowTracker, make_tracker

__all__ = ["MlflowRun", "MlflowTracker", "make_tracker"]
