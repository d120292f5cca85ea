"""Make the report of a job, finished or not: one HTML page, and its pictures and tables beside it.

  python jobs/report.py                                    of the only job in results/
  python jobs/report.py results --job cifar10-lenet5       of one of several: its key, or how that begins
  python jobs/report.py s3://bucket/results --to here      written into another folder

Everything comes from what the job left in its output folder: nothing is computed again, no data set and no model is
opened. jobs/full_grid.py makes the same report at its end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))  # from a checkout, uninstalled

from impactx.command import main  # noqa: E402


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", default="results", help="the job's output: folder or s3:// (%(default)s)")
    parser.add_argument("--job", metavar="KEY", help="which job, where there are several")
    parser.add_argument("--to", metavar="FOLDER", help="where to write (jobs/<job>/report in the output)")
    return parser.parse_args(arguments)


def run(arguments: list[str] | None = None) -> None:
    """Parse and call."""
    options = _arguments(arguments)
    from impactx.report import write_report
    from impactx.results.export import find_job
    from impactx.storage import Storage

    storage = Storage(options.output)
    to = Storage(options.to) if options.to else None
    print(f"report: {write_report(storage, find_job(storage, options.job), to=to)}")


if __name__ == "__main__":
    main(run)
