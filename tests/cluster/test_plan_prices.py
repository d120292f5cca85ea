"""--plan: its measured rates are those of a real run on the same cluster."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import fmean

import pytest
from lab import Lab, ignore, task

from impactx.approaches.baseline import BASELINE
from impactx.costs.measured import MAPS, Making
from impactx.costs.pricing import probes_of
from impactx.run.threads import run_all

JOB = Path(__file__).resolve().parents[2] / "jobs" / "full_grid.py"
LONGER = {"datasets": {"digits": {"name": "digits", "source": "digits", "augmentation": {"flip": False, "shift": 2}}},
          "training": {"epochs": 8, "patience": 8}, "maps": {"shard_size": 60},
          "grid": {"learning_rate": [0.002, 0.003, 0.004, 0.005], "batch_size": [32], "validation_fraction": [0.2]},
          "attribution": {"method": "partition", "max_evals": 500, "batch_size": 50}}


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_rates_are_within_30_percent_of_a_real_run(lab):
    from impactx.cluster.executor import RayExecutor
    from impactx.cluster.measuring import measure

    one: Lab = lab(**LONGER)
    executor: RayExecutor = one.ray()
    cell = one.cell
    measured = measure(probes_of([cell]), executor.settings, one.place, executor.resources)
    images = cell.facts.train_images
    validation = round(images * 0.2)

    ratios, results = {}, []
    executor.search([task(cell.classifier_trial(point)) for point in cell.configurations()], lambda unit, result, error: results.append(result),
                    ignore)
    ratios[BASELINE] = measured.epoch("trial", cell, BASELINE, 32, images - validation, validation) / epoch(results)

    a = one.a()
    executor.train(task(a), ignore)
    maps = one.maps(a)
    executor.explain(task(maps), ignore)
    # From the shard on that both workers have made one: before it processes start, which the plan says it leaves out.
    written = sorted(path.stat().st_mtime for path in Path(one.place.output, maps.folder).glob("*.parquet"))
    real = (images - 2 * 60) / (written[-1] - written[1])
    ratios[MAPS] = real / measured.maps(cell, Making(maps.attribution))["maps on CPUs"]

    nets = [one.stage2(a, weight) for weight in (0.4, 0.8)]
    done = run_all([partial(executor.train, task(net), ignore) for net in nets], 2)
    ratios["impactx"] = measured.epoch("model", cell, "impactx", 32, images - validation, validation) / epoch(done)
    print({name: round(ratio, 2) for name, ratio in ratios.items()})
    assert all(0.7 < ratio < 1.3 for ratio in ratios.values()), ratios


def epoch(results):
    """Mean seconds of an epoch, without each training's first."""
    return fmean(row["seconds"] for result in results for row in result.history[1:])


@pytest.mark.slow
def test_the_command_prints_prices_and_trains_nothing(tmp_path):
    done = subprocess.run([sys.executable, str(JOB), "--preset", "demo", "--plan", f"output={tmp_path / 'out'}",
                           f"cache={tmp_path / 'cache'}", "datasets.digits.subset=200", "cluster.num_cpus=2"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "digits x lenet5   (exists: nothing)" in done.stdout and "in all: 8 trials" in done.stdout
    assert "ms a step" in done.stdout and "maps/s each" in done.stdout and "CPU-hours" in done.stdout
    assert not list((tmp_path / "out").rglob("*.pt")) and not list((tmp_path / "out").rglob("result.json"))
