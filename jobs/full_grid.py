"""Run an experiment: search A, make the maps, train stage 2, and test all final models.

  python jobs/full_grid.py --preset demo                      some minutes; downloads nothing
  python jobs/full_grid.py --preset cifar10-lenet5            one cell of Table 2, on a CPU
  python jobs/full_grid.py dataset=cifar10 model=lenet5       the paper's grid for one cell
  python jobs/full_grid.py                                    the paper's whole grid
  python jobs/full_grid.py --plan                             measure what it costs on this cluster
  python jobs/full_grid.py --pilot repeats=5                  find how many repeats it needs
  ray job submit --working-dir . -- python jobs/full_grid.py  run it on a remote cluster

The same command started again goes on where it stopped: finished steps are not computed again.
"""

from __future__ import annotations

import sys
from pathlib import Path

# For a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))

from impactx.cli.main import main, start_facts  # noqa: E402
from impactx.cli.options import experiment_options  # noqa: E402


def run(arguments: list[str] | None = None) -> None:
    """Parse the options, check them, connect to the cluster, and run the experiment."""
    options = experiment_options(__doc__ or "", __file__, arguments)
    settings = options.load()
    if options.dry_run:
        from impactx.costs.dry_run import dry_run

        print(dry_run(settings))
        return
    from impactx.experiment.preparation import prepare

    prepared = prepare(settings)
    from impactx.cluster.connection import connected

    if options.plan:
        with connected(settings.cluster, settings.processes(), settings.plugins):
            from impactx.cluster.measuring import plan

            print(plan(prepared.cells, settings.cluster, prepared.place))
        return
    from impactx.cluster.executor import RayExecutor
    from impactx.report import write_report
    from impactx.results.evidence import sentences
    from impactx.results.rows import table
    from impactx.run.job import Job
    from impactx.tracking import make_tracker
    from impactx.version import code_version

    storage = prepared.place.artifacts.storage
    tracker = make_tracker(settings)
    tracker.prepare()
    with connected(settings.cluster, settings.processes(), settings.plugins):
        executor = RayExecutor(settings.cluster, prepared.place, tracker, {
            name: model.resources for name, model in settings.models.items()})
        job = Job(settings, prepared.cells, prepared.place, executor, tracker,
                  tags={"impactx.code": code_version()},
                  start=start_facts().model_copy(update={"pilot": options.pilot}))
        rows = job.run(report=lambda key, run: write_report(storage, key, run=run))
    if job.proposal is not None:
        print(f"\n{job.proposal}")
        job.check()
        return
    print("\n" + table(rows) + "\n\n" + sentences(job.evidence) + "\n")
    print("\n".join([*(f"maps:    {folder}" for folder in job.map_folders), *tracker.describe(),
                     *([f"report:  {job.report}"] if job.report else []),
                     f"results: {storage.uri(f'jobs/{job.key}/results.csv')}"]))
    job.check()


if __name__ == "__main__":
    main(run)
