"""The compared approaches against their description, tensor by tensor: plain twins written out, in float64."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from impactx.approaches.abn import Abn, AbnOutput, NoSplit
from impactx.approaches.ensemble import EnsembleNetwork
from impactx.approaches.single_stage import SingleStage
from impactx.approaches.wae import Wae
from impactx.explain.masking import parse_masker
from impactx.explain.partition.fast import fast_score
from impactx.explain.weighted import class_probabilities, explain_by_own_probabilities
from impactx.models import build_classifier, build_trunk
from impactx.models.logits import Logits
from impactx.settings import ModelSettings
from impactx.settings.extensions import attribution

sys.path.insert(0, str(Path(__file__).parent))
from partition_twin import partition_values  # noqa: E402

LENET = ModelSettings(name="lenet5", architecture="lenet5")


def images(count=5, size=32, dtype=torch.float64):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def shapes(module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def norm(x, bn):
    """Batch norm in training mode, from its definition: over batch and places."""
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
    return (x - mean) / (variance + bn.eps).sqrt() * bn.weight[:, None, None] + bn.bias[:, None, None]


# ---- ABN

def test_abn_of_lenet5_has_the_tensors_of_the_description():
    net = Abn().build(LENET, 10, (32, 32), seed=0)
    assert shapes(net.branch) == {
        "stage.0.weight": (16, 6, 5, 5), "stage.0.bias": (16,), "norm.weight": (16,), "norm.bias": (16,),
        "to_classes.weight": (10, 16, 1, 1), "classes_norm.weight": (10,), "classes_norm.bias": (10,),
        "to_logits.weight": (10, 10, 1, 1), "to_map.weight": (1, 10, 3, 3), "map_norm.weight": (1,),
        "map_norm.bias": (1,)}
    a = build_classifier(LENET, 10, (32, 32), seed=0)
    mine = net.a.state_dict()
    assert all(torch.equal(t, mine[name]) for name, t in a.state_dict().items())  # A's own start
    branch = sum(p.numel() for p in net.branch.parameters())
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in a.parameters()) + branch


def test_abn_of_lenet5_is_the_description_written_out():
    net = Abn().build(LENET, 10, (32, 32), seed=3).double()
    x, b, trunk, head = images(), net.branch, net.a.trunk, net.a.head
    features = F.max_pool2d(F.relu(F.conv2d((x - 0.5) / 0.5, trunk.conv1.weight, trunk.conv1.bias)), 2)
    assert features.shape == (5, 6, 14, 14)  # before the second and last halving
    s = norm(F.relu(F.conv2d(features, b.stage[0].weight, b.stage[0].bias, padding=2)), b.norm)
    s = F.relu(norm(torch.einsum("kc,bchw->bkhw", b.to_classes.weight[:, :, 0, 0], s), b.classes_norm))
    attention_logits = torch.einsum("jk,bkhw->bj", b.to_logits.weight[:, :, 0, 0], s) / (14 * 14)
    attention = 1 / (1 + torch.exp(-norm(F.conv2d(s, b.to_map.weight, padding=1), b.map_norm)))
    onward = F.relu(F.conv2d(features * (1 + attention), trunk.conv2.weight, trunk.conv2.bias))
    flat = F.max_pool2d(onward, 2).flatten(1)
    logits = head.last(F.relu(head.hidden[2](F.relu(head.hidden[0](flat)))))
    found = net(x)
    assert isinstance(found, AbnOutput) and found.maps.shape == (5, 1, 14, 14)
    for mine, theirs in zip(found, (logits, attention, attention_logits), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(net.classify(x), logits, rtol=0, atol=1e-12)
    enlarged = net.with_maps(x)[1]
    assert enlarged.shape == (5, 1, 32, 32) and 0 < enlarged.min() and enlarged.max() < 1


def test_both_losses_reach_the_backbone_and_the_map_is_not_detached():
    net = Abn().build(LENET, 10, (32, 32), seed=3).double()
    found = net(images())
    of_attention = torch.autograd.grad(found.attention_logits.sum(), net.a.trunk.conv1.weight, retain_graph=True)
    of_perception = torch.autograd.grad(found.logits.sum(), net.branch.to_map.weight)
    assert of_attention[0].abs().sum() > 0 and of_perception[0].abs().sum() > 0
    copy.deepcopy(net)  # nothing of a forward stays in it


@pytest.mark.parametrize("architecture, size, path, features, map_size", [
    ("mobilenetv1_100", 224, "blocks.4", 512, 14), ("tf_efficientnet_b2", 260, "blocks.5", 120, 17),
    ("resnet18", 224, "layer4", 256, 14), ("resnet18", 128, "layer4", 256, 8), ("resnet18", 64, "layer3", 128, 8),
    ("lcnet_035", 32, "blocks.2", None, 8),
    ("densenet121", 64, "features.transition2", 512, 8), ("convnext_atto", 64, "stages.2", 80, 8),
    ("resnetblur18", 64, "layer3", 128, 8)])
def test_a_timm_backbone_is_cut_before_its_last_halving_stage(architecture, size, path, features, map_size):
    settings = ModelSettings(name="m", architecture=architecture, input_size=size)
    net = Abn().build(settings, 10, (32, 32), seed=1).eval()
    assert net.where == f"{path}.0"
    stage = net.a.trunk.get_submodule(path)[1]
    given = []
    stage.register_forward_pre_hook(lambda m, i: given.append(i[0]))
    with torch.no_grad():
        found = net(images(2, dtype=torch.float32))
    assert found.logits.shape == found.attention_logits.shape == (2, 10)
    assert found.maps.shape == (2, 1, map_size, map_size) and 0 < found.maps.min() < found.maps.max() < 1
    assert features in (None, given[0].shape[1]) and given[0].shape[2:] == (map_size, map_size)
    # The branch has the next stage's tensors, fresh; the rest is the backbone as A starts.
    copied, own = net.branch.stage.state_dict(), stage.state_dict()
    assert {k: t.shape for k, t in copied.items()} == {k: t.shape for k, t in own.items()}
    kernels = [k for k, t in own.items() if t.ndim == 4]
    assert kernels and not any(torch.equal(copied[k], own[k]) for k in kernels)
    a = build_classifier(settings, 10, (32, 32), seed=1)
    assert torch.equal(a.trunk.state_dict()[f"{path}.{kernels[0]}"], own[kernels[0]])


def test_a_branch_that_says_nothing_leaves_the_backbone_as_it_is():
    """With M = 0 the perception branch is A itself: the cut is on the way of everything, and nothing is lost there."""
    settings = ModelSettings(name="m", architecture="mobilenetv1_100", input_size=224)
    net, a = Abn().build(settings, 10, (32, 32), seed=1), build_classifier(settings, 10, (32, 32), seed=1)
    with torch.no_grad():
        net.branch.map_norm.bias.fill_(-1e4)
        torch.testing.assert_close(net.eval().classify(images(2, dtype=torch.float32)),
                                   a.eval()(images(2, dtype=torch.float32)), rtol=1e-5, atol=1e-6)


def unchanged_by_training(net) -> list[str]:
    """The parameters that two steps leave as they were (timm starts a residual branch at 0: one step has it move)."""
    before = [p.detach().clone() for p in net.train().parameters()]
    x, labels = images(4, dtype=torch.float32), torch.tensor([0, 1, 2, 0])
    for rate in (1e-3, 3e-3):  # two that cannot cancel
        net.zero_grad()
        found = net(x)
        (F.cross_entropy(found.logits, labels) + F.cross_entropy(found.attention_logits, labels)).backward()
        for p in net.parameters():
            p.data -= rate * p.grad.sign()  # however small: ConvNeXt's layer scale starts at 1e-6
    return [name for (name, p), old in zip(net.named_parameters(), before, strict=True) if torch.equal(p, old)]


def test_a_pooling_of_its_own_has_its_stage_before_it():
    """VGG's, a flat list of layers: the stage begins after the pooling before, as LeNet-5's does."""
    net = Abn().build(ModelSettings(name="m", architecture="vgg11", input_size=64), 3, (32, 32), seed=1)
    assert net.where == "features.11.0"  # features: ... 10 pooling to 8x8, 11 conv, relu, 13 conv, relu, 15 pooling ...
    assert [type(layer).__name__ for layer in net.branch.stage] == ["Conv2d", "ReLU", "Conv2d", "ReLU", "Identity"]
    assert net(images(2, dtype=torch.float32)).maps.shape == (2, 1, 8, 8)
    assert unchanged_by_training(net) == []


@pytest.mark.parametrize("architecture", ["densenet121", "convnext_atto", "resnetblur18", "lcnet_035"])
def test_every_parameter_is_trained(architecture):
    settings = ModelSettings(name="m", architecture=architecture, input_size=64)
    assert unchanged_by_training(Abn().build(settings, 3, (32, 32), seed=1)) == []


@pytest.mark.parametrize("architecture, left_out", [
    ("convnext_atto", 0), ("resnetblur18", 0), ("densenet121", 1), ("resnet10t", 1), ("legacy_xception", 0)])
def test_at_stride_1_a_stage_keeps_every_layer_that_can_keep_the_resolution(architecture, left_out):
    """The copy is the stage but for strides, a 2x2 convolution's padding and 2x2 poolings."""
    net = Abn().build(ModelSettings(name="m", architecture=architecture, input_size=128), 10, (32, 32),
                    seed=1)
    own = dict(net.a.trunk.get_submodule(net.where.removesuffix(".0"))[1].named_modules())
    copied = dict(net.branch.stage.named_modules())
    changed = [name for name, layer in own.items() if type(copied[name]) is not type(layer)]
    assert len(changed) == left_out and all(type(own[name]) is torch.nn.AvgPool2d for name in changed)
    assert all(isinstance(copied[name], torch.nn.Identity) for name in changed)
    padded = [layer for layer in copied.values() if getattr(layer, "padding", None) == "same"]
    assert [layer.kernel_size for layer in padded] == ([(2, 2)] if architecture == "convnext_atto" else [])


@pytest.mark.parametrize("settings", [LENET, ModelSettings(name="m", architecture="lcnet_035", input_size=32)])
def test_an_abn_is_explained_in_its_fast_form(settings):
    net = Abn().build(settings, 10, (32, 32), seed=1).eval()
    x = images(4, dtype=torch.float32)
    with torch.no_grad():
        fast = fast_score(Logits(net).eval(), (3, 32, 32))
        torch.testing.assert_close(fast(x), net.classify(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture, size, said", [
    ("lenet5", 16, r"at least 8x8 places before the last stage, lenet5 has 6x6 for inputs of 16x16"),
    ("mobilenetv1_100", 12, r"mobilenetv1_100 cannot be cut .* at 12x12 pixels: looked for a stage .* 8x8"),
    ("vit_tiny_patch16_224", 224, r"found no stage that halves it"),
    ("inception_v3", 160, r"found Mixed_6a at stride 1 fails \(RuntimeError: Sizes of tensors must match")])
def test_a_backbone_without_a_place_for_the_branch_is_refused(architecture, size, said):
    settings = ModelSettings(name="m", architecture=architecture, input_size=size)
    with pytest.raises(NoSplit, match=said):
        Abn().build(settings, 10, (32, 32), seed=0)


# ---- WAE

@pytest.mark.parametrize("m", ["logits", "penultimate"])
@pytest.mark.parametrize("factor", [7.0, 0.0], ids=["std", "max_abs"])
def test_wae_is_the_description_written_out(m, factor):
    a = build_classifier(LENET, 10, (32, 32), seed=1).double()
    net = Wae(m=m, latent=24).build(LENET, a, seed=4, factor=factor)
    x, maps = images(), 0.02 * torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1),
                                           dtype=torch.float64)
    z = torch.stack([r * (factor or 1 / r.abs().max()) for r in maps])
    t = net.encoder.trunk
    for conv in (t.conv1, t.conv2):
        z = F.max_pool2d(F.relu(F.conv2d(z, conv.weight, conv.bias)), 2)
    z = 1 / (1 + torch.exp(-(z.flatten(1) @ net.encoder.to_latent.weight.T + net.encoder.to_latent.bias)))
    known = a(x) if m == "logits" else a.penultimate(x)
    logits = torch.cat([known, z], 1) @ net.c.weight.T + net.c.bias
    torch.testing.assert_close(net(x, maps), logits, rtol=0, atol=1e-12)
    assert torch.equal(net.classify(x, maps), net(x, maps))
    start = build_trunk(LENET, (32, 32), seed=4).double()
    assert all(torch.equal(v, net.encoder.trunk.state_dict()[k]) for k, v in start.state_dict().items())
    assert not any(p.requires_grad for p in net.a.parameters()) and not net.train().a.training


def test_waes_map_is_the_weighted_sum_by_the_slow_twin():
    """The engine against the twin, which explains g(x) = sum_k p_k f_k(x) one image and one mask at a time."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Tanh(), torch.nn.Flatten(),
                              torch.nn.Linear(4 * 36, 5)).eval()
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    maker = attribution.parse({"method": "partition", "max_evals": 60, "batch_size": 6,
                                                 "masker": "0.25"})
    found = explain_by_own_probabilities(maker, net, pictures)
    slow = copy.deepcopy(net).double()

    def scores(x):
        with torch.no_grad():
            return slow(torch.from_numpy(x)).numpy()

    for i, picture in enumerate(pictures):
        image = picture.transpose(2, 0, 1) / 255.0
        f = scores(image[None])[0]
        p = np.exp(f) / np.exp(f).sum()
        np.testing.assert_allclose(class_probabilities(net, pictures)[i], p, rtol=1e-5)
        background = parse_masker("0.25").background(torch.from_numpy(image[None])).numpy()[0]
        twin = partition_values(lambda x, p=p: (scores(x) @ p)[:, None], image, background, [0], 60, 6)[0]
        assert np.abs(twin).max() > 1e-3
        np.testing.assert_allclose(found.maps[i], twin, atol=2e-5 * np.abs(twin).max())
        assert found.scores[i] == pytest.approx(f @ p, rel=1e-5)


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion"])
def test_of_other_attributions_the_class_maps_are_summed(method):
    pytest.importorskip("captum")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Tanh(), torch.nn.Flatten(),
                              torch.nn.Linear(4 * 36, 5)).eval()
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    maker = attribution.parse({"method": method} | (
        {"window": 4} if method == "occlusion" else {"steps": 4}))
    found, p = explain_by_own_probabilities(maker, net, pictures), class_probabilities(net, pictures)
    each = [maker.explain(net, pictures, np.full(3, k)).maps for k in range(5)]
    for i in range(3):
        np.testing.assert_allclose(found.maps[i], sum(p[i, k] * each[k][i] for k in range(5)), atol=1e-6)


# ---- ensemble and single stage

def test_an_ensemble_predicts_by_the_mean_of_probabilities():
    members = [build_classifier(LENET, 10, (32, 32), seed=s).double() for s in (0, 1)]
    x = 5 * images()
    mean = sum(m(x).exp() / m(x).exp().sum(1, keepdim=True) for m in members) / 2
    torch.testing.assert_close(EnsembleNetwork(members).classify(x).softmax(1), mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("m, auxiliary, learns", [("logits", 0.0, True), ("penultimate", 0.0, False),
                                                  ("penultimate", 0.5, True)])
def test_the_single_stage_network_is_impactx_with_a_learning_m(m, auxiliary, learns):
    net = SingleStage(m=m, latent=24, auxiliary=auxiliary).build(LENET, 10, (32, 32),
                             seed=2).double()
    x = images()
    logits, maps, own = net.train()(x)
    prepared = (x - 0.5) / 0.5
    features = net.a.head.hidden(net.a.trunk(prepared))
    z = torch.sigmoid(net.lep.to_latent(net.lep.trunk(prepared)))
    scores = features @ net.a.head.last.weight.T + net.a.head.last.bias
    known = scores if m == "logits" else features
    torch.testing.assert_close(logits, torch.cat([known, z], 1) @ net.c.weight.T + net.c.bias, rtol=0, atol=1e-12)
    torch.testing.assert_close(own, scores, rtol=0, atol=1e-12)
    torch.testing.assert_close(maps, net.decoder(z), rtol=0, atol=0)
    torch.testing.assert_close(net.classify(x), logits, rtol=0, atol=1e-12)
    assert net.a.training and all(p.requires_grad for n, p in net.named_parameters() if not n.startswith("a.head.last"))
    assert net.a.head.last.weight.requires_grad == learns
