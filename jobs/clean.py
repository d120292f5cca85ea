"""List what an output holds that nothing leads to any more, and delete it.

  python jobs/clean.py results                       steps that no job names
  python jobs/clean.py results --code other          steps of other code than today's, whoever names them
  python jobs/clean.py results --code 3f2a9c         steps of one version of the code
  python jobs/clean.py results --job demo-1a2b3c     steps that only this job names
  python jobs/clean.py results --older-than 30 --delete

Nothing is deleted without --delete and a yes. What a running job owns is left alone, and said. Reports of jobs whose
steps are deleted (--code, --job) cannot be made again without computing these steps again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))  # from a checkout, uninstalled

from impactx.command import main  # noqa: E402


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="the jobs' output: folder or s3://")
    parser.add_argument("--code", metavar="other|DIGEST", help="only steps of other code than today's, or of one version")
    parser.add_argument("--job", metavar="KEY", help="steps that only this job names; the key, or how it begins")
    parser.add_argument("--older-than", metavar="DAYS", type=float, default=0, help="not written since so many days")
    parser.add_argument("--delete", action="store_true", help="delete what is listed, after asking")
    parser.add_argument("--yes", action="store_true", help="with --delete: do not ask")
    parser.add_argument("--plugins", metavar="FILE.py", nargs="+", default=[], help="extensions of the jobs' own")
    return parser.parse_args(arguments)


def run(arguments: list[str] | None = None) -> None:
    """Parse, list, ask, delete."""
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
    if not options.yes and input(f"delete {len(listed.steps)} steps for good? [y/N] ").strip().lower() != "y":
        print("nothing was deleted")
        return
    delete(storage, listed.steps)
    print(f"{len(listed.steps)} steps were deleted")


if __name__ == "__main__":
    main(run)
