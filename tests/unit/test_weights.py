"""Weights from files and from the hub: what is taken, what is left out, what each error says."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

from impactx.approaches.impactx import Impactx
from impactx.models import WeightsError, build_classifier, weights_fingerprint
from impactx.settings import ModelSettings

ARCHITECTURE = "mobilenetv1_100"


@pytest.fixture(scope="module")
def donor() -> dict[str, torch.Tensor]:
    """The state dict of a whole timm model with its 1000 classes, as timm's own files hold it."""
    with torch.random.fork_rng():
        torch.manual_seed(123)
        model = timm.create_model(ARCHITECTURE)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def build(weights, match="names", architecture=ARCHITECTURE, seed=0):
    settings = ModelSettings(name="m", architecture=architecture, weights=str(weights), weights_match=match)
    return build_classifier(settings, 10, (32, 32), seed=seed)


def message(*args, **kwargs) -> str:
    with pytest.raises(WeightsError) as caught:
        build(*args, **kwargs)
    return str(caught.value)


def holds(trunk, donor) -> bool:
    return all(torch.equal(tensor, donor[name]) for name, tensor in trunk.state_dict().items())


@pytest.mark.parametrize("form", ["pth", "safetensors", "wrapped", "data_parallel", "no_counters"])
def test_a_file_by_names(tmp_path, donor, form, caplog):
    caplog.set_level(logging.INFO, logger="impactx.models")
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(donor, path)
    elif form == "wrapped":
        torch.save({"epoch": 3, "model": {"x": torch.zeros(1)}, "state_dict": donor}, path)
    elif form == "data_parallel":
        torch.save({f"module.{name}": tensor for name, tensor in donor.items()}, path)
    else:
        keep = {n: t for n, t in donor.items() if form == "pth" or not n.endswith("num_batches_tracked")}
        torch.save(keep, path)
    assert holds(build(path).trunk, donor)
    assert str(path) in caplog.text and "head was left out: classifier." in caplog.text
    assert "classifier.weight" in caplog.text and "classifier.bias" in caplog.text


def test_the_new_head_stays_random_and_the_lep_starts_from_the_file_too(tmp_path, donor):
    path = tmp_path / "w.pth"
    torch.save(donor, path)
    model = build(path, seed=4)
    assert weights_fingerprint(model.head) == weights_fingerprint(build("random", seed=4).head)
    assert not holds(build("random", seed=4).trunk, donor)
    settings = ModelSettings(name="m", architecture=ARCHITECTURE, weights=str(path))
    assert holds(Impactx().build(settings, model, seed=9).lep.trunk, donor)


@pytest.mark.parametrize("head", [True, False])
def test_a_file_by_order(tmp_path, donor, head):
    path = tmp_path / "w.pth"
    renamed = {f"layer{i}.{name.rpartition('.')[2]}": tensor for i, (name, tensor) in enumerate(donor.items())
               if head or not name.startswith("classifier")}
    torch.save(renamed, path)
    assert holds_but_counters(build(path, "order").trunk, donor)
    text = message(path)  # by names nothing fits, and the message knows the way out
    assert "set weights_match to order" in text and "layer0.weight" in text and "conv_stem.weight" in text


def holds_but_counters(trunk, donor) -> bool:
    return all(torch.equal(tensor, donor[name]) for name, tensor in trunk.state_dict().items()
               if not name.endswith("num_batches_tracked"))


def test_a_misfit_lists_missing_unexpected_and_shapes(tmp_path, donor):
    path = tmp_path / "w.pth"
    broken = dict(donor)
    names = [name for name in donor if name.endswith("bn1.bias")]
    for name in names[:12]:
        del broken[name]
    broken["surplus.weight"] = torch.zeros(2)
    broken["conv_stem.weight"] = torch.zeros(32, 1, 3, 3)
    torch.save(broken, path)
    text = message(path)
    assert str(path) in text and ARCHITECTURE in text
    assert "12 missing" in text and names[0] in text and names[9] in text and names[10] not in text
    assert "and 2 more" in text
    assert "1 unexpected: surplus.weight" in text
    assert "1 not matching: conv_stem.weight (32, 1, 3, 3), the model has (32, 3, 3, 3)" in text
    assert "weights_match to" not in text  # order would not fit either
    assert "mobilenetv1_100" in message(path, "order")


def test_by_order_neither_shapes_nor_roles_may_differ(tmp_path, donor):
    items = [(n, t) for n, t in donor.items() if not n.endswith("num_batches_tracked")]
    path = tmp_path / "w.pth"
    weight, bias = ([n for n, _ in items].index(f"bn1.{role}") for role in ("weight", "bias"))
    swapped = list(items)
    swapped[weight], swapped[bias] = items[bias], items[weight]
    torch.save(dict(swapped), path)
    text = message(path, "order")
    assert "2 not matching: tensor 2 is bn1.bias (32,), the model has bn1.weight (32,)" in text
    assert "In the names of its tensors the file fits" in text
    torch.save(dict(items[:-7]), path)
    assert f"{len(items) - 7} tensors in the file, {len(items) - 2} in the model" in message(path, "order")


def test_by_order_needs_a_format_that_keeps_it(tmp_path, donor):
    path = tmp_path / "w.safetensors"
    save_file(donor, path)
    assert "does not keep the order" in message(path, "order")


def test_files_that_are_no_weights(tmp_path, donor):
    path = tmp_path / "w.pth"
    assert str(path) in message(path) and "no weights file" in message(path)
    torch.save(donor, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    assert str(path) in message(path)
    path.write_bytes(b"hello")
    assert str(path) in message(path)
    torch.save([1, 2], path)
    assert "no state_dict" in message(path)
    torch.save({"model": torch.nn.Linear(1, 1)}, path)
    assert "weights_only" in message(path) or "not loaded for safety" in message(path)
    torch.save({**donor, "bn1.bias": torch.full((32,), float("nan"))}, path)
    assert "not finite in 1 tensors: bn1.bias" in message(path)
    other = tmp_path / "w.bin"
    other.write_bytes(whole)
    assert ".safetensors" in message(other)
    broken = tmp_path / "w.safetensors"
    broken.write_bytes(b"\xff" * 64)
    assert str(broken) in message(broken)


def test_a_failed_load_changes_nothing(tmp_path, donor):
    from impactx.models.weights import load_trunk_file
    trunk = build("random").trunk
    before = weights_fingerprint(trunk)
    path = tmp_path / "w.pth"
    broken = {name: tensor for name, tensor in donor.items() if name != "conv_stem.weight"}
    torch.save(broken, path)
    with pytest.raises(WeightsError):
        load_trunk_file(trunk, path, model_name=ARCHITECTURE, head_names=("classifier",))
    assert weights_fingerprint(trunk) == before


def test_lenet5_from_a_file(tmp_path):
    path = tmp_path / "lenet.pth"
    weights = {"conv1.weight": torch.randn(6, 3, 5, 5), "conv1.bias": torch.randn(6),
               "conv2.weight": torch.randn(16, 6, 5, 5), "conv2.bias": torch.randn(16),
               "fc1.weight": torch.randn(120, 400), "fc1.bias": torch.randn(120)}
    torch.save(weights, path)
    trunk = build(path, architecture="lenet5").trunk
    assert torch.equal(trunk.conv2.weight, weights["conv2.weight"])
    with pytest.raises(ValueError, match="weights 'hub' with architecture 'lenet5'"):
        build("hub", architecture="lenet5")


def test_no_hub_says_how_to_provide_the_file(tmp_path):
    """For real, in a process that has an empty cache and may not ask the network."""
    code = ("from impactx.models import build_classifier\nfrom impactx.settings import ModelSettings\n"
            "settings = ModelSettings(name='m', architecture='mobilenetv1_100', weights='hub')\n"
            "build_classifier(settings, 10, (32, 32), seed=0, load_weights=False)\nprint('built')\n"
            "build_classifier(settings, 10, (32, 32), seed=0)\n")
    source = os.path.dirname(os.path.dirname(sys.modules["impactx"].__file__))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": source}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 1 and done.stdout == "built\n"  # a checkpoint is rebuilt without the hub
    error = done.stderr[done.stderr.rindex("WeightsError:"):]
    for part in ("mobilenetv1_100", "https://huggingface.co/timm/mobilenetv1_100.ra4_e3600_r224_in1k",
                 "model.safetensors", "HF_HOME", "HF_ENDPOINT", "random"):
        assert part in error


def test_an_architecture_without_weights_is_said():
    names = [n for n in timm.list_models("resnet*") if not timm.get_pretrained_cfg(n).has_weights]
    assert names, "timm has weights for everything"
    assert f"no pre-trained weights for {names[0]}" in message("hub", architecture=names[0])
