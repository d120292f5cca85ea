"""How well maps predict other maps: against plain formulas, and at the ends of the scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from impactx.approaches.impactx import Impactx
from impactx.evaluation.metrics.fidelity import agreement, randomised
from impactx.evaluation.targets import mean_maps
from impactx.models import build_classifier
from impactx.settings import ModelSettings


def maps(seed: int, count: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (count, 3, 8, 8)).astype(np.float32)


def test_agreement_is_the_plain_formulas():
    a, b = maps(0), maps(1) + maps(0)
    found = agreement(a, b, top_share=0.25)
    for i in range(len(a)):
        x, y = a[i].astype(float).ravel(), b[i].astype(float).ravel()
        assert found["mse"][i] == pytest.approx(sum((p - q) ** 2 for p, q in zip(x, y, strict=True)) / len(x))
        assert found["correlation"][i] == pytest.approx(np.corrcoef(x, y)[0, 1])
        tops = [set(sorted(range(64), key=lambda k, m=m: -m[i].astype(float).sum(0).ravel()[k])[:16]) for m in (a, b)]
        assert found["overlap"][i] == pytest.approx(len(tops[0] & tops[1]) / 16)
    assert found["correlation"].mean() > 0.5


def test_the_ends_of_the_scale():
    a = maps(0)
    same, opposite = agreement(a, a), agreement(a, -a)
    assert (same["mse"] == 0).all() and same["correlation"] == pytest.approx(1) and (same["overlap"] == 1).all()
    assert opposite["correlation"] == pytest.approx(-1) and (opposite["overlap"] == 0).all()
    constant = agreement(np.full_like(a, 0.1), a)
    assert np.isnan(constant["correlation"]).all() and np.isfinite(constant["mse"]).all()


@pytest.mark.parametrize("scale", [2.0, np.arange(1.0, 31.0)])
def test_mean_maps_are_those_of_the_chosen_images(scale):
    whole, labels = maps(2, 30), np.arange(30) % 3
    chosen = np.array([0, 1, 2, 3, 7, 20, 29])
    mean, by_class = mean_maps(whole, labels, chosen, 3, scale)
    scaled = np.stack([whole[i].astype(float) * (scale if np.ndim(scale) == 0 else scale[i]) for i in range(30)])
    np.testing.assert_allclose(mean, scaled[chosen].mean(0))
    for label in range(3):
        np.testing.assert_allclose(by_class[label], scaled[[i for i in chosen if i % 3 == label]].mean(0))


def test_only_the_decoder_is_randomised_and_the_model_stays():
    settings = ModelSettings(name="lenet5", architecture="lenet5")
    model = Impactx(latent=8).build(settings, build_classifier(settings, 4, (32, 32), seed=0), seed=0)
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = randomised(model, "decoder", 5)
    changed = {name.partition(".")[0] for name, tensor in other.state_dict().items()
               if not torch.equal(tensor, before[name])}
    assert changed == {"decoder"} and all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(other(x)[0], model(x)[0]) and not torch.equal(other(x)[1], model(x)[1])
    assert torch.equal(randomised(model, "decoder", 5)(x)[1], other(x)[1])
