"""Measure this project's speed on this machine, as ratios in one run.

  python jobs/benchmark.py train     training epochs against a hand-written loop and a DataLoader
  python jobs/benchmark.py train --device cuda --batch-size 512 --models lenet5 tf_efficientnet_b2
  python jobs/benchmark.py explain   maps against the model's forward pass alone, and against shap
  python jobs/benchmark.py grid      seconds that a short trial costs beside its training

Nothing else should run at the same time: ratios are less sensitive to other load than seconds are,
but not insensitive.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# For a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))

from impactx.cli.main import main  # noqa: E402


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmark = parser.add_subparsers(dest="benchmark", required=True)
    train = benchmark.add_parser("train", help="speed of the training loop")
    train.add_argument("--models", nargs="+", default=["lenet5", "mobilenetv1_100"], help=(
        "lenet5 or names of timm models"))
    train.add_argument("--images", type=int, default=2000, help="images in an epoch (%(default)s)")
    train.add_argument("--size", type=int, default=32, help="side in pixels (%(default)s)")
    train.add_argument("--batch-size", type=int, default=32, help="(%(default)s)")
    train.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    train.add_argument("--device", default="cpu", help="(%(default)s)")
    train.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    train.add_argument("--compiled", action="store_true", help=(
        "measure the step that torch.compile makes as well"))
    explain = benchmark.add_parser("explain", help="speed of maps")
    explain.add_argument("--models", nargs="+", help=(
        "lenet5 or names of timm models (lenet5, a MobileNet, an EfficientNet)"))
    explain.add_argument("--size", type=int, default=32, help="side in pixels (%(default)s)")
    explain.add_argument("--images", type=int, help=(
        "images in a round (64 for lenet5, 32 for others; 512 on a GPU)"))
    explain.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    explain.add_argument("--device", default="cpu", help="(%(default)s)")
    grid = benchmark.add_parser("grid", help="overhead of a trial in a whole experiment")
    grid.add_argument("--trials", type=int, default=22, help="(%(default)s)")
    grid.add_argument("--epochs", type=int, default=5, help="of each trial (%(default)s)")
    grid.add_argument("--images", type=int, default=1000, help="in an epoch (%(default)s)")
    grid.add_argument("--cpus", type=int, default=2, help=(
        "CPUs of the local cluster, one for each trial (%(default)s)"))
    return parser.parse_args()


def run() -> None:
    """Parse the options and run the benchmark."""
    options = _arguments()
    if options.benchmark == "train":
        from impactx.benchmarks.train import random_images
        from impactx.benchmarks.train import run as train

        images, labels = random_images(options.images, options.size)
        train(options.models, images=images, labels=labels, batch_size=options.batch_size,
              rounds=options.rounds, device=options.device, threads=options.threads,
              compiled=options.compiled)
    elif options.benchmark == "grid":
        from impactx.benchmarks.grid import run as grid

        grid(trials=options.trials, epochs=options.epochs, images=options.images,
             cpus=options.cpus)
    else:
        from impactx.benchmarks.explain import MODELS
        from impactx.benchmarks.explain import run as explain

        explain(models=options.models or MODELS, size=options.size, images=options.images,
                rounds=options.rounds, device=options.device)


if __name__ == "__main__":
    main(run)
