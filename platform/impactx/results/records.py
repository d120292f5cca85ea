"""What a job writes down about itself in its folder, as typed records.

`impactx.run.journal` writes them:

jobs/<job>/job.json                       settings; when and by which code it was started
    jobs/<job>/cells/<data set>.<model>.json  steps in the order of the flow, choices, what failed
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from impactx.experiment.steps.test import Test
from impactx.experiment.steps.training import Model, Trial
from impactx.settings.base import Name

JOB, CELLS, EVIDENCE = "job.json", "cells", "evidence.json"
TRAINED = (Trial.kind, Model.kind, Test.kind)
EXPLAINED = "explained"  # <key>.json of each store of maps that jobs/explain.py makes


def now() -> str:
    """Return the time as ISO 8601, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Look(_Entry):
    """What a finished start of a job asked for, so that its results could be seen."""

    repeats: int
    margin: float


class Start(_Entry):
    """One start of a job: when, by which command, code, machine and versions of libraries.

    Attributes:
        repeats: How many it asked for.
        pilot: Whether it shows only how many repeats the job needs.
        seen: The results that were there when it began; None where there were none.
    """

    time: str = ""
    repeats: int = 0
    pilot: bool = False
    seen: Look | None = None
    command: str = ""
    code: str = ""
    machine: str = ""
    versions: dict[str, str] = {}


def pilot_repeats(starts: Iterable[Start]) -> int:
    """Return how many of a job's first repeats were a pilot, which its results leave out."""
    return max((start.repeats for start in starts if start.pilot), default=0)


class JobRecord(_Entry):
    """job.json: the experiment's settings as plain data, and all its starts."""

    settings: dict[str, Any]
    starts: list[Start]


class _Read(BaseModel):
    """What results and report read of the parameters of steps that train or test a model."""

    approach: Name
    repeat: int = Field(ge=0)
    learning_rate: float
    batch_size: int
    validation_fraction: float
    weight: float | None = Field(None, alias="lambda")
    paper_accuracy: float | None = None


class StepRecord(_Entry):
    """A step of a cell.

    Attributes:
        group: The title of its group in the flow.
        search: Whether the group is a search, which selects one of its trials.
        parameters: What MLflow and the report show of it.
        inputs: Folders of the steps that it starts from, by what they are to it.
        reused_code: Digest of the other code than the job's that did it; None: the job's own.
    """

    kind: str
    name: str
    folder: str = Field(pattern=r"^\w+/\w+$")
    group: str
    search: bool
    parameters: dict[str, Any]
    inputs: dict[str, str]
    reused_code: str | None = None

    @model_validator(mode="after")
    def _parameters_can_be_read(self) -> StepRecord:
        if self.kind in TRAINED:
            _Read.model_validate(self.parameters)
        return self


class CellFacts(_Entry):
    """What a report must know of a cell; a journal of other facts is another cell's."""

    dataset: Name
    model: Name
    class_names: list[str]
    image_size: tuple[int, int]
    train_images: int
    selection_metric: str
    fingerprint: str


class CellRecord(_Entry):
    """cells/<data set>.<model>.json.

    Attributes:
        failed: Reasons by folder, of steps that failed.
        left_out: Reasons by name, of what the cell goes on without.
        selected: Folder of the selected trial, by the search's title.
        error: What ended the cell; None while nothing has.
    """

    facts: CellFacts
    steps: list[StepRecord] = []
    failed: dict[str, str] = {}
    left_out: dict[str, str] = {}
    selected: dict[str, str] = {}
    error: str | None = None


def cell_path(job: str, dataset: str, model: str) -> str:
    """Return where the journal of a cell lies."""
    return f"jobs/{job}/{CELLS}/{dataset}.{model}.json"
