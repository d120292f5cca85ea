"""What claims to work on a GPU, on one: maps, precision, memory, training. Skipped where there is none.

The CPU's results, which the reference tests compare with shap's and with the slow twins', are the standard here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import impactx
from impactx import (
    AugmentationSettings,
    DatasetSettings,
    ModelSettings,
    Schedule,
    TrainingSettings,
)
from impactx.explain.methods.partition import Partition
from impactx.explain.partition.engine import partition_shap
from impactx.training.loop import precision_of
from impactx.version import environment

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False: no GPU")

LENET = ModelSettings(name="lenet5", architecture="lenet5")
PLAIN = Schedule(learning_rate=0.002, augmentation=AugmentationSettings(flip=False, shift=0))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory):  # noqa: ANN201
    root = tmp_path_factory.mktemp("gpu")
    return impactx.load_dataset(DatasetSettings(name="digits", source="digits", subset=400), data_root=root)


@pytest.fixture(scope="module")
def trained(data):  # noqa: ANN001, ANN201
    """LeNet-5 after 6 epochs on 400 digits, trained on a CPU."""
    return impactx.train_classifier(data, LENET, TrainingSettings(epochs=6), PLAIN)


def largest_difference(maps: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """(N,): the largest difference of each map, as a share of the exact one's largest absolute value."""
    apart = np.abs(maps - exact).reshape(len(maps), -1).max(1)
    return apart / np.abs(exact).reshape(len(exact), -1).max(1)


def test_maps_are_those_of_the_cpu(data, trained) -> None:  # noqa: ANN001
    """In float64 all of them; in float32, where near-ties in a queue may fall otherwise, all but few."""
    images, labels = data.train.images[:40], data.train.labels[:40]
    for dtype, within, share in ((torch.float64, 1e-7, 1.0), (torch.float32, 1e-4, 0.95)):
        model = trained.model.to(dtype)
        found = {}
        for device in ("cpu", DEVICE):
            model.to(device)
            stack = torch.from_numpy(np.array(images)).to(device)
            found[device] = partition_shap(model, stack, labels, max_evals=500, dtype=dtype).values
        model.to("cpu", torch.float32)
        assert np.abs(found["cpu"]).max() > 0.01
        assert (largest_difference(found[DEVICE], found["cpu"]) < within).mean() >= share


def test_bfloat16_says_what_it_costs(data, trained) -> None:  # noqa: ANN001
    maker = Partition(max_evals=200, precision="bfloat16")
    model = trained.model.to(DEVICE)
    found = maker.explain(model, data.train.images[:8], data.train.labels[:8], device=DEVICE)
    model.to("cpu")
    assert found.precision_error is not None and 0 < found.precision_error < 0.5


def test_out_of_memory_leads_to_smaller_batches(data, trained) -> None:  # noqa: ANN001
    model, sizes = trained.model.to(DEVICE), []

    def greedy(images: Tensor) -> Tensor:
        if len(images) > 64:
            torch.empty(1 << 46, device=DEVICE)  # 256 TiB: the allocator's own error
        sizes.append(len(images))
        return model(images)

    stack = torch.from_numpy(np.array(data.train.images[:8])).to(DEVICE)
    labels = data.train.labels[:8]
    found = partition_shap(greedy, stack, labels, max_evals=300)
    expected = partition_shap(model, stack, labels, max_evals=300)
    model.to("cpu")
    assert 1 < max(sizes) <= 64
    assert (largest_difference(found.values, expected.values) < 1e-4).mean() >= 0.85


def test_both_stages_train_in_mixed_precision(data) -> None:  # noqa: ANN001
    """bfloat16, the default on a GPU, learns what float32 learns on a CPU."""
    training = TrainingSettings(epochs=8)
    a = impactx.train_classifier(data, LENET, training, PLAIN, device=DEVICE)
    maps = impactx.explain_dataset(a, data, Partition(max_evals=100), device=DEVICE)
    net = impactx.train_impactx(a, data, maps, training, weight=0.8, device=DEVICE)
    reference = impactx.train_classifier(data, LENET, training, PLAIN)
    assert a.best["val_accuracy"] > reference.best["val_accuracy"] - 0.1
    assert net.best["val_accuracy"] > a.best["val_accuracy"] - 0.05
    first, last = net.history[0], net.history[-1]
    assert last["train_mse"] < first["train_mse"]


def test_an_epoch_in_float32_is_that_of_the_cpu(data) -> None:  # noqa: ANN001
    """Same start, same batches, no augmentation: only rounding (TF32 in convolutions) is another."""
    training = TrainingSettings(epochs=1, precision="float32")
    rows = [impactx.train_classifier(data, LENET, training, PLAIN, device=device).history[0]
            for device in ("cpu", DEVICE)]
    assert rows[1]["train_loss"] == pytest.approx(rows[0]["train_loss"], rel=0.02)
    assert rows[1]["val_loss"] == pytest.approx(rows[0]["val_loss"], rel=0.02)


def test_a_result_names_the_gpu_and_the_precision_in_force() -> None:
    has_tf32 = torch.cuda.get_device_capability() >= (8, 0)
    trained, explained = environment(DEVICE, "float32"), environment(DEVICE, "float32", exact=True)
    assert trained.precision == ("float32 with tf32 convolutions" if has_tf32 else "float32")
    assert explained.precision == "float32" and explained.device == torch.cuda.get_device_name()
    assert environment(DEVICE, "tf32", exact=True).precision == ("tf32" if has_tf32 else "float32")
    assert precision_of(TrainingSettings(), torch.device(DEVICE)) == "bfloat16"
