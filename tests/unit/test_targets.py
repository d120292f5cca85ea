"""What controls are taught: maps of the right images, and nothing of the validation part in the training part."""

from __future__ import annotations

import numpy as np
import pytest

from impactx.approaches.impactx.targets import targets_of
from impactx.datasets import Split, make_split
from impactx.datasets.batches import DeviceData

COUNT, CLASSES = 90, 4
LABELS = np.random.default_rng(0).integers(0, CLASSES, COUNT)
MAPS = np.random.default_rng(1).normal(size=(COUNT, 3, 4, 4)).astype(np.float32)
SPLIT = make_split(LABELS, 0.2, common_fraction=0.2, seed=3)
ROWS = np.arange(COUNT)


def taught(how, scale=2.0, seed=5, labels=LABELS, split=SPLIT) -> np.ndarray:
    """The scaled targets of all images, as a training gets them."""
    targets, factor = targets_of(how, MAPS, scale, labels, split, seed)
    images = np.zeros((COUNT, 4, 4, 3), np.uint8)
    held = DeviceData(images, labels, ROWS, maps=targets, scale=factor)
    assert targets.shape == MAPS.shape
    return held.maps.permute(0, 3, 1, 2).numpy()


def source_of(targets: np.ndarray, scale=2.0) -> np.ndarray:
    """Whose map each image got."""
    flat = (MAPS * np.reshape(scale, (-1, 1, 1, 1))).reshape(COUNT, -1)
    return np.array([int(np.abs(flat - row).sum(1).argmin()) for row in targets.reshape(COUNT, -1)])


def test_its_own_map_is_the_map_itself():
    targets, factor = targets_of("own", MAPS, 2.0, LABELS, SPLIT, 0)
    assert targets is MAPS and factor == 2.0


@pytest.mark.parametrize("how", ["shuffled", "shuffled_in_class"])
@pytest.mark.parametrize("scale", [2.0, np.linspace(1, 3, COUNT).astype(np.float32)], ids=["one", "each"])
def test_shuffles_give_every_image_anothers_map_of_its_own_part(how, scale):
    found = taught(how, scale)
    source = source_of(found, scale)
    np.testing.assert_allclose(found, (MAPS * np.reshape(scale, (-1, 1, 1, 1)))[source], rtol=1e-6)
    assert (source != ROWS).all()
    for part in (SPLIT.train, SPLIT.validation):
        assert sorted(source[part]) == list(part)  # every map once, and none of the other part
    assert (LABELS[source] == LABELS).all() == (how == "shuffled_in_class")


def test_shuffles_are_drawn_by_the_seed_and_each_part_by_itself():
    first, again, other = (source_of(taught("shuffled", seed=s)) for s in (5, 5, 6))
    assert (first == again).all() and (first != other).mean() > 0.5
    # Another validation part of the same size leaves the training part's shuffle as it is.
    fewer = Split(SPLIT.train, SPLIT.validation[:-4], SPLIT.common)
    assert (source_of(taught("shuffled", split=fewer))[SPLIT.train] == first[SPLIT.train]).all()


def test_an_image_alone_in_its_class_keeps_its_map():
    labels = np.zeros(COUNT, int)
    labels[SPLIT.train[0]] = 1
    source = source_of(taught("shuffled_in_class", labels=labels))
    assert source[SPLIT.train[0]] == SPLIT.train[0] and (source != ROWS).sum() == COUNT - 1


@pytest.mark.parametrize("scale", [0.5, np.linspace(1, 3, COUNT)], ids=["one", "each"])
def test_means_are_of_the_scaled_training_maps_alone(scale):
    scaled = MAPS.astype(np.float64) * np.reshape(scale, (-1, 1, 1, 1))
    mean = sum(scaled[i] for i in SPLIT.train) / len(SPLIT.train)
    np.testing.assert_allclose(taught("mean", scale), np.broadcast_to(mean, MAPS.shape), atol=1e-6)
    found = taught("class_mean", scale)
    for i in ROWS:
        members = [scaled[j] for j in SPLIT.train if LABELS[j] == LABELS[i]]
        np.testing.assert_allclose(found[i], sum(members) / len(members), atol=1e-6)


def test_a_class_without_training_images_has_no_mean():
    labels = LABELS.copy()
    labels[SPLIT.validation[0]] = CLASSES
    with pytest.raises(ValueError, match="label 4 has no image in the training part"):
        taught("class_mean", labels=labels)
