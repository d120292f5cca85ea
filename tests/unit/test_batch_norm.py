"""Batch norm over several workers is that of one with the whole batch: the layer, and trainings of models with it."""

from __future__ import annotations

import copy
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.multiprocessing
from timm.layers import BatchNormAct2d
from torch import nn

from impactx.approaches.abn import Abn, abn_loss
from impactx.approaches.impactx import Impactx, impactx_loss
from impactx.datasets.batches import DeviceData
from impactx.models import build_classifier
from impactx.settings import AugmentationSettings, ModelSettings, TrainingSettings
from impactx.training import TrainingData, classification_loss, fit
from impactx.training.batch_norm import JoinedBatchNorm, counted, join_batch_norms

CPU = torch.device("cpu")


def swish():
    return BatchNormAct2d(3, act_layer="silu", inplace=False)


def relu():
    return BatchNormAct2d(3, drop_layer=lambda: nn.Threshold(-1.0, -0.5))  # an in-place ReLU after it


PLACES = (4, 3, 2)
# The layer; the shares of the workers; the sizes after (B, C).
LAYERS = {
    "even": (lambda: nn.BatchNorm2d(3), (4, 4), PLACES[:2]),
    "uneven": (lambda: nn.BatchNorm2d(3, eps=1e-3, momentum=0.3), (5, 2), PLACES[:2]),
    "one image": (lambda: nn.BatchNorm2d(3), (1, 6), PLACES[:2]),
    "no image": (lambda: nn.BatchNorm2d(3), (6, 0), PLACES[:2]),
    "one value each": (lambda: nn.BatchNorm2d(3), (1, 1), (1, 1)),
    "cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (3, 4), PLACES[:2]),
    "not affine": (lambda: nn.BatchNorm2d(3, affine=False), (3, 4), PLACES[:2]),
    "no bias": (lambda: nn.BatchNorm2d(3, bias=False), (3, 4), PLACES[:2]),
    "no statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (3, 4), PLACES[:2]),
    "1d": (lambda: nn.BatchNorm1d(3), (3, 4), ()),
    "sequence": (lambda: nn.BatchNorm1d(3), (3, 4), PLACES[:1]),
    "3d": (lambda: nn.BatchNorm3d(3), (3, 4), PLACES),
    "activation": (swish, (3, 4), PLACES[:2]),
    "drop and in-place activation": (relu, (3, 4), PLACES[:2]),
}


def case(name, dtype, offset=0.0):
    """The layer with parameters of its own, two batches, and gradients of their outputs."""
    make, shares, places = LAYERS[name]
    torch.manual_seed(0)
    layer = make().to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.5)
    batches = torch.randn(2, sum(shares), 3, *places, dtype=torch.float64) + offset
    return layer, batches.to(dtype), torch.randn(2, sum(shares), 3, *places, dtype=torch.float64).to(dtype)


def steps(layer, batches, gradients):
    """Outputs, input gradients, parameter gradients (summed over the batches) and running statistics."""
    outputs, inputs = [], []
    for x, gradient in zip(batches, gradients, strict=True):
        x = x.clone(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format).requires_grad_()
        y = layer(x)
        y.backward(gradient)
        outputs.append(y.detach())
        inputs.append(x.grad)
    return {"outputs": torch.stack(outputs), "inputs": torch.stack(inputs),
            "parameters": {k: p.grad for k, p in layer.named_parameters()},
            "statistics": dict(layer.named_buffers())}


VARIANTS = [(name, torch.float64, 0.0) for name in LAYERS] + [
    ("uneven", torch.float32, 0.0), ("uneven", torch.float32, 1000.0), ("uneven", torch.bfloat16, 0.0)]


def layers_of(rank):
    found = []
    for name, dtype, offset in VARIANTS:
        shares = LAYERS[name][1]
        layer, batches, gradients = case(name, dtype, offset)
        layer = layer.float() if dtype == torch.bfloat16 else layer  # as autocast has it
        join_batch_norms(layer, CPU)
        rows = slice(0, shares[0]) if rank == 0 else slice(shares[0], sum(shares))
        found.append(steps(layer, batches[:, rows], gradients[:, rows]))
    return found


def oddities(rank):
    """What else a worker can see of the layer: alone in evaluation mode, left out, with too little."""
    layer, batches, gradients = case("even", torch.float64)
    join_batch_norms(layer, CPU)
    if rank == 0:
        layer.eval()(batches[0])  # the other does not take part: it would be waited for
        layer.train()
    layer.counts = rank == 0
    left_out = steps(layer, batches[:, :4] if rank == 0 else 1e6 * batches[:, 4:], (1 - rank) * gradients[:, :4])
    layer.counts = True
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(batches[0, :1 - rank, :, :1, :1])
    return left_out


# Stage, model, precision, batch size, training images, epochs.  35 = 2*16 + 3: a last batch of 3 images and none;
# 37 = 2*16 + 5: of 3 and 2; 37 = 4*8 + 5: ten steps in two epochs.
RESNET, LCNET = (ModelSettings(name=n, architecture=n) for n in ("test_resnet", "lcnet_035"))
TRAININGS = [("stage 1", RESNET, torch.float64, 16, 35, 3), ("stage 2", LCNET, torch.float64, 16, 37, 3),
             ("abn", RESNET, torch.float64, 16, 35, 3),
             ("stage 1", RESNET, torch.float32, 8, 37, 2), ("stage 2", RESNET, torch.float32, 8, 37, 2)]


def train(stage, model, dtype, batch_size, images, epochs, **how):
    """The model's start and its end, and the history."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 60)
    pictures, maps = rng.integers(0, 255, (60, 32, 32, 3), dtype=np.uint8), rng.normal(size=(60, 3, 32, 32))
    if stage == "abn":
        net, loss = Abn().build(model, 4, (32, 32), seed=1), abn_loss
    else:
        net, loss = build_classifier(model, 4, (32, 32), seed=1), classification_loss
    if stage == "stage 2":
        net, loss = Impactx(latent=16).build(model, net, seed=2), impactx_loss(0.8)
    parts = [DeviceData(pictures, labels, part, maps=maps.astype(np.float32), dtype=dtype)
             for part in (np.arange(images), np.arange(40, 60))]
    start = copy.deepcopy(net.to(dtype).state_dict())
    # Adam makes steps of rounding errors: one worker's ten in float32 are 1e-2 from its own in float64, by SGD 1e-6.
    settings = TrainingSettings(epochs=epochs, optimizer="adam" if dtype == torch.float64 else "sgd")
    result = fit(net, loss, TrainingData(*parts, np.ones(20, bool)), settings,
                 learning_rate=0.002, batch_size=batch_size, augmentation=AugmentationSettings(), seed=5, **how)
    return start, net.state_dict(), result.history


def _worker(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world,
                                         timeout=timedelta(seconds=60))
    trained = [train(*training, rank=rank, world_size=world)[1:] for training in TRAININGS]
    torch.save((layers_of(rank), oddities(rank), trained), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """What two processes over gloo found."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(_worker, (2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("which", range(len(VARIANTS)), ids=str)
def test_the_layer_is_that_of_the_joined_batch(workers, which):
    name, dtype, offset = VARIANTS[which]
    one, two = (found[0][which] for found in workers)
    layer, batches, gradients = case(name, dtype, offset)
    if dtype == torch.bfloat16:
        layer = layer.float()
    else:  # the standard is exact, whatever the precision of what is compared with it
        layer, batches, gradients = layer.double(), batches.double(), gradients.double()
    whole = steps(layer, batches, gradients)
    # With an offset of 1000 float32 itself keeps four digits of what it is given less the mean.
    close = {torch.float64: 1e-12, torch.float32: 1e-3 if offset else 3e-6, torch.bfloat16: 0.02}[dtype]

    def same(found, expected):
        torch.testing.assert_close(found, expected.to(found), rtol=close, atol=close)

    for key in ("outputs", "inputs"):
        assert one[key].dtype == dtype
        same(torch.cat([one[key], two[key]], dim=1), whole[key])
    assert one["parameters"].keys() == whole["parameters"].keys()
    for key, expected in whole["parameters"].items():
        same(one["parameters"][key] + two["parameters"][key], expected)
    assert one["statistics"].keys() == whole["statistics"].keys()
    for key, expected in whole["statistics"].items():
        same(one["statistics"][key], expected)
        assert torch.equal(one["statistics"][key], two["statistics"][key])


def test_what_does_not_count_is_normalised_and_changes_nothing(workers):
    one, two = (found[1] for found in workers)
    layer, batches, gradients = case("even", torch.float64)
    alone = steps(layer, batches[:, :4], gradients[:, :4])
    for key in ("outputs", "inputs"):
        torch.testing.assert_close(one[key], alone[key], rtol=0, atol=1e-12)
    for key in ("parameters", "statistics"):
        for name, expected in alone[key].items():
            torch.testing.assert_close(one[key][name], expected, rtol=0, atol=1e-12)
    assert not two["inputs"].any() and two["outputs"].isfinite().all()


@pytest.mark.parametrize("which", range(len(TRAININGS)), ids=str)
def test_two_workers_take_the_steps_of_one(workers, which):
    close = 1e-9 if TRAININGS[which][2] == torch.float64 else 1e-5
    start, alone, history = train(*TRAININGS[which])
    moved = {k for k in alone if k.endswith("running_mean") and not torch.equal(alone[k], start[k])}
    still = {k for k in alone if k.startswith("a.") and torch.equal(alone[k], start[k])}
    assert moved, "no batch norm is at work"
    if TRAININGS[which][0] == "stage 2":  # M is frozen
        assert still == {k for k in alone if k.startswith("a.")} and any(k.endswith("running_mean") for k in still)
    for found in workers:
        state, rows = found[2][which]
        assert state.keys() == alone.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=close, msg=lambda m, n=name: f"{n}: {m}")
        assert len(rows) == len(history) == TRAININGS[which][5]
        for theirs, mine in zip(rows, history, strict=True):
            for name in set(mine) - {"seconds"}:
                assert theirs[name] == pytest.approx(mine[name], abs=close, rel=0), name


@pytest.mark.parametrize("model", [RESNET, LCNET])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_joined_model_is_the_same_model(model, device):
    """Names, tensors and evaluation stay, on a GPU too (torch's own converter loses timm's activations)."""
    net = build_classifier(model, 4, (32, 32), seed=1).eval()
    images = torch.rand(2, 3, 32, 32)
    before, scores = {k: v.data_ptr() for k, v in net.state_dict().items()}, net(images)
    found = join_batch_norms(net, torch.device(device))
    kind = JoinedBatchNorm if device == "cpu" else nn.SyncBatchNorm
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, kind) and not m.training for m in norms)
    assert found == (norms if device == "cpu" else [])
    assert {k: v.data_ptr() for k, v in net.state_dict().items()} == before
    assert torch.equal(net(images), scores) and torch.equal(copy.deepcopy(net)(images), scores)
    again = join_batch_norms(net, CPU) if device == "cpu" else found
    assert again == found


def test_a_batch_of_weight_0_is_not_counted():
    images = np.zeros((3, 8, 8, 3), np.uint8)
    layer = nn.BatchNorm2d(3)
    layers = join_batch_norms(layer, CPU)
    for rank in (0, 1):
        batches = DeviceData(images, np.zeros(3, np.int64), np.arange(3)).training(
            seed=0, epoch=1, batch_size=3, augmentation=AugmentationSettings(), rank=rank, world_size=2)
        assert [layer.counts for _ in counted(layers, batches)] == [rank == 0]
