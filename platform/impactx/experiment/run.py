"""One job: its cells, its table, its evidence, and what happens when it is stopped or started twice.

Nothing here knows by whom the work is done: that is the executor's business.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from impactx.experiment.cell_run import CellRun
from impactx.experiment.claims import Claim
from impactx.experiment.evidence import evidence
from impactx.experiment.executor import Executor
from impactx.experiment.journal import CELLS, note_start, now
from impactx.experiment.plan import EXECUTION_ONLY, Cell
from impactx.experiment.results import Row, results_csv, summarise
from impactx.experiment.summary import Summary
from impactx.experiment.threads import run_all
from impactx.experiment.tracker import Run, Tracker
from impactx.experiment.units import Artifacts, WorkError, fingerprint
from impactx.experiment.workplace import Workplace
from impactx.settings import ExperimentSettings
from impactx.storage import StorageError

log = logging.getLogger("impactx")

PROGRESS = "impactx.progress"  # the tag of a job's run that says how far it is


def job_key(settings: ExperimentSettings) -> str:
    """The same for the same experiment, wherever and by whatever it is executed: a job started again goes on."""
    described = settings.model_dump(mode="json", exclude={
        "cluster": True, "tracking": True, "output": True, "data_root": True, "cache": True,
        "plugins": True,  # paths; what is used of them stands under its own name
        "training": EXECUTION_ONLY})
    return f"{settings.name}-{fingerprint(described)[:12]}"


class CellsFailed(WorkError):
    """Some cells of a job failed; the message says which and why. The rest is in the table."""


class Job:
    """An experiment under way. Finished units are reused, whoever finished them.

    Cells go on by themselves, several at once where the executor has it so; one that fails does not end the others.
    """

    def __init__(self, settings: ExperimentSettings, cells: Sequence[Cell], place: Workplace, executor: Executor,
                 tracker: Tracker, *, tags: dict[str, str] | None = None,
                 about: dict[str, Any] | None = None) -> None:
        """tags: set on every run, such as the version of the code; about: plain data on how the job was started."""
        self.settings, self.cells, self.place = settings, cells, place
        self.executor, self.tracker, self.tags = executor, tracker, dict(tags or {})
        self.key, self.about = job_key(settings), dict(about or {})
        self.artifacts = Artifacts(place.artifacts.storage)
        self.map_folders: list[str] = []
        self.failed: dict[str, Exception] = {}
        self.summary = Summary(len(cells))
        self.report: str | None = None  # the address of the finished job's report
        self.evidence: dict[str, Any] = {"cells": []}  # see experiment.evidence, once the job is done

    def run(self, report: Callable[[str, Run], str] | None = None) -> list[Row]:
        """Do everything; returns one row for each final model. Results are files under jobs/<key> as well.

        report: called at the end with the job's key and run, returns an address; if it fails, that is all that does.

        Cells that failed, whole or in part, are in `failed`; `check` raises for them. Where no row is left, it is
        raised at once.
        """
        # The address of the tracker may hold a password, and the tracker is the last place that needs it.
        described = self.settings.model_dump(mode="json", exclude={"tracking": {"uri"}})
        note_start(self.artifacts.storage, self.key, described, self.about)
        with self.tracker.run(self.key, name=self.settings.name, params=described,
                              tags=self.tags | {"impactx.role": "job", PROGRESS: f"{now()}: started"}) as run:
            run.log_text(json.dumps(described, indent=1), "config.json")
            try:
                self._claim = Claim(self.artifacts.storage, f"jobs/{self.key}/driver.json", f"the job {self.key}")
                with self.summary.said(told=lambda line: self._tell(run, line)):
                    rows = self._all_cells()
                for folder in (f"jobs/{self.key}", f"jobs/{self.key}/{CELLS}"):
                    self.artifacts.storage.sweep(folder)
                if not rows:
                    self.check()
                table = [row.as_dict() for row in rows]
                self.artifacts.storage.write_json(f"jobs/{self.key}/results.json", table)
                self.artifacts.storage.write(f"jobs/{self.key}/results.csv", results_csv(rows).encode())
                run.log_text(results_csv(rows), "results.csv")
                e = self.settings.evaluation
                self.evidence = evidence(self.artifacts.storage, rows, described, resamples=e.resamples,
                                         seed=e.seed, confidence=e.confidence)
                self.artifacts.storage.write_json(f"jobs/{self.key}/evidence.json", self.evidence)
                run.log_text(json.dumps(self.evidence, indent=1), "evidence.json")
                run.log_metrics({f"{s.approach}.{s.dataset}.{s.model}.test_accuracy": s.test_mean
                                 for s in summarise(rows)})
                run.set_tags({PROGRESS: f"failed: {', '.join(self.failed)}" if self.failed else "done"})
                if report is not None:
                    self._report(report, run)
                if self.failed:
                    run.finish("FAILED", str(self._failure()))
            except BaseException:
                self.executor.stop()  # or what is still under way would begin runs that nobody ends
                raise
            finally:
                self.tracker.close_unfinished(self.key)
        self._claim.release()
        return rows

    def may_go_on(self) -> None:
        """Raises TakenOver where the same job was started again meanwhile: that one goes on, and this one ends."""
        self._claim.check()

    def _tell(self, run: Run, line: str) -> None:
        """Tell the tracker how far it is, and look whether results can be written.

        What the processes of trials and maps warn of while they wait for either is in Ray's logs alone.
        """
        run.set_tags({PROGRESS: f"{now()}: {line}"})
        try:
            self.artifacts.storage.check()
        except StorageError as error:
            log.warning("%s (until then what is under way waits, up to %.0f s)", error,
                        self.artifacts.storage.patience)

    def _report(self, report: Callable[[str, Run], str], run: Run) -> None:
        try:
            self.report = report(self.key, run)
        except Exception as error:  # the job's work is done and kept: a page about it must not undo that
            log.error("the report could not be made: %s: %s (jobs/report.py tries it again)", type(error).__name__,
                      error, exc_info=True)

    def _all_cells(self) -> list[Row]:
        """The rows of the cells, in their order: of one that failed those that it came to."""
        at_once = min(self.executor.cells_at_once(), len(self.cells))
        if at_once > 1:
            log.info("%d cells, %d at once", len(self.cells), at_once)
        runs = [CellRun(self, cell, number) for number, cell in enumerate(self.cells, 1)]
        outcomes = run_all([one.run for one in runs], at_once, name="cell", on_interrupt=self.executor.stop)
        self.failed = {cell.name: outcome for cell, outcome in zip(self.cells, outcomes, strict=True)
                       if isinstance(outcome, Exception)}
        return [row for one in runs for row in one.rows]

    def _failure(self) -> Exception:
        if len(self.cells) == 1:
            return next(iter(self.failed.values()))
        reasons = [f"{name}: {type(error).__name__}: {error}" for name, error in self.failed.items()]
        return CellsFailed(f"{len(reasons)} of {len(self.cells)} cells failed (the same command tries them again):\n"
                           + "\n".join(f"  - {reason}" for reason in reasons))

    def check(self) -> None:
        """Raise where a cell failed: its own error if it is the only cell, else CellsFailed."""
        if self.failed:
            raise self._failure()
