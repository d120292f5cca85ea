"""The partition engine by itself: properties that hold for any network, and the errors.

For the comparison with shap see tests/reference/test_partition.py.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from impactx.explain.masking import MaskerError
from impactx.explain.partition.compose import Composer
from impactx.explain.partition.engine import AdditivityError, check_additivity, partition_shap
from impactx.explain.partition.forward import PartitionError
from impactx.explain.partition.tree import TreeOnDevice, build_tree


def network(channels: int = 3, seed: int = 0, outputs: int = 5) -> nn.Module:
    """A small network with a strong, uneven response (random, but far from flat)."""
    torch.manual_seed(seed)
    layers = nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1), nn.Tanh(), nn.AdaptiveMaxPool2d(3), nn.Flatten(), nn.Linear(54, outputs)
    )
    with torch.no_grad():
        layers[0].weight.mul_(3)
        layers[4].weight.mul_(3)
    return layers.eval()


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8), (3, 7, 12), (2, 13, 5), (3, 1, 6), (1, 1, 1)])
@pytest.mark.parametrize("fixed_context", [None, 0, 1])
def test_maps_sum_to_what_the_image_adds(shape: tuple[int, int, int], fixed_context: int | None) -> None:
    model, images = network(shape[0]), pictures(3, *shape)
    found = partition_shap(model, images, "all", max_evals=150, batch_size=10, fixed_context=fixed_context, masker=0.5)
    with torch.no_grad():
        scores = model(images).numpy()
        base = model(torch.full_like(images, 0.5)).numpy()
    np.testing.assert_allclose(found.scores, scores, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.base_values, base, rtol=1e-6, atol=1e-6)
    assert np.abs(scores - base).max() > 0.1
    np.testing.assert_allclose(found.values.sum((2, 3, 4), dtype=float), scores - base, rtol=1e-4, atol=1e-5)
    assert found.values.shape == (3, 5, *shape) and found.values.dtype == np.float32


def test_a_linear_score_gives_each_pixel_its_own_share() -> None:
    """For f = sum of weight x pixel the answer is weight x (pixel - background), once single pixels are reached."""
    weight, images = pictures(3, 3, 4, seed=1) - 0.5, pictures(2, 3, 3, 4)
    found = partition_shap(
        lambda x: (x * weight).sum((1, 2, 3), keepdim=True)[:, :, 0, 0], images, "all", masker=0.25, max_evals=10**6
    )
    np.testing.assert_allclose(found.values[:, 0], (weight * (images - 0.25)).numpy(), atol=1e-6)


def test_two_pixels_share_their_interaction_as_shapley_values_do() -> None:
    """f = a b + a on a 1 x 2 image over black: the Shapley values are a b / 2 + a and a b / 2."""
    images = torch.tensor([[[[0.5, 0.8]]]])
    found = partition_shap(lambda x: x[:, 0, :, :1].sum(1) * (x[:, 0, :, 1:].sum(1) + 1), images, "all", masker=0)
    np.testing.assert_allclose(found.values.ravel(), [0.2 + 0.5, 0.2], rtol=1e-6)
    assert found.evaluations.tolist() == [4]


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 9), (3, 11, 4)])
def test_both_ways_to_a_masked_image_give_the_same_bits(shape: tuple[int, int, int]) -> None:
    """The CPU's box copies, the matrix product of other devices, and a walk up the tree, pixel for pixel."""
    tree = build_tree(shape)
    on_device = TreeOnDevice(tree, torch.device("cpu"))
    images, backgrounds = pictures(2, *shape), pictures(2, *shape, seed=1)
    draw = np.random.default_rng(0)
    nodes = draw.integers(0, tree.n_nodes, 200)
    contexts = np.array([draw.integers(0, 1 << int(tree.depth[node])) for node in nodes])
    which = torch.arange(200) % 2
    masks = on_device.masks(torch.from_numpy(nodes), torch.from_numpy(contexts))
    made = Composer(on_device, images, backgrounds).compose(which, torch.from_numpy(nodes), torch.from_numpy(contexts))
    assert torch.equal(made, torch.where(masks, images[which], backgrounds[which]))
    for node, context, mask in zip(nodes, contexts, masks.numpy(), strict=True):
        expected = np.zeros(shape, bool)
        while (parent := tree.parent[node]) >= 0:
            if context >> tree.depth[parent] & 1:
                r0, r1, c0, c1, z0, z1 = tree.boxes[tree.left[parent] + tree.right[parent] - node]
                expected[z0:z1, r0:r1, c0:c1] = True
            node = parent
        assert (mask == expected).all()


def test_a_tree_of_a_large_image_needs_no_table() -> None:
    tree = build_tree((3, 224, 224))
    assert tree.n_nodes == 2 * 3 * 224 * 224 - 1
    arrays = (tree.boxes, tree.left, tree.right, tree.parent, tree.depth, tree.size, tree.siblings, tree.leaf)
    assert sum(array.nbytes for array in arrays) < 64e6
    assert build_tree((3, 224, 224)) is tree


# --- lockstep ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"fixed_context": 0}, {"max_evals": 10**5, "fixed_context": 1}])
def test_an_image_does_not_depend_on_its_company(settings: dict) -> None:
    model, images = network(), pictures(7, 3, 6, 4).double()
    images[2] = 0.5  # nothing to find: its queue holds only ties
    images[3, :, :3] = 0.5
    settings = {"max_evals": 200, "batch_size": 10, "masker": 0.5, "dtype": torch.float64} | settings
    labels = torch.arange(7) % 5
    model = model.double()
    together = partition_shap(model, images, labels, **settings)
    for width, forward_batch in itertools.product((1, 3, 7), (17, 1000)):
        apart = partition_shap(
            model, images, labels, images_in_flight=width, forward_batch=forward_batch, **settings
        )
        np.testing.assert_allclose(apart.values, together.values, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(apart.evaluations, together.evaluations)
    assert np.abs(together.values[2]).max() == 0 and np.abs(together.values[3]).max() > 0.001


def test_images_may_finish_at_different_steps() -> None:
    """A budget that one image cannot use up and another can: each gets its own count."""
    images = pictures(2, 1, 2, 2)
    found = partition_shap(network(1), images, torch.tensor([0, 1]), max_evals=10**6, masker=0.5)
    assert (found.evaluations == 2 + 2 * (1 + 2 * 2)).all()  # 1 root, then 2 boxes in 2 contexts each


@pytest.mark.parametrize("max_evals", [4, 5, 50, 51])
def test_evaluations_are_counted_as_they_are_made(max_evals: int) -> None:
    model, count = network(), []

    def score(x: Tensor) -> Tensor:
        count.append(len(x))
        return model(x)

    found = partition_shap(score, pictures(2, 3, 8, 8), torch.tensor([0, 1]), max_evals=max_evals, batch_size=7,
                           check=False)
    assert found.evaluations.sum() + 2 == sum(count)  # two in all show how many scores there are
    assert (found.evaluations == 2 + 2 * -(-(max_evals - 2) // 2)).all()  # a split is never cut in half


def test_progress_reaches_the_number_of_images() -> None:
    seen: list[int] = []
    partition_shap(network(), pictures(5, 3, 8, 8), "all", max_evals=10, images_in_flight=2, progress=seen.append)
    assert seen[-1] == 5 and seen == sorted(seen)


# --- outputs and images ------------------------------------------------------------------------------------------


def test_weighted_outputs_equal_a_network_that_computes_the_sum() -> None:
    model, images = network().double(), pictures(3, 3, 8, 8).double()
    weights = pictures(3, 5, seed=2).double()
    settings = {"max_evals": 200, "batch_size": 10, "dtype": torch.float64}
    found = partition_shap(model, images, weights, **settings)
    assert found.values.shape == (3, 1, 3, 8, 8)
    for i in range(3):
        alone = partition_shap(lambda x, i=i: model(x) @ weights[i][:, None], images[i : i + 1], "all", **settings)
        np.testing.assert_allclose(found.values[i], alone.values[0], atol=1e-7)


def test_several_outputs_an_image_have_an_order_of_their_own() -> None:
    """Index pairs pick those two outputs, in that order; the larger decides where the budget goes."""
    model, images = network(), pictures(2, 3, 8, 8)
    settings = {"max_evals": 100, "batch_size": 10}
    pair = partition_shap(model, images, torch.tensor([[3, 1], [0, 4]]), **settings).values
    turned = partition_shap(model, images, torch.tensor([[1, 3], [4, 0]]), **settings).values
    single = partition_shap(model, images, torch.tensor([3, 0]), **settings).values
    np.testing.assert_allclose(pair, turned[:, ::-1], atol=1e-7)
    assert np.abs(pair[:, :1] - single).max() > 1e-4


def test_bytes_and_floats_are_the_same_images() -> None:
    model = network()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 7, 3), dtype=np.uint8)
    floats = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    of_bytes = partition_shap(model, pixels, np.array([0, 1, 2]), max_evals=60)
    of_floats = partition_shap(model, floats, torch.tensor([0, 1, 2]), max_evals=60)
    np.testing.assert_array_equal(of_bytes.values, of_floats.values)


# --- memory ------------------------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_forward_and_goes_on() -> None:
    model, sizes = network(), []

    def score(x: Tensor) -> Tensor:
        sizes.append(len(x))
        if len(x) > 10:
            raise torch.OutOfMemoryError("this device holds 10 images")
        return model(x)

    images, labels = pictures(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    settings = {"max_evals": 200, "batch_size": 40, "masker": 0.5}
    found = partition_shap(score, images, labels, forward_batch=64, **settings)
    np.testing.assert_allclose(found.values, partition_shap(model, images, labels, **settings).values, atol=1e-5)
    assert max(sizes) > 10 and sum(size > 10 for size in sizes) <= 3


def test_a_smaller_memory_limit_takes_fewer_images_at_once() -> None:
    model, images = network(), pictures(30, 3, 16, 16)
    settings = {"max_evals": 200, "batch_size": 10, "masker": 0.5, "forward_batch": 16}
    steps: dict[int, list[int]] = {}
    values = {}
    for limit in (400_000, 64_000_000):
        steps[limit] = []
        values[limit] = partition_shap(
            model, images, "all", memory_limit_bytes=limit, progress=steps[limit].append, **settings
        ).values
    assert len(steps[400_000]) > len(steps[64_000_000])
    np.testing.assert_allclose(values[400_000], values[64_000_000], atol=1e-5)
    with pytest.raises(PartitionError, match=r"memory_limit_bytes = 1000 is too small"):
        partition_shap(model, images, "all", memory_limit_bytes=1000, **settings)


# --- errors ------------------------------------------------------------------------------------------------------

IMAGES = pictures(2, 3, 8, 8)
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_evals": 3}, r"max_evals = 3.*4 or more"),
        ({"batch_size": 0}, r"batch_size = 0"),
        ({"fixed_context": 2}, r"fixed_context = 2"),
        ({"dtype": torch.float16}, r"dtype = torch.float16"),
        ({"forward_batch": 0}, r"forward_batch = 0"),
        ({"images_in_flight": 0}, r"images_in_flight = 0"),
        ({"outputs": torch.tensor([0, 5])}, r"image 1 asks for \[5\], the model has 5 scores; allowed: 0 to 4"),
        ({"outputs": torch.tensor([-1, 0])}, r"image 0 asks for \[-1\]"),
        ({"outputs": torch.tensor([0, 1, 2])}, r"outputs has the shape \(3,\)"),
        ({"outputs": torch.ones(2, 4)}, r"4 weights an image, the model has 5 scores"),
        ({"outputs": torch.full((2, 5), torch.nan)}, r"finite"),
        ({"outputs": "best"}, r"outputs = 'best'"),
        ({"outputs": torch.tensor([True, False])}, r"boolean"),
        ({"images": pictures(2, 3, 8)}, r"images: torch.float32 \(2, 3, 8\)"),
        ({"images": torch.ones(2, 3, 8, 8, dtype=torch.int64)}, r"images: torch.int64"),
        ({"images": IMAGES * 255}, r"image 0 has values outside \[0, 1\]"),
        ({"images": torch.where(IMAGES > 0.99, torch.nan, IMAGES)}, r"outside \[0, 1\] \(or NaN\)"),
        ({"images": IMAGES[:0], "outputs": "all"}, r"there are none"),
        ({"score": lambda x: x.mean((1, 2, 3))}, r"score returned a tensor of shape \(1,\).*\(1, K\)"),
        ({"score": lambda x: x.numpy()}, r"score returned <class 'numpy.ndarray'>"),
        ({"score": lambda x: torch.ones(3, 5)}, r"score returned a tensor of shape \(3, 5\) for 1 inputs"),
        ({"score": lambda x: torch.ones(len(x), 5, dtype=torch.int64)}, r"score returned torch.int64"),
        ({"score": lambda x: torch.full((len(x), 5), torch.nan)}, r"NaN or infinite values for image 0"),
        ({"score": lambda x: torch.where(x[:, :1, 0, 0] == IMAGES[1, 0, 0, 0], torch.inf, 1.0).expand(-1, 5)},
         r"NaN or infinite values for image 1"),
        ({"score": network().train()}, r"training mode.*eval\(\)"),
    ],
)
def test_errors_name_the_setting_its_value_and_what_is_allowed(changed: dict, message: str) -> None:
    arguments = {"score": network(), "images": IMAGES, "outputs": LABELS, "max_evals": 20} | changed
    with pytest.raises(PartitionError, match=message):
        partition_shap(arguments.pop("score"), arguments.pop("images"), arguments.pop("outputs"), **arguments)


def test_a_masker_that_does_not_fit_is_refused() -> None:
    with pytest.raises(MaskerError, match="2 channel values, the images have 3"):
        partition_shap(network(), IMAGES, LABELS, masker=(0.1, 0.2))


def test_additivity_is_checked_on_each_map() -> None:
    found = partition_shap(network(), IMAGES, LABELS, max_evals=100)
    check_additivity(found.values, found.scores, found.base_values)
    broken = found.values.copy()
    broken[1, 0, 0, 3, 3] += 0.01 * np.abs(broken[1]).sum()
    with pytest.raises(AdditivityError, match="image 11, output 0"):
        check_additivity(broken, found.scores, found.base_values, names=range(10, 13))
    with pytest.raises(AdditivityError):
        check_additivity(np.zeros_like(found.values), found.scores, found.base_values)
    with pytest.raises(AdditivityError):
        check_additivity(np.full_like(found.values, np.nan), found.scores, found.base_values)


def test_a_score_that_changes_between_calls_is_refused() -> None:
    """The maps telescope: whatever the scores in between, the sum is f(image) - f(masked) of the first two calls."""
    generator = torch.Generator().manual_seed(0)

    def score(x: Tensor) -> Tensor:
        return torch.rand(len(x), 5, generator=generator)

    found = partition_shap(score, IMAGES, LABELS, max_evals=100, check=False)
    np.testing.assert_allclose(
        found.values.sum((2, 3, 4), dtype=float), found.scores - found.base_values, atol=1e-5
    )
    with pytest.raises(PartitionError, match=r"image \d beside other images .* and .* alone.* or on chance"):
        partition_shap(score, IMAGES, LABELS, max_evals=100)
