"""Regions, orders, noise and areas of MoRF; the curves themselves are compared in tests/reference/test_morf.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from impactx.evaluation.metrics import morf


@pytest.mark.parametrize("size, side, count", [
    ((32, 32), 4, 64), ((96, 96), 8, 144), ((224, 224), 16, 196), ((28, 28), 2, 196), ((8, 8), 1, 64),
    ((40, 64), 4, 160)])
def test_the_default_regions(size, side, count):
    grid = morf.grid_of(size)
    assert (grid.side, grid.count) == (side, count)
    assert np.array_equal(np.unique(grid.index), np.arange(count))
    assert grid.early == {64: 10, 144: 23, 196: 31, 160: 26}[count]


def test_a_side_that_does_not_divide_leaves_smaller_last_regions():
    grid = morf.grid_of((5, 7), 3)
    assert grid.index.tolist() == [[0, 0, 0, 1, 1, 1, 2]] * 3 + [[3, 3, 3, 4, 4, 4, 5]] * 2 and grid.count == 6
    for side in (0, 6):
        with pytest.raises(ValueError, match=rf"regions of {side}x{side} .*allowed are 1 to 5"):
            morf.grid_of((5, 7), side)


def test_relevance_is_summed_over_channels_and_regions():
    maps = np.random.default_rng(0).normal(0, 1, (3, 2, 5, 7)).astype(np.float32)
    grid = morf.grid_of((5, 7), 3)
    found = morf.relevance(maps, grid)
    for n in range(3):
        for region in range(6):
            expected = sum(float(maps[n, c, y, x]) for y in range(5) for x in range(7) for c in range(2)
                           if grid.index[y, x] == region)
            assert found[n, region] == pytest.approx(expected)


def test_equal_regions_keep_the_grids_order_and_are_counted():
    values = np.array([[1.0, 3.0, 1.0, 3.0, 2.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    assert morf.most_relevant_first(values).tolist() == [[3, 0, 4, 1, 2], [0, 1, 2, 3, 4]]
    assert morf.most_relevant_first(-values).tolist() == [[0, 3, 1, 4, 2], [4, 3, 2, 1, 0]]
    assert morf.ties(values).tolist() == [4, 0]
    # Equal pixels make equal regions, whatever rounding does to sums of 0.1.
    constant = np.full((1, 3, 32, 32), 0.1, np.float32)
    assert morf.ties(morf.relevance(constant, morf.grid_of((32, 32)))).tolist() == [64]


def test_noise_and_random_orders_belong_to_image_and_seed():
    grid = morf.grid_of((8, 8), 2)
    noise, order = morf.noise_of(np.array([4, 9]), (3, 8, 8), 0), morf.random_order(np.array([4, 9]), grid, 0)
    assert np.array_equal(noise[1:], morf.noise_of(np.array([9]), (3, 8, 8), 0))
    assert np.array_equal(order[1:], morf.random_order(np.array([9]), grid, 0))
    assert noise.dtype == np.float32 and 0 <= noise.min() and 0.9 < noise.max() < 1
    assert not np.array_equal(noise[0], noise[1]) and sorted(order[0]) == list(range(16))
    assert not np.array_equal(noise, morf.noise_of(np.array([4, 9]), (3, 8, 8), 1))


def brightness(images):
    """A model with two classes: the more light in the first region's pixel, the more of class 1."""
    light = images[:, 0, 0, 0] * 4
    return torch.stack([torch.zeros_like(light), light], 1)


def test_the_curve_falls_where_the_order_says():
    images, noise, grid = torch.ones(3, 1, 4, 4), torch.zeros(3, 1, 4, 4), morf.grid_of((4, 4), 2)
    ranks = np.array([[0, 1, 2, 3], [2, 0, 1, 3], [3, 2, 1, 0]])
    found = morf.curves(brightness, images, noise, {"a": ranks, "b": ranks[::-1]}, grid, batch_size=5)
    assert found["a"].predicted.tolist() == [1, 1, 1]
    assert found["a"].logit.tolist() == [[4, 0, 0, 0, 0], [4, 4, 4, 0, 0], [4, 4, 4, 4, 0]]
    assert found["b"].logit.tolist() == found["a"].logit[::-1].tolist()
    high = 1 / (1 + np.exp(-4))
    assert found["a"].probability[1] == pytest.approx([high, high, high, 0.5, 0.5])
    assert morf.aopc(found["a"].logit, 1).tolist() == [2, 0, 0] and morf.aopc(found["a"].logit, 4)[0] == 16 / 5
    assert images.min() == 1, "the images themselves stay as they are"


@pytest.mark.parametrize("batch_size", [1, 3, 4, 1000])
def test_the_batch_size_changes_nothing(batch_size):
    images, noise = torch.rand(5, 1, 4, 4), torch.rand(5, 1, 4, 4)
    grid, ranks = morf.grid_of((4, 4), 2), np.stack([np.random.default_rng(i).permutation(4) for i in range(5)])
    first = morf.curves(brightness, images, noise, {"a": ranks}, grid)["a"]
    again = morf.curves(brightness, images, noise, {"a": ranks}, grid, batch_size=batch_size)["a"]
    assert np.array_equal(first.logit, again.logit)


def test_scores_that_are_not_finite_are_refused():
    grid = morf.grid_of((4, 4), 2)
    with pytest.raises(ValueError, match="not finite in the order 'a'"):
        morf.curves(lambda x: brightness(x) / x.sum((1, 2, 3))[:, None], torch.ones(1, 1, 4, 4),
                    torch.zeros(1, 1, 4, 4), {"a": np.arange(4)[None]}, grid)
