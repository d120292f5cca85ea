"""Splits: stratified, nested, disjoint, the same everywhere."""

import hashlib

import numpy as np
import pytest

from impactx.datasets import DataError, make_split, stratified_draw


def uneven_labels(seed):
    """Labels of 2 to 9 shuffled classes with 2 to 120 images each."""
    random = np.random.default_rng(seed)
    sizes = random.integers(2, 120, random.integers(2, 10))
    return random.permutation(np.repeat(np.arange(len(sizes)), sizes))


@pytest.mark.parametrize("seed", range(25))
def test_a_split_is_stratified_disjoint_complete_and_sorted(seed):
    labels = uneven_labels(seed)
    for fraction in (0.05, 0.1, 0.2, 0.49):
        split = make_split(labels, fraction, common_fraction=0.05, seed=seed)
        assert all(part.dtype == np.int64 and np.all(np.diff(part) > 0)
                   for part in (split.train, split.validation, split.common))
        assert sorted([*split.train, *split.validation]) == list(range(len(labels)))
        sizes = np.bincount(labels)
        taken = np.bincount(labels[split.validation], minlength=len(sizes))
        assert np.all(np.abs(taken - np.maximum(sizes * fraction, 1)) <= 0.5 + 1e-9) and np.all(taken >= 1)


@pytest.mark.parametrize("seed", range(25))
def test_smaller_validation_parts_lie_inside_larger_ones(seed):
    labels = uneven_labels(seed + 100)
    fractions = (0.05, 0.07, 0.1, 0.2, 0.35)
    splits = [make_split(labels, f, common_fraction=0.05, seed=seed) for f in fractions]
    for small, large in zip(splits, splits[1:], strict=False):
        assert set(small.validation) <= set(large.validation)
        assert np.array_equal(small.common, large.common)
    assert np.array_equal(splits[0].validation, splits[0].common)


def test_seeds_give_different_splits_and_the_same_seed_the_same():
    labels = np.repeat(np.arange(10), 500)
    splits = [make_split(labels, 0.1, common_fraction=0.05, seed=seed).validation
              for seed in (0, 0, 1, 2**31 - 1)]
    assert np.array_equal(splits[0], splits[1])
    overlap = [len(np.intersect1d(splits[0], other)) / 500 for other in splits[2:]]
    assert all(0.03 < share < 0.2 for share in overlap)  # 0.1 by chance
    # Positions within the classes: one permutation for all classes would repeat itself ten times.
    within = [tuple(splits[0][labels[splits[0]] == c] - 500 * c) for c in range(10)]
    assert len(set(within)) == 10


def test_a_split_does_not_follow_the_order_of_the_file():
    labels = np.zeros(1000, dtype=np.int64)
    labels[500:] = 1
    chosen = make_split(labels, 0.2, common_fraction=0.2, seed=3).validation
    assert 150 < chosen[labels[chosen] == 0].mean() < 350


def test_the_split_is_the_one_that_was_published():
    """Pinned: a new version of NumPy or another platform must not move an image to another part."""
    labels = np.arange(1000) % 7
    split = make_split(labels, 0.1, common_fraction=0.05, seed=42)
    drawn = stratified_draw(labels, 123, 42)
    digests = [hashlib.sha256(part.astype("<i8").tobytes()).hexdigest()[:16]
               for part in (split.validation, split.common, drawn)]
    assert digests == ["c8cc3e48d52b4bd8", "f348fdd5a77c48e4", "e360d2d0682ce914"]


@pytest.mark.parametrize("labels, fraction, names, message", [
    ([0] * 50 + [1], 0.1, ["cat", "dog"], "class 'dog' has 1 image"),
    ([0] * 50 + [1], 0.1, None, "class 1 has 1 image"),
    ([0] * 50 + [2] * 50, 0.1, ["cat", "dog", "owl"], "class 'dog' has no image"),
    ([0] * 50 + [2] * 50, 0.1, None, "class 1 has no image"),
    ([0] * 50 + [1] * 50, 0.1, ["cat", "dog", "owl"], "class 'owl' has no image"),
    ([0] * 3 + [1] * 50, 0.9, ["cat", "dog"], "class 'cat' has 3 image"),
    ([0] * 50 + [1] * 50, 0.02, None, "smaller than the common fraction"),
    ([0] * 50 + [1] * 50, 1.0, None, "between 0 and 1"),
    ([0] * 50 + [5] * 50, 0.1, ["cat", "dog"], r"label 5 at position 50 is outside 0\.\.1"),
    ([0, -1], 0.1, None, "label -1 at position 1 is negative"),
    ([], 0.1, None, "non-empty vector of integers"),
    ([0.0, 1.0], 0.1, None, "non-empty vector of integers"),
])
def test_a_split_that_cannot_be_made_names_the_reason(labels, fraction, names, message):
    with pytest.raises(DataError, match=message):
        make_split(np.array(labels), fraction, common_fraction=0.05, seed=0, class_names=names)


@pytest.mark.parametrize("seed", range(25))
def test_a_draw_keeps_the_shares_of_the_classes(seed):
    labels = uneven_labels(seed + 200)
    sizes = np.bincount(labels)
    for count in {len(sizes), len(labels) // 3 + len(sizes), len(labels) - 1, len(labels)}:
        drawn = stratified_draw(labels, count, seed)
        assert drawn.dtype == np.int64 and len(drawn) == count and np.all(np.diff(drawn) > 0)
        taken = np.bincount(labels[drawn], minlength=len(sizes))
        assert np.all(taken >= 1) and np.all(taken <= sizes)
        exact = sizes * count / len(labels)
        assert np.all((np.abs(taken - exact) < 1) | (taken == 1) | (exact.min() < 1))


def test_a_draw_leaves_out_labels_that_do_not_occur_and_refuses_what_is_impossible():
    labels = np.array([3] * 10 + [7] * 10)
    assert np.bincount(labels[stratified_draw(labels, 10, 0)]).tolist() == [0, 0, 0, 5, 0, 0, 0, 5]
    for count in (1, 21):
        with pytest.raises(DataError, match=f"cannot draw {count} images from 20 images of 2 classes"):
            stratified_draw(labels, count, 0)
