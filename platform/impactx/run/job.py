"""One job: its cells, its table and its evidence; it can be stopped and started twice.

Nothing here knows by whom the work is done: that is the executor's business.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence

from impactx.experiment.cell import Cell
from impactx.experiment.history import History
from impactx.experiment.ownership import Ownership
from impactx.experiment.steps.base import StepError, fingerprint
from impactx.experiment.workplace import Workplace
from impactx.results.evidence import evidence
from impactx.results.pilot import proposal
from impactx.results.records import CELLS, EVIDENCE, Start, now, pilot_repeats
from impactx.results.rows import Row, results_csv, summarise
from impactx.run.cell import CellRun
from impactx.run.executor import Executor
from impactx.run.journal import note_start
from impactx.run.progress import JobProgress
from impactx.run.threads import run_all
from impactx.run.tracker import Run, RunIdentity, Tracker
from impactx.settings import ExperimentSettings
from impactx.storage import StorageError

log = logging.getLogger("impactx")

PROGRESS = "impactx.progress"  # the tag of a job's run that says how far it is


def job_key(settings: ExperimentSettings) -> str:
    """Return the job's key.

    It is the same for the same experiment, wherever and by whatever it is executed, so that a job
    that is started again goes on. More repeats and another margin are the same job, which knows
    what could be seen before they were chosen.
    """
    described = settings.model_dump(mode="json", exclude={
        "cluster": True, "tracking": True, "output": True, "data_root": True, "cache": True,
        "cache_gb": True, "plugins": True, "reuse": True, "repeats": True,
        "evaluation": {"margin"}, "models": {"__all__": {"resources"}}})
    for dataset in described["datasets"].values():
        del dataset["noticed_by"]
    described["training"] = settings.training.described()
    return f"{settings.name}-{fingerprint(described)[:12]}"


class CellsFailed(StepError):
    """Some cells of a job failed; the message says which and why. The rest is in the table."""


class Job:
    """An experiment under way. Finished steps are reused, whoever finished them.

    Cells go on by themselves, several at once where the executor has it so; one that fails does not
    end the others.

    Attributes:
        history: What was finished before the job began, and under which code.
        failed: What failed, whole or in part, by the cell's name.
        report: The address of the finished job's report.
        evidence: What the finished job shows; nothing for a pilot.
        proposal: For a pilot, the sentences that propose how many repeats the job needs.
        map_folders: Addresses of the stores of maps.
    """

    def __init__(self, settings: ExperimentSettings, cells: Sequence[Cell], place: Workplace,
                 executor: Executor, tracker: Tracker, *, tags: dict[str, str] | None = None,
                 start: Start | None = None) -> None:
        """Prepare a job.

        Args:
            settings: Of the experiment.
            cells: Data sets with models.
            place: Where the steps are done.
            executor: Does the steps.
            tracker: Keeps runs.
            tags: Set on every run, such as the version of the code.
            start: How, and by which code, the job was started.
        """
        self.settings, self.cells, self.place = settings, cells, place
        self.executor, self.tracker, self.tags = executor, tracker, dict(tags or {})
        self.key, self._start = job_key(settings), start or Start()
        self.artifacts = place.artifacts
        self.history = History(self.artifacts.storage)
        self.map_folders: list[str] = []
        self.failed: dict[str, Exception] = {}
        self.progress = JobProgress(len(cells))
        self.report: str | None = None
        self.proposal: str | None = None
        self.evidence = evidence(self.artifacts.storage, [], settings)

    def run(self, report: Callable[[str, Run], str] | None = None) -> list[Row]:
        """Do everything; results are files under jobs/<key> as well.

        Cells that failed, whole or in part, are in `failed`, and `check` raises for them. Where no
        row is left, it is raised at once. A pilot shows nothing but its proposal, so that nobody
        chooses the number of repeats by what they gain.

        Args:
            report: Called at the end with the job's key and run; returns an address. If it fails,
                that is all that does.

        Returns:
            One row for each final model of the repeats that count: of those after a pilot's.

        Raises:
            StepError: All repeats that are asked for were a pilot.
        """
        # The address of the tracker may hold a password, and the tracker is the last to need it.
        settings = self.settings.model_dump(mode="json", exclude={"tracking": {"uri"}})
        storage, folder = self.artifacts.storage, f"jobs/{self.key}"
        starts = note_start(storage, self.key, self.settings, self._start)
        identity = RunIdentity(
            key=self.key, name=self.settings.name, parent=None, parameters=settings,
            tags=self.tags | {"impactx.role": "job", PROGRESS: f"{now()}: started"})
        with self.tracker.run(identity) as run:
            run.log_text(json.dumps(settings, indent=1), "config.json")
            try:
                self._owner = Ownership(storage, f"{folder}/driver.json", f"the job {self.key}")
                with self.progress.logged(tell=lambda line: self._tell(run, line)):
                    rows = self._all_cells()
                for swept in (folder, f"{folder}/{CELLS}"):
                    storage.sweep(swept)
                if not rows:
                    self.check()
                if self._start.pilot:
                    self.proposal = proposal(storage, rows, self.settings)
                else:
                    first = pilot_repeats(starts)
                    rows = [row for row in rows if row.repeat >= first]
                    self._show(run, rows, starts)
                run.set_tags({PROGRESS: f"failed: {', '.join(self.failed)}" if self.failed
                              else "done"})
                if report is not None and not self._start.pilot:
                    self._report(report, run)
                if self.failed:
                    run.finish("FAILED", str(self._failure()))
            except BaseException:
                # What is still under way would begin runs that nobody ends.
                self.executor.stop()
                raise
            finally:
                self.tracker.close_unfinished(self.key)
        self._owner.release()
        return rows

    def _show(self, run: Run, rows: Sequence[Row], starts: Sequence[Start]) -> None:
        """Write the job's table and its evidence, and tell them to the tracker."""
        storage, folder = self.artifacts.storage, f"jobs/{self.key}"
        storage.write_json(f"{folder}/results.json", [row.as_dict() for row in rows])
        storage.write(f"{folder}/results.csv", results_csv(rows).encode())
        run.log_text(results_csv(rows), "results.csv")
        self.evidence = evidence(storage, rows, self.settings, starts)
        shown = self.evidence.as_json()
        storage.write_json(f"{folder}/{EVIDENCE}", shown)
        run.log_text(json.dumps(shown, indent=1), EVIDENCE)
        run.log_metrics({f"{s.approach}.{s.dataset}.{s.model}.test_accuracy": s.test_mean
                         for s in summarise(rows)})

    def may_go_on(self) -> None:
        """Check that the same job was not started again meanwhile.

        Raises:
            TakenOver: It was: that one goes on, and this one ends.
        """
        self._owner.check()

    def _tell(self, run: Run, line: str) -> None:
        """Tell the tracker how far the job is, and look whether results can be written.

        What the processes of trials and maps warn of while they wait for either is in Ray's logs
        alone.
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
        # The job's work is done and kept: a page about it must not undo that.
        except Exception as error:
            log.error("the report could not be made: %s: %s (jobs/report.py tries it again)",
                      type(error).__name__, error, exc_info=True)

    def _all_cells(self) -> list[Row]:
        """Return the rows of the cells, in their order; of one that failed those that it has."""
        at_once = min(self.executor.cells_at_once(), len(self.cells))
        if at_once > 1:
            log.info("%d cells, %d at once", len(self.cells), at_once)
        runs = [CellRun(self, cell, number) for number, cell in enumerate(self.cells, 1)]
        outcomes = run_all([one.run for one in runs], at_once, name="cell",
                           on_interrupt=self.executor.stop)
        self.failed = {cell.name: outcome
                       for cell, outcome in zip(self.cells, outcomes, strict=True)
                       if isinstance(outcome, Exception)}
        return [row for one in runs for row in one.rows]

    def _failure(self) -> Exception:
        if len(self.cells) == 1:
            return next(iter(self.failed.values()))
        reasons = [f"{name}: {type(error).__name__}: {error}"
                   for name, error in self.failed.items()]
        return CellsFailed(
            f"{len(reasons)} of {len(self.cells)} cells failed (the same command tries them "
            "again):\n" + "\n".join(f"  - {reason}" for reason in reasons))

    def check(self) -> None:
        """Raise the error of a failed cell: its own if there is one cell, else CellsFailed."""
        if self.failed:
            raise self._failure()
