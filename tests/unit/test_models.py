"""The models against their description (docs/METHOD.md; paper 3 and 4.3), tensor by tensor."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from impactx.approaches.impactx import Impactx, ImpactxNetwork
from impactx.models import (
    Decoder,
    Preprocess,
    UnknownArchitecture,
    build_classifier,
    check_architecture,
    decoder_sizes,
    weights_fingerprint,
)
from impactx.settings import ModelSettings

LENET = ModelSettings(name="lenet5", architecture="lenet5")
SMALL = ModelSettings(name="small", architecture="mobilenetv1_100")  # a timm model with batch norm


def images(count: int, size=(32, 32), seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shapes(module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def impactx(model=LENET, *, size=(32, 32), classes=10, seed=3, classifier=None, **approach) -> ImpactxNetwork:
    classifier = classifier or build_classifier(model, classes, size, seed=1)
    return Impactx(**approach).build(model, classifier, seed=seed)


# ---- LeNet-5

def test_lenet5_has_the_shapes_of_the_description():
    model = build_classifier(LENET, 10, (32, 32), seed=0)
    assert shapes(model.trunk) == {"conv1.weight": (6, 3, 5, 5), "conv1.bias": (6,),
                                   "conv2.weight": (16, 6, 5, 5), "conv2.bias": (16,)}
    assert [tuple(p.shape) for p in model.head.parameters()] == [
        (120, 400), (120,), (84, 120), (84,), (10, 84), (10,)]
    # 61,706 of the grey LeNet-5, plus 6 * 2 * 25 weights for the two further channels of conv1 = 62,006.
    assert sum(p.numel() for p in model.parameters()) == 61_706 + 300


def test_lenet5_computes_what_the_description_says():
    model = build_classifier(LENET, 10, (32, 32), seed=0)
    x = images(3)
    p = dict(model.named_parameters())
    y = (x - 0.5) / 0.5
    for name in ("conv1", "conv2"):
        y = F.conv2d(y, p[f"trunk.{name}.weight"], p[f"trunk.{name}.bias"]).clamp(min=0)
        b, c, h, w = y.shape
        y = y.reshape(b, c, h // 2, 2, w // 2, 2).amax(dim=(3, 5))
    y = y.reshape(3, 400)
    weights = [v for n, v in p.items() if n.startswith("head")]
    for weight, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        y = (y @ weight.T + bias).clamp(min=0)
    logits = y @ weights[-2].T + weights[-1]
    torch.testing.assert_close(model(x), logits)
    torch.testing.assert_close(model.penultimate(x), y)


@pytest.mark.parametrize("size, features", [
    ((28, 28), 256), ((96, 96), 7056), ((16, 16), 16), ((32, 48), 720)])
def test_lenet5_takes_other_sizes(size, features):
    model = build_classifier(LENET, 4, size, seed=0)
    assert model.head.in_features == features
    assert model(images(2, size)).shape == (2, 4)


def test_lenet5_refuses_images_too_small_for_it():
    with pytest.raises(ValueError, match=r"at least 16x16 pixels, got 15x32.*input_size"):
        build_classifier(LENET, 10, (15, 32), seed=0)


# ---- preprocessing

def test_preprocessing_normalises_each_channel():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    out = Preprocess((8, 8), (8, 8), mean, std)(images(2, (8, 8)))
    for c in range(3):
        torch.testing.assert_close(out[:, c], (images(2, (8, 8))[:, c] - mean[c]) / std[c])


def test_preprocessing_resizes_antialiased():
    """Halving with antialias is the triangle filter of radius 2: weights 1, 3, 3, 1 over 8 for each axis."""
    x = images(1, (16, 16), dtype=torch.float64)
    out = Preprocess((16, 16), (8, 8), (0, 0, 0), (1, 1, 1)).double()(x)
    kernel = torch.tensor([1, 3, 3, 1], dtype=torch.float64) / 8
    inner = x[:, :, 5:9, 7:11]  # output pixel (3, 4) is centred between input rows 6, 7 and columns 8, 9
    expected = (inner * kernel[:, None] * kernel[None, :]).sum(dim=(2, 3))
    torch.testing.assert_close(out[:, :, 3, 4], expected)


def test_a_model_carries_its_resize():
    settings = LENET.model_copy(update={"input_size": 32})
    model = build_classifier(settings, 10, (96, 64), seed=0)
    assert model.head.in_features == 400 and model.image_size == (96, 64)
    assert model(images(2, (96, 64))).shape == (2, 10)


@pytest.mark.parametrize("x, error", [
    (torch.zeros(2, 3, 28, 28), ValueError), (torch.zeros(2, 1, 32, 32), ValueError),
    (torch.zeros(3, 32, 32), ValueError), (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError)])
def test_wrong_images_are_refused_by_name(x, error):
    with pytest.raises(error, match=r"this model takes") as caught:
        build_classifier(LENET, 10, (32, 32), seed=0)(x)
    assert (str(tuple(x.shape)) if error is ValueError else "torch.uint8") in str(caught.value)


def test_a_std_of_zero_is_refused():
    with pytest.raises(ValueError, match="stds above 0"):
        Preprocess((8, 8), (8, 8), (0, 0, 0), (1, 0, 1))


# ---- timm

@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("architecture, features, mean", [
    ("mobilenetv1_100", 1024, 0.5), ("tf_efficientnet_b2.ns_jft_in1k", 1408, 0.485)])
def test_timm_models_of_the_paper(architecture, features, mean, size):
    settings = ModelSettings(name="m", architecture=architecture)
    model = build_classifier(settings, 10, (size, size), seed=0).eval()
    assert model.num_features == model.head.in_features == features and model.num_classes == 10
    assert model.preprocess.mean.flatten()[0].item() == pytest.approx(mean)  # timm's own for these weights
    x = images(2, (size, size))
    with torch.no_grad():
        logits, penultimate = model(x), model.penultimate(x)
    assert logits.shape == (2, 10) and penultimate.shape == (2, features)
    torch.testing.assert_close(logits, penultimate @ model.head.last.weight.T + model.head.last.bias)


def test_timm_trunk_is_timm_without_its_classifier():
    import timm
    model = build_classifier(SMALL, 10, (32, 32), seed=0).eval()
    peer = timm.create_model("mobilenetv1_100", num_classes=10).eval()
    peer.load_state_dict({**model.trunk.state_dict(), "classifier.weight": model.head.last.weight,
                          "classifier.bias": model.head.last.bias})
    x = images(2)
    with torch.no_grad():
        torch.testing.assert_close(model(x), peer((x - 0.5) / 0.5))


@pytest.mark.parametrize("name, close", [
    ("mobilenetv1_10", "mobilenetv1_100"), ("lenet", "lenet5"), ("resnet18x", "resnet18"),
    ("tf_efficientnet_b2.noisy", "tf_efficientnet_b2.ns_jft_in1k")])
def test_unknown_architecture_names_close_ones(name, close):
    with pytest.raises(UnknownArchitecture) as caught:
        check_architecture(name)
    assert close in str(caught.value) and name.rpartition(".")[2] in str(caught.value)


def test_a_size_the_architecture_cannot_take_is_said():
    settings = ModelSettings(name="vit", architecture="vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"(?s)vit_tiny_patch16_224 cannot take images of 32x32.*"
                                         r"input_size.*224"):
        build_classifier(settings, 10, (32, 32), seed=0)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        build_classifier(LENET, 1, (32, 32), seed=0)


# ---- decoder

def test_decoder_at_32_is_figure_2():
    decoder = Decoder(512, (32, 32))
    assert shapes(decoder) == {
        "expand.weight": (8 * 8 * 32, 512), "expand.bias": (2048,),
        "blocks.0.0.weight": (32, 32, 3, 3), "blocks.0.0.bias": (32,),
        "blocks.0.2.weight": (32, 32, 3, 3), "blocks.0.2.bias": (32,),
        "blocks.1.0.weight": (16, 32, 3, 3), "blocks.1.0.bias": (16,),
        "blocks.1.2.weight": (16, 16, 3, 3), "blocks.1.2.bias": (16,),
        "to_map.weight": (3, 16, 3, 3), "to_map.bias": (3,)}


def test_decoder_at_96_has_one_block_more():
    decoder = Decoder(512, (96, 96))
    small = shapes(Decoder(512, (32, 32)))
    assert shapes(decoder) == {
        **{name: shape for name, shape in small.items() if name.startswith("blocks")},
        "expand.weight": (12 * 12 * 32, 512), "expand.bias": (4608,),
        "blocks.2.0.weight": (8, 16, 3, 3), "blocks.2.0.bias": (8,),
        "blocks.2.2.weight": (8, 8, 3, 3), "blocks.2.2.bias": (8,),
        "to_map.weight": (3, 8, 3, 3), "to_map.bias": (3,)}


@pytest.mark.parametrize("size, channels", [((32, 32), 3), ((96, 96), 1)])
def test_decoder_computes_what_the_description_says(size, channels):
    decoder = Decoder(16, size, channels).double()
    z = torch.rand(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = dict(decoder.named_parameters())
    start = 8 if size == (32, 32) else 12
    y = (z @ p["expand.weight"].T + p["expand.bias"]).reshape(2, 32, start, start)
    for block in range(2 if size == (32, 32) else 3):
        for layer in (0, 2):
            weight, bias = p[f"blocks.{block}.{layer}.weight"], p[f"blocks.{block}.{layer}.bias"]
            y = F.conv2d(y, weight, bias, padding=1).clamp(min=0)
        y = y.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # UpSampling x2, nearest
    y = F.conv2d(y, p["to_map.weight"], p["to_map.bias"], padding=1)
    assert y.shape == (2, channels, *size)
    torch.testing.assert_close(decoder(z), y)


@pytest.mark.parametrize("size, start, blocks", [
    ((32, 32), (8, 8), 2), ((96, 96), (12, 12), 3), ((28, 28), (7, 7), 2), ((48, 48), (12, 12), 2),
    ((64, 64), (8, 8), 3), ((224, 224), (7, 7), 5), ((100, 100), (7, 7), 4), ((33, 47), (9, 12), 2),
    ((16, 64), (2, 8), 3), ((8, 8), (4, 4), 1)])
def test_decoder_meets_any_native_size(size, start, blocks):
    sizes = decoder_sizes(size)
    assert sizes[0] == start and sizes[-1] == size and len(sizes) == blocks + 1
    for smaller, larger in zip(sizes, sizes[1:], strict=False):
        assert smaller == tuple(math.ceil(side / 2) for side in larger)
    with torch.no_grad():
        assert Decoder(4, size)(torch.rand(1, 4)).shape == (1, 3, *size)


# ---- IMPACTX

@pytest.mark.parametrize("model, features, penultimate", [(LENET, 400, 84), (SMALL, 1024, 1024)])
@pytest.mark.parametrize("m", ["logits", "penultimate"])
def test_impactx_parts(model, features, penultimate, m):
    net = impactx(model, m=m)
    assert shapes(net.lep.to_latent) == {"weight": (512, features), "bias": (512,)}
    width = 10 if m == "logits" else penultimate
    assert shapes(net.c) == {"weight": (10, width + 512), "bias": (10,)}
    net.eval()
    x = images(2)
    with torch.no_grad():
        logits, maps = net(x)
        assert logits.shape == (2, 10) and maps.shape == (2, 3, 32, 32)
        # Paper 3.3: z = LEP(x), r = D(z), y = C([m, z]); here from A and the LEP's parts.
        z = torch.sigmoid(net.lep.to_latent(net.lep.trunk(net.a.preprocess(x))))
        scores = net.a(x) if m == "logits" else net.a.penultimate(x)
        torch.testing.assert_close(net.encode(x), z)
        torch.testing.assert_close(logits, torch.cat([scores, z], 1) @ net.c.weight.T + net.c.bias)
        torch.testing.assert_close(maps, net.decoder(z))
        assert torch.equal(net.classify(x), logits)


def test_the_lep_keeps_no_fully_connected_layer_of_a():
    net = impactx()
    assert [m for m in net.lep.modules() if isinstance(m, torch.nn.Linear)] == [net.lep.to_latent]
    assert shapes(net.lep.trunk) == shapes(net.a.trunk)


@pytest.mark.parametrize("model", [LENET, SMALL], ids=lambda m: m.name)
def test_a_training_step_moves_everything_but_m(model):
    net = impactx(model)
    net.train()
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        logits, maps = net(images(8, seed=step))
        (F.cross_entropy(logits, torch.arange(8)) + F.mse_loss(maps, torch.randn(8, 3, 32, 32))).backward()
        optimizer.step()
    after = net.state_dict()
    assert any("running_var" in name for name in before) == (model is SMALL)
    for name in before:
        fixed = name.startswith("a.")
        assert torch.equal(before[name], after[name]) == fixed, name
    assert not net.a.training and not any(m.training for m in net.a.modules())
    assert net.lep.training and net.decoder.training and net.c.training
    assert all(p.grad is None for p in net.a.parameters())


def test_m_keeps_no_graph_in_training():
    net = impactx(SMALL).train()
    assert not net.a(images(2)).requires_grad
    assert net.classify(images(2)).requires_grad


@pytest.mark.parametrize("loss, reached, spared", [
    ("ce", ("lep", "c"), ("a", "decoder")), ("mse", ("lep", "decoder"), ("a", "c"))])
def test_where_each_loss_reaches(loss, reached, spared):
    net = impactx(SMALL)
    logits, maps = net(images(4))
    (F.cross_entropy(logits, torch.arange(4)) if loss == "ce" else maps.square().mean()).backward()
    for part in reached:
        for name, p in getattr(net, part).named_parameters():
            # In front of a batch norm over 1x1 pixels a gradient may be exactly 0, but it is there.
            assert p.grad is not None, f"{part}.{name}"
        assert any(p.grad.abs().max() > 0 for p in getattr(net, part).parameters()), part
    for part in spared:
        assert all(p.grad is None for p in getattr(net, part).parameters()), part


def test_gradients_for_attributions_run_through_both_branches():
    """d logit / d x against finite differences of the whole, in float64, and each branch's share is not 0."""
    net = impactx().double().eval()
    x = images(1, dtype=torch.float64).requires_grad_()
    gradient, = torch.autograd.grad(net(x)[0][0, 3], x)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = 1e-7
    with torch.no_grad():
        moved = (net.classify(x + step * direction) - net.classify(x - step * direction))[0, 3] / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(moved.item(), rel=1e-5)
    for share in (slice(None, 10), slice(10, None)):  # m, then z, silenced in C
        one = copy.deepcopy(net)
        with torch.no_grad():
            one.c.weight[:, share] = 0
        assert torch.autograd.grad(one.classify(x)[0, 3], x)[0].abs().max() > 0


def test_the_given_classifier_is_left_alone():
    classifier = build_classifier(SMALL, 10, (32, 32), seed=1).train()
    before = weights_fingerprint(classifier)
    net = impactx(SMALL, classifier=classifier)
    assert all(p.requires_grad for p in classifier.parameters()) and classifier.training
    with torch.no_grad():
        net.a.head.last.weight.add_(1)
    assert weights_fingerprint(classifier) == before


def test_lep_start():
    classifier = build_classifier(SMALL, 10, (32, 32), seed=1)
    start = weights_fingerprint(classifier.trunk)
    with torch.no_grad():
        for p in classifier.parameters():
            p.mul_(1.01)  # "trained"
    trained = weights_fingerprint(classifier.trunk)
    as_stage1 = impactx(SMALL, classifier=classifier, seed=1)
    assert weights_fingerprint(as_stage1.lep.trunk) == start  # the seed of build_classifier: where A started
    another = impactx(SMALL, classifier=classifier, seed=2)
    assert weights_fingerprint(another.lep.trunk) not in (start, trained)
    copied = impactx(SMALL, classifier=classifier, lep_start="from_stage1", seed=2)
    assert weights_fingerprint(copied.lep.trunk) == trained
    assert all(p.requires_grad for p in copied.lep.parameters())
    assert copied.lep.trunk is not copied.a.trunk


def test_impactx_of_another_architecture_is_refused():
    classifier = build_classifier(LENET, 10, (32, 32), seed=1)
    with pytest.raises(ValueError, match="not of the architecture mobilenetv1_100"):
        Impactx().build(SMALL, classifier, seed=1)


# ---- seeds and float64

@pytest.mark.parametrize("model", [LENET, SMALL], ids=lambda m: m.name)
def test_a_seed_decides_the_weights_and_nothing_else_is_touched(model):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = impactx(model, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert weights_fingerprint(impactx(model, seed=7)) == weights_fingerprint(first)
    other = impactx(model, seed=8)
    for part in ("lep.trunk", "lep.to_latent", "decoder", "c"):
        ours, theirs = (weights_fingerprint(net.get_submodule(part)) for net in (first, other))
        assert ours != theirs, part
    assert weights_fingerprint(build_classifier(model, 10, (32, 32), seed=0)) != weights_fingerprint(
        build_classifier(model, 10, (32, 32), seed=1))


def test_parts_have_streams_of_their_own():
    """Another number of classes or another m changes C only: comparisons stay paired."""
    base, changed = impactx(), impactx(m="penultimate")
    for part in ("lep", "decoder"):
        ours, theirs = (weights_fingerprint(net.get_submodule(part)) for net in (base, changed))
        assert ours == theirs, part
    trunks = [weights_fingerprint(build_classifier(LENET, k, (32, 32), seed=0).trunk) for k in (10, 100)]
    assert trunks[0] == trunks[1]
    # torch draws a linear layer's weights from +-1 / sqrt(in_features)
    draws = [layer.weight.flatten()[:99] * layer.in_features ** 0.5
             for layer in (base.lep.to_latent, base.decoder.expand, base.c, base.a.head.last)]
    for i, first in enumerate(draws):
        assert all(not torch.allclose(first, other, atol=1e-3) for other in draws[i + 1:])


@pytest.mark.parametrize("model", [LENET, SMALL.model_copy(update={"input_size": 48})],
                         ids=lambda m: m.name)
def test_float64(model):
    net = impactx(model).eval()
    twin = copy.deepcopy(net).double()
    x = images(2)
    with torch.no_grad():
        low, high = net(x), twin(x.double())
    for a, b in zip(low, high, strict=True):
        assert b.dtype == torch.float64
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-4)
    # A model in double gives its IMPACTX in double.
    classifier = build_classifier(model, 10, (32, 32), seed=1).double()
    assert {p.dtype for p in impactx(model, classifier=classifier).parameters()} == {torch.float64}
