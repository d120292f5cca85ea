"""No stale number: which edits of the real package make which steps of a cell new, and that the job says why."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPIED = shutil.ignore_patterns("__pycache__")

# The keys of a small cell's steps. What a step leaves is made up from its key, so that a step that is made again makes
# those again that start from its result, as different weights do.
KEYS = """
import json, sys
from impactx import plugins
from impactx.configuration import load_settings
plugins.load(["mine.py"])
from impactx.experiment.cell import Cell, DataFacts
from impactx.experiment.flow import flow
from impactx.experiment.groups import LeftOut, Outcomes
settings = load_settings("demo", [
    "approach=[impactx,abn,ensemble]", "repeats=1", "grid.learning_rate=[0.002,0.004]", "grid.batch_size=[16]",
    "grid.validation_fraction=[0.2]", "approaches.impactx.lambdas=[0.4,0.8]", "evaluation.map_images=10",
    "approaches.smoothed={kind: smoothed}"], sys.argv[1])
cell = Cell(settings, next(iter(settings.datasets.values())), next(iter(settings.models.values())),
            DataFacts("of the images", 100, 10, (32, 32), tuple("0123456789"), "of the test", 20))
steps, requests = {}, flow(cell)
request = next(requests)
try:
    while True:
        if not isinstance(request, LeftOut):
            steps |= {f"{step.kind}: {step.name}": [step.approach_name, step.key, step.code] for step in request.steps}
        request = requests.send(Outcomes({} if isinstance(request, LeftOut) else {
            step.folder: step.placeholder() for step in request.steps}))
except StopIteration:
    print(json.dumps(steps))
"""
EXTENSION = '''
from typing import Literal
from impactx.approaches.baseline import Baseline
from impactx.settings.extensions import approach
from mine_helper import smoothing
@approach
class Smoothed(Baseline):
    kind: Literal["smoothed"] = "smoothed"
    def train(self, bench):
        return smoothing(super().train(bench))
'''
HELPER = "def smoothing(trained):\n    return trained\n"

A = {"trial A", "A"}
IMPACTX, ABN = {"trial impactx", "impactx"}, {"abn"}
OTHERS = {"ensemble", "smoothed"}
APPROACHES = ("baseline", "impactx", "abn", "ensemble", "smoothed")
TRAININGS = A | IMPACTX | ABN | OTHERS


def judged(*names: str) -> set[str]:
    """The tests and the map quality of approaches; without names of all."""
    return {f"{what} {name}" for what in ("test", "quality") for name in names or APPROACHES}


QUALITY = {one for one in judged() if one.startswith("quality")}
ALL = TRAININGS | {"maps"} | judged()
NONE: set[str] = set()
P = "platform/impactx"
# file, old text, new text, steps whose own code it is, steps that are made again
EDITS = {
    "the loss of stage 2": (
        f"{P}/approaches/impactx/__init__.py", "ce + weight * mse", "ce + 2 * weight * mse",
        IMPACTX | judged("impactx"), IMPACTX | judged("impactx")),
    "the maps' error": (
        f"{P}/approaches/impactx/loss.py", "(maps - targets).square()", "(maps - targets).abs()",
        IMPACTX | judged("impactx"), IMPACTX | judged("impactx")),
    "the cross entropy": (
        f"{P}/training/losses.py", "* batch.weights).sum()", "* batch.weights).mean()", TRAININGS | judged(), ALL),
    "the decoder": (
        f"{P}/models/decoder.py", "nn.ReLU()", "nn.GELU()", IMPACTX | judged("impactx"), IMPACTX | judged("impactx")),
    "ABN's network": (
        f"{P}/approaches/abn/network.py", "torch.sigmoid(", "torch.tanh(", ABN | judged("abn"), ABN | judged("abn")),
    "how the ensemble joins its networks": (
        f"{P}/approaches/ensemble.py", "def classify(", "def classify_(", {"ensemble"} | judged("ensemble"),
        {"ensemble"} | judged("ensemble")),
    "a Numba kernel": (
        f"{P}/explain/partition/compose.py", "nogil=True, cache=True", "nogil=True, cache=True, fastmath=True",
        {"maps"} | QUALITY, {"maps"} | QUALITY | IMPACTX | judged("impactx")),
    "the draw of augmentation": (
        f"{P}/datasets/batches.py", "shift + 1", "shift + 2", TRAININGS | judged(), ALL),
    "A's network": (f"{P}/models/lenet5.py", "nn.ReLU()", "nn.GELU()", ALL, ALL),
    "a metric of maps": (
        f"{P}/evaluation/metrics/fidelity.py", "return ", "return 2 * ", QUALITY, QUALITY),
    "a helper of an extension": (
        "mine_helper.py", "return trained", "return [trained][0]", {"smoothed"} | judged("smoothed"),
        {"smoothed"} | judged("smoothed")),
    # ---- what computes nothing
    "a comment": (f"{P}/approaches/impactx/__init__.py", "    def loss(", "    # equation (1)\n    def loss(", NONE, NONE),
    "a docstring": (f"{P}/training/loop.py", '"""', '"""In short: ', NONE, NONE),
    "a message": (f"{P}/approaches/impactx/__init__.py", "and this batch has none", "but this one has none", NONE, NONE),
    "the report": (f"{P}/report/build.py", "def ", "def further(): return 1\n\n\ndef ", NONE, NONE),
    "a local executor": (f"{P}/run/local.py", "cells_at_once(self) -> int:", "cells_at_once(self, x=1) -> int:", NONE,
                         NONE),
    "Ray's executor": (f"{P}/cluster/executor.py", "time.perf_counter()", "time.monotonic()", NONE, NONE),
    "how results are kept": (f"{P}/experiment/artifacts.py", "def finish(", "def finish_(", NONE, NONE),
    "the order of keys of a checkpoint": (
        f"{P}/approaches/checkpoint.py", "buffer = io.BytesIO()", "buffer = io.BytesIO(b'')", NONE, NONE),
    "another approach": (f"{P}/approaches/wae.py", "return ", "return 2 * ", NONE, NONE),
    "another attribution": (f"{P}/explain/methods/occlusion.py", "return ", "return 2 * ", NONE, NONE),
}


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """The platform with an extension beside it, to be copied and edited."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "platform", folder / "platform", ignore=COPIED)
    (folder / "mine.py").write_text(EXTENSION)
    (folder / "mine_helper.py").write_text(HELPER)
    return folder


@pytest.fixture(scope="module")
def before(package) -> dict[str, list[tuple[str, str]]]:
    return steps(package)


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(folder / "platform"), "PYTHONDONTWRITEBYTECODE": "1"})


def steps(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """The sorted keys and digests of the code, by what people would call a group of steps."""
    done = python(folder, "-c", KEYS, str(ROOT / "configs"))
    assert done.returncode == 0, done.stderr[-2000:]
    groups: dict[str, list[tuple[str, str]]] = {}
    for title, (approach, key, code) in json.loads(done.stdout).items():
        kind = title.partition(":")[0]
        name = {"trial": f"trial {approach}", "model": approach, "maps": "maps", "test": f"test {approach}",
                "map_quality": f"quality {approach}"}[kind]
        name = name.replace("baseline", "A") if kind in ("trial", "model") else name
        groups.setdefault(name, []).append((key, code))
    return {name: sorted(group) for name, group in groups.items()}


def changed(before, after, part: int) -> set[str]:
    """The groups of which every step has another key (part 0) or other code (part 1); half a group is an error."""
    names = set()
    for name, group in before.items():
        same = {pair[part] for pair in group} & {pair[part] for pair in after[name]}
        assert not same or same == {pair[part] for pair in group}, name
        if not same:
            names.add(name)
    return names


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text, f"{file} holds no {old!r}: this test edits nothing"
    file.write_text(text.replace(old, new, 1))


def test_the_cell_has_all_kinds_of_steps(before):
    assert set(before) == ALL


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_makes_the_dependent_steps_again_and_no_others(package, before, tmp_path, what):
    file, old, new, own, again = EDITS[what]
    shutil.copytree(package, tmp_path / "edited")
    edit(tmp_path / "edited" / file, old, new)
    after = steps(tmp_path / "edited")
    assert changed(before, after, 1) == own
    assert changed(before, after, 0) == again


def test_a_module_may_be_moved(package, before, tmp_path):
    shutil.copytree(package, folder := tmp_path / "moved")
    inside = folder / "platform" / "impactx"
    (inside / "models" / "drawing").mkdir()
    (inside / "models" / "decoder.py").rename(inside / "models" / "drawing" / "decoder.py")
    for path in inside.rglob("*.py"):
        text = path.read_text()
        if "impactx.models.decoder" in text:
            path.write_text(text.replace("impactx.models.decoder", "impactx.models.drawing.decoder"))
    assert not changed(before, steps(folder), 0)


JOB = """
import logging, sys
from impactx.configuration import load_settings
from impactx.experiment.preparation import prepare
from impactx.run.job import Job
from impactx.run.local import LocalExecutor
from impactx.run.no_tracker import NoTracker
configs, *overrides = sys.argv[1:]
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
settings = load_settings("demo", overrides, configs)
prepared, tracker = prepare(settings), NoTracker()
job = Job(settings, prepared.cells, prepared.place, LocalExecutor(prepared.place, tracker), tracker)
for row in job.run():
    print("row", row.approach, repr(row.val_accuracy), repr(row.test_accuracy), row.weights)
"""
TINY = ("datasets.digits.subset=100", "grid.learning_rate=[0.002,0.004]", "grid.batch_size=[16]",
        "grid.validation_fraction=[0.2]", "training.epochs=2", "attribution.max_evals=50", "maps.shard_size=30",
        "approach=impactx", "approaches.impactx.lambdas=[0.4,0.8]", "repeats=1", "evaluation.map_images=0")


def job(folder: Path, *overrides: str) -> list[str]:
    """The log of a small job, by the package that lies in the folder."""
    done = python(folder, "-c", JOB, str(ROOT / "configs"), *TINY, "output=results", "data_root=data", "cache=cache",
                  *overrides)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def finished(package, tmp_path_factory) -> tuple[Path, list[str]]:
    """A small job that ran, and its log."""
    folder = tmp_path_factory.mktemp("job") / "here"
    shutil.copytree(package, folder)
    return folder, job(folder)


def said(log: list[str], text: str) -> list[str]:
    return [line for line in log if text in line]


def test_a_job_says_why_it_trains_again(finished, tmp_path):
    folder, first = finished[0], finished[1]
    assert not said(first, "made again") and len(said(first, "row ")) == 2
    shutil.copytree(folder, tmp_path / "here")
    loss = tmp_path / "here" / P / "approaches" / "impactx" / "__init__.py"
    edit(loss, "ce + weight * mse", "ce + 9 * weight * mse")
    second = job(tmp_path / "here")
    assert said(second, "stage 1: 2 of 2 trials reused")
    assert said(second, "A repeat 0: reused") and said(second, "maps repeat 0: reused")
    assert said(second, "test of A repeat 0: reused") and not said(second, "test of impactx lambda=0.4 repeat 0: reused")
    reason = "made again, the code differs: impactx.approaches.impactx changed"
    assert said(second, "made again") == [
        f"digits x lenet5: stage 2 of impactx: 2 finished steps are {reason}",
        f"digits x lenet5: final trainings: 1 finished step is {reason}"]
    assert said(first, "row baseline") == said(second, "row baseline")
    assert said(first, "row impactx") != said(second, "row impactx")
    # The results of the earlier code are still there.
    edit(loss, "ce + 9 * weight * mse", "ce + weight * mse")
    third = job(tmp_path / "here")
    assert not said(third, ": starts") and not said(third, "made again")
    assert said(third, "row ") == said(first, "row ")


def clean(folder: Path, *options: str) -> str:
    done = python(folder, "jobs/clean.py", "results", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def kept(folder: Path) -> set[str]:
    return {str(p.parent.relative_to(folder / "results")) for p in folder.glob("results/*/*/result.json")}


@pytest.fixture
def edited(finished, tmp_path) -> Path:
    """The small job, and the same started again after stage 2's loss was edited."""
    shutil.copytree(finished[0], tmp_path / "here")
    # jobs/clean.py puts its own checkout first: it has to be the copy's.
    shutil.copytree(ROOT / "jobs", tmp_path / "here" / "jobs")
    edit(tmp_path / "here" / P / "approaches" / "impactx" / "__init__.py", "ce + weight * mse", "ce + 9 * weight * mse")
    job(tmp_path / "here")
    return tmp_path / "here"


def test_what_nothing_leads_to_is_listed_and_deleted(finished, edited):
    before, old = kept(edited), kept(finished[0])
    # The job's journal names the new steps: two trials, a model and its test are left over.
    text = clean(edited)
    assert "named by no job" in text and "in all: 4 steps" in text and "not today's" in text
    assert "in all: 4 steps" in clean(edited, "--code", "other")
    assert "in all: 0 steps" in clean(edited, "--older-than", "1", "--delete", "--yes")
    assert kept(edited) == before
    (key,) = [p.name for p in (edited / "results" / "jobs").iterdir()]
    # A job that is under way may still come to them.
    owner = {"token": "x", "host": "elsewhere", "process": 1, "since": "today"}
    (driver := edited / "results" / "jobs" / key / "driver.json").write_text(json.dumps(owner))
    text = clean(edited, "--delete", "--yes")
    assert "in all: 0 steps" in text and "process 1 on elsewhere" in text and kept(edited) == before
    driver.unlink()
    assert "4 steps were deleted" in clean(edited, "--delete", "--yes")
    assert before - kept(edited) == old - kept(edited) and len(before - kept(edited)) == 4
    assert not said(job(edited), ": starts")  # nothing that the job needs is gone
    codes = {name.split(".")[1] for name in os.listdir(edited / "results" / "recipes")}
    assert {name.removesuffix(".json") for name in os.listdir(edited / "results" / "code")} == codes
    assert f"in all: {len(kept(edited))} steps" in clean(edited, "--job", key, "--delete", "--yes")
    assert not kept(edited)


def test_nothing_is_deleted_without_a_yes(edited):
    before = kept(edited)
    done = subprocess.run([sys.executable, "jobs/clean.py", "results", "--delete"], cwd=edited, input="n\n", text=True,
                          capture_output=True, timeout=300)
    assert "delete 4 steps for good?" in done.stdout and "nothing was deleted" in done.stdout, done.stderr
    assert kept(edited) == before


def test_steps_of_other_code_are_reused_where_asked_and_marked(finished, tmp_path):
    shutil.copytree(finished[0], here := tmp_path / "here")
    edit(here / P / "approaches" / "impactx" / "__init__.py", "ce + weight * mse", "ce + 9 * weight * mse")
    edit(here / P / "explain" / "partition" / "compose.py", "nogil=True, cache=True", "nogil=True")
    log = job(here, "reuse=any_code")
    assert not said(log, ": starts") and not said(log, "made again")
    assert said(log, "row ") == said(finished[1], "row ")
    reused = "is reused, the code differs: impactx."
    assert said(log, f"maps: 1 finished step {reused}explain.partition.compose changed (reuse = any_code)")
    assert said(log, f"final trainings: 1 finished step {reused}approaches.impactx changed (reuse = any_code)")
    (table,) = here.glob("results/jobs/*/results.csv")  # the same job: the setting is part of no key
    marks = {row["approach"]: row["other_code"] for row in csv.DictReader(table.open())}
    assert marks == {"baseline": "", "impactx": "maps, model, test"}
    # The same command without the setting does them by today's code, and the mark goes.
    assert said(job(here), "maps repeat 0: starts")
    assert [row["other_code"] for row in csv.DictReader(table.open())] == ["", ""]
