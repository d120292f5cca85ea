"""An attribution that a user wrote, in a file outside the package, is one like any other."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from impactx.configuration import ConfigurationError, configs_folder, load_settings
from impactx.explain.maps.store import MapStore, StoreSpec
from impactx.explain.weighted import explain_by_own_probabilities
from impactx.settings import ExperimentSettings
from impactx.settings.extensions import attribution
from impactx.settings_doc import settings_markdown
from impactx.storage import Storage

FILE = Path(__file__).resolve().parents[1] / "extensions" / "toy_attribution.py"
NAME = "input_times_gradient"


@pytest.fixture
def toy(monkeypatch):
    """The class, registered for one test."""
    attribution.names()  # the built-in ones are there before
    monkeypatch.setattr(attribution, "_classes", dict(attribution._classes))
    spec = importlib.util.spec_from_file_location("toy_attribution", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.InputTimesGradient


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 100, 5)).eval()


def pictures(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (count, 12, 12, 3), np.uint8), rng.integers(0, 5, count)


def test_it_is_found_by_its_name(toy):
    assert NAME in attribution.names() and attribution.get(NAME) is toy
    assert f"## attribution: {NAME}" in settings_markdown() and "`attribution.absolute`" in settings_markdown()


def test_settings_hold_it_and_come_back_from_json(toy):
    demo = load_settings("demo", [], configs_folder()).model_dump(mode="json")
    settings = ExperimentSettings.model_validate(demo | {
        "attribution": {"method": NAME, "explain": "probability"},
        "evaluation": {"attributions": [{"method": NAME, "absolute": True}]}})
    assert settings.attribution == toy(explain="probability") and settings.evaluation.attributions[0].absolute
    assert ExperimentSettings.model_validate_json(settings.model_dump_json()) == settings
    assert settings.attribution.described() == {"method": NAME, "explain": "probability", "absolute": False}


def test_the_command_line_chooses_it_without_a_file_in_configs(toy):
    chosen = load_settings("demo", [f"attribution={NAME}", "attribution.absolute=true"], configs_folder())
    assert chosen.attribution == toy(absolute=True)
    assert load_settings("demo", [f"attribution.method={NAME}"], configs_folder()).attribution == toy()


def test_an_unknown_name_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigurationError, match="no such attribution; .*there are grad_cam, gradient_shap"):
        load_settings("demo", ["evaluation.attributions=[{method: input_times_gradient}]"], configs_folder())


def test_a_wrong_setting_of_a_registered_one_is_named(toy):
    with pytest.raises(ConfigurationError, match=(
            r"evaluation.attributions.0.absolut = True: no such setting with method input_times_gradient; "
            r"did you mean 'absolute'\? allowed here: method, explain, absolute")):
        load_settings("demo", [f"evaluation.attributions=[{{method: {NAME}, absolut: true}}]"], configs_folder())


def test_it_fills_a_store_and_is_read_back(toy, tmp_path):
    images, labels = pictures(5)
    maker, model = attribution.parse({"method": NAME}), net()
    store = MapStore.create(Storage(tmp_path), "maps/a", StoreSpec(
        "a" * 32, 5, (3, 12, 12), 2, {"attribution": maker.described()}))
    for shard in range(store.spec.shards):
        rows = store.shard_indices(shard)
        store.write_shard(shard, labels[rows], maker.explain(model, images[rows], labels[rows], indices=rows))
    again = MapStore.open(Storage(tmp_path), "maps/a")
    assert again.verify() == [] and attribution.parse(again.spec.recipe["attribution"]) == maker
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).requires_grad_()
    model(x)[torch.arange(5), torch.from_numpy(labels)].sum().backward()
    np.testing.assert_allclose(again.unpack(tmp_path / "cache"), (x * x.grad).detach().numpy(), atol=1e-6)


def test_the_common_members_have_their_defaults(toy):
    maker = toy()
    assert (maker.title, maker.maskers, maker.additive, maker.requires) == (NAME, (), False, ())
    assert maker.weighted_evaluations((12, 12), 5) == 20
    maker.check_available()
    maker.check(3, (12, 12))
    assert explain_by_own_probabilities(maker, net(), pictures(2)[0]).maps.shape == (2, 3, 12, 12)
