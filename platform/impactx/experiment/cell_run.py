"""One cell of a job under way: the order of the plan, reuse, tracking and progress."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from impactx.experiment.budget import Budget
from impactx.experiment.claims import TakenOver
from impactx.experiment.executor import STOPPED_TAG, Limits, Task, final_metrics, training_files
from impactx.experiment.journal import CellJournal
from impactx.experiment.paper import published
from impactx.experiment.plan import Cell, Configuration, select
from impactx.experiment.results import Row, results_csv, summarise
from impactx.experiment.stage2 import Basis, Entry
from impactx.experiment.summary import CellLog
from impactx.experiment.threads import run_all
from impactx.experiment.tracker import Run
from impactx.experiment.units import CHECKPOINT, RESULT, Unit, WorkError
from impactx.experiment.work import maps_complete
from impactx.timing import Progress, duration

if TYPE_CHECKING:
    from impactx.experiment.run import Job

log = logging.getLogger("impactx")
DOING = {"model": "final trainings", "maps": "maps", "test": "tests", "explanations": "judging maps"}  # by role


class PartsFailed(WorkError):
    """Some parts of a cell failed: approaches, or repeats of them. The message says which and why."""


class CellRun:
    """One cell of a job under way. rows: of the final models that have read the test set, also where it fails."""

    def __init__(self, job: Job, cell: Cell, number: int) -> None:
        """number: of the cell in its job, from 1."""
        self.job, self.cell, self.number = job, cell, number
        self.key = f"{job.key}/{cell.dataset.name}/{cell.model.name}"
        self.journal = CellJournal(job.artifacts.storage, job.key, cell.dataset.name, cell.model.name, {
            "class_names": list(cell.facts.class_names), "image_size": list(cell.facts.image_size),
            "train_images": cell.facts.train_images, "selection_metric": cell.selection_metric,
            "common": cell.fingerprint})
        self.log = CellLog(log, {"cell": cell.name})
        self.rows: list[Row] = []
        self.failed: dict[str, str] = {}  # what failed alone, by name, and why

    def _task(self, unit: Unit) -> Task:
        self.journal.plan([unit])
        # A trial and the model of repeat 0 may have one recipe: the role keeps their runs apart.
        return Task(unit, f"{self.key}/{unit.role}-{unit.key}", self.key,
                    self.job.tags | {"impactx.role": unit.role})

    def _reused(self, unit: Unit) -> dict[str, Any] | None:
        result = self.job.artifacts.result(unit)
        if result is not None and unit.role == "maps" and not maps_complete(unit, self.job.place):
            self.log.warning("%s: it was finished, but its store is not whole any more: it is completed", unit.name)
            return None
        if result is not None:
            self._replay(unit, result, {"impactx.reused": "true"})
            self.journal.done(unit)
        return result

    def _replay(self, unit: Unit, result: dict[str, Any], tags: dict[str, str]) -> None:
        """Make the tracker's run of a unit that was done earlier, where there is none."""
        task = self._task(unit)
        self.job.tracker.replay(task.run_key, name=unit.name, parent=self.key, params=unit.params,
                                tags=task.tags | tags, final=final_metrics(unit, result),
                                history=[{k: v for k, v in row.items() if v is not None}
                                         for row in result.get("history", [])],
                                files=partial(training_files, unit, self.job.place) if "history" in result else None)

    def _do(self, unit: Unit, how: Callable[[Task], dict[str, Any]]) -> dict[str, Any]:
        if (result := self._reused(unit)) is not None:
            self.log.info("%s: reused, finished earlier (%s)", unit.name, unit.folder)
            return result
        self.job.may_go_on()
        started = time.perf_counter()
        self.log.info("%s: starts", unit.name)
        self.job.summary.at(self.cell.name, DOING[unit.role])
        try:
            result = how(self._task(unit))
        except Exception as error:
            self._failed(unit, f"{type(error).__name__}: {error}")
            raise
        self.journal.done(unit)
        if result.get("best"):
            self.log.info("%s: validation accuracy %.4f at epoch %d of %d, in %s", unit.name,
                     result["best"]["val_accuracy"], result["best_epoch"], result["epochs"],
                     duration(time.perf_counter() - started))
        return result

    def _failed(self, unit: Unit, error: str) -> None:
        """Note it; a unit's own process may not have come to saying so."""
        self.journal.failed(unit, error)
        if not error.startswith(TakenOver.__name__):  # else it goes on, elsewhere
            task = self._task(unit)
            self.job.tracker.died(task.run_key, error, name=unit.name, parent=self.key, params=unit.params,
                                  tags=task.tags)

    def _search(self, what: str, units: list[Unit], metric: str, hours: float | None = None
                ) -> tuple[Unit, dict[str, Any]]:
        """Train all units as trials, and choose. hours: of training, summed; then no other trial is begun."""
        self.journal.plan(units, what)
        results = {u.key: r for u in units if (r := self._reused(u)) is not None}
        stopped = {u.key: r for u in units if u.key not in results and (r := self._stopped(u)) is not None}
        if results or stopped:
            self.log.info("%s: %d of %d trials reused, finished earlier%s", what, len(results), len(units),
                          f"; {len(stopped)} were stopped early" if stopped else "")
        pending = [u for u in units if u.key not in results | stopped]
        begun = {u.key for u in pending if hours is not None and self.job.artifacts.begun(u)}
        budget = Budget(hours, [*results.values(), *stopped.values()])
        failed: dict[str, str] = {}
        progress = Progress(f"{self.cell.name}: {what}", "trials", len(units), before=len(results) + len(stopped))

        def on_epoch(unit: Unit, row: dict[str, float]) -> None:
            budget.epoch(unit.key, row)
            self._on_epoch(unit, row)

        def on_result(unit: Unit, result: dict[str, Any] | None, error: str | None) -> None:
            best = max((r["best"][metric] for r in results.values() if r.get("best")), default=float("nan"))
            if result is None:
                failed[unit.name] = said = error or "it left no result"
                self._failed(unit, said)
                self.log.warning("%s failed: %s", unit.name, error)
            elif result.get("stopped"):
                stopped[unit.key] = result
                said = f"stopped at epoch {result['epochs']} ({metric} {result['last'][metric]:.4f})"
            else:
                results[unit.key] = result
                budget.ended(unit.key, result)
                if result["diverged"]:
                    self.log.warning("%s diverged at epoch %d (loss not finite)", unit.name, result["epochs"])
                score = result["best"][metric] if result.get("best") else float("nan")
                said, best = f"{metric} {score:.4f}", score if not best >= score else best
            if result is not None:
                self.journal.done(unit)
            over = len(results) + len(stopped) + len(failed)
            self.job.summary.ended(self.cell.name, unit.name)
            self.job.summary.at(self.cell.name, f"{what}, {over} of {len(units)} trials")
            progress.step(f"{unit.name}: {said}, best so far {best:.4f}")

        if pending:
            self.job.summary.at(self.cell.name, f"{what}, {len(units) - len(pending)} of {len(units)} trials")

            def may_begin(unit: Unit) -> bool:
                self.job.may_go_on()
                return unit.key in begun or not budget.spent

            limits = Limits(may_begin, units[0].inputs.get("halving", {}),
                            [r["history"] for r in [*results.values(), *stopped.values()]])
            pending.sort(key=lambda unit: unit.key not in begun)
            self.job.executor.search([self._task(u) for u in pending], on_result, on_epoch, limits)
            if left := len(units) - len(results) - len(stopped) - len(failed):
                self.log.info("%s: the budget of %g hours is spent, %d of %d trials were not begun", what, hours, left,
                              len(units))
        if lost := [f"{name}: {said}" for name, said in failed.items() if said.startswith(TakenOver.__name__)]:
            raise TakenOver("\n".join(lost))  # a choice among the rest would be another one
        chosen, result = select(units, results, metric, failed)
        self.journal.selected(what, chosen)
        notes = [f"{len(failed)} of {len(units)} trials failed"] if failed else []
        notes += [f"{len(stopped)} of {len(units)} were stopped early"] if stopped else []
        self.log.info("%s: selected %s (%s %.4f)%s", what, chosen.name, metric, result["best"][metric],
                      "".join(f"; {note}" for note in notes))
        return chosen, result

    def _stopped(self, unit: Unit) -> dict[str, Any] | None:
        """What a trial had come to when this search stopped it earlier."""
        if (found := self.job.artifacts.stopped(unit)) is not None:
            self._replay(unit, found, {"impactx.reused": "true"} | STOPPED_TAG)
        return found

    def _on_epoch(self, unit: Unit, row: dict[str, float]) -> None:
        self.job.summary.epoch(self.cell.name, unit.name, row)

    def _train(self, unit: Unit) -> dict[str, Any]:
        try:
            return self._do(unit, lambda task: self.job.executor.train(task, self._on_epoch))
        finally:
            self.job.summary.ended(self.cell.name, unit.name)

    @contextlib.contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """What fails in this block is noted, and the cell goes on without it; interrupts and TakenOver end it."""
        try:
            yield
        except TakenOver:
            raise
        except Exception as error:
            self.failed[what] = reason = f"{type(error).__name__}: {error}"
            self.journal.lost(what, reason)
            self._log_failure(error, f"{what} failed, the cell goes on without it")

    def _log_failure(self, error: Exception, what: str) -> None:
        named = type(error).__module__.startswith("impactx.")
        self.log.error("%s: %s: %s", what, type(error).__name__, error, exc_info=None if named else error)

    def _train_all(self, units: list[Unit]) -> list[tuple[Unit, dict[str, Any]]]:
        """Train independent models; those that are done, with their results."""
        return self._all(units, self._train, "training")

    def _all(self, units: list[Unit], how: Callable[[Unit], dict[str, Any]], name: str
             ) -> list[tuple[Unit, dict[str, Any]]]:
        """Do independent units, as many at once as the executor has room for trainings; those that are done, with
        their results. One that fails does so alone."""
        # Two approaches may come to one recipe: that unit must not be done by two at once.
        self.journal.plan(units)
        unique = {unit.key: unit for unit in units}
        outcomes = run_all([partial(how, unit) for unit in unique.values()],
                           self.job.executor.trainings_at_once(), name=name, on_interrupt=self.job.executor.stop)
        by_key, done = dict(zip(unique, outcomes, strict=True)), []
        for unit in units:
            with self._alone(unit.name):
                if isinstance(outcome := by_key[unit.key], Exception):
                    raise outcome
                done.append((unit, outcome))
        return done

    def _explain(self, unit: Unit) -> dict[str, Any]:
        progress = Progress(f"{self.cell.name}: {unit.name}", "maps", every=60)

        def on_shards(done: int, before: int, total: int) -> None:
            progress.at(before + done, before=before, total=total)
            self.job.summary.at(self.cell.name, f"{unit.name}, {before + done} of {total} maps")

        result = self._do(unit, lambda task: self.job.executor.explain(task, on_shards))
        self.job.map_folders.append(result["folder"])
        return result

    def run(self) -> None:
        """Stage 1, maps, stage 2, and the test of every final model.

        What fails alone (an approach, or a repeat) does not end the rest, and is raised at the end as PartsFailed. What
        ends the cell is logged and raised at once.
        """
        self.log.info("cell %d of %d", self.number, len(self.job.cells))
        try:
            self._run()
        except Exception as error:
            self.journal.stopped(f"{type(error).__name__}: {error}")
            if len(self.job.cells) > 1:  # the job goes on, and says it again at its end
                self._log_failure(error, "failed")
            raise
        finally:
            self.job.summary.ended(self.cell.name)
        if self.failed:
            raise self._failure()

    def _failure(self) -> PartsFailed:
        reasons = "\n".join(f"  - {what}: {reason}" for what, reason in self.failed.items())
        return PartsFailed(f"{len(self.failed)} part{'s' * (len(self.failed) > 1)} of the cell failed, the rest is in "
                           f"the table (the same command tries again):\n{reasons}")

    def _run(self) -> None:
        cell, settings = self.cell, self.job.settings
        with self.job.tracker.run(self.key, name=cell.name, parent=self.job.key, tags=self.job.tags | {
                "impactx.role": "cell"}, params={"dataset": cell.dataset, "model": cell.model}) as run:
            trials = cell.stage1_trials()
            chosen, found = self._search("stage 1", trials, cell.selection_metric, settings.grid.max_hours)
            configuration = Configuration(*(chosen.params[k] for k in (
                "learning_rate", "batch_size", "validation_fraction")))
            self._log_selection(run, "A", chosen, found)
            finals = self._classifiers(configuration)
            if settings.approaches:
                finals += self._stage2(run, configuration, list(finals))
            for model, result in finals:
                if not result["weights"]:
                    self.log.warning("%s diverged in its first epoch: it is not in the table", model.name)
                    continue
                with self._alone(f"test of {model.name}"):
                    self._test(model, result)
            self._all([unit for model, result in finals if result["weights"]
                       and (unit := cell.explanations(model, result)) is not None], self._judge, "judgement")
            self._register(finals)
            for s in summarise(self.rows):
                run.log_metrics({f"{s.approach}.val_accuracy": s.val_mean, f"{s.approach}.test_accuracy": s.test_mean})
                if s.paper_accuracy is not None:
                    run.log_metrics({f"{s.approach}.paper_accuracy": s.paper_accuracy})
            run.log_text(results_csv(self.rows), "results.csv")
            self.journal.finished()
            for folder in self.journal.folders():
                self.job.artifacts.storage.sweep(folder)
            if self.failed:
                run.finish("FAILED", str(self._failure()))

    def _classifiers(self, configuration: Configuration) -> list[tuple[Unit, dict[str, Any]]]:
        """Each repeat's A, with its result. A repeat without one is left out. Raises WorkError where none is left."""
        units = [self.cell.stage1_model(configuration, repeat) for repeat in range(self.job.settings.repeats)]
        found, diverged = [], {}
        for a, result in self._train_all(units):
            if result["weights"]:
                found.append((a, result))
                continue
            diverged[a.name] = "diverged in its first epoch"
            self.log.warning("%s diverged in its first epoch: repeat %d is left out, for every approach", a.name,
                             a.params["repeat"])
        if not found:
            reasons = "\n".join(f"  - {name}: {reason}" for name, reason in (self.failed | diverged).items())
            raise WorkError(f"no classifier A is left in {len(units)} repeats, there is nothing to go on from:\n"
                            f"{reasons}")
        return found

    def _register(self, finals: list[tuple[Unit, dict[str, Any]]]) -> None:
        """Give the tracker one final model of each approach: of the first repeat that has one."""
        storage, cell = self.job.artifacts.storage, self.cell
        first = {row.approach: row for row in reversed(self.rows)}
        for unit, result in finals:
            row = first.get(unit.params["approach"])
            if row is not None and row.repeat == unit.params["repeat"]:
                self.job.tracker.register_model(
                    self._task(unit).run_key, name=(cell.dataset.name, cell.model.name, row.approach),
                    checkpoint=partial(storage.read, f"{unit.folder}/{CHECKPOINT}"),
                    about=unit.params | {"impactx.weights": result["weights"], "test_accuracy": row.test_accuracy})

    def _stage2(self, run: Run, configuration: Configuration,
                classifiers: list[tuple[Unit, dict[str, Any]]]) -> list[tuple[Unit, dict[str, Any]]]:
        """The maps of each repeat's A, each approach's own search in the first repeat, and the final trainings."""
        cell = self.cell
        bases = [cell.basis(configuration, a, result, a.params["repeat"]) for a, result in classifiers]
        approaches = cell.approaches()
        stores = {unit.key: unit for basis in bases for approach in approaches for unit in approach.stores(basis)}
        made = set()
        for unit in stores.values():
            with self._alone(unit.name):
                self._explain(unit)
                made.add(unit.key)
        models: list[Unit] = []
        for approach in approaches:
            with self._alone(approach.name):
                models += self._models(run, approach, bases, made)
        return self._train_all(models)

    def _models(self, run: Run, approach: Entry, bases: list[Basis], made: set[str]) -> list[Unit]:
        """An approach's final trainings, by what its own search chooses, in the repeats whose maps are made.

        made: keys of stores. Raises SelectionError, and WorkError where there is no such repeat.
        """
        absent = [[unit.name for unit in approach.stores(basis) if unit.key not in made] for basis in bases]
        bases = [basis for basis, names in zip(bases, absent, strict=True) if not names]
        if not bases:
            raise WorkError(f"it has no maps, their making failed: {', '.join(sum(absent, []))}")
        candidate = approach.approach.candidates()[0]
        if trials := approach.trials(bases[0]):
            best, found = self._search(f"stage 2 of {approach.name}", [unit for unit, _ in trials], "val_accuracy")
            candidate = next(one for unit, one in trials if unit.key == best.key)
            self._log_selection(run, approach.name, best, found)
        return [approach.model(basis, candidate) for basis in bases]

    def _log_selection(self, run: Run, what: str, chosen: Unit, result: dict[str, Any]) -> None:
        run.log_params({"selected": {what: {k: chosen.params[k] for k in (
            "learning_rate", "batch_size", "validation_fraction", "lambda") if k in chosen.params}}})
        run.log_metrics({f"selected.{what}.val_accuracy": result["best"]["val_accuracy"]})

    def _test(self, model: Unit, result: dict[str, Any]) -> None:
        cell, approach = self.cell, model.params["approach"]
        unit, judged = cell.test(model, result), cell.explanations(model, result)
        tested = self._do(unit, self.job.executor.evaluate)
        self.log.info("%s: test accuracy %.4f on %d images", model.name, tested["accuracy"], tested["images"])
        row = Row(dataset=cell.dataset.name, model=cell.model.name, approach=approach,
                  repeat=model.params["repeat"], weight=model.params.get("lambda"),
                  learning_rate=model.params["learning_rate"], batch_size=model.params["batch_size"],
                  validation_fraction=model.params["validation_fraction"],
                  val_accuracy=result["best"]["val_accuracy"], test_accuracy=tested["accuracy"],
                  test_images=tested["images"], epochs=result["epochs"], train_seconds=result["seconds"],
                  paper_accuracy=published(cell.dataset, cell.model.name, approach),
                  seconds_in_all=self._seconds_in_all(model, result),
                  checkpoint=self.job.artifacts.storage.uri(model.folder), test=unit.folder,
                  map_seconds=tested.get("map_seconds"),
                  explanations=judged.folder if judged is not None else None)
        self.rows.append(row)
        self.journal.tested(row)

    def _seconds_in_all(self, model: Unit, result: dict[str, Any]) -> float | None:
        """Of the processes that made a model, with the A and the maps that it needs; None where that is not known."""
        found = [result["seconds"]]
        if "checkpoint" in model.inputs:
            found.append(self._result_of(model.inputs["checkpoint"]).get("seconds"))
        if "maps" in model.inputs and model.params.get("lambda") != 0:  # which learns nothing from them
            found.append(self._result_of(model.inputs["maps"]).get("process_seconds"))
        return None if None in found else math.fsum(found)

    def _result_of(self, folder: str) -> dict[str, Any]:
        return self.job.artifacts.storage.read_json(f"{folder}/{RESULT}")

    def _judge(self, unit: Unit) -> dict[str, Any]:
        found = self._do(unit, self.job.executor.judge)
        self.log.info("%s: %s", unit.name, ", ".join(
            f"{name} {order['aopc']['probability']['early']['mean']:.3f}" for name, order in found["morf"].items()))
        return found
