"""One cell of a job under way: its flow carried out, with reuse, tracking, journal and progress."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from impactx.experiment import flow
from impactx.experiment.artifacts import CHECKPOINT
from impactx.experiment.cell import Cell, Configuration
from impactx.experiment.groups import (
    Group,
    LeftOut,
    Outcomes,
    Request,
    Search,
    SelectionError,
    select,
)
from impactx.experiment.ownership import TakenOver
from impactx.experiment.steps.base import Result, Step, StepError
from impactx.experiment.steps.training import STOPPED_TAG, TrainingResult, Trial
from impactx.results.records import CellFacts
from impactx.results.rows import Row, cell_rows, results_csv, summarise
from impactx.run.budget import Budget
from impactx.run.executor import Epoch, Limits, Task, history_of
from impactx.run.journal import CellJournal
from impactx.run.progress import CellLog
from impactx.run.threads import run_all
from impactx.run.tracker import FinalModel, Run, RunIdentity
from impactx.timing import Progress, duration

if TYPE_CHECKING:
    from impactx.run.job import Job

log = logging.getLogger("impactx")
REUSED = {"impactx.reused": "true"}


class PartsFailed(StepError):
    """Some parts of a cell failed: approaches, or repeats. The message says which and why."""


class CellRun:
    """One cell of a job under way.

    Attributes:
        rows: Of the final models that have read the test set, also where the cell fails.
    """

    def __init__(self, job: Job, cell: Cell, number: int) -> None:
        """Open the cell's journal; number: of the cell in its job, from 1."""
        self.job, self.cell, self.number = job, cell, number
        self.key = f"{job.key}/{cell.dataset.name}/{cell.model.name}"
        facts = cell.facts
        self.journal = CellJournal(job.artifacts.storage, job.key, CellFacts(
            dataset=cell.dataset.name, model=cell.model.name, class_names=list(facts.class_names),
            image_size=facts.image_size, train_images=facts.train_images,
            selection_metric=cell.selection_metric, fingerprint=cell.fingerprint))
        self.log = CellLog(log, {"cell": cell.name})
        self.rows: list[Row] = []
        self._failed: dict[str, str] = {}
        self._diverged: dict[str, str] = {}

    def run(self) -> None:
        """Carry the flow out.

        Raises:
            PartsFailed: A part failed by itself; the rest was done.
            StepError: The cell cannot go on.
        """
        self.log.info("cell %d of %d", self.number, len(self.job.cells))
        try:
            self._run()
        except Exception as error:
            self.journal.stopped(f"{type(error).__name__}: {error}")
            # With several cells the job goes on, and says it again at its end.
            if len(self.job.cells) > 1:
                self._log_failure(error, "failed")
            raise
        finally:
            self.job.progress.ended(self.cell.name)
        if self._failed:
            raise self._failure()

    def _run(self) -> None:
        job, cell = self.job, self.cell
        identity = RunIdentity(
            key=self.key, name=cell.name, parent=job.key,
            parameters={"dataset": cell.dataset, "model": cell.model},
            tags=job.tags | {"impactx.role": "cell"})
        with job.tracker.run(identity) as run:
            try:
                self._carry_out(run)
            finally:
                self.rows = cell_rows(job.artifacts.storage, self.journal.record)
            self._register()
            for s in summarise(self.rows):
                run.log_metrics({f"{s.approach}.val_accuracy": s.val_mean,
                                 f"{s.approach}.test_accuracy": s.test_mean})
                if s.paper_accuracy is not None:
                    run.log_metrics({f"{s.approach}.paper_accuracy": s.paper_accuracy})
            run.log_text(results_csv(self.rows), "results.csv")
            self.journal.finished()
            for folder in self.journal.folders():
                job.artifacts.storage.sweep(folder)
            if self._failed:
                run.finish("FAILED", str(self._failure()))

    def _carry_out(self, run: Run) -> None:
        steps = flow.flow(self.cell)
        try:
            request = next(steps)
            while True:
                request = steps.send(self._answer(request, run))
        except StopIteration:
            return
        except StepError as error:
            reasons = self._failed | self._diverged
            if type(error) is not StepError or not reasons:
                raise
            raise StepError(f"{error}:\n{_listed(reasons)}") from error

    def _answer(self, request: Request, run: Run) -> Outcomes:
        if isinstance(request, LeftOut):
            self._leave_out(request)
            return Outcomes({})
        if isinstance(request, Search):
            return self._search(request, run)
        return self._group(request)

    def _leave_out(self, part: LeftOut) -> None:
        if not part.failed:
            self._diverged[part.what] = part.reason
            self.log.warning("%s: %s", part.what, part.reason)
            return
        self._failed[part.what] = part.reason
        self.journal.left_out(part.what, part.reason)
        self.log.error("%s failed, the cell goes on without it: %s", part.what, part.reason)

    def _failure(self) -> PartsFailed:
        count = len(self._failed)
        return PartsFailed(
            f"{count} part{'s' * (count > 1)} of the cell failed, the rest is in the table (the "
            f"same command tries again):\n{_listed(self._failed)}")

    def _log_failure(self, error: Exception, what: str) -> None:
        ours = type(error).__module__.startswith("impactx.")
        self.log.error("%s: %s: %s", what, type(error).__name__, error,
                       exc_info=None if ours else error)

    # ---- single steps

    def _task(self, step: Step[Any]) -> Task:
        # A trial and a final model may have one recipe: the kind keeps their runs apart.
        return Task(step, RunIdentity(
            key=f"{self.key}/{step.kind}-{step.key}", name=step.name, parent=self.key,
            parameters=step.parameters(), tags=self.job.tags | {"impactx.role": step.kind}))

    def _reused(self, step: Step[Any]) -> Result | None:
        """Return the result of a step that was finished earlier, and see that it has its run."""
        result: Result | None = self.job.artifacts.result(step)
        if result is None:
            return None
        if not step.complete(self.job.place):
            self.log.warning("%s: it was finished, but its store is not whole any more: it is "
                             "completed", step.name)
            return None
        self._replay(step, result, REUSED)
        self.journal.done(step)
        return result

    def _replay(self, step: Step[Any], result: Result, tags: dict[str, str]) -> None:
        place = self.job.place
        history = history_of(result)
        identity = self._task(step).run
        self.job.tracker.replay(
            replace(identity, tags={**identity.tags, **tags}), history=history,
            final=step.metrics(result), files=lambda folder: step.files(place, folder, result))

    def _do(self, step: Step[Any]) -> Result:
        if (result := self._reused(step)) is not None:
            self.log.info("%s: reused, finished earlier (%s)", step.name, step.folder)
            return result
        self.job.may_go_on()
        started = time.perf_counter()
        self.log.info("%s: starts", step.name)
        try:
            result = self._execute(self._task(step))
        except Exception as error:
            self._note_failure(step, f"{type(error).__name__}: {error}")
            raise
        finally:
            self.job.progress.ended(self.cell.name, step.name)
        self.journal.done(step)
        self.log.info("%s: %s (%s)", step.name, step.describe(result),
                      duration(time.perf_counter() - started))
        return result

    def _execute(self, task: Task) -> Result:
        step, executor = task.step, self.job.executor
        if step.slot == "training":
            return executor.train(task, self._on_epoch)
        if step.slot != "maps":
            return executor.process(task)
        progress = Progress(f"{self.cell.name}: {step.name}", "maps", every=60)

        def on_maps(made: int, before: int, total: int) -> None:
            progress.at(before + made, before=before, total=total)
            self.job.progress.at(self.cell.name,
                                 f"{step.name}, {before + made} of {total} maps")

        result = executor.explain(task, on_maps)
        self.job.map_folders.append(result.folder)
        return result

    def _on_epoch(self, step: Step[Any], row: Epoch) -> None:
        self.job.progress.epoch(self.cell.name, step.name, row)

    def _note_failure(self, step: Step[Any], error: str) -> None:
        """Note a failure also for MLflow: the step's own process may have died before it could."""
        self.journal.failed(step, error)
        # A step that was taken over goes on elsewhere.
        if not error.startswith(TakenOver.__name__):
            self.job.tracker.died(self._task(step).run, error)

    # ---- groups

    def _plan(self, group: Group) -> None:
        """Note a group's steps, and say which of them only the code makes new."""
        self.journal.plan(group.title, group.steps, search=isinstance(group, Search))
        if again := self.job.history.made_again(group.steps):
            self.log.info("%s: %s", group.title, again)
        if other := self.job.history.reused(group.steps):
            self.log.warning("%s: %s (reuse = any_code)", group.title, other)

    def _group(self, group: Group) -> Outcomes:
        """Do independent steps at once; maps, which spread over a cluster, one after the other."""
        self._plan(group)
        self.job.progress.at(self.cell.name, group.title)
        # Two approaches may come to one step: it must not be done twice at once.
        unique = {step.folder: step for step in group.steps}
        spread = any(step.slot == "maps" for step in unique.values())
        at_once = 1 if spread else self.job.executor.steps_at_once(group.steps[0])
        taken_over: list[TakenOver] = []

        def do(step: Step[Any]) -> Result:
            if taken_over:
                raise taken_over[0]  # another process does the cell: nothing more is begun here
            try:
                return self._do(step)
            except TakenOver as error:
                taken_over.append(error)
                raise

        work: list[Callable[[], Result]] = [partial(do, step) for step in unique.values()]
        outcomes = run_all(work, at_once, name=group.title.replace(" ", "-"),
                           on_interrupt=self.job.executor.stop)
        results: dict[str, Result] = {}
        failures: dict[str, str] = {}
        for step, outcome in zip(unique.values(), outcomes, strict=True):
            if isinstance(outcome, TakenOver):
                raise outcome
            if not isinstance(outcome, Exception):
                results[step.folder] = outcome
                continue
            failures[step.folder] = reason = f"{type(outcome).__name__}: {outcome}"
            self._failed[step.name] = reason
            self.journal.left_out(step.name, reason)
            self._log_failure(outcome, f"{step.name} failed, the cell goes on without it")
        return Outcomes(results, failures)

    def _search(self, search: Search, run: Run) -> Outcomes:
        """Train the trials of a search; they may have been trained or stopped earlier."""
        self._plan(search)
        under_way = _Trials(self, search)
        if pending := under_way.pending:
            self.job.executor.search([self._task(trial) for trial in pending], under_way.on_result,
                                     under_way.on_epoch, under_way.limits())
        outcomes = under_way.outcomes()
        try:
            chosen = select(search.steps, outcomes, search.metric)
        except SelectionError:
            return outcomes  # the flow says what follows from it
        self.journal.selected(search.title, chosen.trial)
        self.log.info("%s: selected %s (%s %.4f)%s", search.title, chosen.trial.name,
                      search.metric, chosen.result.score(search.metric), under_way.notes())
        self._log_selection(run, search, chosen.trial, chosen.result)
        return outcomes

    def _log_selection(self, run: Run, search: Search, trial: Trial, result: TrainingResult
                       ) -> None:
        what, c = search.subject, Configuration.of(trial)
        weight = trial.candidate.weight
        run.log_params({"selected": {what: {
            "learning_rate": c.learning_rate, "batch_size": c.batch_size,
            "validation_fraction": c.validation_fraction} | (
            {} if weight is None else {"lambda": weight})}})
        run.log_metrics({f"selected.{what}.val_accuracy": result.score("val_accuracy")})

    def _register(self) -> None:
        """Give the tracker one final model of each approach: of the first repeat that has one."""
        storage, first = self.job.artifacts.storage, dict[str, Row]()
        for row in self.rows:
            first.setdefault(row.approach, row)
        folders = {row.model_folder: row for row in first.values()}
        for step in self.journal.record.steps:
            if (chosen := folders.get(step.folder)) is None or step.kind != "model":
                continue
            self.job.tracker.register_model(FinalModel(
                run_key=f"{self.key}/{step.folder.replace('models/', 'model-')}",
                name=(self.cell.dataset.name, self.cell.model.name, chosen.approach),
                weights=chosen.weights,
                read_checkpoint=partial(storage.read, f"{step.folder}/{CHECKPOINT}"),
                tags=step.parameters | {"test_accuracy": chosen.test_accuracy}))


class _Trials:
    """The trials of one search under way."""

    def __init__(self, cell: CellRun, search: Search) -> None:
        artifacts = cell.job.artifacts
        self._cell, self._search = cell, search
        self.results: dict[str, TrainingResult] = {}
        self.stopped: dict[str, TrainingResult] = {}
        self.failed: dict[str, str] = {}
        trials: Sequence[Trial] = search.steps
        for trial in trials:
            result = cell._reused(trial)
            if isinstance(result, TrainingResult):
                self.results[trial.folder] = result
            elif (so_far := artifacts.stopped(trial)) is not None:
                cell._replay(trial, so_far, REUSED | STOPPED_TAG)
                self.stopped[trial.folder] = so_far
        earlier = len(self.results) + len(self.stopped)
        if earlier:
            stopped = f"; {len(self.stopped)} were stopped early" if self.stopped else ""
            cell.log.info("%s: %d of %d trials reused, finished earlier%s", search.title,
                          len(self.results), len(trials), stopped)
        waiting = [trial for trial in trials if trial.folder not in self.results | self.stopped]
        self._begun = {trial.folder for trial in waiting
                       if search.hours is not None and artifacts.begun(trial)}
        self.pending = sorted(waiting, key=lambda trial: trial.folder not in self._begun)
        self._budget = Budget(search.hours, [
            result.seconds for result in [*self.results.values(), *self.stopped.values()]])
        self._progress = Progress(f"{cell.cell.name}: {search.title}", "trials", len(trials),
                                  before=earlier)
        if self.pending:
            self._say()

    def _say(self) -> None:
        over = len(self.results) + len(self.stopped) + len(self.failed)
        self._cell.job.progress.at(
            self._cell.cell.name,
            f"{self._search.title}, {over} of {len(self._search.steps)} trials")

    def limits(self) -> Limits:
        """Return what the executor may begin, and by what it stops trials early."""
        def may_begin(trial: Trial) -> bool:
            self._cell.job.may_go_on()
            return trial.folder in self._begun or not self._budget.spent

        return Limits(may_begin, self._search.steps[0].halving, [
            result.history for result in [*self.results.values(), *self.stopped.values()]])

    def on_epoch(self, step: Step[Any], row: Epoch) -> None:
        """An epoch of a trial is done."""
        self._budget.epoch(step.key, row["seconds"])
        self._cell._on_epoch(step, row)

    def on_result(self, trial: Trial, result: TrainingResult | None, error: str | None) -> None:
        """A trial has ended."""
        cell, metric = self._cell, self._search.metric
        if result is None:
            self.failed[trial.folder] = text = error or "it left no result"
            cell._note_failure(trial, text)
            cell.log.warning("%s failed: %s", trial.name, error)
        elif result.stopped:
            self.stopped[trial.folder] = result
            last = result.history[-1] if result.history else {}
            text = f"stopped at epoch {result.epochs} ({metric} {last.get(metric) or 0:.4f})"
        else:
            self.results[trial.folder] = result
            self._budget.ended(trial.key, result.seconds)
            if result.diverged:
                cell.log.warning("%s diverged at epoch %d (loss not finite)", trial.name,
                                 result.epochs)
            text = f"{metric} {result.score(metric):.4f}"
        if result is not None:
            cell.journal.done(trial)
        cell.job.progress.ended(cell.cell.name, trial.name)
        self._say()
        best = max((r.score(metric) for r in self.results.values() if r.best), default=float("nan"))
        self._progress.step(f"{trial.name}: {text}, best so far {best:.4f}")

    def outcomes(self) -> Outcomes:
        """Return what became of the trials.

        Raises:
            TakenOver: Another process has taken a trial over: a choice among the others would be
                another one.
        """
        search = self._search
        over = len(self.results) + len(self.stopped) + len(self.failed)
        if left := len(search.steps) - over:
            self._cell.log.info("%s: the budget of %g hours is spent, %d of %d trials were not "
                                "begun", search.title, search.hours, left, len(search.steps))
        taken = [f"{trial.name}: {self.failed[trial.folder]}" for trial in search.steps
                 if self.failed.get(trial.folder, "").startswith(TakenOver.__name__)]
        if taken:
            raise TakenOver("\n".join(taken))
        return Outcomes(self.results | self.stopped, self.failed)

    def notes(self) -> str:
        """Return what to say of trials that the choice was made without."""
        of = f"of {len(self._search.steps)}"
        notes = [f"{len(self.failed)} {of} trials failed"] if self.failed else []
        notes += [f"{len(self.stopped)} {of} were stopped early"] if self.stopped else []
        refused = [result.fallback for result in self.results.values() if result.fallback]
        notes += [f"{len(refused)} {of} were trained in float32, their network cannot run in "
                  f"bfloat16 ({refused[0]})"] if refused else []
        return "".join(f"; {note}" for note in notes)


def _listed(reasons: dict[str, str]) -> str:
    return "\n".join(f"  - {what}: {reason}" for what, reason in reasons.items())


