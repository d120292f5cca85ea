"""Reports of real jobs on digits, finished and not: what stands in them is what the job left."""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from impactx.cli.main import main
from impactx.configuration import load_settings
from impactx.evaluation.judgement import MapQuality
from impactx.evaluation.statistics import Estimate
from impactx.experiment.preparation import prepare
from impactx.report import build_report, write_report
from impactx.report.blocks import Code, Figure, Items, Table, Text
from impactx.report.map_words import sentence
from impactx.report.maps import map_sections
from impactx.report.page import html
from impactx.results.evidence_records import Evidence, MapEvidence, MapValue, OrderAreas
from impactx.results.export import ExportError, JobExport, export_job, find_job, map_scores
from impactx.results.records import Start
from impactx.run.job import Job
from impactx.run.local import LocalExecutor
from impactx.run.no_tracker import NoRun, NoTracker
from impactx.storage import Storage, StorageError

ROOT = Path(__file__).resolve().parents[2]
TINY = ("datasets.digits.subset=100", "grid.learning_rate=[0.002,0.004]", "grid.batch_size=[16,32]",
        "grid.validation_fraction=[0.2]", "training.epochs=2", "attribution.max_evals=50", "maps.shard_size=50",
        "approaches.impactx.lambdas=[0.4,0.8]", "approaches.lambda0.learning_rate_factors=[1.0]", "repeats=2",
        "evaluation={map_images: 12, resamples: 200}")
START = Start(command="python jobs/full_grid.py --preset demo", code="0.1.0+gabc", machine="2 × test",
              versions={"torch": "2.15.0"})
BROKEN, STOPPED = "A lr=0.004 bs=32 vf=0.2", "lambda0 lambda=0 repeat 1"


class Unlucky(LocalExecutor):
    """One trial fails; the last training is interrupted."""

    def train(self, task, on_epoch):
        if task.step.name == BROKEN:
            raise ValueError("out of <memory>")
        if task.step.name == STOPPED:
            raise KeyboardInterrupt
        return super().train(task, on_epoch)


class Kept(NoRun):
    """A run that keeps the artifacts it is given."""

    def __init__(self) -> None:
        self.artifacts: dict[str, bytes] = {}

    def log_bytes(self, content, path):
        self.artifacts[path] = content


def job(output: Path, shared: Path, executor: type[LocalExecutor]) -> Job:
    settings = load_settings("demo", [*TINY, f"output={output}", f"cache={shared}", f"data_root={shared}"],
                             ROOT / "configs")
    prepared, tracker = prepare(settings), NoTracker()
    return Job(settings, prepared.cells, prepared.place, executor(prepared.place, tracker), tracker, start=START)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The output of a job that was interrupted, and what goes on from it."""
    output, shared = tmp_path_factory.mktemp("stopped"), tmp_path_factory.mktemp("shared")
    with pytest.raises(KeyboardInterrupt):
        job(output, shared, Unlucky).run()
    return Storage(output), shared


@pytest.fixture(scope="module")
def finished(stopped, tmp_path_factory):
    """The job started again, to its end; its storage, rows and report's run."""
    output = tmp_path_factory.mktemp("finished") / "results"
    shutil.copytree(stopped[0].root, output)
    run, storage = Kept(), Storage(output)
    done = job(output, stopped[1], LocalExecutor)
    rows = done.run(report=lambda key, _: write_report(storage, key, run=run))
    return storage, done, rows, run


def text_of(page: bytes) -> str:
    return re.sub(r"<[^>]*>", " ", re.sub(r"data:image/png;base64,[\w+/=]*", "", page.decode()))


def report(storage: Storage) -> dict[str, bytes]:
    return build_report(export_job(storage, find_job(storage)), lambda folder: map_scores(storage, folder))


def table(files: dict[str, bytes], name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(files[f"{name}.csv"].decode())))


def test_a_job_that_was_stopped_says_what_is_missing_and_shows_the_rest(stopped):
    export = export_job(stopped[0], find_job(stopped[0]))
    files = build_report(export, lambda folder: None)
    text = text_of(files["report.html"])
    assert "This job is not complete" in text
    for approach in ("baseline", "impactx", "lambda0"):
        assert f"{approach}: no final model is tested yet" in text
    assert "No final model has read the test set yet" in text
    # What is there: the search, with its failed trial and the reason, and the finished trainings.
    assert "stage-1-digits-lenet5.png" in files and "training-digits-lenet5.png" in files
    assert f"{BROKEN}: ValueError: out of &lt;memory&gt;" in text
    assert "Stage 1: 3 of 4 trials finished; selected" in text
    states = {step.name: step.state for step in export.cells[0].steps}
    assert states[BROKEN] == "failed" and states[STOPPED] == "missing" and states["A repeat 1"] == "finished"


def test_a_finished_job_hides_nothing_and_its_numbers_are_its_own(finished):
    storage, done, rows, run = finished
    files = report(storage)
    assert "not complete" not in text_of(files["report.html"])
    found = table(files, "table2")
    assert [r["approach"] for r in found] == ["A (baseline)", "IMPACTX", "control λ = 0"]
    for row, approach in zip(found, ("baseline", "impactx", "lambda0"), strict=True):
        mine = [r.test_accuracy for r in rows if r.approach == approach]
        assert row["test %"] == f"{100 * np.mean(mine):.2f}" and row["repeats"] == "2"
    a, b = ({r.repeat: r.test_accuracy for r in rows if r.approach == x} for x in ("impactx", "lambda0"))
    gain = next(r for r in table(files, "gains") if (r["approach"], r["over"]) == ("IMPACTX", "same network, λ = 0"))
    expected = 100 * np.mean([a[k] - b[k] for k in a])
    assert gain["gain (points)"] == f"{expected:+.2f}"
    assert done.evidence.cells[0].sentence in text_of(files["report.html"])
    # What a model costs with all that it needs; lambda = 0 needs no maps, though it is handed them.
    result = {step.name: step.result for step in export_job(storage, done.key).cells[0].steps if step.result}
    of = {(r.approach, r.repeat): r for r in rows}
    maps, a = result["maps repeat 1"].process_seconds, result["A repeat 1"].seconds
    assert of["baseline", 1].seconds_in_all == a and maps > 0
    assert of["impactx", 1].seconds_in_all == pytest.approx(a + maps + of["impactx", 1].train_seconds)
    assert of["lambda0", 1].seconds_in_all == pytest.approx(a + of["lambda0", 1].train_seconds)
    cost = next(r for r in table(files, "costs") if r["step"] == "maps")
    worked = sum(result[f"maps repeat {k}"].process_seconds for k in (0, 1))
    assert cost["amount"] == "200 images" and cost["time of each"] == f"{200 / worked:.1f} maps/s"
    assert "digits: models learn from a part of the data set, 100 training images" in text_of(files["report.html"])
    for approach in ("baseline", "impactx", "lambda0"):  # the judgement of maps that the job itself made
        assert {f"{part}-digits-lenet5-{approach}.png" for part in ("morf", "examples")} <= files.keys()
    assert [r["predictor of the map"] for r in table(files, "fidelity-digits-lenet5-impactx")].count("the decoder") == 1
    assert len(table(files, "stage-1-digits-lenet5")) == 4 and len(table(files, "classes-digits-lenet5")) == 10


def test_a_table_that_mixes_precisions_says_so(finished, tmp_path):
    storage, done, rows, _ = finished
    assert "one precision" not in text_of(report(storage)["report.html"])
    results = {path: json.loads(path.read_text()) for path in Path(storage.root).glob("*/*/result.json")}
    assert {r["kind"] for r in results.values() if len(r["environments"]) == 1} == {
        "trial", "model", "maps", "test", "map_quality"}
    odd = next(row for row in rows if (row.approach, row.repeat) == ("impactx", 1))
    output = tmp_path / "results"
    shutil.copytree(storage.root, output)
    file = output / odd.model_folder / "result.json"
    result = json.loads(file.read_text())
    result["environments"][0]["precision"] = "bfloat16"  # as if a GPU had trained this one
    file.write_text(json.dumps(result))
    assert ("Not all of this table is of one precision: trained in float32: 5 models; digits x lenet5, impactx "
            "repeat 1 in bfloat16.") in text_of(report(Storage(output))["report.html"])


def test_the_finished_job_made_it_and_logged_it(finished):
    storage, done, _, run = finished
    assert done.report == storage.uri(f"jobs/{done.key}/report/report.html")
    kept = {p.name: p for p in Path(done.report).parent.iterdir()}
    assert {"report.html", "table2.csv", "table2.png", "gains.png"} <= kept.keys()
    assert run.artifacts == {f"report/{name}": file.read_bytes() for name, file in kept.items()}


def test_everything_that_is_needed_to_repeat_it(finished):
    text = text_of(report(finished[0])["report.html"])
    for part in (START.command, START.code, START.machine, "2.15.0", "max_evals", "learning_rate"):
        assert part in text


def test_the_page_needs_nothing_beside_it_and_shows_its_files(finished):
    files = report(finished[0])
    page = files["report.html"].decode()
    assert not re.search(r"<(script|link|iframe)|(src|href)=\"(?!data:|#)|url\(", page)
    embedded = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([\w+/=]*)", page)]
    assert len(embedded) >= 5 and embedded == [files[name] for name in re.findall(r'<figure id="([^"]*)"', page)]
    assert all(re.search(r'alt="[^"]{10,}"', image) for image in re.findall("<img[^>]*>", page))


def test_a_report_that_fails_is_an_error_line_and_the_job_stands(finished, stopped, tmp_path, caplog):
    shutil.copytree(finished[0].root, tmp_path / "again")

    def fails(key, run):
        raise OSError("the disk is full")

    with caplog.at_level(logging.ERROR, "impactx"):
        again = job(tmp_path / "again", stopped[1], LocalExecutor)
        assert len(again.run(report=fails)) == len(finished[2])
    assert "the report could not be made: OSError: the disk is full" in caplog.text and again.report is None


def test_which_job(finished, tmp_path):
    storage, done = finished[:2]
    assert find_job(storage, done.key) == find_job(storage, "demo") == find_job(storage)
    with pytest.raises(ExportError, match=f"no job 'other': give one of\n  {done.key}"):
        find_job(storage, "other")
    with pytest.raises(ExportError, match="holds no job"):
        find_job(Storage(tmp_path))
    for name in ("a-1", "a-2"):
        Storage(tmp_path).write_json(f"jobs/{name}/job.json", {})
    with pytest.raises(ExportError, match="2 jobs: give one of\n  a-1\n  a-2"):
        find_job(Storage(tmp_path), "a")


def test_a_cell_that_has_not_begun_is_named(finished, tmp_path):
    shutil.copytree(Path(finished[0].root, "jobs"), tmp_path / "jobs")
    path = tmp_path / "jobs" / finished[1].key / "job.json"
    about = json.loads(path.read_text())
    about["settings"]["models"]["other"] = about["settings"]["models"]["lenet5"] | {"name": "other"}
    path.write_text(json.dumps(about))
    files = build_report(export_job(Storage(tmp_path), finished[1].key), lambda folder: None)
    text = text_of(files["report.html"])
    assert "table2.csv" not in files and "No final model has read the test set yet" in text
    assert "digits × other: everything: it has not begun" in text
    # The steps' results are gone as well: that is said, not hidden.
    assert "digits × lenet5: stage 1: 4 of 4 trials are not finished" in text


@pytest.mark.parametrize("block", [
    Text("<b>&\"'"), Items(["<b>&\"'"]), Code("<b>&\"'", closed="<i>&\"'"),
    Table("t", ["<b>&\"'"], [["<b>&\"'"]], caption="<b>"), Figure("<b>.png", b"x", "<b>&\"'", "<b>&\"'")])
def test_no_text_becomes_markup(block):
    assert "<b>" not in html(block) and "<i>" not in html(block) and "&lt;b&gt;" in html(block)


def test_as_a_program(finished, stopped, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("report_job", ROOT / "jobs/report.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    main(lambda: program.run([finished[0].root, "--to", str(tmp_path / "here")]))
    assert capsys.readouterr().out == f"report: {tmp_path}/here/report.html\n"
    assert (tmp_path / "here" / "table2.csv").is_file()
    with pytest.raises(SystemExit) as end:
        main(lambda: program.run([str(tmp_path)]))
    assert end.value.code == 2 and "holds no job" in capsys.readouterr().err


def about_maps(gap: float, own: str = "decoder", over_mean: float | None = None, over_class: float = 0.05
               ) -> MapEvidence:
    """What maps are worth, small."""
    def interval(mean: float | None) -> Estimate | None:
        return None if mean is None else Estimate(mean, 0.1, mean - 0.1, mean + 0.1, None, 2, 4, 0.05, 0.0, "repeats and images")

    def order(area: float, random: float | None, explainer: float | None, mean: float | None = None) -> OrderAreas:
        return OrderAreas(aopc=interval(area), over_random=interval(random), over_explainer=interval(explainer),
                          over_mean_map=interval(mean), all_regions=interval(0.3), logit=interval(2),
                          logit_all_regions=interval(3))

    orders = {own: order(0.5, gap, -0.3, over_mean), "shap_predicted": order(0.6, 0.3, None),
              "random": order(0.2, None, -0.3)}
    measures = {m: MapValue(**interval(0.5).as_dict(), decoder_over=interval(over_class)) for m in ("mse", "correlation", "overlap")}
    return MapEvidence(orders=orders, explainer="shap_predicted",
                       fidelity={own: measures, "class_mean_of_predicted": measures}, metrics={})


def of_one_model(own: str = "decoder") -> dict:
    """A result of a judgement, small."""
    band = {k: [0.9, 0.5, 0.1] for k in ("mean", "low", "high")}
    orders = (own, "shap_predicted", "random")
    return {"images": 4, "seconds": 1.0, "results": {
                "morf": {"metric": "morf", "values": {}, "region": 4, "regions": 2, "early_regions": 1,
                         "curves": {order: {"probability": band, "logit": band} for order in orders},
                         "ties": {order: {"images": 0.25, "regions": 2.0} for order in orders}},
                "fidelity": {"metric": "fidelity", "values": {}, "target": "shap_of_a", "scale": "std",
                             "top_share": 0.1}},
            "seconds_per_map": {own: 0.001, "shap_predicted": 0.2},
            "evaluations_per_map": {own: 1, "shap_predicted": 2000}}


@pytest.mark.parametrize(("gap", "says"), [(0.2, "better than chance"), (-0.2, "worse than a random order"),
                                           (0.05, "cannot be told from a random order")])
def test_what_is_said_of_maps(gap, says):
    said = sentence(about_maps(gap), MapQuality.model_validate(of_one_model()), "impactx")
    assert says in said and said.startswith("IMPACTX's own map") and "200 times as long" in said
    assert f"{100 * abs(gap):.1f} points {'ahead' if gap > 0 else 'short'} of a random" in said.replace(
        f" [{100 * gap - 10:+.1f}, {100 * gap + 10:+.1f}]".replace("-", "−"), "")
    assert "30.0 points short [−40.0, −20.0] of that by SHAP of this model, predicted class" in said


@pytest.mark.parametrize(("over_mean", "says"), [
    (0.2, "finds what the model looks at better than chance and one mean map for every image do"),
    (0.05, "is better than chance, but not surely better than one mean map for every image"),
    (-0.2, "is better than chance, but worse than one mean map for every image")])
def test_a_map_that_the_mean_map_beats_is_not_praised(over_mean, says):
    said = sentence(about_maps(0.2, over_mean=over_mean), MapQuality.model_validate(of_one_model()), "impactx")
    assert says in said and f"{abs(100 * over_mean):.1f} points {'ahead' if over_mean > 0 else 'short'} [" in said


@pytest.mark.parametrize(("over_class", "says"), [
    (0.2, "learns more than the mean map of"), (-0.2, "learns less than the mean map of"),
    (0.05, "learns no more, as far as can be told, than the mean map of")])
def test_agreement_is_told_beside_the_mean_map_of_the_class(over_class, says):
    assert says in sentence(about_maps(0.2, over_class=over_class), MapQuality.model_validate(of_one_model()), "impactx")


def test_the_part_on_maps_and_its_examples(finished):
    """With what the unit leaves, image by image: one row an example, misclassified ones say so."""
    export = export_job(finished[0], finished[1].key)
    quality = MapQuality.model_validate(of_one_model())
    entries = [entry.model_copy(update={"map_quality": [quality, None], "maps": about_maps(0.2)}
                                if entry.approach == "impactx" else {"map_quality": [None, None], "maps": None})
               for entry in export.evidence.cells[0].approaches]
    rows = [replace(row, map_quality=f"map_quality/{row.approach}-{row.repeat}") for row in export.cells[0].rows]
    export = replace(export, cells=[replace(export.cells[0], rows=rows)], evidence=of_the_cell(export, approaches=entries))
    rng = np.random.default_rng(0)
    arrays = {"predicted": np.array([1, 2, 3, 4]), "labels": np.array([1, 2, 3, 5]), "shown": np.array([2, 3]),
              "images": rng.integers(0, 256, (2, 32, 32, 3), np.uint8), "rows": np.arange(4)}
    for order in ("decoder", "shap_predicted", "random"):
        arrays[f"curve.{order}"] = rng.random((4, 3)).astype(np.float32)
        arrays[f"maps.{order}"] = rng.normal(size=(2, 3, 32, 32)).astype(np.float32)
    asked = []
    sections = map_sections(export, lambda folder: asked.append(folder) or arrays, [])
    assert asked == ["map_quality/impactx-0"] and len(sections) == 2
    names = [block.name for block in sections[1].blocks if isinstance(block, (Figure, Table))]
    tail = "digits-lenet5-impactx"
    assert names == [f"morf-{tail}.png", f"morf-{tail}", f"morf-more-{tail}", f"fidelity-{tail}",
                     f"examples-{tail}.png"]


@pytest.mark.parametrize("damage", ["torn", "a folder", "gone"])
def test_scores_of_a_repeat_that_cannot_be_read_are_named_and_the_next_repeat_is_shown(finished, tmp_path, damage):
    shutil.copytree(finished[0].root, tmp_path / "out")
    storage = Storage(tmp_path / "out")
    folders = {(row.approach, row.repeat): row.map_quality for row in finished[2]}
    file = tmp_path / "out" / folders["impactx", 0] / "map_scores.npz"
    content = bytearray(file.read_bytes())
    file.unlink()
    if damage == "torn":
        content[len(content) // 2:len(content) // 2 + 256] = bytes(256)
        file.write_bytes(content)
    elif damage == "a folder":
        file.mkdir()
    files = report(storage)
    text = html_of_the_box(files["report.html"])
    said = {"torn": "is damaged", "a folder": "could not read", "gone": "is missing"}[damage]
    assert text.count("impactx repeat 0: ") == 1 and str(file) in text and said in text
    page = text_of(files["report.html"])
    assert "are those of repeat 1, in one process" in page and "are those of repeat 0, in one process" in page
    assert {f"{part}-digits-lenet5-impactx.png" for part in ("morf", "examples")} <= files.keys()


def test_damaged_results_and_journals_are_named_and_the_rest_is_shown(finished, tmp_path):
    shutil.copytree(finished[0].root, tmp_path / "out")
    storage = Storage(tmp_path / "out")
    key = find_job(storage)
    folders = {step.name: step.folder for step in export_job(storage, key).cells[0].steps}
    trial = next(name for name, folder in folders.items() if folder.startswith("trials/"))
    judged = next(row.map_quality for row in finished[2] if (row.approach, row.repeat) == ("impactx", 0))
    damaged = [folders[trial], folders["A repeat 1"], judged]
    for folder in damaged:
        storage.write(f"{folder}/result.json", b'{"half')
    export, files = export_job(storage, key), report(storage)
    assert {step.folder for step in export.cells[0].steps if step.state == "damaged"} == set(damaged)
    text = text_of(files["report.html"])
    for folder in damaged:
        assert f"{tmp_path}/out/{folder}/result.json is damaged" in text
    assert [r["approach"] for r in table(files, "table2")] == ["A (baseline)", "IMPACTX", "control λ = 0"]
    assert f"{trial}: {tmp_path}" in text.partition("Stage 1: ")[2]
    storage.write(f"jobs/{key}/cells/digits.lenet5.json", b"{")
    (cell,) = export_job(storage, key).cells
    assert not cell.steps and "digits.lenet5.json is damaged" in cell.missing[0]
    assert "digits.lenet5.json is damaged" in text_of(report(storage)["report.html"])


def test_what_cannot_be_read_is_not_taken_for_damaged(finished, tmp_path):
    """A storage that does not answer ends the report: the next try may find everything."""
    shutil.copytree(finished[0].root, tmp_path / "out")
    storage = Storage(tmp_path / "out")
    key = find_job(storage)
    result = tmp_path / "out" / export_job(storage, key).cells[0].steps[0].folder / "result.json"
    result.unlink()
    result.mkdir()
    with pytest.raises(StorageError, match="could not read .*result.json"):
        export_job(storage, key)


def of_the_cell(export: JobExport, **changed) -> Evidence:
    """The evidence of a job of one cell, in which something is another."""
    return export.evidence.model_copy(update={"cells": [export.evidence.cells[0].model_copy(update=changed)]})


def html_of_the_box(page: bytes) -> str:
    """The text of what is said to be missing."""
    return text_of(page).partition("This job is not complete")[2][:2000]


def test_without_scores_of_any_repeat_the_numbers_are_shown_without_examples(finished):
    export = export_job(finished[0], finished[1].key)

    def damaged(folder):
        raise StorageError(f"{folder} is damaged")

    missing = []
    sections = map_sections(export, damaged, missing)
    assert len(sections) == 4 and not any(isinstance(block, Figure) and block.name.startswith("examples")
                                          for section in sections for block in section.blocks)
    assert [line.partition(": ")[0] for line in missing] == [
        f"{approach} repeat {repeat}" for approach in ("baseline", "impactx", "lambda0") for repeat in (0, 1)]


def test_damaged_scores_are_named(tmp_path):
    Storage(tmp_path).write("map_quality/k/map_scores.npz", b"PK no")
    with pytest.raises(StorageError, match="map_quality/k/map_scores.npz is damaged"):
        map_scores(Storage(tmp_path), "map_quality/k")
    assert map_scores(Storage(tmp_path), "map_quality/absent") is None


def test_names_that_look_like_formulas_are_drawn_as_they_are(finished):
    export = export_job(finished[0], finished[1].key)
    cell = export.cells[0]
    export = replace(export, cells=[replace(cell, class_names=["$5", "a_b$", *cell.class_names[2:]])])
    assert "report.html" in build_report(export, lambda folder: map_scores(finished[0], folder))


def test_of_several_cells_a_line_says_of_which_it_is(finished):
    export = export_job(finished[0], finished[1].key)
    export = replace(export, cells=[*export.cells, replace(export.cells[0], dataset="other")],
                     evidence=of_the_cell(export, missing=["impactx repeat 0: gone"]))
    text = html_of_the_box(build_report(export, lambda folder: None)["report.html"])
    assert "digits × lenet5: impactx repeat 0: gone" in text


def test_a_column_without_a_value_is_in_the_file_alone(finished):
    files = report(finished[0])
    page = text_of(files["report.html"])
    # The paper knows nothing of digits.
    assert "paper %" in files["table2.csv"].decode() and "paper %" not in page and "time per model" in page
