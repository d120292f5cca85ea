"""Explain a model of yours: one map for each training image of a data set, for its true class.

  python jobs/explain.py --model net.pt dataset=my_images         a checkpoint of impactx
  python jobs/explain.py --timm resnet18 --weights net.pth dataset=my_images
                                                                  a timm model with your weights
  python jobs/explain.py --import my_code.net:build dataset=my_images
                                                                  build() returns a torch module
  python jobs/explain.py --model net.pt dataset=digits attribution=occlusion --sheet examples.png
  python jobs/explain.py --verify results/maps/<key>              check a whole store of maps

A module of your own takes float images (B, 3, H, W) in [0, 1] and returns logits (B, K). The maps
are Parquet files: read them with impactx.explain.maps.reading, pyarrow, pandas or DuckDB
(docs/METHOD.md). The same command started again makes only the maps that are missing.

The training images are explained; if a folder has no test part of its own, all images are. An
experiment draws a test part from such a folder. To explain the images that it trains on, and to
share its maps, set datasets.<name>.test_fraction to the experiment's value (its default is 0.2).
The log names the images that were converted, resized or left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

# For a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))

from impactx.cli.main import main  # noqa: E402
from impactx.cli.options import explain_options  # noqa: E402


def run(arguments: list[str] | None = None) -> None:
    """Parse the options, check them, connect to the cluster, and make the maps."""
    options = explain_options(__doc__ or "", __file__, arguments)
    from impactx.run import explain

    if options.verify:
        problems = explain.verify(options.verify)
        print("\n".join(problems)
              or f"{options.verify}: every shard is there and as it was written, and no other")
        sys.exit(1 if problems else 0)
    settings = options.settings()
    job = explain.prepare(settings, options.choice(), options.sheet)
    if options.dry_run:
        print(explain.plan(settings, job))
        return
    from impactx.cluster.connection import executor_when_needed

    with executor_when_needed(settings, job.place, job.step.model_name) as executor:
        print(explain.run(job, executor))
    if options.sheet:
        explain.draw(job, options.sheet, options.sheet_images)
        print(f"sheet: {options.sheet}")


if __name__ == "__main__":
    main(run)
