"""Classify images with a trained model, and draw the explanations that the model itself makes.

  python jobs/predict.py cat.png dog.jpg --model results/jobs/<job>           IMPACTX of a job
  python jobs/predict.py cat.png --model results/models/<key>/checkpoint.pt   a checkpoint
  python jobs/predict.py cat.png --model models:/impactx.cifar10.lenet5.impactx/latest
                                                                              from MLflow's registry

The three classes with the highest probabilities are printed. If the model makes maps (IMPACTX), a
PNG file is written for each image with the image, the map and an overlay of both. Red pixels speak
for the class and blue ones against it, on one scale for all images of a call. The attention map of
ABN has no sign: it is drawn from 0 to 1. The decoder of a model that was trained with lambda = 0
learned no maps, so none is drawn. Images are converted as those of a data set: rotated by their
EXIF orientation, converted to RGB, and resized to the model's size.
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
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files of images")
    parser.add_argument("--model", required=True, metavar="ADDRESS", help=(
        "a checkpoint, a job's folder (or the output folder of one job), models:/NAME/VERSION or "
        "runs:/RUN_ID"))
    parser.add_argument("--cell", metavar="DATASET/MODEL", help="the cell, if a job has several")
    parser.add_argument("--approach", help=(
        "the approach in a job: impactx, baseline, ... (impactx)"))
    parser.add_argument("--repeat", type=int, default=0, help="the repeat in a job (%(default)s)")
    parser.add_argument("--tracking", metavar="URI", help=(
        "MLflow's address (the one in MLFLOW_TRACKING_URI, else the database in results/)"))
    parser.add_argument("--out", type=Path, default=Path("predictions"), metavar="FOLDER",
                        help="the folder of the pictures (%(default)s)")
    parser.add_argument("--device", default="cpu", help="of torch (%(default)s)")
    return parser.parse_intermixed_args(arguments)


def run(arguments: list[str] | None = None) -> None:
    """Parse the options, load the model, and classify the images."""
    options = _arguments(arguments)
    from impactx.prediction import ModelChoice, predict_files

    choice = ModelChoice(options.model, options.cell, options.approach, options.repeat,
                         options.tracking)
    print(predict_files(options.images, choice, options.out, device=options.device))


if __name__ == "__main__":
    main(run)
