"""Attributions beside partition SHAP: against captum and shap called directly, and against closed forms.

On a linear model everything is known: integrated gradients and gradient SHAP are weight x (image - baseline),
occlusion is a mean of sums of those products. Grad-CAM is written out by hand. The network of the comparisons was
trained, so a map that says nothing cannot pass.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from impactx.explain.masking import parse_masker
from impactx.settings import extensions

captum_attr = pytest.importorskip("captum.attr")
shap = pytest.importorskip("shap")

SIZE, CLASSES = 16, 10


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits as uint8 (1797, 16, 16, 3), and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = (found.images / 16 * 255).astype(np.uint8).repeat(2, 1).repeat(2, 2)
    return np.stack([grey, 255 - grey, grey // 2], axis=-1), found.target.astype(np.int64)


@cache
def network() -> nn.Module:
    """A small CNN after two epochs, with an in-place activation behind its convolutions, its parameters frozen."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                        nn.Conv2d(8, 12, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12 * 36, CLASSES))
    images, labels = digits()
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(2):
        for batch in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimiser.step()
    net.eval().requires_grad_(False)
    assert (net(x).argmax(1) == y).float().mean() > 0.8
    return net


def some(count: int = 6) -> tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]:
    chosen = np.random.default_rng(3).choice(1797, count, replace=False)
    images, labels = digits()
    return (images[chosen], labels[chosen], torch.from_numpy(images[chosen]).permute(0, 3, 1, 2).float() / 255,
            torch.from_numpy(labels[chosen]))


def made(score, images, labels, **settings):
    return extensions.attribution.parse(settings).explain(score, images, labels)


def says_something(maps: np.ndarray) -> None:
    flat = maps.reshape(len(maps), -1)
    assert (np.abs(flat).sum(1) > 0.05).all() and (flat.std(1) > 0.1 * np.abs(flat).mean(1)).all()


def agree(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-5) -> None:
    says_something(theirs)
    apart = np.abs(ours - theirs).reshape(len(ours), -1).max(1) / np.abs(theirs).reshape(len(ours), -1).max(1)
    print(f"largest difference, relative to the map's largest value: {apart.max():.1e}")
    assert apart.max() < tolerance


# --- captum and shap as peers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("masker", ["0", "blur(5,5)", "0.2,0.4,0.6"])
@pytest.mark.parametrize("explain", ["logit", "probability"])
def test_integrated_gradients_are_captums(masker, explain):
    images, labels, x, y = some()
    baselines = parse_masker(masker).background(x)
    score = network() if explain == "logit" else lambda batch: network()(batch).softmax(1)
    theirs = captum_attr.IntegratedGradients(score).attribute(x, baselines, target=y, n_steps=16)
    found = made(network(), images, labels, method="integrated_gradients", masker=masker, explain=explain, steps=16)
    agree(found.maps, theirs.numpy())
    np.testing.assert_allclose(found.scores, score(x).gather(1, y[:, None])[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found.base_values, score(baselines).gather(1, y[:, None])[:, 0], rtol=1e-5)


def test_integrated_gradients_add_up_better_with_more_steps():
    from impactx.explain.scores import completeness_gaps

    images, labels, _, _ = some(4)
    gaps = []
    for steps in (4, 200):
        found = made(network(), images, labels, method="integrated_gradients", steps=steps)
        gaps.append(completeness_gaps(found.maps, found.scores, found.base_values))
    print("completeness gaps, 4 and 200 steps:", gaps[0].max(), gaps[1].max())
    assert gaps[1].max() < 2e-3 and gaps[1].max() < gaps[0].max() / 5


def test_gradient_shap_is_captums_with_the_same_numbers():
    images, labels, x, y = some(3)
    maskers = ["0", "1", "blur(4,4)"]
    found = made(network(), images, labels, method="gradient_shap", maskers=maskers, samples=25, seed=7)
    theirs = []
    for i in range(3):
        baselines = torch.cat([parse_masker(m).background(x[i:i + 1]) for m in maskers])
        np.random.seed(np.random.SeedSequence([7, i]).generate_state(2)[0])
        theirs.append(captum_attr.GradientShap(network()).attribute(
            x[i:i + 1], baselines, n_samples=25, stdevs=0.0, target=y[i]).numpy()[0])
    agree(found.maps, np.stack(theirs))


def test_gradient_shap_with_noise_estimates_what_captum_estimates():
    images, labels, x, y = some(1)
    ours = made(network(), images, labels, method="gradient_shap", samples=1500, noise=0.1).maps
    torch.manual_seed(0)
    np.random.seed(0)
    for i in range(1):
        baselines = torch.cat([torch.zeros_like(x[:1]), torch.ones_like(x[:1])])
        theirs = captum_attr.GradientShap(network()).attribute(x[i:i + 1], baselines, n_samples=1500, stdevs=0.1,
                                                               target=y[i]).numpy()[0]
        correlation = np.corrcoef(ours[i].ravel(), theirs.ravel())[0, 1]
        print(f"two estimates of 1500 samples correlate by {correlation:.4f}")
        assert correlation > 0.99


@pytest.mark.parametrize("masker, window, stride", [("0.5", 4, 2), ("blur(7,7)", 5, 3), ("0", 16, 16), ("1", 1, 1)])
def test_occlusion_is_captums(masker, window, stride):
    images, labels, x, y = some()
    theirs = captum_attr.Occlusion(network()).attribute(
        x, (3, window, window), strides=(3, stride, stride), baselines=parse_masker(masker).background(x), target=y)
    found = made(network(), images, labels, method="occlusion", masker=masker, window=window, stride=stride)
    if window == 16:  # one square hides everything
        np.testing.assert_allclose(found.maps, theirs.numpy(), rtol=1e-4, atol=1e-5)
    else:
        agree(found.maps, theirs.numpy(), 2e-5)


@pytest.mark.parametrize("layer", [None, "0", "4"])
@pytest.mark.parametrize("relu", [True, False])
def test_grad_cam_is_captums(layer, relu):
    images, labels, x, y = some(40)
    at = network().get_submodule(layer or "4")
    theirs = captum_attr.LayerGradCam(network(), at).attribute(
        x.clone().requires_grad_(), target=y, relu_attributions=relu).detach()
    theirs = captum_attr.LayerAttribution.interpolate(theirs, (SIZE, SIZE), "bilinear").numpy()[:, 0]
    found = made(network(), images, labels, method="grad_cam", layer=layer, relu=relu)
    assert found.maps.shape == (40, 3, SIZE, SIZE)
    np.testing.assert_array_equal(found.maps[:, 0], found.maps[:, 1])
    kept = np.abs(theirs).reshape(40, -1).sum(1) > 0.1  # ReLU may leave nothing of a map
    assert kept.sum() > 20
    agree(found.maps.sum(1)[kept], theirs[kept])
    np.testing.assert_allclose(found.maps.sum(1), theirs, atol=1e-4)
    assert np.isnan(found.base_values).all()


@pytest.mark.parametrize("masker, batch_size, fixed_context", [("blur(5,5)", 50, None), ("0.5", 10, 0)])
def test_stock_shap_is_shap_and_partition_is_stock_shap(masker, batch_size, fixed_context):
    images, labels, x, y = some(4)
    settings = dict(masker=masker, batch_size=batch_size, fixed_context=fixed_context, max_evals=300)
    stock = made(network(), images, labels, method="shap_partition", **settings)
    batched = made(network(), images, labels, method="partition", **settings)
    agree(batched.maps, stock.maps)
    np.testing.assert_allclose(batched.scores, stock.scores, rtol=1e-5)
    np.testing.assert_allclose(batched.base_values, stock.base_values, rtol=1e-4, atol=1e-5)
    pixels = np.ascontiguousarray(x[0].permute(1, 2, 0).numpy())
    value = masker if masker.startswith("blur") else np.full_like(pixels, float(masker))
    explainer = shap.PartitionExplainer(
        lambda p: network()(torch.from_numpy(p).permute(0, 3, 1, 2).contiguous()).numpy(),
        shap.maskers.Image(value, pixels.shape))
    direct = explainer(pixels[None], max_evals=300, batch_size=batch_size, outputs=[int(y[0])],
                       fixed_context=fixed_context, silent=True)
    agree(stock.maps[:1], np.moveaxis(direct.values[..., 0], 3, 1), 1e-7)


# --- closed forms --------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """f_k(x) = sum of w_k x + b_k."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(CLASSES, 3, SIZE, SIZE, generator=generator), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(CLASSES, generator=generator), requires_grad=False)

    def forward(self, x):  # noqa: ANN001, ANN201
        return torch.einsum("bchw,kchw->bk", x, self.weight) + self.bias


@pytest.mark.parametrize("settings", [
    dict(method="integrated_gradients", masker="0.3", steps=3),
    dict(method="gradient_shap", maskers=["0.3"], samples=4)])
def test_gradients_of_a_linear_model_are_weight_times_difference(settings):
    images, labels, x, y = some()
    linear = Linear().eval()
    expected = linear.weight[y] * (x - 0.3)
    found = made(linear, images, labels, **settings)
    np.testing.assert_allclose(found.maps, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.maps.sum((1, 2, 3)), found.scores - found.base_values, rtol=1e-3)


def test_gradient_shap_of_a_linear_model_averages_its_baselines():
    images, labels, x, y = some(2)
    linear = Linear().eval()
    found = made(linear, images, labels, method="gradient_shap", maskers=["0", "1"], samples=3000)
    expected = linear.weight[y] * (x - 0.5)
    spread = linear.weight[y].abs() * 0.5 / np.sqrt(3000)  # a baseline is 0 or 1, drawn for all pixels together
    assert (np.abs(found.maps - expected.numpy()) < 5 * spread.numpy() + 1e-6).all()


def test_occlusion_of_a_linear_model_is_a_mean_of_sums_of_differences():
    images, labels, x, y = some(3)
    linear, window, stride = Linear().eval(), 5, 3
    products = (linear.weight[y] * (x - 0.5)).sum(1).numpy()  # (N, H, W)
    total, count = np.zeros_like(products), np.zeros((SIZE, SIZE))
    places = sorted({min(k * stride, SIZE) for k in range(1 + -(-(SIZE - window) // stride))})
    for top in places:
        for left in places:
            square = np.s_[top:top + window, left:left + window]
            total[(slice(None), *square)] += products[(slice(None), *square)].sum((1, 2))[:, None, None]
            count[square] += 1
    found = made(linear, images, labels, method="occlusion", masker="0.5", window=window, stride=stride)
    assert count.min() >= 1
    for channel in range(3):
        np.testing.assert_allclose(found.maps[:, channel], total / count, rtol=1e-3, atol=1e-4)


def test_grad_cam_by_hand():
    """y = v . mean over places of ReLU(conv(x)): the weight of a channel is the mean of its gradients."""
    torch.manual_seed(1)
    conv, head = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Linear(4, CLASSES)
    model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval().requires_grad_(False)
    images, labels, x, y = some(3)
    activations = conv(x)
    places = activations.shape[2] * activations.shape[3]
    gradient = head.weight[y][:, :, None, None] * (activations > 0) / places
    small = (gradient.mean((2, 3), keepdim=True) * activations).sum(1, keepdim=True)
    expected = F.interpolate(small, size=(SIZE, SIZE), mode="bilinear")[:, 0]
    found = made(model, images, labels, method="grad_cam", relu=False)
    np.testing.assert_allclose(found.maps.sum(1), expected, rtol=1e-4, atol=1e-7)
