"""A cell's flow counted: its steps, and which of them are finished. Nothing is computed.

What is known only once something else is finished (the selected configuration, A's weights) is made
up until then, and so are the steps that depend on it: they are as many and as large as the real
ones will be, but never finished.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from impactx.approaches.baseline import BASELINE
from impactx.experiment import flow
from impactx.experiment.artifacts import Artifacts
from impactx.experiment.cell import Cell, Configuration
from impactx.experiment.groups import Group, LeftOut, Outcomes, Search
from impactx.experiment.steps.base import Result, Step, StepError
from impactx.experiment.steps.maps import Maps
from impactx.experiment.steps.training import Model, Trial
from impactx.explain.maps.store import HEAD, MapStore
from impactx.run.budget import Budget

S = TypeVar("S", bound=Step[Any])


@dataclass(frozen=True)
class CountedGroup:
    """A group of the flow.

    Attributes:
        group: As the flow asks for it; of a search also its trials that never begin.
        done: Steps that are finished, and trials that were stopped early.
        left: Steps that are still to be done.
        assumed: Whether these steps stand for some that nobody knows yet.
        seconds_left: Of a search's budget of training; infinite without one.
        begun: How many of `left`, the first ones, were begun and go on whatever the budget says.
    """

    group: Group
    done: Sequence[Step[Any]]
    left: Sequence[Step[Any]]
    assumed: bool = False
    seconds_left: float = math.inf
    begun: int = 0

    @property
    def title(self) -> str:
        """What people call the group."""
        return self.group.title


@dataclass(frozen=True)
class Count:
    """The counted flow of a cell.

    Attributes:
        groups: In the flow's order.
        points: The configurations that may be the selected one; one, once stage 1 is over.
        end: Why the flow cannot go on, where it cannot.
    """

    cell: Cell
    groups: Sequence[CountedGroup]
    points: Sequence[Configuration]
    end: str | None = None

    def steps(self, kind: type[S]) -> list[S]:
        """Return all steps of a kind, without duplicates, in the flow's order."""
        return _unique(step for group in self.groups for step in group.group.steps
                       if isinstance(step, kind))

    def left(self, kind: type[S]) -> list[S]:
        """Return the steps of a kind that are still to be done."""
        return _unique(step for group in self.groups for step in group.left
                       if isinstance(step, kind))

    @property
    def searches(self) -> dict[str, CountedGroup]:
        """The searches by the approach that they are for; A's first."""
        return {group.group.subject: group for group in self.groups
                if isinstance(group.group, Search)}


def _unique(steps: Iterable[S]) -> list[S]:
    return list({(step.folder, step.name): step for step in steps}.values())


def count(cell: Cell, artifacts: Artifacts | None = None) -> Count:
    """Count a cell's flow.

    Args:
        cell: Data set and model.
        artifacts: What is finished; None for nothing.

    Raises:
        StorageError: A result is damaged.
        StoreError: The folder of a store of maps holds others.
    """
    groups: list[CountedGroup] = []
    undecided: set[str] = set()  # subjects of searches that are not over
    points: list[Configuration] = []
    requests, end = flow.flow(cell), None
    try:
        request = next(requests)
        while True:
            if isinstance(request, LeftOut):
                request = requests.send(Outcomes({}))
                continue
            counted, outcomes = _counted(request, cell, artifacts, undecided)
            groups.append(counted)
            if isinstance(request, Search) and (counted.left or counted.assumed):
                undecided.add(request.subject)
            if isinstance(request, Search) and request.subject == BASELINE:
                points = [Configuration.of(trial) for trial in request.steps]
            request = requests.send(outcomes)
    except StopIteration:
        pass
    except StepError as error:
        end = str(error)
    if BASELINE not in undecided:
        points = _selected(groups) or points
    return Count(cell, groups, points, end)


def _counted(group: Group, cell: Cell, artifacts: Artifacts | None, undecided: set[str]
             ) -> tuple[CountedGroup, Outcomes]:
    def assumed(step: Step[Any]) -> bool:
        return BASELINE in undecided or step.approach_name in undecided

    results: dict[str, Result] = {}
    for step in group.steps:
        if artifacts is not None and not assumed(step):
            result = artifacts.result(step)
            if result is not None and not (isinstance(step, Maps) and shards_left(
                    step, cell, artifacts)):
                results[step.folder] = result
    done = [step for step in group.steps if step.folder in results]
    left = [step for step in group.steps if step.folder not in results]
    if isinstance(group, Search) and artifacts is not None:
        counted, stopped = _search(group, artifacts, done, left, results)
        results |= stopped
    else:
        hours = group.hours if isinstance(group, Search) else None
        counted = CountedGroup(group, done, left, seconds_left=Budget(hours).left)
    unknown = {step.folder: step.placeholder() for step in counted.left}
    some = any(assumed(step) for step in group.steps)
    counted = CountedGroup(group, counted.done, counted.left, some, counted.seconds_left,
                           counted.begun)
    return counted, Outcomes(unknown | results)


def _search(search: Search, artifacts: Artifacts, done: Sequence[Step[Any]],
            left: Sequence[Step[Any]], results: dict[str, Result]
            ) -> tuple[CountedGroup, dict[str, Result]]:
    """Count a search without trials that were stopped early or that its budget leaves out."""
    stopped = {trial.folder: so_far for trial in left if isinstance(trial, Trial)
               and (so_far := artifacts.stopped(trial)) is not None}
    ended = [step for step in search.steps if step.folder in results or step.folder in stopped]
    waiting = [step for step in left if step.folder not in stopped]
    budget = Budget(search.hours, [result.seconds for result in [*results.values(),
                                                                 *stopped.values()]])
    if search.hours is None:
        return CountedGroup(search, ended, waiting), dict(stopped)
    begun = [step for step in waiting if artifacts.begun(step)]
    rest = [] if budget.spent else [step for step in waiting if step not in begun]
    return CountedGroup(search, ended, begun + rest, seconds_left=budget.left,
                        begun=len(begun)), dict(stopped)


def _selected(groups: Sequence[CountedGroup]) -> list[Configuration]:
    """Return the configuration of A's final trainings, where stage 1 is over."""
    for group in groups:
        for step in group.group.steps:
            if isinstance(step, Model) and step.approach_name == BASELINE:
                return [Configuration.of(step)]
    return []


def images_of(step: Maps, cell: Cell, train_images: int | None = None) -> int | None:
    """Return how many maps a store has; None where that is not known.

    Args:
        step: Makes the maps.
        cell: Whose facts may not be known yet.
        train_images: Of the training split, where the facts do not say.
    """
    facts = cell.facts
    known = facts.test_images if step.part == "test" else facts.train_images or train_images
    return known or None


def shards_left(step: Maps, cell: Cell, artifacts: Artifacts | None) -> list[int]:
    """Return how many maps each shard has that is not there yet.

    Raises:
        StoreError: The folder holds the maps of another step.
    """
    images, size = images_of(step, cell) or 0, step.shard_size
    if artifacts is None or not artifacts.storage.exists(f"{step.folder}/{HEAD}"):
        return [min(size, images - start) for start in range(0, images, size)]
    store = MapStore.open(artifacts.storage, step.folder, step.key)
    return [len(store.shard_indices(shard)) for shard in store.missing()]
