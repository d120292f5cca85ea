"""Use a trained model: the class of each image, its score, and a picture of the model's own explanation.

  python jobs/predict.py cat.png dog.jpg --model results/jobs/<job>             a job's IMPACTX, repeat 0
  python jobs/predict.py cat.png --model results/models/<key>/checkpoint.pt     a checkpoint
  python jobs/predict.py cat.png --model models:/impactx.cifar10.lenet5.impactx/latest    from MLflow's registry

Printed are the three classes with the highest scores (probabilities). Of a model that makes maps (IMPACTX) a PNG is
written for each image: image, map and overlay; red speaks for the class, blue against it, on one scale for all images
of a call. ABN's attention has no sign: it is drawn from 0 to 1. A model trained with lambda = 0 learned no maps, and
none is drawn. Images are converted as those of a data set: turned as their EXIF orientation says, to RGB, and resized
to the model's size.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))  # from a checkout, uninstalled

from impactx.command import main  # noqa: E402


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--model", required=True, metavar="ADDRESS", help=(
        "a checkpoint, a job's folder (or the output folder of one job), models:/NAME/VERSION or runs:/RUN_ID"))
    parser.add_argument("--cell", metavar="DATASET/MODEL", help="of a job with several")
    parser.add_argument("--approach", help="of a job: impactx, baseline, ... (impactx)")
    parser.add_argument("--repeat", type=int, default=0, help="of a job (%(default)s)")
    parser.add_argument("--tracking", metavar="URI", help=(
        "MLflow's address (MLFLOW_TRACKING_URI, else the database in results/)"))
    parser.add_argument("--out", type=Path, default=Path("predictions"), metavar="FOLDER",
                        help="where the pictures go (%(default)s)")
    parser.add_argument("--device", default="cpu")
    return parser.parse_intermixed_args(arguments)


def run(arguments: list[str] | None = None) -> None:
    """Parse and call."""
    options = _arguments(arguments)
    from impactx.prediction import ModelChoice, predict_files

    choice = ModelChoice(options.model, options.cell, options.approach, options.repeat, options.tracking)
    print(predict_files(options.images, choice, options.out, device=options.device))


if __name__ == "__main__":
    main(run)
