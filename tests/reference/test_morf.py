"""MoRF in large batches against its sequential twin, and against Quantus where the two define the same."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from impactx.evaluation.metrics import morf
from impactx.models import build_classifier
from impactx.settings import ModelSettings

sys.path.insert(0, str(Path(__file__).parent))
from morf_twin import slow_aopc, slow_curves  # noqa: E402


def lenet(size: int, classes: int = 10):
    settings = ModelSettings(name="lenet5", architecture="lenet5")
    return build_classifier(settings, classes, (size, size), seed=3).eval()


def case(images: int, size: int, seed: int = 0):
    generator = np.random.default_rng(seed)
    x = generator.random((images, 3, size, size), np.float32)
    maps = generator.normal(0, 1, (images, 3, size, size)).astype(np.float32)
    maps[0] = np.round(maps[0] / 4)  # a map with many ties
    return x, maps, morf.noise_of(np.arange(images) + 7, (3, size, size), 1)


@pytest.mark.parametrize("size, side", [(32, None), (32, 5), (36, 8), (16, 1)])
def test_curves_are_the_sequential_twins(size, side):
    x, maps, noise = case(3, size)
    model, grid = lenet(size).double(), morf.grid_of((size, size), side)
    score = lambda images: 20 * model(images.double())  # noqa: E731 - probabilities that are not all 1/K
    values = morf.relevance(maps, grid)
    found = morf.curves(score, torch.from_numpy(x), torch.from_numpy(noise),
                        {"map": morf.most_relevant_first(values)}, grid, batch_size=100)["map"]
    for i in range(len(x)):
        probability, logit, predicted, order = slow_curves(score, x[i], noise[i], maps[i], grid.side)
        assert found.predicted[i] == predicted
        assert np.array_equal(np.argsort(morf.most_relevant_first(values)[i]), order)
        np.testing.assert_allclose(found.probability[i], probability, rtol=0, atol=1e-6)
        np.testing.assert_allclose(found.logit[i], logit, rtol=0, atol=1e-6)
        assert morf.aopc(found.probability[i:i + 1], grid.early)[0] == pytest.approx(slow_aopc(probability, grid.early))
        assert morf.aopc(found.logit[i:i + 1], grid.count)[0] == pytest.approx(slow_aopc(logit, grid.count))
    assert np.ptp(found.probability) > 0.05


def test_float32_in_batches_stays_within_1e_6():
    x, maps, noise = case(4, 32)
    model, grid = lenet(32), morf.grid_of((32, 32))
    found = morf.curves(model, torch.from_numpy(x), torch.from_numpy(noise),
                        {"map": morf.most_relevant_first(morf.relevance(maps, grid))}, grid)["map"]
    for i in range(len(x)):
        probability, logit, _, _ = slow_curves(model, x[i], noise[i], maps[i], grid.side)
        np.testing.assert_allclose(found.probability[i], probability, rtol=0, atol=1e-6)
        np.testing.assert_allclose(found.logit[i], logit, rtol=0, atol=1e-6)


def replace_by(noise):
    """Quantus draws its noise anew at every step; with ours the two replace the same pixels by the same values."""
    flat = noise.reshape(len(noise), -1)

    def perturb(arr, indices, **kwargs):
        mixed, rows = np.array(arr), np.arange(len(arr))[:, None]
        mixed[rows, indices] = flat[rows, indices]
        return mixed

    return perturb


# `make install` brings quantus without its opencv-python, which would write over opencv-python-headless.
@pytest.mark.parametrize("order", ["morf", "lerf"])
def test_region_perturbation_agrees_with_quantus(order):
    quantus = pytest.importorskip("quantus")
    x, maps, noise = case(4, 32)
    maps[0] = np.random.default_rng(5).normal(0, 1, maps[0].shape)  # ties are broken otherwise there
    model, grid = lenet(32), morf.grid_of((32, 32))
    values = morf.relevance(maps if order == "morf" else -maps, grid)
    found = morf.curves(model, torch.from_numpy(x), torch.from_numpy(noise),
                        {order: morf.most_relevant_first(values)}, grid)[order]
    metric = quantus.RegionPerturbation(patch_size=4, order=order, regions_evaluation=64, normalise=False, abs=False,
                                        perturb_func=replace_by(noise), disable_warnings=True)
    for softmax, ours in ((True, found.probability), (False, found.logit)):
        theirs = np.array(metric(model=model, x_batch=x, y_batch=found.predicted, a_batch=maps, softmax=softmax,
                                 device="cpu", channel_first=True))
        np.testing.assert_allclose(ours[:, :1] - ours[:, 1:], theirs, rtol=0, atol=1e-6)  # it gives the differences


def test_pixel_flipping_agrees_with_quantus_on_one_channel():
    quantus = pytest.importorskip("quantus")
    generator = np.random.default_rng(1)
    x, maps = (generator.random((2, 1, 12, 12), np.float32) for _ in range(2))
    noise, grid = morf.noise_of(np.arange(2), (1, 12, 12), 0), morf.grid_of((12, 12), 1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
                                torch.nn.Linear(400, 5)).eval()
    found = morf.curves(model, torch.from_numpy(x), torch.from_numpy(noise),
                        {"map": morf.most_relevant_first(morf.relevance(maps, grid))}, grid)["map"]
    metric = quantus.PixelFlipping(features_in_step=1, normalise=False, abs=False, perturb_func=replace_by(noise),
                                   disable_warnings=True)
    theirs = metric(model=model, x_batch=x, y_batch=found.predicted, a_batch=maps, softmax=True, device="cpu",
                    channel_first=True)
    np.testing.assert_allclose(found.probability[:, 1:], theirs, rtol=0, atol=1e-6)
