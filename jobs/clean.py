"""List the steps in an output folder that are no longer needed, and delete them.

  python jobs/clean.py results                     steps that no job uses
  python jobs/clean.py results --code other        steps of other code than the present, used or not
  python jobs/clean.py results --code 3f2a9c       steps of one version of the code
  python jobs/clean.py results --job demo-1a2b3c   steps that only this job uses
  python jobs/clean.py results --older-than 30 --delete

Nothing is deleted without --delete and a confirmation. Steps that a running job owns are kept, and
listed as such. A job whose steps are deleted (--code, --job) has to compute them again before its
report can be made again.
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
    parser.add_argument("output", help="the jobs' output: a folder or an s3:// address")
    parser.add_argument("--code", metavar="other|DIGEST", help=(
        "only steps of other code than the present, or of one version"))
    parser.add_argument("--job", metavar="KEY", help=(
        "only steps that only this job uses: its key, or the beginning of it"))
    parser.add_argument("--older-than", metavar="DAYS", type=float, default=0, help=(
        "only steps that were last written this many days ago or earlier"))
    parser.add_argument("--delete", action="store_true", help=(
        "delete the listed steps, after asking"))
    parser.add_argument("--yes", action="store_true", help="with --delete: do not ask")
    parser.add_argument("--plugins", metavar="FILE.py", nargs="+", default=[], help=(
        "files with the jobs' extensions"))
    return parser.parse_args(arguments)


def run(arguments: list[str] | None = None) -> None:
    """Parse the options, list the steps, ask, and delete them."""
    options = _arguments(arguments)
    from impactx import plugins
    from impactx.results.cleaning import delete, leftovers
    from impactx.results.export import find_job
    from impactx.storage import Storage

    plugins.load(options.plugins)
    storage = Storage(options.output)
    job = find_job(storage, options.job) if options.job else None
    listed = leftovers(storage, code=options.code, job=job, older_than=options.older_than)
    print(listed)
    if not options.delete or not listed.steps:
        return
    if not options.yes:
        answer = input(f"delete {len(listed.steps)} steps for good? [y/N] ")
        if answer.strip().lower() != "y":
            print("nothing was deleted")
            return
    delete(storage, listed.steps)
    print(f"{len(listed.steps)} steps were deleted")


if __name__ == "__main__":
    main(run)
