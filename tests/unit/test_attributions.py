"""Attributions: what they refuse and how they say it, that they are deterministic, and that images do not mix."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
import torch
from torch import nn

from impactx.approaches.base import Candidate
from impactx.configuration import ConfigurationError, configs_folder, load_settings
from impactx.costs.dry_run import dry_run
from impactx.experiment.cell import Classifier, Configuration
from impactx.experiment.preparation import prepare
from impactx.explain.attribution import AttributionError, MissingPackage
from impactx.explain.maps.store import MapStore
from impactx.explain.precision import forward_precision, map_error
from impactx.explain.scores import completeness_gaps
from impactx.run.executor import Task
from impactx.run.local import LocalExecutor
from impactx.run.no_tracker import NoTracker
from impactx.run.tracker import RunIdentity
from impactx.settings import extensions

CHEAP = {
    "partition": {"max_evals": 40, "batch_size": 10, "masker": "blur(3,3)"},
    "shap_partition": {"max_evals": 20, "batch_size": 10, "masker": "0.5"},
    "integrated_gradients": {"steps": 3},
    "gradient_shap": {"samples": 3, "noise": 0.05},
    "occlusion": {"window": 4, "stride": 4},
    "grad_cam": {},
}
PACKAGE = {name: "shap" if name == "shap_partition" else "captum" for name in CHEAP if name != "partition"}


def attribution(method: str, **changes):
    return extensions.attribution.parse({"method": method} | CHEAP[method] | changes)


@pytest.fixture(params=CHEAP)
def method(request):
    pytest.importorskip(PACKAGE.get(request.param, "torch"))
    return request.param


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(),
                         nn.Linear(4 * 64, 5)).eval()


def pictures(count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (count, 12, 12, 3), np.uint8), rng.integers(0, 5, count)


class Bad(nn.Module):
    """A model that does what it should not for bright images."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.net, self.what = net(), what

    def forward(self, x):  # noqa: ANN001, ANN201
        scores = self.net(x)
        if self.what == "nan":
            return torch.where(x.mean((1, 2, 3))[:, None] > 0.9, torch.nan, scores)
        return {"flat": scores[:, 0], "rows": scores[:1].repeat(3, 1), "integers": scores.long(),
                "tuple": (scores, x)}[self.what]


def test_every_method_has_a_config_and_a_class():
    assert set(extensions.attribution.names()) == set(CHEAP)


def test_maps_have_the_right_form(method):
    images, labels = pictures()
    found = attribution(method).explain(net(), images, labels)
    assert found.maps.shape == (4, 3, 12, 12) and found.maps.dtype == np.float32 and found.maps.flags["C_CONTIGUOUS"]
    assert found.scores.dtype == found.base_values.dtype == np.float64 and np.abs(found.maps).max() > 1e-4
    with torch.no_grad():
        scores = net()(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    np.testing.assert_allclose(found.scores, scores.gather(1, torch.from_numpy(labels)[:, None])[:, 0], atol=1e-5)
    if attribution(method).additive:
        np.testing.assert_allclose(found.maps.sum((1, 2, 3)), found.scores - found.base_values, atol=1e-5)


def test_maps_depend_on_image_and_index_alone(method):
    """Not on the images beside it, on who was explained before, on the random state, or on the memory."""
    images, labels = pictures()
    model, indices = net(), np.array([7, 100, 3, 8])
    whole = attribution(method).explain(model, images, labels, indices=indices)
    np.random.seed(5)
    torch.manual_seed(5)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    again = attribution(method).explain(model, images, labels, indices=indices)
    np.testing.assert_array_equal(whole.maps, again.maps)
    np.testing.assert_array_equal(before[0], np.random.get_state()[1])
    assert torch.equal(before[1], torch.get_rng_state())
    order = [2, 0]
    part = attribution(method).explain(model, images[order], labels[order], indices=indices[order], memory_bytes=2**20)
    np.testing.assert_allclose(part.maps, whole.maps[order], atol=1e-5 * np.abs(whole.maps).max())
    assert model[0].weight.grad is None


class Narrow(nn.Module):
    """A model on a device with room for three images at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.refused = net(), 0

    def forward(self, x):  # noqa: ANN001, ANN201
        if len(x) > 3:
            self.refused += 1
            raise torch.OutOfMemoryError("no room")
        return self.net(x)


def low_contrast() -> tuple[np.ndarray, np.ndarray]:
    """Images whose scores hardly differ from those of their blurred versions; the first is all of one grey."""
    images = np.random.default_rng(0).integers(128, 130, (12, 12, 12, 3), np.uint8)
    images[0] = 128
    return images, np.arange(12) % 5


@pytest.mark.parametrize("explain", ["logit", "probability"])
def test_shaps_maps_of_low_contrast_add_up(explain):
    """The batch in which f(image) is computed moves it by more than these maps may miss."""
    pytest.importorskip("shap")
    found = attribution("shap_partition", explain=explain, masker="blur(3,3)").explain(net(), *low_contrast())
    assert not found.maps[0].any() and found.maps[1:].any((1, 2, 3)).all()
    assert completeness_gaps(found.maps, found.scores, found.base_values).max() < 1e-6


def test_a_wrong_map_of_low_contrast_is_refused(monkeypatch):
    shap = pytest.importorskip("shap")

    class Wrong(shap.PartitionExplainer):
        def __call__(self, *args, **settings):  # noqa: ANN002, ANN003, ANN204
            made = super().__call__(*args, **settings)
            made.values = made.values * 1.001
            return made

    monkeypatch.setattr(shap, "PartitionExplainer", Wrong)
    with pytest.raises(AttributionError, match="map of image 1, output 0, sums to"):
        attribution("shap_partition", masker="blur(3,3)").explain(net(), *low_contrast())


def test_out_of_memory_leads_to_smaller_batches(method):
    images, labels = pictures(8)
    narrow, indices = Narrow().eval(), np.arange(8)
    found = attribution(method).explain(narrow, images, labels, indices=indices)
    whole = attribution(method).explain(net(), images, labels, indices=indices)
    assert narrow.refused > 0
    np.testing.assert_allclose(found.maps, whole.maps, atol=1e-5 * np.abs(whole.maps).max())


def test_a_lower_precision_is_a_choice_whose_error_is_measured():
    images, labels = pictures(6)
    exact = attribution("partition").explain(net(), images, labels)
    assert exact.precision_error is None
    found = attribution("partition", precision="bfloat16").explain(net(), images, labels)
    apart = map_error(found.maps[:2], exact.maps[:2])
    assert found.precision_error == pytest.approx(apart, rel=0.01) and 1e-4 < apart < 0.5
    twice = exact.maps * np.array([1, 2, 1, 1, 1, 1], np.float32)[:, None, None, None]
    assert map_error(twice, exact.maps) == pytest.approx(1)


def test_the_precision_is_the_blocks_alone():
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    with forward_precision("float32"):
        assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(ZeroDivisionError), forward_precision("tf32"):
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
        raise ZeroDivisionError
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == before


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_in_any_precision_a_model_can_be_exported_and_onednn_stays_on(precision):
    example = torch.zeros(2, 3, 12, 12)
    with forward_precision(precision):
        assert torch.equal(torch.export.export(net(), (example,)).module()(example), net()(example))
    assert torch.backends.mkldnn.enabled


def test_every_attribution_is_made_in_exact_float32(method):
    seen = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x):  # noqa: ANN001, ANN202
            seen.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
            return self.net(x)

    # A function: a module would be traced, and its forward not run again.
    watching = Watching().eval()
    attribution(method).explain(watching if method == "grad_cam" else lambda x: watching(x), *pictures(2))
    assert set(seen) == {("ieee", "ieee")}


def test_gradient_shap_draws_by_seed_and_index():
    pytest.importorskip("captum")
    images, labels = pictures(1)
    maps = [attribution("gradient_shap", seed=seed).explain(net(), images, labels, indices=np.array([index])).maps
            for seed, index in ((0, 0), (0, 1), (1, 0))]
    assert not np.allclose(maps[0], maps[1]) and not np.allclose(maps[0], maps[2])


def test_a_score_that_is_not_finite_names_the_image(method):
    images, labels = pictures()
    images[2] = 255
    masked = "masker" in extensions.attribution.parse({"method": method}).model_dump()
    maker = attribution(method, **({"masker": "0.2"} if masked else {}))
    with pytest.raises(AttributionError, match=r"image 12\b") as caught:
        maker.explain(Bad("nan").eval(), images, labels, indices=np.arange(10, 14))
    assert "nan" in str(caught.value).lower() or "finite" in str(caught.value)


@pytest.mark.parametrize("what, said", [("flat", r"\(\d+,\)"), ("rows", "3, 5"), ("integers", "int64"),
                                        ("tuple", "tuple")])
def test_scores_of_another_form_are_refused(method, what, said):
    with pytest.raises(AttributionError, match=said):
        attribution(method).explain(Bad(what).eval(), *pictures())


def test_a_label_without_a_score_is_named(method):
    images, labels = pictures()
    labels[1] = 5
    with pytest.raises(AttributionError, match=r"image 1 .*5.*0 to 4"):
        attribution(method).explain(net(), images, labels)


def test_a_model_in_training_mode_is_refused(method):
    with pytest.raises((AttributionError, ValueError), match="training mode"):
        attribution(method).explain(net().train(), *pictures())


@pytest.mark.parametrize("layer, said", [("7", "does not exist"), ("1", "is no convolution"), ("unused", "not called")])
def test_a_layer_that_cannot_be_used_is_refused_with_those_that_can(layer, said):
    pytest.importorskip("captum")
    model = net()
    model.forward = lambda x: nn.Sequential.forward(model[:6], x)  # the last layer is not called
    model.add_module("unused", nn.Conv2d(3, 3, 1))
    with pytest.raises(AttributionError, match=f"{said}.*: 0, 2$"):
        attribution("grad_cam", layer=layer).explain(model, *pictures())
    np.testing.assert_array_equal(attribution("grad_cam").explain(model, *pictures()).maps,
                                  attribution("grad_cam", layer="2").explain(model, *pictures()).maps)


def test_grad_cam_without_convolutions_or_module_is_refused():
    pytest.importorskip("captum")
    with pytest.raises(AttributionError, match="calls none"):
        attribution("grad_cam").explain(nn.Sequential(nn.Flatten(), nn.Linear(432, 5)).eval(), *pictures())
    model = net()
    with pytest.raises(AttributionError, match="torch module"):
        attribution("grad_cam").explain(lambda x: model(x), *pictures())


def test_a_map_that_misses_the_tolerance_is_named():
    pytest.importorskip("captum")
    with pytest.raises(AttributionError, match=r"image 0 sums to .*above attribution.tolerance 1e-12 \(4 of 4 maps\)"):
        attribution("integrated_gradients", tolerance=1e-12, steps=1).explain(net(), *pictures())


def test_a_window_larger_than_the_image_is_refused():
    pytest.importorskip("captum")
    with pytest.raises(AttributionError, match="window = 13 is larger than the images"):
        attribution("occlusion", window=13).explain(net(), *pictures())


@pytest.mark.parametrize("name, package", PACKAGE.items())
def test_a_missing_package_is_named(name, package, monkeypatch):
    for module in {package, *(m for m in sys.modules if m.startswith(f"{package}."))}:
        monkeypatch.setitem(sys.modules, module, None)  # Python's own way to say that it is not there
    with pytest.raises(MissingPackage, match=rf"{name} needs the package {package}.*impactx\[explain\]"):
        attribution(name).check_available()


# --- configuration, cost, stage 2 ------------------------------------------------------------------------------------


def wrong(*overrides: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_settings("demo", overrides)
    return str(caught.value)


def test_configuration_errors_stay_good_with_several_methods():
    assert "did you mean 'occlusion'?" in wrong("attribution=oclusion")
    for choice in ("", "[]", "[occlusion,partition]"):
        assert f"attribution = {choice!r}: give one of" in wrong(f"attribution={choice}")
    assert "did you mean 'occlusion'?" in wrong("attribution.method=oclusion")
    text = wrong("attribution=occlusion", "attribution.max_evals=7", "attribution.stride=0")
    assert "2 errors" in text and "attribution.max_evals = 7: no such setting with method occlusion" in text
    assert "allowed here: method, explain, masker, window, stride" in text and "occlusion.stride" not in text
    assert "at most window" not in text and "stride 9 is above window 8" in wrong("attribution=occlusion",
                                                                                   "attribution.stride=9")


def test_a_choice_leaves_nothing_of_the_presets_own_attribution(tmp_path):
    folder = tmp_path / "configs"
    shutil.copytree(configs_folder(), folder)
    (folder / "mine.yaml").write_text("defaults: [demo, _self_]\nattribution: {max_evals: 77, masker: '0.1'}\n")
    assert load_settings("mine", [], folder).attribution.max_evals == 77
    assert load_settings("mine", ["attribution=partition"], folder).attribution.max_evals == 77
    chosen = load_settings("mine", ["attribution=occlusion", "attribution.window=5"], folder).attribution
    assert (chosen.method, chosen.masker, chosen.window) == ("occlusion", "0.5", 5)
    assert load_settings("mine", ["attribution.method=occlusion"], folder).attribution.masker == "0.5"
    assert load_settings("mine", ["attribution.masker=[0.1,0.2,0.3]"], folder).attribution.masker == "0.1,0.2,0.3"


@pytest.mark.parametrize("settings, cost", [
    ({"method": "partition", "max_evals": 99}, 99), ({"method": "integrated_gradients", "steps": 10}, 32),
    ({"method": "gradient_shap", "samples": 10, "maskers": ["0", "1", "0.5"]}, 34), ({"method": "grad_cam"}, 4),
    ({"method": "occlusion", "window": 5, "stride": 3}, 10 * 13 + 2)])
def test_the_cost_of_a_map(settings, cost):
    assert extensions.attribution.parse(settings).evaluations((32, 40)) == cost


TINY = ("datasets.digits.subset=60", "grid.learning_rate=[0.002]", "grid.batch_size=[16]", "repeats=1",
        "grid.validation_fraction=[0.2]", "training.epochs=1", "maps.shard_size=25", "tracking.enabled=false",
        "approaches.impactx.lambdas=[0.8]")


@pytest.mark.parametrize("name, more", [("occlusion", ["attribution.window=16", "attribution.stride=16"]),
                                        ("gradient_shap", ["attribution.samples=2"]), ("grad_cam", []),
                                        ("shap_partition", ["attribution.max_evals=20"])])
def test_stage_2_runs_on_any_of_them(name, more, tmp_path):
    pytest.importorskip("captum")
    settings = load_settings("demo", [*TINY, f"output={tmp_path}/out", f"data_root={tmp_path}/data",
                                      f"attribution={name}", *more])
    prepared = prepare(settings)
    cell, executor = prepared.cells[0], LocalExecutor(prepared.place, NoTracker())
    per_map = settings.attribution.evaluations((32, 32))
    assert f"60 maps, {60 * per_map:,} evaluations" in dry_run(settings)
    step = cell.classifier(Configuration(0.002, 16, 0.2), 0)
    a = Classifier(step, step.ref(executor.train(task(step), lambda *_: None)))
    maps = cell.maps(a, settings.attribution)
    made = executor.explain(task(maps), lambda *_: None)
    assert made.images == 60 and (made.map_gap_mean is not None) == (name in ("gradient_shap", "shap_partition"))
    store = MapStore.open(prepared.place.artifacts.storage, maps.folder)
    assert store.spec.recipe["attribution"]["method"] == name and store.verify() == []
    result = executor.train(task(cell.approach_model("impactx", Candidate(0.8), a)), lambda *_: None)
    assert not result.diverged and np.isfinite(result.history[0]["train_loss"])


def task(step) -> Task:
    """A step as executors get it."""
    return Task(step, RunIdentity(f"job/{step.key}", step.name, "job"))
