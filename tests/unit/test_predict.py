"""jobs/predict.py on real image files, with real models: which model, which pixels, what is said, what is drawn."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from impactx.api import TrainedModel, load_model
from impactx.approaches.abn import Abn
from impactx.approaches.checkpoint import load_checkpoint
from impactx.approaches.impactx import Impactx
from impactx.approaches.wae import Wae
from impactx.cli.main import main
from impactx.datasets import DataError
from impactx.explain.maps.sheet import draw_sheet
from impactx.explain.methods.partition import Partition
from impactx.models import build_classifier
from impactx.prediction import ModelChoice, PredictionError, read_images
from impactx.serving import _load_pyfunc
from impactx.settings import ModelSettings, extensions
from impactx.tracking.models import DISTRIBUTIONS, REQUIREMENTS, requirements, save, signature

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("cat", "dog", "ship", "plane")
LENET = ModelSettings(name="lenet5", architecture="lenet5")


def trained(approach: str, seed: int = 0) -> TrainedModel:
    a = build_classifier(LENET, len(NAMES), (32, 32), seed=seed)
    if approach == "baseline":
        return TrainedModel(a.eval(), LENET, NAMES)
    if approach == "wae":
        wae = Wae(attribution=Partition(max_evals=12, fixed_context=1))
        return TrainedModel(wae.build(LENET, a, seed=seed).eval(), LENET, NAMES, wae)
    if approach == "abn":
        return TrainedModel(Abn().build(LENET, len(NAMES), (32, 32), seed=seed).eval(), LENET, NAMES,
                            Abn())
    settings = Impactx()
    return TrainedModel(settings.build(LENET, a, seed=seed, channels=3).eval(), LENET, NAMES, settings, 0.5)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The output folder of a job with two cells, as a job leaves it, and moved since it was written."""
    root = tmp_path_factory.mktemp("moved")
    rows = []
    for seed, (model, approach, repeat) in enumerate([
            ("lenet5", "baseline", 0), ("lenet5", "impactx", 0), ("lenet5", "impactx", 1), ("other", "baseline", 0)]):
        (root / f"models/k{seed}").mkdir(parents=True)
        trained(approach, seed).save(root / f"models/k{seed}/checkpoint.pt")
        rows.append({"dataset": "pets", "model": model, "approach": approach, "repeat": repeat,
                     "checkpoint": f"/where/it/was/models/k{seed}"})
    (root / "jobs/one-1").mkdir(parents=True)
    (root / "jobs/one-1/results.json").write_text(json.dumps(rows))
    return root


@pytest.fixture
def pictures(tmp_path):
    """A 32x32 RGB image, a larger one with transparency, and a file that is none."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "plain.png")
    Image.fromarray(rng.integers(0, 256, (40, 80, 4), np.uint8), "RGBA").save(tmp_path / "wide.png")
    (tmp_path / "note.txt").write_text("no image")
    return tmp_path


@pytest.fixture
def predict(monkeypatch, pictures):
    """The job as a program; it runs in the folder of the pictures."""
    spec = importlib.util.spec_from_file_location("predict_job", ROOT / "jobs/predict.py")
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    monkeypatch.chdir(pictures)
    return lambda *arguments: main(lambda: job.run([str(a) for a in arguments]))


def same(model: TrainedModel, path: Path) -> bool:
    pairs = zip(model.model.state_dict().values(), load_model(path).model.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("address", "options", "key"), [
    ("models/k2/checkpoint.pt", {}, "k2"), ("models/k2", {}, "k2"),
    ("jobs/one-1", {"cell": "pets/lenet5"}, "k1"), ("", {"cell": "pets/lenet5", "repeat": 1}, "k2"),
    ("", {"cell": "pets/lenet5", "approach": "baseline"}, "k0"), ("", {"cell": "pets/other"}, "k3")])
def test_the_model_that_is_meant(output, address, options, key):
    assert same(ModelChoice(str(output / address), **options).load(), output / f"models/{key}/checkpoint.pt")


@pytest.mark.parametrize(("address", "options", "says"), [
    ("jobs/one-1", {}, "2 cells: give --cell, one of pets/lenet5, pets/other"),
    ("jobs/one-1", {"cell": "pets/lenet5", "approach": "abn"}, "--approach abn.*baseline, impactx"),
    ("jobs/one-1", {"cell": "pets/lenet5", "repeat": 7}, r"--repeat 7.*\[0, 1\]"),
    ("models", {}, "no checkpoint file"), ("jobs/one-1/results.json", {}, "is no checkpoint")])
def test_no_such_model(output, address, options, says):
    with pytest.raises(PredictionError, match=says):
        ModelChoice(str(output / address), **options).load()


def test_several_jobs_are_named(output, tmp_path):
    for job in ("a", "b"):
        (tmp_path / "jobs" / job).mkdir(parents=True)
        (tmp_path / "jobs" / job / "results.json").write_text("[]")
    with pytest.raises(PredictionError, match=r"2 jobs: give one of\n.*jobs/a\n.*jobs/b"):
        ModelChoice(str(tmp_path)).load()


def test_images_are_converted_as_a_data_set_does_and_it_is_said(pictures, caplog):
    caplog.set_level(logging.INFO, "impactx")
    images = read_images([pictures / "plain.png", pictures / "wide.png"], (32, 32))
    np.testing.assert_array_equal(images[0], np.asarray(Image.open(pictures / "plain.png")))
    rgba = Image.open(pictures / "wide.png")
    black = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    np.testing.assert_array_equal(images[1], np.asarray(black.resize((32, 32), Image.Resampling.BILINEAR)))
    assert "plain.png" not in caplog.text
    assert "converted from RGBA to RGB; resized from 80x40 to 32x32 pixels, its proportions are changed" in caplog.text


def test_a_photograph_is_turned_as_the_camera_was_held(pictures, caplog):
    caplog.set_level(logging.INFO, "impactx")
    pixels, exif = np.asarray(Image.open(pictures / "plain.png")), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels)).save(pictures / "photo.png", exif=exif)
    np.testing.assert_array_equal(read_images([pictures / "photo.png"], (32, 32))[0], pixels)
    assert "photo.png: turned as its EXIF orientation says" in caplog.text


def test_every_bad_image_is_named(pictures):
    with pytest.raises(DataError, match=r"(?s)note.txt cannot be read as an image.*absent.png: no such file"):
        read_images([pictures / "plain.png", pictures / "note.txt", pictures / "absent.png"], (32, 32))


def test_classes_scores_and_pictures(predict, output, pictures, capsys):
    predict("plain.png", "wide.png", "--model", output / "models/k1", "--out", "seen")
    lines = capsys.readouterr().out.splitlines()
    found = load_model(output / "models/k1/checkpoint.pt").predict(
        read_images([pictures / "plain.png", pictures / "wide.png"], (32, 32)))
    for line, name, scores in zip(lines, ("plain", "wide"), found.probabilities, strict=True):
        ranked = sorted(zip(scores, NAMES, strict=True), reverse=True)[:3]
        assert line == f"{name}.png: {', '.join(f'{n} {s:.3f}' for s, n in ranked)}  -> seen/{name}-map.png"
        with Image.open(pictures / f"seen/{name}-map.png") as drawn:
            assert drawn.width > drawn.height > 100


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved; saving them also lays their texts out."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    return saved


@pytest.mark.parametrize("approach, colours, label", [
    ("impactx", "RdBu_r", "against the class  <  value, summed over channels  <  for the class"),
    ("abn", "viridis", "attention, without a sign: it speaks neither for the class nor against it")])
def test_a_map_is_drawn_as_what_it_is(predict, figures, tmp_path, approach, colours, label):
    """Evidence has a sign; ABN's attention, in (0, 1), has none."""
    trained(approach).save(tmp_path / "net.pt")
    predict("plain.png", "--model", tmp_path / "net.pt")
    *panels, bar = figures[0].axes
    assert bar.get_xlabel() == label
    for panel in panels[1:3]:
        drawn = panel.images[-1]
        assert drawn.get_cmap().name == colours
        low, high = drawn.get_clim()
        assert (low, high) == (0, 1) if approach == "abn" else low == -high < 0


def test_a_dollar_in_a_name_begins_no_formula(figures, tmp_path):
    image = np.zeros((1, 32, 32, 3), np.uint8)
    draw_sheet(tmp_path / "sheet.png", image, np.ones((1, 3, 32, 32), np.float32), ["$y^{$ US$5"], title="$x^{$.png")
    assert figures[0].axes[0].get_title() == "$y^{$ US$5" and figures[0].get_suptitle() == "$x^{$.png"


def test_the_file_and_the_classes_may_have_a_dollar(predict, tmp_path, pictures, capsys):
    (pictures / "plain.png").rename(pictures / "$x^{$.png")
    model = trained("impactx")
    TrainedModel(model.model, LENET, ("$a^{$",) * len(NAMES), model.approach).save(tmp_path / "net.pt")
    predict("$x^{$.png", "--model", tmp_path / "net.pt")
    assert "-> predictions/$x^{$-map.png" in capsys.readouterr().out
    assert (pictures / "predictions/$x^{$-map.png").exists()


def test_a_model_without_maps_gives_classes_and_says_so(predict, output, pictures, capsys):
    predict("plain.png", "--model", output / "models/k0")
    out = capsys.readouterr().out
    assert out.startswith("plain.png: ") and "this model gives classes only" in out
    assert not (pictures / "predictions").exists()


@pytest.mark.parametrize("how", ["kept", "settings", "job"])
def test_a_decoder_that_learned_nothing_explains_nothing(predict, tmp_path, pictures, capsys, how):
    """lambda = 0 by the checkpoint, by an older one's settings, by the job of an older one that searched lambda."""
    lambdas = {"kept": [0.2, 0.8], "settings": [0.0], "job": [0.0, 0.8]}[how]
    model = replace(trained("impactx"), approach=Impactx(lambdas=lambdas))
    (tmp_path / "models/k").mkdir(parents=True)
    replace(model, weight=0.0 if how == "kept" else None).save(tmp_path / "models/k/checkpoint.pt")
    (tmp_path / "jobs/one-1").mkdir(parents=True)
    (tmp_path / "jobs/one-1/results.json").write_text(json.dumps([
        {"dataset": "pets", "model": "lenet5", "approach": "lambda0", "repeat": 0, "weight": 0.0,
         "checkpoint": "/where/models/k"}]))
    predict("plain.png", "--model", tmp_path / "jobs/one-1")
    out = capsys.readouterr().out
    assert "no picture: this model was trained with lambda = 0" in out and out.startswith("plain.png: ")
    assert not (pictures / "predictions").exists()
    images, untaught = read_images([pictures / "plain.png"], (32, 32)), replace(model, weight=0.0)
    assert model.predict(images).maps.shape == (1, 3, 32, 32) and untaught.predict(images).maps is None
    np.testing.assert_array_equal(model.predict(images).probabilities, untaught.predict(images).probabilities)


@pytest.mark.parametrize("weight, served", [(0.8, {"label", "scores", "map"}), (0.0, {"label", "scores"})])
def test_a_served_model_has_the_outputs_of_its_signature(tmp_path, weight, served):
    replace(trained("impactx"), weight=weight).save(tmp_path / "net.pt")
    found = _load_pyfunc(str(tmp_path / "net.pt")).predict(np.zeros((2, 32, 32, 3), np.uint8))
    assert set(found) == served == set(signature(load_checkpoint(tmp_path / "net.pt")).outputs.input_names())


@pytest.mark.parametrize("sent, warned", [(0.5, True), (1.0, True), (2, False), (128.0, False)])
def test_fractions_in_a_request_are_warned_of_and_documented(tmp_path, caplog, sent, warned):
    """MLflow makes uint8 of them before the model gets them: whether they were fractions cannot be told there."""
    from mlflow.models import Model
    from mlflow.pyfunc.scoring_server import infer_and_parse_data

    trained("impactx").save(tmp_path / "net.pt")
    save(tmp_path / "served", (tmp_path / "net.pt").read_bytes())
    about = Model.load(tmp_path / "served")
    request = {"inputs": np.full((2, 32, 32, 3), sent).tolist()}
    images = infer_and_parse_data(request, about.get_input_schema())
    assert images.dtype == np.uint8 and (images == int(sent)).all()
    with caplog.at_level(logging.WARNING, "impactx"):
        _load_pyfunc(str(tmp_path / "net.pt")).predict(images)
    assert ("no pixel of these 2 images has a value above 1" in caplog.text) == warned
    assert "no fractions" in about.metadata["images"] and about.metadata["map_kind"] == "evidence"


@pytest.mark.parametrize("method, needed", [
    ("integrated_gradients", {"captum"}), ("gradient_shap", {"captum"}), ("occlusion", {"captum"}),
    ("grad_cam", {"captum"}), ("partition", set()), ("shap_partition", {"shap", "opencv-python-headless"})])
def test_a_machine_that_serves_gets_what_the_models_attribution_needs(tmp_path, method, needed):
    """WAE makes a map of each image that it is given; what IMPACTX was taught by, it needs no longer."""
    def found(model, settings):
        TrainedModel(model.eval(), LENET, NAMES, settings).save(tmp_path / "net.pt")
        return dict(line.partition("==")[::2] for line in requirements(load_checkpoint(tmp_path / "net.pt")))

    a, attribution = build_classifier(LENET, len(NAMES), (32, 32), seed=0), extensions.attribution.parse({"method": method})
    wae, own = Wae(attribution=attribution), Impactx(attribution=attribution)
    extra = found(wae.build(LENET, a, seed=0), wae)
    assert set(extra) == set(REQUIREMENTS) | needed
    assert all(extra[name] == importlib.metadata.version(name) for name in REQUIREMENTS)
    assert set(found(own.build(LENET, a, seed=0), own)) == set(REQUIREMENTS)


def test_what_attributions_need_is_in_the_extra():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["explain"]
    needed = {package for name in extensions.attribution.names() for package in extensions.attribution.get(name).requires}
    assert needed == {"captum", "shap", "cv2"}
    assert {DISTRIBUTIONS.get(name, name) for name in needed} <= {line.partition(">=")[0] for line in extra}


@pytest.mark.parametrize("approach", ["baseline", "impactx", "abn", "wae"])
def test_of_no_image_there_is_no_prediction(tmp_path, approach):
    """The shapes are those that images have, through serving as well."""
    trained(approach).save(tmp_path / "net.pt")
    served = _load_pyfunc(str(tmp_path / "net.pt"))
    some, none = (served.predict(np.zeros((count, 32, 32, 3), np.uint8)) for count in (2, 0))
    assert some.keys() == none.keys() and set(none) >= {"label", "scores"}
    for name, found in none.items():
        assert found.shape == (0, *some[name].shape[1:]) and found.dtype == some[name].dtype


@pytest.mark.parametrize("images", [
    np.zeros((0, 64, 64, 3), np.uint8), np.zeros((2, 64, 64, 3), np.uint8), np.zeros((2, 32, 32, 1), np.uint8),
    np.zeros((32, 32, 3), np.uint8), np.zeros((2, 32, 32, 3))], ids=lambda a: f"{a.dtype} {a.shape}")
@pytest.mark.parametrize("approach", ["baseline", "wae"])
def test_other_arrays_than_images_are_refused(approach, images):
    got = re.escape(f"got {images.dtype} {images.shape}")
    with pytest.raises(ValueError, match=rf"must be uint8 \(N, 32, 32, 3\).*{got}"):
        trained(approach).predict(images)


def test_a_mistake_is_one_message(predict, output, capsys):
    with pytest.raises(SystemExit) as end:
        predict("absent.png", "--model", output / "models/k0")
    assert end.value.code == 2
    assert "absent.png: no such file" in capsys.readouterr().err
