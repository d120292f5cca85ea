"""Measure this project's speed on this machine, as ratios in one run.

  python jobs/benchmark.py train                      training epochs against the bare step and a DataLoader
  python jobs/benchmark.py train --device cuda --batch-size 512 --models lenet5 tf_efficientnet_b2
  python jobs/benchmark.py explain                    maps against the raw forward and against shap itself
  python jobs/benchmark.py grid                       seconds that a short trial costs beside its training

Nothing else should run meanwhile: ratios stand noise better than seconds do, but not everything.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))  # from a checkout, uninstalled

from impactx.command import main  # noqa: E402


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    train = what.add_parser("train", help="speed of the training loop")
    train.add_argument("--models", nargs="+", default=["lenet5", "mobilenetv1_100"], help="lenet5 or timm names")
    train.add_argument("--images", type=int, default=2000, help="images an epoch (%(default)s)")
    train.add_argument("--size", type=int, default=32, help="side in pixels (%(default)s)")
    train.add_argument("--batch-size", type=int, default=32)
    train.add_argument("--rounds", type=int, default=5)
    train.add_argument("--device", default="cpu")
    train.add_argument("--threads", type=int, default=1)
    train.add_argument("--compiled", action="store_true", help="measure torch.compile's step as well")
    explain = what.add_parser("explain", help="speed of the maps")
    explain.add_argument("--models", nargs="+", help="lenet5 or timm names (lenet5, a MobileNet, an EfficientNet)")
    explain.add_argument("--size", type=int, default=32, help="side in pixels (%(default)s)")
    explain.add_argument("--images", type=int, help="images a round (64 for lenet5, else 32; 512 on a GPU)")
    explain.add_argument("--rounds", type=int, default=5)
    explain.add_argument("--device", default="cpu")
    grid = what.add_parser("grid", help="overhead of a trial in the whole stack")
    grid.add_argument("--trials", type=int, default=22, help="(%(default)s)")
    grid.add_argument("--epochs", type=int, default=5)
    grid.add_argument("--images", type=int, default=1000)
    grid.add_argument("--cpus", type=int, default=2, help="of a local cluster, a trial each (%(default)s)")
    return parser.parse_args()


def run() -> None:
    """Parse and call."""
    options = _arguments()
    if options.what == "train":
        from impactx.benchmarks.train import random_images
        from impactx.benchmarks.train import run as train

        images, labels = random_images(options.images, options.size)
        train(options.models, images=images, labels=labels, batch_size=options.batch_size, rounds=options.rounds,
              device=options.device, threads=options.threads, compiled=options.compiled)
    elif options.what == "grid":
        from impactx.benchmarks.grid import run as grid

        grid(trials=options.trials, epochs=options.epochs, images=options.images, cpus=options.cpus)
    else:
        from impactx.benchmarks.explain import MODELS
        from impactx.benchmarks.explain import run as explain

        explain(models=options.models or MODELS, size=options.size, images=options.images, rounds=options.rounds,
                device=options.device)


if __name__ == "__main__":
    main(run)
