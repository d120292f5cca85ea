"""The fast forms of a model: the same scores, the same maps, and a cut only where it is right."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impactx.explain.methods.partition import Partition
from impactx.explain.partition.engine import partition_shap
from impactx.explain.partition.fast import fast_score
from impactx.explain.partition.forms.torchscript import layout_changes, trace

SHAPE = (3, 13, 16)


class Net(nn.Module):
    """Convolution, then what the test says, then a small rest that looks at the batch's size."""

    def __init__(self, between: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between = between
        self.first = nn.Conv2d(3, 5, (3, 4), padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)
        self.last = nn.LazyLinear(4)
        self.forward(torch.rand(2, *SHAPE))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        image = x
        x = self.first((x - 0.4) / 0.3)
        if self.between == "norm, relu, pool":
            x = F.max_pool2d(F.relu(self.norm(x)), 2)
        elif self.between == "pool, relu":
            x = F.relu(F.max_pool2d(x, (3, 2)))
        elif self.between == "pool":
            x = F.max_pool2d(x, 2)
        elif self.between == "overlapping pool":
            x = F.max_pool2d(F.relu(x), 3, 2)
        elif self.between == "tanh":
            x = F.max_pool2d(torch.tanh(x), 2)
        elif self.between == "clamp":
            x = F.max_pool2d(F.relu(self.first(image.clamp(0, 1))), 2)
        elif self.between == "skip":
            x = F.max_pool2d(F.relu(x), 2) + image.mean()
        return self.last(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize("between", ["norm, relu, pool", "pool, relu", "pool"])
def test_a_split_model_gives_the_same_maps(between: str) -> None:
    model, images = Net(between), torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    score = fast_score(model, SHAPE)
    assert score.head is not None and score.head.relu == ("relu" in between)
    for settings in ({}, {"masker": 0.5, "batch_size": 10}, {"masker": "blur(3,3)", "fixed_context": 0}):
        settings = {"max_evals": 200} | settings
        plain = partition_shap(model, images, "all", **settings)
        fast = partition_shap(score, images, "all", **settings)
        size = np.abs(plain.values).max((2, 3, 4), keepdims=True)
        assert size.min() > 1e-4
        assert (np.abs(fast.values - plain.values) / size).max() < 1e-5


@pytest.mark.parametrize("between", ["overlapping pool", "tanh", "clamp", "skip", "none"])
def test_what_cannot_be_split_is_left_whole(between: str) -> None:
    model, images = Net(between), torch.rand(7, *SHAPE)
    score = fast_score(model, SHAPE)
    assert score.head is None
    with torch.no_grad():
        torch.testing.assert_close(score(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("activation", "stays"), [(nn.ReLU, True), (nn.SiLU, False)])
def test_onednns_layout_is_for_networks_that_can_stay_in_it(activation: type[nn.Module], stays: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), activation(), nn.Conv2d(8, 8, 3), activation(), nn.Conv2d(8, 8, 3),
                          nn.Flatten(), nn.Linear(8 * 7 * 10, 5)).eval()
    images = torch.rand(7, *SHAPE)
    with torch.no_grad():
        frozen = torch.jit.optimize_for_inference(trace(model, torch.rand(50, *SHAPE)))
        assert (layout_changes(frozen.graph) == 1) == stays
        score = fast_score(model, SHAPE)
        assert not isinstance(score.score, nn.Sequential), "it runs as it is"
        torch.testing.assert_close(score(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_split_model_in_float64_is_exact() -> None:
    model = Net("norm, relu, pool").double()
    images = torch.rand(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    score = fast_score(model, SHAPE, dtype=torch.float64)
    settings = {"max_evals": 150, "dtype": torch.float64, "masker": 0.5}
    assert score.head is not None
    np.testing.assert_allclose(
        partition_shap(score, images, "all", **settings).values,
        partition_shap(model, images, "all", **settings).values, rtol=1e-5, atol=1e-10,
    )


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="training mode"):
        fast_score(Net("pool").train(), SHAPE)


def test_an_attribution_keeps_the_fast_form_of_a_module_that_stays_as_it_is():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    kept, labels = Partition(max_evals=20, masker="0.5"), np.array([0, 1])
    before = kept.explain(module, images, labels).maps
    form = kept._fast._last[2]
    np.testing.assert_array_equal(kept.explain(module, images, labels).maps, before)
    assert kept._fast._last[2] is form
    with torch.no_grad():
        module[0].weight.mul_(2)
    after = kept.explain(module, images, labels).maps
    np.testing.assert_array_equal(after, Partition(max_evals=20, masker="0.5").explain(module, images, labels).maps)
    assert np.abs(after - before).max() > 1e-3
    likely = kept.model_copy(update={"explained_score": "probability"})
    assert np.abs(likely.explain(module, images, labels).scores).max() < 1


def test_what_is_kept_is_no_part_of_the_settings():
    kept = Partition(max_evals=20, masker="0.5")
    kept.explain(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval(), np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, int))
    again = pickle.loads(pickle.dumps(kept))
    assert kept == again == copy.deepcopy(kept) == Partition(max_evals=20, masker="0.5") and hash(kept) == hash(again)
    assert kept._fast._last is not None and again._fast._last is None
