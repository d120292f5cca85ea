"""From presets and overrides to settings: what comes out, and one message for everything that is wrong."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from impactx.approaches.impactx import Impactx
from impactx.configuration import ConfigurationError, configs_folder, groups, load_settings, presets
from impactx.explain.methods.partition import Partition
from impactx.settings import ExperimentSettings, GridSettings
from impactx.settings_doc import settings_markdown

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


def failure(*overrides: str, preset: str = "demo", folder: Path = CONFIGS) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(preset, overrides, folder)
    return str(caught.value)


def test_the_shipped_configs_are_found():
    assert configs_folder() == CONFIGS and configs_folder(ROOT / "jobs" / "full_grid.py") == CONFIGS
    assert {"full_grid", "demo", "cifar10-lenet5"} <= set(presets(CONFIGS))
    assert set(groups(CONFIGS)) == {"dataset", "model", "attribution", "approach"}


@pytest.mark.parametrize("preset", presets(CONFIGS))
def test_every_preset_loads(preset):
    assert isinstance(load_settings(preset, folder=CONFIGS), ExperimentSettings)


@pytest.mark.parametrize("group, choice", [(g, c) for g, cs in groups(CONFIGS).items() for c in cs])
def test_every_choice_of_every_group_loads(group, choice):
    found = load_settings("full_grid", [f"{group}={choice}"], CONFIGS)
    held = {"dataset": found.datasets, "model": found.models, "approach": found.approaches}.get(group)
    assert found.attribution.method == choice if held is None else list(held) == [choice]


def test_full_grid_is_table_1_and_the_nine_cells():
    s = load_settings("full_grid", folder=CONFIGS)
    assert list(s.datasets) == ["cifar10", "cifar100", "stl10"]
    assert list(s.models) == ["lenet5", "mobilenet", "efficientnet_b2"]
    assert s.grid.learning_rate == [
        0.0001, 0.0006, 0.0011, 0.0016, 0.0021, 0.0026, 0.0031, 0.0036, 0.0041, 0.0046, 0.0051, 0.0056, 0.0061,
        0.0066, 0.0071, 0.0076, 0.0081, 0.0086, 0.0091, 0.0096]
    assert s.grid.batch_size == [16, 32, 64] and s.grid.validation_fraction == [0.05, 0.1, 0.2]
    assert s.approaches["impactx"].lambdas == [0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4]
    assert s.approaches["impactx"].latent == 512 and s.approaches["impactx"].m == "logits"
    assert s.approaches["lambda0"].lambdas == [0.0]
    assert s.attribution == Partition() and s.attribution.max_evals == 2000
    weights = {name: (m.architecture, m.weights) for name, m in s.models.items()}
    assert weights == {"lenet5": ("lenet5", "random"), "mobilenet": ("mobilenetv1_100", "hub"),
                       "efficientnet_b2": ("tf_efficientnet_b2.ns_jft_in1k", "hub")}


def test_defaults_of_the_classes_are_table_1_as_well():
    table = load_settings("full_grid", folder=CONFIGS)
    assert GridSettings() == table.grid and Impactx() == table.approaches["impactx"]


def test_all_errors_come_in_one_message_with_setting_value_and_what_is_allowed():
    text = failure("training.epochz=3", "grid.batch_size=[0,16]", "training.optimizer=adan", "repeats=many",
                   "datasets.digits.augmentation.shift=-1", "modell=lenet5", "dataset=[digits,cifar99]", "nonsense",
                   "grid.learning_rate=[0.1, 0.1]", "approaches.baseline={kind: impactx}")
    assert text.startswith("10 errors in the configuration (preset demo)")
    for parts in (["training.epochz = 3", "no such setting", "did you mean 'epochs'?", "allowed here: epochs,"],
                  ["grid.batch_size.0 = 0", "greater than or equal to 1"],
                  ["training.optimizer = 'adan'", "'adam', 'adamw' or 'sgd'"],
                  ["repeats = 'many'", "valid integer"],
                  ["datasets.digits.augmentation.shift = -1", "greater than or equal to 0"],
                  ["modell = 'lenet5'", "no such setting", "did you mean 'models'?"],
                  ["dataset = 'cifar99'", "did you mean 'cifar10",
                   "there are cifar10, cifar100, digits, my_images, stl10"],
                  ["'nonsense': write it as setting=value"],
                  ["grid.learning_rate = [0.1, 0.1]", "holds a value twice"],
                  ["approaches", "'baseline' is A itself"]):
        assert any(all(p in line for p in parts) for line in text.splitlines()), (parts, text)


def test_maskers_and_weights_files_are_in_that_message_too():
    text = failure("attribution.masker=blurr(3)", "training.epochs=0", "models.lenet5.weights=/nope.pth",
                   "evaluation.attributions=[{method: gradient_shap, maskers: ['0', '2']}]",
                   "approaches.impactx.attribution={method: occlusion, masker: 'blur(0,3)'}")
    assert text.startswith("5 errors in the configuration (preset demo)")
    for parts in (["  - attribution.masker = 'blurr(3)'", "'blur(kw,kh)' with whole numbers"],
                  ["training.epochs = 0", "greater than or equal to 1"],
                  ["models.lenet5.weights = '/nope.pth'", "no such file", "'hub' or 'random'"],
                  ["evaluation.attributions.0.maskers.1 = '2'", "outside [0, 1]"],
                  ["approaches.impactx.attribution.masker = 'blur(0,3)'", "a kernel side of 0"]):
        assert any(all(p in line for p in parts) for line in text.splitlines()), (parts, text)
    addresses = load_settings("demo", ["models.lenet5.weights=s3://bucket/w.pth"], CONFIGS)  # not asked here
    assert addresses.models["lenet5"].weights == "s3://bucket/w.pth"


def test_metrics_of_maps_are_named_or_set():
    chosen = load_settings("demo", ["evaluation.metrics=[{metric: morf, region: 8}, fidelity]"], CONFIGS).evaluation
    assert [one.model_dump() for one in chosen.metrics] == [{"metric": "morf", "region": 8},
                                                            {"metric": "fidelity", "top_share": 0.1}]
    for wrong, parts in (
            ("metrics=[{metric: morf, regoin: 3}]", ["evaluation.metrics.0.regoin = 3: no such setting with metric morf",
                                                     "did you mean 'region'?"]),
            ("metrics=[morff]", ["evaluation.metrics.0", "did you mean 'morf'? there are fidelity, morf"]),
            ("metrics=[morf, morf]", ["evaluation.metrics", "holds a value twice"]),
            ("metrics=[]", ["evaluation.metrics = []", "at least 1 item"]),
            ("metrics=[{metric: morf, region: 0}]", ["evaluation.metrics.0.region = 0", "greater than or equal to 1"]),
            ("region=8", ["evaluation.metrics=[{metric: morf, region: 8}, fidelity]"])):
        text = failure(f"evaluation.{wrong}")
        assert text.startswith("1 error") and all(part in text for part in parts), text


@pytest.mark.parametrize("masker", ["blur(3,5)", "0.5", "constant(0.1, 0.2, 0.3)"])
def test_a_masker_is_kept_as_it_is_written(masker):
    assert Partition(masker=masker).described()["masker"] == masker


def test_wrong_preset_is_named_with_what_there_is():
    text = failure(preset="demmo")
    assert "'demmo'" in text and "did you mean 'demo'?" in text and "full_grid" in text


@pytest.mark.parametrize("override, said", [
    ("training.epochs.x=3", "'epochs' holds a value, not settings"),
    ("grid={oops", "not readable as YAML"),
    ("grid.learning_rate={start: 0, stop: 1}", "exactly the numbers start, stop and step"),
    ("grid.learning_rate={start: 0.1, stop: 1, step: 0}", "step of a range must be above 0"),
    ("grid.learning_rate={start: 0.1, stop: 1, step: 1e-9}", "at most 10000"),
    ("grid.learning_rate={start: 1, stop: 0.1, step: 0.1}", "at least 1 item"),
    ("grid.learning_rate=[.nan]", "finite number"),
    ("grid.validation_fraction=[1.0]", "less than 1"),
    ("grid.batch_size=[1.5]", "valid integer"),
    ("approaches.impactx.lambdas=[]", "at least 1 item"),
    ("seed=-1", "greater than or equal to 0"),
    ("datasets.digits.name=other", "they must be equal"),
    ("datasets.digits.test_fraction=null", "test_fraction null of digits: an experiment ends with a test"),
    ("datasets.digits.name=a/b", "should match pattern"),
    ("training.memory_mb=1", "greater than or equal to 64"),
])
def test_each_wrong_value_is_named(override, said):
    text = failure(override)
    assert said in text and override.partition("=")[0].split(".")[0] in text


@pytest.mark.parametrize("text, values", [
    ("{start: 0.2, stop: 1.4, step: 0.2}", [0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4]),
    ("{start: 0.2, stop: 1.39, step: 0.2}", [0.2, 0.4, 0.6, 0.8, 1.0, 1.2]),
    ("{start: 1, stop: 1, step: 5}", [1.0]),
    ("[1e-3, 2]", [0.001, 2.0]),
])
def test_ranges_hold_the_points_that_one_would_write(text, values):
    found = load_settings("demo", [f"approaches.impactx.lambdas={text}"], CONFIGS)
    assert found.approaches["impactx"].lambdas == values


def test_overrides_reach_every_level_and_the_last_one_wins():
    s = load_settings("demo", [
        "training.epochs=3", "training.epochs=4", "datasets.digits.subset=100", "cache=null", "output=/tmp/a b",
        "datasets.digits.augmentation.shift=1", "grid.batch_size=[8]"], CONFIGS)
    assert s.training.epochs == 4 and s.training.patience == 6 and s.cache is None and s.output == "/tmp/a b"
    assert s.datasets["digits"].subset == 100 and s.datasets["digits"].augmentation.shift == 1
    assert not s.datasets["digits"].augmentation.flip and s.grid.batch_size == [8]


def test_groups_chosen_on_the_command_line_replace_the_presets():
    s = load_settings("demo", ["approach=[impactx]", "model=[lenet5]", "dataset=digits"], CONFIGS)
    assert list(s.approaches) == ["impactx"] and list(s.datasets) == ["digits"]
    assert load_settings("demo", ["approach=[lambda0]"], CONFIGS).approaches.keys() == {"lambda0"}
    assert load_settings("demo", ["approach=[]"], CONFIGS).approaches == {}


def test_the_last_choice_of_a_group_counts():
    settings = load_settings("full_grid", ["approach=[impactx]", "attribution=occlusion", "model=[lenet5,mobilenet]",
                                           "approach=[abn,wae]", "attribution=partition", "model=lenet5"], CONFIGS)
    assert list(settings.approaches) == ["abn", "wae"] and list(settings.models) == ["lenet5"]
    assert settings.attribution == load_settings("full_grid", [], CONFIGS).attribution


@pytest.mark.parametrize("place", ["preset", "override"])
def test_a_python_object_in_yaml_is_refused_and_not_made(tmp_path, place):
    trace = tmp_path / "trace"
    attack = f'!!python/object/apply:os.mkdir ["{trace}"]'
    folder = tmp_path / "configs"
    shutil.copytree(CONFIGS, folder)
    if place == "preset":
        (folder / "bad.yaml").write_text(f"defaults: [demo, _self_]\nname: {attack}\n")
        text = failure(preset="bad", folder=folder)
    else:
        text = failure(f"name={attack}")
    assert not trace.exists() and "python/object/apply" in text


def test_settings_cannot_be_changed_and_come_back_from_json():
    s = load_settings("demo", folder=CONFIGS)
    with pytest.raises(ValueError):
        s.seed = 3
    assert ExperimentSettings.model_validate_json(s.model_dump_json()) == s


def test_the_data_folder_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("IMPACTX_DATA", "/some/where")
    assert load_settings("demo", folder=CONFIGS).data_root == "/some/where"
    monkeypatch.delenv("IMPACTX_DATA")
    assert load_settings("demo", folder=CONFIGS).data_root == "data"


def test_settings_md_is_up_to_date():
    written = (ROOT / "docs" / "SETTINGS.md").read_text(encoding="utf8")
    assert written == settings_markdown(), "run: python -m impactx.settings_doc > docs/SETTINGS.md"


def test_settings_md_has_every_setting():
    text = settings_markdown()

    def leaves(value, prefix=""):
        for key, inner in value.items():
            key = "<name>" if prefix in ("datasets.", "models.", "approaches.") else key
            if isinstance(inner, dict):
                yield from leaves(inner, f"{prefix}{key}.")
            else:
                yield prefix + key

    for name in set(leaves(load_settings("demo", folder=CONFIGS).model_dump())):
        assert f"| `{name}` |" in text, name


def test_importing_the_package_is_light():
    code = ("import sys, impactx; from impactx import DatasetSettings; "
            "print([m for m in ('torch', 'numpy', 'ray', 'mlflow', 'pydantic') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT / "platform")})
    assert done.stdout.strip() == "['pydantic']"


def test_platform_is_no_package_and_the_front_door_is_complete():
    import impactx

    assert not (ROOT / "platform" / "__init__.py").exists()
    assert sorted(itertools.chain(*impactx._HOMES.values())) == sorted(impactx.__all__)
    with pytest.raises(AttributeError, match="no_such"):
        impactx.no_such  # noqa: B018


SECRET = "do-not-tell"


@pytest.mark.parametrize("text", [
    "name: ${oc.env:A_PASSWORD}",
    'name: "\\x24{oc.env:A_PASSWORD}"',
    "half: IMPACTX\nname: ${oc.env:${half}_X,${oc.env:A_PASSWORD}}",
    "name: ${oc.decode:'${oc.env:A_PASSWORD}'}",
    "name: ${hydra:runtime.cwd}",
    "grid: {learning_rate: [0.1, '${oc.env:A_PASSWORD}']}",
    "${oc.env:A_PASSWORD}: 1",
    "loop: &loop [*loop, '${oc.env:A_PASSWORD}']",
    "defaults: [full_grid, {override dataset: '${oc.env:A_PASSWORD}'}]",
])
def test_a_foreign_file_cannot_read_the_environment(tmp_path, monkeypatch, text):
    monkeypatch.setenv("A_PASSWORD", SECRET)
    folder = tmp_path / "configs"
    shutil.copytree(CONFIGS, folder)
    (folder / "bad.yaml").write_text(text if "defaults" in text else f"defaults: [demo, _self_]\n{text}\n")
    found = failure(preset="bad", folder=folder)
    assert "may not stand in a configuration" in found and "bad.yaml" in found and SECRET not in found


def test_nor_from_a_folder_that_it_brings_along(tmp_path, monkeypatch):
    monkeypatch.setenv("A_PASSWORD", SECRET)
    folder = tmp_path / "configs"
    shutil.copytree(CONFIGS, folder)
    (tmp_path / "other" / "dataset").mkdir(parents=True)
    (tmp_path / "other" / "dataset" / "theirs.yaml").write_text("# @package _global_\nname: ${oc.env:A_PASSWORD}\n")
    (folder / "bad.yaml").write_text(
        f"defaults: [full_grid, dataset/theirs, _self_]\nhydra: {{searchpath: ['file://{tmp_path}/other']}}\n")
    found = failure(preset="bad", folder=folder)
    assert "may not stand in a configuration" in found and SECRET not in found


def test_a_target_is_no_call_and_an_override_no_reference(tmp_path, monkeypatch):
    monkeypatch.setenv("A_PASSWORD", SECRET)
    trace = tmp_path / "trace"
    folder = tmp_path / "configs"
    shutil.copytree(CONFIGS, folder)
    (folder / "bad.yaml").write_text("defaults: [demo, _self_]\n"
                                     f"training: {{_target_: os.mkdir, _args_: ['{trace}'], epochs: 3}}\n")
    text = failure(preset="bad", folder=folder)
    assert "training._target_ = 'os.mkdir': no such setting" in text and not trace.exists()
    assert load_settings("demo", ["output=${oc.env:A_PASSWORD}"], CONFIGS).output == "${oc.env:A_PASSWORD}"


def test_results_and_pages_come_from_the_environment(monkeypatch):
    for name in ("IMPACTX_OUTPUT", "IMPACTX_MLFLOW_UI"):
        monkeypatch.delenv(name, raising=False)
    bare = load_settings("demo", folder=CONFIGS)
    assert (bare.output, bare.tracking.ui) == ("results", None)
    monkeypatch.setenv("IMPACTX_OUTPUT", "s3://bucket/results")
    monkeypatch.setenv("IMPACTX_MLFLOW_UI", "http://127.0.0.1:5000")
    found = load_settings("demo", folder=CONFIGS)
    assert (found.output, found.tracking.ui) == ("s3://bucket/results", "http://127.0.0.1:5000")
