"""What a flow asks for: groups of steps, and the results that it is given for them.

A flow is a generator. It yields groups, and for each it is sent the outcomes of the group's steps:
by the job that carries it out (`impactx.run`), or by a count of what it would do (`impactx.costs`),
which makes up what nobody knows yet.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from impactx.experiment.steps.base import Result, Step, StepError
from impactx.experiment.steps.training import TrainingResult, Trial

R = TypeVar("R", bound=Result)


class SelectionError(StepError):
    """No configuration can be selected; the message says why."""


@dataclass(frozen=True)
class Group:
    """Independent steps that are done together.

    Attributes:
        title: What people call them.
        steps: In the order in which they begin. One that fails does so alone.
    """

    title: str
    steps: Sequence[Step[Any]]


@dataclass(frozen=True)
class Search(Group):
    """Trials of which one is selected.

    Attributes:
        subject: The approach that is searched.
        metric: Of a trial's best epoch, by which trials are compared.
        hours: Of training, summed over trials; once they are spent, no trial is begun. None: no
            limit.
    """

    steps: Sequence[Trial]
    subject: str = ""
    metric: str = "val_accuracy"
    hours: float | None = None


@dataclass(frozen=True)
class Outcomes:
    """What became of a group.

    Attributes:
        results: Of finished steps, by folder.
        failures: Reasons, by folder, of the others.
        unknown: Whether these results stand for some that nobody knows yet.
    """

    results: Mapping[str, Result]
    failures: Mapping[str, str] = field(default_factory=dict)
    unknown: bool = False

    def result(self, step: Step[R]) -> R | None:
        """Return a step's result, or None where it failed."""
        return cast("R | None", self.results.get(step.folder))


@dataclass(frozen=True)
class Selected:
    """The trial that a search came to, and its result."""

    trial: Trial
    result: TrainingResult


@dataclass(frozen=True)
class LeftOut:
    """A part that the cell goes on without, and why.

    Attributes:
        what: An approach or a step, by its name.
        reason: For people.
        failed: Whether it failed, so that the same command tries it again; a training that diverged
            has come to its end.
    """

    what: str
    reason: str
    failed: bool


Request = Group | LeftOut
Flow = Generator[Request, Outcomes, None]


def do(title: str, steps: Iterable[Step[R]]) -> Generator[Request, Outcomes, list[tuple[Any, R]]]:
    """Ask for steps; return those that are finished, each with its result, in their order."""
    steps = list(steps)
    if not steps:
        return []
    outcomes = yield Group(title, steps)
    return [(step, result) for step in steps if (result := outcomes.result(step)) is not None]


def search(title: str, subject: str, trials: Sequence[Trial], metric: str,
           hours: float | None = None) -> Generator[Request, Outcomes, Selected]:
    """Ask for the trials of a search; return the best one, the first of equals.

    Raises:
        SelectionError: No trial can be selected.
    """
    outcomes = yield Search(title, trials, subject, metric, hours)
    return select(trials, outcomes, metric)


def select(trials: Sequence[Trial], outcomes: Outcomes, metric: str) -> Selected:
    """Return the trial with the best metric; among equals, with the smallest cross entropy.

    The cross entropy and not the whole loss: stage 2's loss grows with lambda, so it cannot compare
    two of them.

    Raises:
        SelectionError: Every trial failed or diverged; the message says which and why.
    """
    finished = [Selected(trial, result) for trial in trials
                if (result := outcomes.result(trial)) is not None and not result.stopped]
    usable = [one for one in finished if one.result.best]
    if not usable:
        failed = [trial for trial in trials if trial.folder in outcomes.failures]
        reasons = [f"{trial.name}: {outcomes.failures[trial.folder]}" for trial in failed]
        reasons += [f"{one.trial.name}: diverged, its loss was not finite in the first epoch"
                    for one in finished]
        more = f"\n  and {len(reasons) - 5} more" if len(reasons) > 5 else ""
        raise SelectionError(
            f"none of {len(trials)} trials can be selected, {len(failed)} failed and "
            f"{len(finished)} diverged:\n  " + "\n  ".join(reasons[:5]) + more)

    def order(one: Selected) -> tuple[float, float]:
        best = one.result.best or {}
        return one.result.score(metric), -(best.get("val_ce") or best.get("val_loss") or 0.0)

    return max(usable, key=order)
