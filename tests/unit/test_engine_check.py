"""A user's model is explained rightly or not at all: fast forms that are wrong, and models that mix images.

Each model here is right in its own forward; what must not happen is that a faster form of it, or its batches, give other
maps in silence. ``fast=false`` with the same model is the truth.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import impactx
from impactx.explain.attribution import AttributionError
from impactx.explain.methods.partition import Partition
from impactx.explain.partition import check
from impactx.explain.partition.engine import partition_shap
from impactx.explain.partition.fast import CHECKED_EACH, fast_score
from impactx.explain.partition.lockstep import Group
from impactx.explain.weighted import explain_by_own_probabilities

SIDE = 12
SETTINGS = {"max_evals": 200, "masker": "0.2"}
LABELS = np.arange(4) % 3


def pictures(count: int = 4, low: int = 0, high: int = 256, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (count, SIDE, SIDE, 3), np.uint8)


BRIGHT = pictures(low=190)


class Net(nn.Module):
    """Convolution, a head that a test says, max-pool, and the rest; `change` is applied to what is pooled."""

    def __init__(self, head: Callable[[Tensor], Tensor] = torch.relu,
                 change: Callable[[Tensor], Tensor] = lambda h: h) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Linear(6 * 25, 3)
        self.first.weight.data.abs_()
        self.head, self.change = head, change
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.change(F.max_pool2d(self.head(self.first(x)), 2)).flatten(1))


def maps(model: nn.Module, images: np.ndarray, **settings: object) -> np.ndarray:
    return Partition(**(SETTINGS | settings)).explain(model, images, LABELS[: len(images)]).maps


def assert_right(model: nn.Module, images: np.ndarray = BRIGHT, **settings: object) -> None:
    ours, expected = maps(model, images, **settings), maps(model, images, fast=False, **settings)
    assert np.abs(expected).max() > 1e-5 or not np.abs(ours).any()
    for one, other in zip(ours, expected, strict=True):
        assert np.abs(one - other).max() <= 2e-5 * max(np.abs(other).max(), 1e-6)


def guarded_clamp(h: Tensor) -> Tensor:
    """A clamp of each value by itself, that is left out where no value of the batch needs it."""
    return h.clamp(max=1.0) if bool((h > 1.0).any()) else h


def halved_until_small(h: Tensor) -> Tensor:
    """Each image is halved by itself, as often as it needs."""
    while bool((large := h.abs().amax((1, 2, 3), keepdim=True) > 0.9).any()):
        h = torch.where(large, h / 2, h)
    return h


def each_by_itself(h: Tensor) -> Tensor:
    return torch.stack([image if image.mean() < 0.8 else image.square() for image in h])


def written_beside(h: Tensor) -> Tensor:
    """In-place, and its result is not what goes on."""
    h.clamp_(max=1.0)
    return h


def picked_out(h: Tensor) -> Tensor:
    where = (h > 1.2).nonzero()
    h = h.clone()
    if len(where):
        h[tuple(where.T)] = 0.0
    return h


def counted(h: Tensor) -> Tensor:
    return h * float((h > 0).any())


def scaled_by_number(h: Tensor) -> Tensor:
    return h / max(1.0, round(float((h > 50).sum()) + 1.0))


def normalised_by_itself(h: Tensor) -> Tensor:
    return h / h.square().sum((1, 2, 3), keepdim=True).sqrt().clamp(min=1)


def conditional(h: Tensor) -> Tensor:
    """Like guarded_clamp, by torch's own control flow."""
    return torch.cond((h > 1.0).any(), lambda h: h.clamp(max=1.0), lambda h: h.clone(), (h,))


def quantised(h: Tensor) -> Tensor:
    return (h * 8).round() / 8


def by_numpy(h: Tensor) -> Tensor:
    return torch.from_numpy(np.minimum(h.detach().numpy(), 1.0))


SATURATING = {
    "hardtanh": lambda h: F.hardtanh(h, -1, 1), "clamp": lambda h: h.clamp(max=1.1), "relu6": F.relu6,
    "minimum": lambda h: torch.minimum(h, torch.tensor(1.1)), "where": lambda h: torch.where(h > 1.1, 1.1, h),
    "squared": lambda h: h * h, "hardtanh and relu": lambda h: F.relu(F.hardtanh(h, -1, 1)), "rounded": quantised,
    "abs": torch.abs, "softplus": F.softplus, "own maximum": lambda h: h - h.amax((1, 2, 3), keepdim=True),
    "divided into": lambda h: 1 / (1 + h.square()), "leaky": F.leaky_relu, "to half": lambda h: h.half().float(),
}
BRANCHES = [guarded_clamp, halved_until_small, each_by_itself, written_beside, picked_out, counted, scaled_by_number,
            normalised_by_itself, conditional, quantised, by_numpy]


@pytest.mark.parametrize("head", SATURATING)
@pytest.mark.parametrize("images", [BRIGHT, pictures()], ids=["bright", "noise"])
def test_a_head_that_is_not_linear_is_never_split_off(head: str, images: np.ndarray) -> None:
    model = Net(SATURATING[head])
    assert fast_score(model, (3, SIDE, SIDE)).head is None
    assert_right(model, images)


@pytest.mark.parametrize("head", [
    torch.relu, F.relu_, lambda h: (h - 0.3) * 2, lambda h: 1 - h / 3, lambda h: F.avg_pool2d(h, 3, 1, 1),
    lambda h: F.dropout(h, 0.5, training=False),
    lambda h: F.interpolate(h, scale_factor=1.0, mode="bilinear") * torch.ones(6, 1, 1),
])
def test_a_linear_head_is_split_off_and_right(head: Callable[[Tensor], Tensor]) -> None:
    model = Net(head)
    assert fast_score(model, (3, SIDE, SIDE)).head is not None
    assert_right(model)


@pytest.mark.parametrize("change", BRANCHES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("images", [BRIGHT, pictures()], ids=["bright", "noise"])
def test_what_depends_on_the_values_of_an_image_is_right(change: Callable[[Tensor], Tensor], images: np.ndarray) -> None:
    assert_right(Net(change=change), images)


class Other(nn.Module):
    """A model that is another one while it is exported, which noise does not show: bright images are darkened."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            x = x - (x.mean((1, 2, 3), keepdim=True) - 0.6).clamp(min=0)
        return self.net(x)


class Keeper(nn.Module):
    """A model with a number that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.limits = Net(), {"high": 1.5}
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).clamp(max=self.limits["high"])


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def dark(count: int, seed: int) -> np.ndarray:
    return pictures(count, high=200, seed=seed)


def test_a_model_that_goes_wrong_in_its_seventh_shard_is_caught(caplog) -> None:
    """And the shard is made again by the model itself, as are all after it; the six before are right."""
    model = Other()
    explainer = Partition(**SETTINGS)
    for shard in range(6):
        images = dark(4, shard)
        np.testing.assert_allclose(explainer.explain(model, images, LABELS).maps,
                                   maps(model, images, fast=False), atol=1e-5)
    assert warnings_of(caplog) == [] and explainer._fast._last[2].faster
    for shard in (BRIGHT, dark(4, 7)):
        np.testing.assert_array_equal(explainer.explain(model, shard, LABELS).maps, maps(model, shard, fast=False))
    assert len(warnings_of(caplog)) == 1, "later shards begin with the model itself"
    assert "Other" in caplog.text and "the model computes mean" in caplog.text and "the model itself gives" in caplog.text


def test_one_bright_image_among_many_is_enough(caplog) -> None:
    images, labels = dark(20, 3), np.zeros(20, int)
    images[13] = BRIGHT[0]
    settings = SETTINGS | {"max_evals": 1000}
    ours = Partition(**settings).explain(Other(), images, labels).maps
    np.testing.assert_array_equal(ours, Partition(**settings, fast=False).explain(Other(), images, labels).maps)
    assert "image 13" in caplog.text


def test_fast_false_turns_all_of_it_off(monkeypatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a form was made")

    monkeypatch.setattr("impactx.explain.partition.cache.fast_score", refuse)
    maps(Net(), BRIGHT, fast=False)
    with pytest.raises(AssertionError, match="a form was made"):
        maps(Net(), BRIGHT)
    assert "fast" not in Partition().described() and Partition(fast=False).described()["fast"] is False


def test_a_score_that_is_used_directly_is_checked_too(caplog) -> None:
    """The form is a copy: weights that change after it was made are found, and a number that is no weight."""
    model, images = Net(), torch.from_numpy(BRIGHT)
    score = fast_score(model, (3, SIDE, SIDE))
    model.last.weight.data.mul_(1.5)
    found = partition_shap(score, images, LABELS, max_evals=100, masker=0.2).values
    np.testing.assert_array_equal(found, partition_shap(model, images, LABELS, max_evals=100, masker=0.2).values)
    assert not score.faster and "the first layer is split off" in caplog.text


def test_what_changes_between_two_calls_is_seen(caplog) -> None:
    model, explainer = Net(), Partition(**SETTINGS)
    before = explainer.explain(model, BRIGHT, LABELS).maps
    with torch.no_grad():
        model.first.weight.mul_(1.3)
    after = explainer.explain(model, BRIGHT, LABELS).maps
    np.testing.assert_allclose(after, maps(model, BRIGHT, fast=False), atol=1e-5)
    assert np.abs(after - before).max() > 1e-3
    assert warnings_of(caplog) == [] and explainer._fast._last[2].faster, "a new form is made of the new weights"
    keeper, explainer = Keeper(), Partition(**SETTINGS)
    explainer.explain(keeper, BRIGHT, LABELS)
    keeper.limits["high"] = -0.5
    np.testing.assert_array_equal(explainer.explain(keeper, BRIGHT, LABELS).maps, maps(keeper, BRIGHT, fast=False))


class Mixing(nn.Module):
    """A model whose score of an image depends on the others of its batch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = Net(), how
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "branch on the mean":
            return self.net(x) if x.mean() < 0.6 else self.net(x.flip(3))
        if self.how == "loop on the maximum":
            while x.abs().max() > 0.4:
                x = x / 1.3
            return self.net(x)
        if self.how == "mean taken off":
            return self.net(x - x.mean(0, keepdim=True))
        if self.how == "neighbour":
            return self.net(x + 0.2 * x.roll(1, 0))
        if self.how == "number":
            return self.net(x) / (1 + 0.01 * len(x))
        if self.how == "softmax over the batch":
            return self.net(x).softmax(0)
        if self.how == "batch statistics":
            return F.batch_norm(self.net(x), None, None, training=True) if len(x) > 1 else self.net(x)
        return F.dropout(self.net(x), 0.3)


MIXING = ["branch on the mean", "loop on the maximum", "mean taken off", "neighbour", "number", "softmax over the batch",
          "batch statistics", "dropout"]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("how", MIXING)
def test_a_score_that_depends_on_its_batch_is_refused_with_both_values(how: str, fast: bool) -> None:
    images = np.concatenate([BRIGHT[:2], dark(2, 1)])
    with pytest.raises(AttributionError, match=r"score is -?[\d.]+.* beside other images .* and -?[\d.]+.* alone"):
        maps(Mixing(how), images, fast=fast)


@pytest.mark.parametrize("explain", ["logit", "probability"])
def test_training_mode_is_refused_wherever_it_is(explain: str) -> None:
    model = nn.Sequential(Net(), nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))).eval()
    maps(model, BRIGHT, explain=explain)
    model[1].train()
    for settings in ({}, {"fast": False}, {"fixed_context": 0}):
        with pytest.raises(AttributionError, match=r"1\.1 \(Dropout\) in the model is in training mode.*eval\(\)"):
            maps(model, BRIGHT, explain=explain, **settings)
    assert model[1][1].training and not model.training, "the model's own mode was changed"
    with pytest.raises(AttributionError, match="the model is in training mode"):
        maps(model.train(), BRIGHT, explain=explain)
    assert model.training
    model.eval()[1][0].train()  # a linear layer does the same in both modes
    maps(model, BRIGHT, explain=explain)
    assert model[1][0].training, "the model's own mode was changed"
    model[1][1].train()
    with pytest.raises(ValueError, match=r"1\.1 \(Dropout\)"):
        fast_score(model, (3, SIDE, SIDE))


class Sharp(nn.Module):
    """A model in which the last bit of a sum decides, and sums of one image and of many are rounded otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        scores = self.net(x)
        return scores + 0.3 * torch.sin(3e5 * scores)


@pytest.mark.parametrize("fast", [True, False])
def test_what_a_model_itself_does_with_the_last_bit_is_no_error(caplog, fast: bool) -> None:
    assert np.isfinite(maps(Sharp(), BRIGHT, fast=fast)).all()
    assert warnings_of(caplog) == []


def test_the_share_that_is_checked_is_small_and_has_each_images_deepest_mask(monkeypatch) -> None:
    alone, scored = [], []

    class Counting(Net):
        def forward(self, x: Tensor) -> Tensor:
            (alone if len(x) == 1 else scored).append(len(x))
            return super().forward(x)

    drawn: list[tuple[int, int]] = []
    real = check._drawn

    def seen(group: Group, count: int) -> tuple[Tensor, Tensor]:
        found = real(group, count)
        for image, slot in zip(*(column.tolist() for column in found), strict=True):
            depth = group.tree.depth[group.queue.node[image, : group.queue.used[image]].long()]
            drawn.append((image, int(depth[slot] - depth.max())))
        return found

    monkeypatch.setattr(check, "_drawn", seen)
    images = pictures(15)
    Partition(max_evals=2000, masker="0.2").explain(Counting(), images, np.zeros(15, int))
    assert {image for image, below in drawn if below == 0} == set(range(15))
    assert any(below < 0 for _, below in drawn)
    drawn.clear()
    alone.clear()
    Partition(max_evals=2000, masker="0.2", fast=False).explain(Counting(), images, np.zeros(15, int))
    assert len(drawn) == 30 and len(alone) <= 30 + 2 and sum(scored) > 50 * len(alone)


def test_a_form_that_is_called_checks_itself(caplog) -> None:
    """The judging of maps calls it as a function."""
    model = Net()
    score, images = fast_score(model, (3, SIDE, SIDE)), torch.rand(40, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(score(images), model(images))
        model.first.weight.mul_(1.5)
        for _ in range(CHECKED_EACH // 40 + 1):
            last = score(images)
        assert torch.equal(last, model(images)) and "the model itself gives" in caplog.text


def test_weighted_maps_are_checked_as_well() -> None:
    with pytest.raises(AttributionError, match="beside other images"):
        explain_by_own_probabilities(Partition(**SETTINGS), Mixing("neighbour"), BRIGHT)


@pytest.mark.parametrize("forms", [(), ("torchscript",), ("torchscript", "inductor")])
def test_the_engine_runs_without_torchscript(tmp_path: Path, forms: tuple[str, ...]) -> None:
    """Taking a form out is the removal of its file."""
    copied = tmp_path / "impactx"
    shutil.copytree(Path(impactx.__file__).parent, copied, ignore=shutil.ignore_patterns("__pycache__"))
    for form in forms:
        (copied / "explain" / "partition" / "forms" / f"{form}.py").unlink()
    code = """
import numpy as np, torch, impactx
from torch import nn
from impactx.explain.methods.partition import Partition
from impactx.explain.partition.forms import FORMS
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, bias=False),
                      nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
model[5].running_mean.uniform_(-1, 1), model[5].running_var.uniform_(.5, 2)
model.eval()
images = np.random.default_rng(0).integers(0, 256, (3, 12, 12, 3), np.uint8)
explainers = Partition(max_evals=200), Partition(max_evals=200, fast=False)
ours, plain = (explainer.explain(model, images, np.arange(3)).maps for explainer in explainers)
form = explainers[0]._fast._last[2]
assert np.abs(ours - plain).max() < 1e-5 * np.abs(plain).max()
assert form.head is not None and form.score is not model and form.trusted
print(impactx.__file__, [f.__name__ for f in FORMS])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400, check=False,
                         env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert run.returncode == 0, run.stderr
    assert str(tmp_path) in run.stdout and not any(form in run.stdout.split("[")[1] for form in forms)
