"""One job from its first trial to the table: the order of the plan, reuse, tracking and progress.

Nothing here knows by whom the work is done: that is the executor's business.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from impactx.experiment.evidence import evidence
from impactx.experiment.executor import Executor, Task, final_metrics
from impactx.experiment.explanations import map_metrics
from impactx.experiment.paper import paper_accuracy
from impactx.experiment.plan import EXECUTION_ONLY, Cell, Configuration, select
from impactx.experiment.results import Row, results_csv, summarise
from impactx.experiment.tracker import Run, Tracker
from impactx.experiment.units import Artifacts, Unit, WorkError, fingerprint
from impactx.experiment.work import Workplace, maps_complete
from impactx.settings import ExperimentSettings
from impactx.timing import Progress, duration

log = logging.getLogger("impactx")


def job_key(settings: ExperimentSettings) -> str:
    """The same for the same experiment, wherever and by whatever it is executed: a job started again goes on."""
    described = settings.model_dump(mode="json", exclude={
        "cluster": True, "tracking": True, "output": True, "data_root": True, "cache": True,
        "training": EXECUTION_ONLY})
    return f"{settings.name}-{fingerprint(described)[:12]}"


class Job:
    """An experiment under way. Finished units are reused, whoever finished them."""

    def __init__(self, settings: ExperimentSettings, cells: Sequence[Cell], place: Workplace, executor: Executor,
                 tracker: Tracker, *, tags: dict[str, str] | None = None) -> None:
        """tags: set on every run, such as the version of the code."""
        self.settings, self.cells, self.place = settings, cells, place
        self.executor, self.tracker, self.tags = executor, tracker, dict(tags or {})
        self.key = job_key(settings)
        self.artifacts = Artifacts(place.artifacts.storage)
        self.map_folders: list[str] = []
        self.evidence: dict[str, Any] = {"cells": []}  # see experiment.evidence, once the job is done

    def run(self) -> list[Row]:
        """Do everything; returns one row for each final model. Results are files under jobs/<key> as well."""
        rows: list[Row] = []
        with self.tracker.run(self.key, name=self.settings.name, params=self.settings.model_dump(mode="json"),
                              tags=self.tags | {"impactx.role": "job"}) as run:
            run.log_text(json.dumps(self.settings.model_dump(mode="json"), indent=1), "config.json")
            try:
                for number, cell in enumerate(self.cells, 1):
                    log.info("cell %d of %d: %s", number, len(self.cells), cell.name)
                    rows += CellRun(self, cell).run()
                table = [row.as_dict() for row in rows]
                self.artifacts.storage.write_json(f"jobs/{self.key}/results.json", table)
                self.artifacts.storage.write(f"jobs/{self.key}/results.csv", results_csv(rows).encode())
                run.log_text(results_csv(rows), "results.csv")
                e = self.settings.evaluation
                self.evidence = evidence(self.artifacts.storage, rows, resamples=e.resamples, seed=e.seed,
                                         confidence=e.confidence)
                self.artifacts.storage.write_json(f"jobs/{self.key}/evidence.json", self.evidence)
                run.log_text(json.dumps(self.evidence, indent=1), "evidence.json")
                run.log_metrics({f"{s.approach}.{s.dataset}.{s.model}.test_accuracy": s.test_mean
                                 for s in summarise(rows)})
            except BaseException:
                self.executor.stop()  # or what is still under way would begin runs that nobody ends
                raise
            finally:
                self.tracker.close_unfinished(self.key)
        return rows


class EpochLines:
    """Says at most once a minute how far the running trainings are."""

    def __init__(self, every: float = 60) -> None:
        self._every, self._last = every, time.perf_counter()
        self._latest: dict[str, str] = {}

    def __call__(self, unit: Unit, row: dict[str, float]) -> None:
        """An epoch of a training is done."""
        self._latest[unit.name] = f"{unit.name}: epoch {row['epoch']:.0f}, accuracy {row['val_accuracy']:.4f}"
        if time.perf_counter() - self._last >= self._every:
            self._last = time.perf_counter()
            log.info("  under way: %s", "; ".join(self._latest.values()))
            self._latest.clear()


class CellRun:
    """One cell of a job under way."""

    def __init__(self, job: Job, cell: Cell) -> None:
        self.job, self.cell = job, cell
        self.key = f"{job.key}/{cell.dataset.name}/{cell.model.name}"

    def _task(self, unit: Unit) -> Task:
        # A trial and the model of repeat 0 may have one recipe: the role keeps their runs apart.
        return Task(unit, f"{self.key}/{unit.role}-{unit.key}", self.key,
                    self.job.tags | {"impactx.role": unit.role})

    def _reused(self, unit: Unit) -> dict[str, Any] | None:
        result = self.job.artifacts.result(unit)
        if result is not None and unit.role == "maps" and not maps_complete(unit, self.job.place):
            log.warning("  %s: shards were deleted since they were finished: they are made anew", unit.name)
            return None
        if result is not None:
            task = self._task(unit)
            final = final_metrics(result) if "history" in result else map_metrics(result) if "morf" in result else {
                f"{unit.role}_{k}": v for k, v in result.items() if isinstance(v, (int, float))}
            self.job.tracker.replay(task.run_key, name=unit.name, parent=self.key, params=unit.params,
                                    tags=task.tags | {"impactx.reused": "true"}, final=final,
                                    history=[{k: v for k, v in row.items() if v is not None}
                                             for row in result.get("history", [])])
        return result

    def _do(self, unit: Unit, how: Callable[[Task], dict[str, Any]]) -> dict[str, Any]:
        if (result := self._reused(unit)) is not None:
            log.info("  %s: reused, finished earlier (%s)", unit.name, unit.folder)
            return result
        started = time.perf_counter()
        log.info("  %s: starts", unit.name)
        result = how(self._task(unit))
        if result.get("best"):
            log.info("  %s: validation accuracy %.4f at epoch %d of %d, in %s", unit.name,
                     result["best"]["val_accuracy"], result["best_epoch"], result["epochs"],
                     duration(time.perf_counter() - started))
        return result

    def _search(self, what: str, units: list[Unit], metric: str) -> tuple[Unit, dict[str, Any]]:
        results = {u.key: r for u in units if (r := self._reused(u)) is not None}
        if results:
            log.info("  %s: %d of %d trials reused, finished earlier", what, len(results), len(units))
        failed: dict[str, str] = {}
        progress = Progress(f"  {what}", "trials", len(units), before=len(results))

        def on_result(unit: Unit, result: dict[str, Any] | None, error: str | None) -> None:
            if result is None:
                failed[unit.name] = error or "it left no result"
                log.warning("  %s failed: %s", unit.name, error)
            else:
                results[unit.key] = result
                if result["diverged"]:
                    log.warning("  %s diverged at epoch %d (loss not finite)", unit.name, result["epochs"])
            best = max((r["best"][metric] for r in results.values() if r.get("best")), default=float("nan"))
            score = result["best"][metric] if result and result.get("best") else float("nan")
            progress.step(f"{unit.name}: {metric} {score:.4f}, best so far {best:.4f}")

        pending = [u for u in units if u.key not in results]
        if pending:
            self.job.executor.search([self._task(u) for u in pending], on_result, EpochLines())
        chosen, result = select(units, results, metric, failed)
        log.info("  %s: selected %s (%s %.4f)%s", what, chosen.name, metric, result["best"][metric],
                 f"; {len(failed)} of {len(units)} trials failed" if failed else "")
        return chosen, result

    def _train(self, unit: Unit) -> dict[str, Any]:
        return self._do(unit, lambda task: self.job.executor.train(task, EpochLines()))

    def _train_all(self, units: list[Unit]) -> list[dict[str, Any]]:
        """Train independent models, as many at once as the executor has room for."""
        # Two approaches may come to one recipe: that unit must not be trained by two at once.
        unique = list({unit.key: unit for unit in units}.values())
        at_once = min(self.job.executor.trainings_at_once(), len(unique))
        if at_once <= 1:
            found = [self._train(unit) for unit in unique]
        else:
            pool = ThreadPoolExecutor(at_once, thread_name_prefix="training")
            try:
                found = list(pool.map(self._train, unique))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        results = {unit.key: result for unit, result in zip(unique, found, strict=True)}
        return [results[unit.key] for unit in units]

    def _explain(self, unit: Unit) -> dict[str, Any]:
        progress = Progress(f"  {unit.name}", "maps", every=10)

        def on_shards(done: int, before: int, total: int) -> None:
            progress.at(before + done, before=before, total=total)

        result = self._do(unit, lambda task: self.job.executor.explain(task, on_shards))
        self.job.map_folders.append(result["folder"])
        return result

    def run(self) -> list[Row]:
        """Stage 1, maps, stage 2, and the test of every final model."""
        cell, settings = self.cell, self.job.settings
        with self.job.tracker.run(self.key, name=cell.name, parent=self.job.key, tags=self.job.tags | {
                "impactx.role": "cell"}, params={"dataset": cell.dataset, "model": cell.model}) as run:
            trials = cell.stage1_trials()
            chosen, found = self._search("stage 1", trials, cell.selection_metric)
            configuration = Configuration(*(chosen.params[k] for k in (
                "learning_rate", "batch_size", "validation_fraction")))
            self._log_selection(run, "A", chosen, found)
            a_units = [cell.stage1_model(configuration, repeat) for repeat in range(settings.repeats)]
            finals = list(zip(a_units, self._train_all(a_units), strict=True))
            if settings.approaches:
                finals += self._stage2(run, configuration, list(finals))
            for model, result in finals:
                if not result["weights"]:
                    log.warning("  %s diverged in its first epoch: it is not in the table", model.name)
            rows = [self._test(model, result) for model, result in finals if result["weights"]]
            for s in summarise(rows):
                run.log_metrics({f"{s.approach}.val_accuracy": s.val_mean, f"{s.approach}.test_accuracy": s.test_mean})
                if (published := paper_accuracy(s.dataset, s.model, s.approach)) is not None:
                    run.log_metrics({f"{s.approach}.paper_accuracy": published})
            run.log_text(results_csv(rows), "results.csv")
        return rows

    def _stage2(self, run: Run, configuration: Configuration,
                classifiers: list[tuple[Unit, dict[str, Any]]]) -> list[tuple[Unit, dict[str, Any]]]:
        """The maps of each repeat's A, the choice of lambda in repeat 0, and the final trainings."""
        cell = self.cell
        for a, result in classifiers:
            if not result["weights"]:
                raise WorkError(f"{cell.name}: {a.name} diverged, there is no classifier to explain")
        maps = [cell.maps(a, result, repeat) for repeat, (a, result) in enumerate(classifiers)]
        for unit in maps:
            self._explain(unit)
        models = []
        for name, approach in self.job.settings.approaches.items():
            weight = approach.lambdas[0]
            if candidates := cell.stage2_trials(name, approach, configuration, classifiers[0][0], maps[0]):
                best, found = self._search(f"stage 2 of {name}", candidates, "val_accuracy")
                weight = best.params["lambda"]
                self._log_selection(run, name, best, found)
            models += [cell.stage2_model(name, approach, configuration, weight, repeat, a, maps[repeat])
                       for repeat, (a, _) in enumerate(classifiers)]
        return list(zip(models, self._train_all(models), strict=True))

    def _log_selection(self, run: Run, what: str, chosen: Unit, result: dict[str, Any]) -> None:
        run.log_params({"selected": {what: {k: chosen.params[k] for k in (
            "learning_rate", "batch_size", "validation_fraction", "lambda") if k in chosen.params}}})
        run.log_metrics({f"selected.{what}.val_accuracy": result["best"]["val_accuracy"]})

    def _test(self, model: Unit, result: dict[str, Any]) -> Row:
        cell, approach = self.cell, model.params["approach"]
        unit = cell.test(model, result)
        tested = self._do(unit, self.job.executor.evaluate)
        log.info("  %s: test accuracy %.4f on %d images", model.name, tested["accuracy"], tested["images"])
        return Row(dataset=cell.dataset.name, model=cell.model.name, approach=approach,
                   repeat=model.params["repeat"], weight=model.params.get("lambda"),
                   learning_rate=model.params["learning_rate"], batch_size=model.params["batch_size"],
                   validation_fraction=model.params["validation_fraction"],
                   val_accuracy=result["best"]["val_accuracy"], test_accuracy=tested["accuracy"],
                   test_images=tested["images"], epochs=result["epochs"], train_seconds=result["seconds"],
                   paper_accuracy=paper_accuracy(cell.dataset.name, cell.model.name, approach),
                   checkpoint=self.job.artifacts.storage.uri(model.folder), test=unit.folder,
                   explanations=self._judge(model, result))

    def _judge(self, model: Unit, result: dict[str, Any]) -> str | None:
        """The folder of the unit that judged the model's maps, None where there is none."""
        if (unit := self.cell.explanations(model, result)) is None:
            return None
        found = self._do(unit, self.job.executor.judge)
        log.info("  %s: %s", unit.name, ", ".join(
            f"{name} {order['aopc']['probability']['early']['mean']:.3f}" for name, order in found["morf"].items()))
        return unit.folder


