"""A folder of somebody else's: what it holds is shown, refused in one message, and never written elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from impactx.configuration import load_settings
from impactx.experiment.preparation import prepare
from impactx.report import write_report
from impactx.results.export import find_job
from impactx.run.job import Job
from impactx.run.local import LocalExecutor
from impactx.run.no_tracker import NoTracker
from impactx.settings import ExperimentSettings
from impactx.storage import Storage, StorageError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ELSEWHERE = "../../../../../elsewhere"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output of a small job."""
    output = tmp_path_factory.mktemp("finished") / "output"
    settings = load_settings("demo", [
        f"output={output}", f"cache={output.parent / 'cache'}", "approach=[impactx]", "datasets.digits.subset=80",
        "grid.learning_rate=[0.004]", "grid.batch_size=[16]", "grid.validation_fraction=[0.2]", "training.epochs=2",
        "attribution.max_evals=12", "maps.shard_size=50", "approaches.impactx.lambdas=[0.8]", "repeats=1",
        "evaluation.map_images=10"], CONFIGS)
    prepared = prepare(settings)
    Job(settings, prepared.cells, prepared.place, LocalExecutor(prepared.place, NoTracker()), NoTracker()).run()
    return output


@pytest.fixture
def output(finished, tmp_path):
    """A copy of it, deep enough that a path upwards stays in the test's own folder."""
    return Path(shutil.copytree(finished, tmp_path / "a/b/c/d/output"))


def crafted(output: Path, name: str, change) -> None:
    (path,) = output.glob(f"jobs/*/{name}")
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def report(output: Path) -> str:
    storage = Storage(output)
    return Path(write_report(storage, find_job(storage, None))).read_text()


def files_outside(output: Path) -> list[Path]:
    return [path for path in output.parents[3].rglob("*") if path.is_file() and not path.is_relative_to(output)]


def approach_of(steps, name):
    return next(step for step in steps if step["parameters"].get("approach") == name and step["kind"] == "test")


@pytest.mark.parametrize("name, change, says", [
    ("job.json", lambda d: d["settings"]["approaches"].update({ELSEWHERE: {"kind": "impactx"}}), "job.json.*approaches"),
    ("job.json", lambda d: d["settings"].update(name=ELSEWHERE), "job.json.*name"),
    ("job.json", lambda d: d["settings"]["datasets"]["digits"].update(name=ELSEWHERE), "job.json.*digits.name"),
    ("job.json", lambda d: d["settings"].update(models={}), "job.json.*models"),
    ("job.json", lambda d: d.update(settings=7), "job.json.*settings"),
    ("job.json", lambda d: d.update(starts={}), "job.json.*starts"),
])
def test_a_crafted_job_is_refused_in_one_message(output, name, change, says):
    crafted(output, name, change)
    with pytest.raises(StorageError, match=f"(?s){says}"):
        report(output)
    assert files_outside(output) == []


@pytest.mark.parametrize("change", [
    lambda d: d["facts"].update(dataset=ELSEWHERE), lambda d: d["facts"].update(model="another"),
    lambda d: approach_of(d["steps"], "impactx").update(folder=ELSEWHERE),
    lambda d: approach_of(d["steps"], "impactx")["parameters"].update(approach=ELSEWHERE),
    lambda d: approach_of(d["steps"], "impactx")["parameters"].update(approach=None),
    lambda d: approach_of(d["steps"], "impactx")["parameters"].update(repeat=[]),
    lambda d: approach_of(d["steps"], "impactx")["parameters"].update({"lambda": "0.8x"}),
    lambda d: approach_of(d["steps"], "impactx")["parameters"].pop("learning_rate"),
    lambda d: approach_of(d["steps"], "impactx").update(parameters={})])
def test_a_crafted_cell_is_named_in_the_report(output, change):
    crafted(output, "cells/digits.lenet5.json", change)
    page = report(output)
    assert "everything: " in page and "digits.lenet5.json" in page
    assert files_outside(output) == []


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"facts": ' * 50_000, b"NaN", b"", b"\xff\xfe"])
def test_json_that_cannot_be_read_is_one_message(output, content):
    (path,) = output.glob("jobs/*/job.json")
    path.write_bytes(content)
    with pytest.raises(StorageError, match="job.json"):
        report(output)


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/x", "a//x", "./x", "", "a/..", "a\\x", "a\0x", ".."])
def test_no_path_leads_out_of_a_storage(tmp_path, path):
    storage = Storage(tmp_path / "root")
    for action in (lambda: storage.write(path, b"x"), lambda: storage.read(path), lambda: storage.exists(path),
                   lambda: storage.delete(path), lambda: storage.delete_folder(path)):
        with pytest.raises(StorageError, match="is no path of a file below"):
            action()
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("name", ["..", ".hidden", "a/b", "-rf", "a b", "", "ä", "x" * 101])
@pytest.mark.parametrize("where", ["name", "approaches", "datasets", "models"])
def test_names_of_files_have_a_plain_alphabet(name, where):
    settings = {"datasets": {"digits": {"name": "digits", "source": "digits"}},
                "models": {"lenet5": {"name": "lenet5", "architecture": "lenet5"}}}
    ExperimentSettings.model_validate(settings)
    bad = {"name": name, "approaches": {name: {"kind": "impactx"}},
           "datasets": {name: {"name": name, "source": "digits"}},
           "models": {name: {"name": name, "architecture": "lenet5"}}}[where]
    with pytest.raises(ValueError, match=where):
        ExperimentSettings.model_validate(settings | {where: bad})


@pytest.mark.parametrize("file, change, says", [
    ("tests/*/predictions.npz", lambda a: a.pop("labels"), "it has no labels"),
    ("tests/*/predictions.npz", lambda a: a.update(labels=np.zeros(3, int)), "probabilities have the shape"),
    ("tests/*/predictions.npz", lambda a: a.update(labels=a["labels"] - 0.5), "labels are no indices"),
    ("tests/*/predictions.npz", lambda a: a.update(labels=a["labels"] + 90), "labels of 100 classes"),
    ("tests/*/predictions.npz", lambda a: a.update(probabilities=a["probabilities"] * np.nan), "no finite numbers"),
    ("tests/*/predictions.npz", lambda a: a.update(probabilities=np.array("x")), "probabilities have the shape"),
    ("map_quality/*/map_scores.npz", lambda a: a.pop("predicted"), "it has no predicted"),
    ("map_quality/*/map_scores.npz", lambda a: a.update(predicted=np.zeros((2, 2))), "predicted have the shape"),
    ("map_quality/*/map_scores.npz", lambda a: a.update(labels=np.zeros(0, int)), "rows have the shape"),
    ("map_quality/*/map_scores.npz", lambda a: a.update(shown=a["shown"] + 90), "shown are not the rows of images"),
    ("map_quality/*/map_scores.npz", lambda a: a.update(images=np.zeros(0)), "shown are not the rows of images"),
    ("map_quality/*/map_scores.npz", lambda a: a.update(shown=np.array("x")), "shown are no indices"),
])
def test_arrays_that_do_not_fit_each_other_are_named_in_the_report(output, file, change, says):
    path = sorted(output.glob(file))[0]
    with np.load(path) as kept:
        arrays = dict(kept)
    change(arrays)
    np.savez_compressed(path, **arrays)
    assert says in report(output)
