"""Make the report of a job, finished or not: an HTML page with its figures and tables.

  python jobs/report.py                                 of the only job in results/
  python jobs/report.py results --job cifar10-lenet5    of one of several, by the start of its key
  python jobs/report.py s3://bucket/results --to here   written into another folder

The report is made from the files in the job's output folder: nothing is computed again, and no data
set or model is opened. jobs/full_grid.py makes the same report when it ends.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# For a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))

from impactx.cli.main import main  # noqa: E402


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", default="results", help=(
        "the job's output: a folder or an s3:// address (%(default)s)"))
    parser.add_argument("--job", metavar="KEY", help=(
        "the job's key, or the beginning of it, if there are several"))
    parser.add_argument("--to", metavar="FOLDER", help=(
        "the folder of the report (jobs/<job>/report in the output)"))
    return parser.parse_args(arguments)


def run(arguments: list[str] | None = None) -> None:
    """Parse the options and write the report."""
    options = _arguments(arguments)
    from impactx.report import write_report
    from impactx.results.export import find_job
    from impactx.storage import Storage

    storage = Storage(options.output)
    to = Storage(options.to) if options.to else None
    print(f"report: {write_report(storage, find_job(storage, options.job), to=to)}")


if __name__ == "__main__":
    main(run)
