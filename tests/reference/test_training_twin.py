"""The training loop against the paper's formulas written out: one image at a time, float64, no torch.optim.

Stage 1 minimises the cross entropy of A; stage 2 equation (1), CE(y, C(m, z)) + lambda * MSE(r, LEP-D(x)), with
M frozen.  Adam is Kingma and Ba's, algorithm 1.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from impactx.approaches.impactx import Impactx, impactx_loss
from impactx.datasets.batches import DeviceData, draws
from impactx.explain.maps.scale import map_scale
from impactx.models import build_classifier
from impactx.settings import AugmentationSettings, ModelSettings, TrainingSettings
from impactx.training import TrainingData, classification_loss, fit

LENET = ModelSettings(name="lenet5", architecture="lenet5")
CLASSES, BATCH, SEED = 4, 7, 11
TRAIN, VALIDATION = np.arange(0, 30), np.arange(30, 42)
TRAINING = TrainingSettings(epochs=2, precision="float64", eval_batch_size=5)


def pictures():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 42)
    images = rng.integers(0, 120, (42, 32, 32, 3), dtype=np.uint8)
    for i, label in enumerate(labels):
        images[i, label * 6:label * 6 + 6] += 100
    return images, labels, rng.normal(0, 0.02, (42, 3, 32, 32)).astype(np.float32)


def moved(plane: torch.Tensor, down: int, right: int, mirrored: bool) -> torch.Tensor:
    """plane (C, H, W)."""
    result = torch.zeros_like(plane)
    height, width = plane.shape[1:]
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                result[:, y, width - 1 - x if mirrored else x] = plane[:, y - down, x - right]
    return result


def cross_entropy(logits: torch.Tensor, label: int) -> torch.Tensor:
    return -(logits[label] - logits.max() - (logits - logits.max()).exp().sum().log())


def twin(forward, parameters, images, labels, targets, weight, lr, augmentation):
    """Two epochs; forward: image (C, H, W) -> (scores (K,), map or None). Returns a metrics row an epoch."""
    first, second, step, rows = [0.0] * len(parameters), [0.0] * len(parameters), 0, []

    def loss_of(image, label, target):
        scores, found = forward(image)
        ce = cross_entropy(scores, label)
        if target is None:
            return scores, {"loss": ce}
        mse = ((found - target) ** 2).sum() / target.numel()
        return scores, {"loss": ce + weight * mse, "ce": ce, "mse": mse}

    for epoch in (1, 2):
        order, dy, dx, flips = draws(SEED, epoch, len(TRAIN), augmentation.shift)
        sums, hits = {}, 0
        for start in range(0, len(TRAIN), BATCH):
            rows_of_batch, total = order[start:start + BATCH].tolist(), 0.0
            for k in rows_of_batch:
                how = (augmentation.shift - int(dy[k]), augmentation.shift - int(dx[k]),
                       augmentation.flip and bool(flips[k]))
                image = moved(images[TRAIN[k]], *how)
                target = None if targets is None else moved(targets[TRAIN[k]], *how)
                scores, terms = loss_of(image, labels[TRAIN[k]], target)
                total = total + terms["loss"] / len(rows_of_batch)
                hits += int(scores.argmax()) == labels[TRAIN[k]]
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + float(value.detach())
            gradients = torch.autograd.grad(total, parameters)
            step += 1
            with torch.no_grad():
                for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
                    first[i] = 0.9 * first[i] + 0.1 * g
                    second[i] = 0.999 * second[i] + 0.001 * g * g
                    p -= lr * (first[i] / (1 - 0.9**step)) / ((second[i] / (1 - 0.999**step)).sqrt() + 1e-8)
        row = {f"train_{k}": v / len(TRAIN) for k, v in sums.items()} | {"train_accuracy": hits / len(TRAIN)}
        with torch.no_grad():
            found = [loss_of(images[i], labels[i], None if targets is None else targets[i]) for i in VALIDATION]
        for name in found[0][1]:
            row[f"val_{name}"] = math.fsum(float(t[name]) for _, t in found) / len(VALIDATION)
        right = [int(s.argmax()) == labels[i] for (s, _), i in zip(found, VALIDATION, strict=True)]
        rows.append(row | {"val_accuracy": np.mean(right), "common_accuracy": np.mean(right[::2])})
    return rows


def close(result, rows, model, other):
    assert len(result.history) == len(rows) == 2
    for mine, theirs in zip(result.history, rows, strict=True):
        assert set(mine) - {"seconds", "epoch"} == set(theirs)
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, abs=1e-9), name
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("augmentation", [AugmentationSettings(flip=True, shift=2),
                                          AugmentationSettings(flip=False, shift=0)])
def test_stage_1_is_the_formula(augmentation):
    images, labels, _ = pictures()
    model = build_classifier(LENET, CLASSES, (32, 32), seed=SEED).double()
    other = copy.deepcopy(model)
    rows = twin(lambda x: (other(x[None])[0], None), list(other.parameters()),
                torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255, labels.tolist(), None, 0.0, 0.002,
                augmentation)
    parts = [DeviceData(images, labels, part, dtype=torch.float64) for part in (TRAIN, VALIDATION)]
    result = fit(model, classification_loss, TrainingData(*parts, np.arange(12) % 2 == 0), TRAINING,
                 learning_rate=0.002, batch_size=BATCH, augmentation=augmentation, seed=SEED)
    close(result, rows, model, other)


@pytest.mark.parametrize("m, weight", [("logits", 0.8), ("penultimate", 1.4), ("logits", 0.0)])
def test_stage_2_is_equation_1(m, weight):
    images, labels, maps = pictures()
    augmentation = AugmentationSettings(flip=True, shift=1)
    a = build_classifier(LENET, CLASSES, (32, 32), seed=2).double()
    net = Impactx(m=m, latent=24).build(LENET, a, seed=SEED).double()
    other = copy.deepcopy(net)

    def forward(x):
        x = x[None]
        with torch.no_grad():
            known = a(x) if m == "logits" else a.penultimate(x)
        prepared = (x - 0.5) / 0.5
        z = 1 / (1 + (-other.lep.to_latent(other.lep.trunk(prepared))).exp())
        scores = torch.cat([known, z], 1)[0] @ other.c.weight.T + other.c.bias
        return scores, other.decoder(z)[0]

    parameters = [p for part in (other.lep, other.decoder, other.c) for p in part.parameters()]
    std = np.asarray(maps[TRAIN], np.float64).std()
    rows = twin(forward, parameters, torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255, labels.tolist(),
                torch.from_numpy(maps).double() / std, weight, 0.002, augmentation)
    scale = map_scale(maps, TRAIN, "std")
    parts = [DeviceData(images, labels, part, maps=maps, scale=scale, dtype=torch.float64)
             for part in (TRAIN, VALIDATION)]
    result = fit(net, impactx_loss(weight), TrainingData(*parts, np.arange(12) % 2 == 0), TRAINING,
                 learning_rate=0.002, batch_size=BATCH, augmentation=augmentation, seed=SEED)
    close(result, rows, net, other)
    assert all(torch.equal(t, net.a.state_dict()[n]) for n, t in a.state_dict().items())
