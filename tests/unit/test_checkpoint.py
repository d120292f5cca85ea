"""Checkpoints: what comes back, what is refused, and the fingerprint of weights."""

from __future__ import annotations

import copy
import io
import zipfile
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch

from impactx.approaches.baseline import Baseline
from impactx.approaches.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from impactx.approaches.impactx import Impactx, ImpactxNetwork
from impactx.models import (
    Classifier,
    build_classifier,
    map_kind,
    weights_fingerprint,
)
from impactx.settings import ModelSettings
from impactx.settings.extensions import approach
from impactx.settings.registry import RegistrationError

NAMES = [f"class {i}" for i in range(5)]
LENET = ModelSettings(name="lenet5", architecture="lenet5", mean=(0.4, 0.5, 0.6))
SMALL = ModelSettings(name="small", architecture="mobilenetv1_100", input_size=48)


def images(size=(32, 32), dtype=torch.float32):
    return torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def classifier(settings=LENET, size=(32, 32), seed=1) -> Classifier:
    model = build_classifier(settings, len(NAMES), size, seed=seed)
    model(images(size))  # moves batch-norm statistics off their start
    return model.eval()


def content(settings=LENET, **changes) -> bytes:
    return save_checkpoint(classifier(settings), model_settings=settings, class_names=NAMES, **changes)


def altered(data: bytes, **changes) -> bytes:
    payload = torch.load(io.BytesIO(data), weights_only=True)
    payload.update(changes)
    buffer = io.BytesIO()
    torch.save({key: value for key, value in payload.items() if value is not ...}, buffer)
    return buffer.getvalue()


def refusal(source, **wanted) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(source, **wanted)
    return str(caught.value)


@pytest.mark.parametrize("settings, size", [(LENET, (32, 32)), (LENET, (28, 40)), (SMALL, (32, 32))])
def test_a_classifier_comes_back(settings, size):
    model = classifier(settings, size)
    extra = {"epoch": 3, "scores": [0.5, None], "split": torch.arange(4), "s": {"a": "b"}}
    data = save_checkpoint(model, model_settings=settings, class_names=NAMES, extra=extra)
    loaded = load_checkpoint(data)
    assert type(loaded.model) is Classifier and not loaded.model.training
    assert (loaded.kind, loaded.num_classes, loaded.image_size) == ("baseline", 5, size)
    assert loaded.map_scale is None
    assert loaded.model_settings == settings and loaded.approach == Baseline()
    assert loaded.class_names == NAMES
    assert loaded.extra.pop("split").tolist() == [0, 1, 2, 3]
    assert loaded.extra == {"epoch": 3, "scores": [0.5, None], "s": {"a": "b"}}
    assert weights_fingerprint(loaded.model) == weights_fingerprint(model)
    with torch.no_grad():
        assert torch.equal(loaded.model(images(size)), model(images(size)))


@pytest.mark.parametrize("settings", [LENET, SMALL], ids=lambda s: s.name)
@pytest.mark.parametrize("approach, channels", [
    (Impactx(), 3),
    (Impactx(m="penultimate", latent=64, lep_start="from_stage1", lambdas=[0.8]), 1)],
    ids=["default", "other"])
def test_an_impactx_comes_back_from_a_file(tmp_path, settings, approach, channels):
    model = approach.build(settings, classifier(settings), seed=2, channels=channels)
    model(images())
    model.eval()
    path = tmp_path / "model.pt"
    path.write_bytes(save_checkpoint(model, model_settings=settings, approach=approach,
                                     class_names=NAMES, map_scale=0.012))
    for source in (path, str(path)):
        loaded = load_checkpoint(source, kind="impactx", architecture=settings.architecture, num_classes=5)
        assert type(loaded.model) is ImpactxNetwork and loaded.map_scale == 0.012
        assert loaded.approach == approach
        assert weights_fingerprint(loaded.model) == weights_fingerprint(model)
        with torch.no_grad():
            for ours, theirs in zip(loaded.model(images()), model(images()), strict=True):
                assert torch.equal(ours, theirs)
    assert not any(p.requires_grad for p in loaded.model.a.parameters())
    assert all(p.requires_grad for p in [*loaded.model.lep.parameters(), *loaded.model.decoder.parameters(), *loaded.model.c.parameters()])


@pytest.mark.parametrize("lambdas, kept, found", [
    ([0.2, 0.8], 0.0, 0.0), ([0.0], 0.8, 0.8), ([0.0], None, 0.0), ([0.0, 0.8], None, None), ([0.8], None, 0.8)])
def test_the_lambda_of_a_training_is_known(lambdas, kept, found):
    """Checkpoints of before it was kept tell it by their settings where there is but one candidate."""
    approach = Impactx(lambdas=lambdas, latent=16)
    model = approach.build(LENET, classifier(), seed=2)
    loaded = load_checkpoint(save_checkpoint(model, model_settings=LENET, approach=approach, weight=kept,
                                             class_names=NAMES, extra={"unit": "k"}))
    assert loaded.weight == found and loaded.extra["unit"] == "k"
    assert map_kind(loaded.model, loaded.weight) == (None if found == 0 else "evidence")
    assert load_checkpoint(content()).weight is None and map_kind(classifier()) is None


def test_float64_comes_back_as_float64():
    model = classifier().double()
    loaded = load_checkpoint(save_checkpoint(model, model_settings=LENET, class_names=NAMES))
    assert weights_fingerprint(loaded.model) == weights_fingerprint(model)
    assert loaded.model(images(dtype=torch.float64)).dtype == torch.float64


def test_a_pretrained_model_is_rebuilt_without_its_file(tmp_path):
    settings = LENET.model_copy(update={"weights": str(tmp_path / "gone.pth")})
    data = save_checkpoint(classifier(LENET), model_settings=settings, class_names=NAMES)
    assert load_checkpoint(data).model_settings.weights.endswith("gone.pth")


def test_saving_does_not_share_memory_and_loading_leaves_the_random_numbers():
    model = classifier()
    data = save_checkpoint(model, model_settings=LENET, class_names=NAMES)
    before = weights_fingerprint(model)
    with torch.no_grad():
        model.trunk.conv1.weight.zero_()
    state = torch.get_rng_state()
    assert weights_fingerprint(load_checkpoint(data).model) == before
    assert torch.equal(torch.get_rng_state(), state)


# ---- refused when saved

def test_only_what_can_be_read_again_is_saved():
    with pytest.raises(TypeError, match=r"extra\['a'\]\[1\] is a numpy.float64"):
        content(extra={"a": [1, np.float64(2)]})
    with pytest.raises(TypeError, match="kind baseline holds a Classifier, this is a Sequential.*unwrap"):
        save_checkpoint(torch.nn.Sequential(classifier()), model_settings=LENET, class_names=NAMES)
    with pytest.raises(TypeError, match="kind impactx holds a ImpactxNetwork, this is a Classifier"):
        content(approach=Impactx())
    with pytest.raises(TypeError, match="kind baseline holds a Classifier, this is a ImpactxNetwork"):
        save_checkpoint(Impactx().build(LENET, classifier(), seed=0), model_settings=LENET,
                        class_names=NAMES)
    with pytest.raises(ValueError, match="5 classes, but 4 class names"):
        save_checkpoint(classifier(), model_settings=LENET, class_names=NAMES[:4])
    mixed = classifier()
    mixed.head.double()
    with pytest.raises(ValueError, match="one float type"):
        save_checkpoint(mixed, model_settings=LENET, class_names=NAMES)


# ---- refused when loaded

def test_what_is_no_checkpoint(tmp_path):
    path = tmp_path / "absent.pt"
    assert str(path) in refusal(path) and "No such file" in refusal(path)
    path.write_bytes(b"")
    assert str(path) in refusal(path) and "empty" in refusal(path)
    path.write_bytes(b"an image, say")
    assert "no checkpoint" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "b")
    assert "no checkpoint of impactx" in refusal(path)
    torch.save(classifier().state_dict(), path)
    assert "bare weights" in refusal(path)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999])
def test_truncated(share):
    data = content()
    cut = data[:int(len(data) * share)]
    assert f"truncated ({len(cut)} bytes)" in refusal(cut)


def test_a_flipped_bit_in_a_tensor_is_found():
    data = bytearray(content())
    data[len(data) // 2] ^= 1
    assert "damaged" in refusal(bytes(data))


def test_another_model_is_named():
    data = content()
    text = refusal(data, kind="impactx")
    assert "another model" in text and "'baseline'" in text and "'impactx' was asked for" in text
    assert "its architecture is 'lenet5', 'resnet18' was asked for" in refusal(data, architecture="resnet18")
    assert "its num_classes is 5, 10 was asked for" in refusal(data, num_classes=10)


def test_another_version_kind_or_content():
    data = content()
    assert "format version 1, this impactx reads 2" in refusal(altered(data, version=1, kind=...))
    assert "kind 'abc', known here: abn, baseline, ensemble, impactx" in refusal(altered(data, kind="abc"))
    assert "incomplete: it lacks extra, state" in refusal(altered(data, state=..., extra=...))
    assert "does not know" in refusal(altered(data, model={"name": "m", "architecture": "lenet5", "new": 1}))
    unknown = refusal(altered(data, model={"name": "m", "architecture": "mobilenetv1_10"}))
    assert "cannot be rebuilt" in unknown and "mobilenetv1_100" in unknown


def test_tensors_of_another_architecture_are_listed():
    text = refusal(altered(content(), model={"name": "m", "architecture": "mobilenetv1_100"}))
    assert "do not fit mobilenetv1_100" in text
    assert "missing: trunk.conv_stem.weight" in text and "trunk.conv1.weight" in text
    assert "head.last.weight (5, 84), the model has (5, 1024)" in text
    state = dict(torch.load(io.BytesIO(content()), weights_only=True)["state"])
    del state["trunk.conv2.bias"]
    assert "1 missing: trunk.conv2.bias" in refusal(altered(content(), state=state))


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    buffer = io.BytesIO()
    torch.save({"format": "impactx-checkpoint", "version": 2, "extra": Evil()}, buffer)
    assert "no checkpoint of impactx" in refusal(buffer.getvalue())
    assert not (tmp_path / "made").exists()


def test_kinds_are_open():
    class Mine(Classifier):
        pass

    @approach
    class OfMine(Baseline):
        kind: Literal["test-mine"] = "test-mine"
        network: ClassVar[type[torch.nn.Module]] = Mine

        def rebuild(self, model, num_classes, image_size, channels=None):
            inner = build_classifier(model, num_classes, image_size, seed=0)
            return Mine(inner.preprocess, inner.trunk, inner.head)

    try:
        model = OfMine().rebuild(LENET, 5, (32, 32))
        loaded = load_checkpoint(save_checkpoint(model, model_settings=LENET, approach=OfMine(), class_names=NAMES))
        assert loaded.kind == "test-mine" and type(loaded.model) is Mine
        with pytest.raises(RegistrationError, match="'test-mine' is .*OfMine already"):
            @approach
            class Another(OfMine):
                pass
    finally:
        del approach._classes["test-mine"]


# ---- fingerprint

def test_the_fingerprint_sees_every_tensor_and_no_order():
    model = classifier(SMALL)
    first = weights_fingerprint(model)
    assert first == weights_fingerprint(copy.deepcopy(model)) and len(first) == 64
    seen = {first}
    for name in ("preprocess.mean", "trunk.bn1.running_var", "trunk.bn1.num_batches_tracked",
                 "head.last.bias"):
        other = copy.deepcopy(model)
        with torch.no_grad():
            tensor = other.state_dict()[name]
            tensor.view(-1)[0] += 1
        seen.add(weights_fingerprint(other))
    seen.add(weights_fingerprint(copy.deepcopy(model).double()))
    seen.add(weights_fingerprint(copy.deepcopy(model).bfloat16()))
    assert len(seen) == 7

    class Pair(torch.nn.Module):
        def __init__(self, names, shape):
            super().__init__()
            for name in names:
                self.register_buffer(name, torch.full(shape, float(ord(name))))

    assert weights_fingerprint(Pair("ab", (2, 3))) == weights_fingerprint(Pair("ba", (2, 3)))
    assert weights_fingerprint(Pair("ab", (2, 3))) != weights_fingerprint(Pair("ab", (3, 2)))
