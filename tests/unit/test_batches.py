"""Batches against a slow twin that moves one image at a time, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from impactx.datasets.batches import DeviceData, check_maps, draws, move
from impactx.settings import AugmentationSettings

BOTH = AugmentationSettings(flip=True, shift=2)


def arrays(count=30, height=6, width=8, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.integers(1, 256, (count, height, width, 3), dtype=np.uint8), rng.integers(0, 4, count),
            rng.normal(size=(count, 3, height, width)).astype(np.float32))


def twin(plane: np.ndarray, down: int, right: int, mirrored: bool) -> np.ndarray:
    """plane (H, W, C) moved by (down, right), zeros moving in, then mirrored; by explicit loops."""
    height, width, channels = plane.shape
    moved = np.zeros_like(plane)
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                moved[y, x] = plane[y - down, x - right]
    result = np.zeros_like(plane)
    for x in range(width):
        result[:, x] = moved[:, width - 1 - x] if mirrored else moved[:, x]
    return result


@pytest.mark.parametrize("shift, flip", [(0, True), (1, False), (2, True), (7, True)])
def test_move_is_the_slow_twin(shift, flip):
    images, _, maps = arrays(40)
    _, dy, dx, flips = draws(3, 1, 40, shift)
    for planes in (images, maps.transpose(0, 2, 3, 1)):
        found = move(torch.from_numpy(np.ascontiguousarray(planes)), shift, dy, dx, flips if flip else None)
        assert found.dtype == torch.from_numpy(planes[:1].copy()).dtype
        for i in range(40):
            expected = twin(planes[i], shift - int(dy[i]), shift - int(dx[i]), flip and bool(flips[i]))
            np.testing.assert_array_equal(found[i].numpy(), expected)


def test_an_epoch_is_the_slow_twin_for_images_and_maps_together():
    images, labels, maps = arrays()
    chosen = np.array([3, 29, 0, 7, 8, 20, 11, 12, 2, 5, 17])
    data = DeviceData(images, labels, chosen, maps=maps, scale=2.5)
    order, dy, dx, flips = draws(9, 4, len(chosen), 2)
    seen = 0
    for batch in data.training(seed=9, epoch=4, batch_size=4, augmentation=BOTH):
        for i in range(len(batch.labels)):
            k = int(order[seen])
            how = (2 - int(dy[k]), 2 - int(dx[k]), bool(flips[k]))
            image = twin(images[chosen[k]], *how).astype(np.float32) / np.float32(255)
            np.testing.assert_array_equal(batch.images[i].permute(1, 2, 0).numpy(), image)
            target = twin(maps[chosen[k]].transpose(1, 2, 0), *how) * np.float32(2.5)
            np.testing.assert_array_equal(batch.maps[i].permute(1, 2, 0).numpy(), target)
            assert batch.labels[i] == labels[chosen[k]]
            seen += 1
        assert batch.total == len(batch.labels) and batch.weights.sum() == pytest.approx(1)
    assert seen == len(chosen) and sorted(order.tolist()) == list(range(len(chosen)))


def test_every_shift_and_both_flips_occur_and_are_about_equally_frequent():
    _, dy, dx, flips = draws(0, 1, 5000, 2)
    for drawn in (dy, dx):
        counts = torch.bincount(drawn, minlength=5)
        assert len(counts) == 5 and counts.min() > 850 and counts.max() < 1150
    assert 2350 < int(flips.sum()) < 2650
    assert abs(float(np.corrcoef(dy, dx)[0, 1])) < 0.05 and abs(float(np.corrcoef(dy, flips)[0, 1])) < 0.05


def test_draws_belong_to_seed_and_epoch():
    first = draws(0, 1, 50, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, draws(0, 1, 50, 2), strict=True))
    for other in (draws(0, 2, 50, 2), draws(1, 1, 50, 2)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    state = torch.get_rng_state()
    draws(5, 5, 10, 2)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("augmentation", [BOTH, AugmentationSettings(flip=False, shift=0)])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_shares_of_all_workers_are_the_global_batch(world, augmentation):
    images, labels, maps = arrays(22)
    data = DeviceData(images, labels, np.arange(22), maps=maps)
    how = {"seed": 1, "epoch": 2, "batch_size": 4, "augmentation": augmentation}
    whole = list(data.training(**how))
    shares = [list(data.training(**how, rank=r, world_size=world)) for r in range(world)]
    assert {len(s) for s in shares} == {len(whole)}
    for k, batch in enumerate(whole):
        parts = [s[k] for s in shares]
        weights = torch.cat([p.weights for p in parts])
        assert float(weights.sum()) == pytest.approx(1) and all(p.total == len(batch.labels) for p in parts)
        assert all(len(p.labels) >= 2 for p in parts), "batch norm cannot normalise one image of one pixel"
        assert set(weights.tolist()) <= {0.0, batch.weights[0].item()}
        union = torch.empty_like(batch.images)
        targets, classes = torch.empty_like(batch.maps), torch.empty_like(batch.labels)
        sharing = [part for part in parts if (part.weights > 0).all()]
        assert len(sharing) == min(world, len(batch.labels) // 2)
        for r, part in enumerate(sharing):
            union[r::len(sharing)], targets[r::len(sharing)] = part.images, part.maps
            classes[r::len(sharing)] = part.labels
        assert torch.equal(union, batch.images) and torch.equal(targets, batch.maps)
        assert torch.equal(classes, batch.labels)


def test_a_worker_without_an_image_gets_some_of_weight_zero():
    images, labels, _ = arrays(6)
    batches = list(DeviceData(images, labels, np.arange(6)).training(
        seed=0, epoch=1, batch_size=4, augmentation=BOTH, rank=1, world_size=2))
    assert [b.weights.tolist() for b in batches] == [[0.25, 0.25], [0.0, 0.0]] and batches[1].total == 2


@pytest.mark.parametrize("count, size, lengths", [(9, 4, [4, 5]), (10, 4, [4, 4, 2]), (1, 4, [1]), (3, 1, [1, 1, 1]),
                                                  (4, 9, [4]), (5, 2, [2, 3])])
def test_a_single_image_left_over_joins_the_batch_before(count, size, lengths):
    images, labels, _ = arrays(count)
    batches = list(DeviceData(images, labels, np.arange(count)).training(
        seed=0, epoch=1, batch_size=size, augmentation=BOTH))
    assert [len(b.labels) for b in batches] == lengths == [b.total for b in batches]
    assert all(float(b.weights.sum()) == pytest.approx(1) for b in batches)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_visits_every_image_once_in_order(world):
    images, labels, maps = arrays(11)
    chosen = np.array([9, 1, 4, 0, 7, 8, 2])
    data = DeviceData(images, labels, chosen, maps=maps)
    for rank in range(world):
        batches = list(data.evaluation(batch_size=2, rank=rank, world_size=world))
        mine = chosen[rank::world]
        found = torch.cat([b.images for b in batches]).permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(found, images[mine].astype(np.float32) / np.float32(255))
        np.testing.assert_array_equal(torch.cat([b.maps for b in batches]).numpy(), maps[mine])
        np.testing.assert_array_equal(torch.cat([b.labels for b in batches]).numpy(), labels[mine])
        assert torch.cat([b.weights for b in batches]).tolist() == pytest.approx([1 / 7] * len(mine))


@pytest.mark.parametrize("scale", [0.37, "per image"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_data_set_above_the_budget_stays_mapped_and_gives_the_same_batches(tmp_path, scale, dtype):
    images, labels, maps = arrays(40)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "maps.npy", maps)
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("images", "maps")]
    scale = np.linspace(0.5, 2, 40).astype(np.float32) if scale == "per image" else scale
    chosen = np.random.default_rng(1).permutation(40)[:31]
    how = {"maps": mapped[1], "scale": scale, "dtype": dtype}
    needed = 31 * 6 * 8 * 3 * (1 + dtype.itemsize)
    loaded = DeviceData(mapped[0], labels, chosen, memory_bytes=needed, **how)
    kept = DeviceData(mapped[0], labels, chosen, memory_bytes=needed - 1, **how)
    assert loaded.loaded and not kept.loaded and kept.images is None and kept.maps is None and loaded.images is not None
    for epoch in (1, 2):
        for rank in (0, 1):
            pairs = zip(*(d.training(seed=0, epoch=epoch, batch_size=4, augmentation=BOTH, rank=rank, world_size=2)
                          for d in (loaded, kept)), strict=True)
            for a, b in pairs:
                assert a.total == b.total and b.maps.dtype == dtype
                assert all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("images", "labels", "maps", "weights"))
    for a, b in zip(loaded.evaluation(batch_size=8), kept.evaluation(batch_size=8), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.maps, b.maps)


def test_batches_are_channels_last_and_the_arrays_stay_as_they_were():
    images, labels, maps = arrays(8)
    before = images.copy(), maps.copy()
    batch = next(DeviceData(images, labels, np.arange(8), maps=maps).training(
        seed=0, epoch=1, batch_size=8, augmentation=BOTH))
    assert batch.images.is_contiguous(memory_format=torch.channels_last) and batch.images.shape == (8, 3, 6, 8)
    batch.images.zero_()
    np.testing.assert_array_equal(images, before[0])
    np.testing.assert_array_equal(maps, before[1])


def spoilt(maps, value=np.nan):
    maps = maps.copy()
    maps[[5, 7], 1, 2, 3] = value
    return maps


@pytest.mark.parametrize("memory", [None, 0], ids=["loaded", "kept"])
@pytest.mark.parametrize("change, says", [
    (lambda m: m[:6], r"\(6, 3, 6, 8\) for 10 images of 6x8 pixels.*\(10, 3, 6, 8\)"),
    (lambda m: np.concatenate([m, m]), r"\(20, 3, 6, 8\) for 10 images"), (lambda m: m[:, :1], r"\(10, 1, 6, 8\) for"),
    (lambda m: m[:, :, :5], r"\(10, 3, 5, 8\) for"), (lambda m: m[0], r"\(3, 6, 8\) for")])
def test_maps_of_other_images_are_refused(memory, change, says):
    images, labels, maps = arrays(10)
    with pytest.raises(ValueError, match=says):
        DeviceData(images, labels, np.arange(4), maps=change(maps), memory_bytes=memory)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("memory", [None, 0], ids=["loaded", "kept"])
def test_maps_that_are_not_finite_are_refused_where_they_are_taken(memory, value):
    images, labels, maps = arrays(10)
    maps = spoilt(maps, value)

    def batches(rows, **how):
        held = DeviceData(images, labels, np.array(rows), maps=maps, memory_bytes=memory, **how)
        return list(held.evaluation(batch_size=4))

    assert len(batches([4, 6, 9])) == 1  # the others are not looked at
    with pytest.raises(ValueError, match="maps of 2 images, the first of them image 7,.*not finite"):
        batches([9, 7, 5])
    assert not batches([9, 7], pending=True)[0].maps[1].isfinite().all()  # single-stage: there is none yet
    check_maps(maps, images)
    with pytest.raises(ValueError, match="maps of 2 images, the first of them image 5,.*not finite"):
        check_maps(maps, images, finite=True)
