"""Stratified draws and the nested split into training and validation part.

All draws are functions of (labels, seed) alone: they use the raw stream of PCG64, which NumPy
keeps stable over versions and platforms (the methods of a Generator carry no such promise), and
a stable sort. Two machines that hold the same labels therefore hold the same split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from impactx.datasets.errors import DataError

# Streams that must not coincide although they share a seed.
_VALIDATION, _DRAW = 1, 2


@dataclass(frozen=True)
class Split:
    """Indices into the training images, each an ascending int64 array of shape (n,).

    Attributes:
        train: The images that are trained on.
        validation: All the others.
        common: The part of `validation` that belongs to every split of the same seed and
            common_fraction.
    """

    train: np.ndarray
    validation: np.ndarray
    common: np.ndarray


def make_split(labels: np.ndarray, fraction: float, *, common_fraction: float, seed: int,
               class_names: Sequence[str] | None = None) -> Split:
    """Split images into training and validation part, class by class.

    Each class has one permutation a seed, of which a fraction takes the beginning, so the
    validation part of a smaller fraction lies inside that of a larger one.

    Args:
        labels: Integers of shape (N,) in 0..K-1, K = len(class_names) if given, else max + 1.
        fraction: Share of every class that becomes validation, in (0, 1): round(n * fraction)
            images, at least 1.
        common_fraction: The smallest fraction in use, in (0, fraction]; gives `common`.
        seed: At least 0.
        class_names: K names, for messages.

    Raises:
        DataError: A fraction is out of range, or a class (named) would be left without a training
            or validation image.
    """
    if not 0 < fraction < 1 or not 0 < common_fraction < 1:
        raise DataError("a validation fraction must lie between 0 and 1, exclusive: got "
                        f"{fraction} and {common_fraction} as the common one")
    if fraction < common_fraction:
        raise DataError(f"the validation fraction {fraction} is smaller than the common fraction "
                        f"{common_fraction}: the common part must lie in every validation part")
    labels = _checked(labels)
    validation, common = [], []
    classes = None if class_names is None else len(class_names)
    for label, members in enumerate(_by_class(labels, classes)):
        name = _class(label, class_names)
        count = _share(len(members), fraction)
        if not len(members):
            raise DataError(f"{name} has no image: it can be neither trained nor validated")
        if count >= len(members):
            raise DataError(f"{name} has {len(members)} image(s); a validation fraction of "
                            f"{fraction} takes {count} and leaves none for training: use a smaller "
                            "fraction or more images")
        order = members[_permutation(len(members), seed, _VALIDATION, label)]
        validation.append(order[:count])
        common.append(order[:_share(len(members), common_fraction)])
    held_out = np.sort(np.concatenate(validation))
    return Split(train=_complement(len(labels), held_out), validation=held_out,
                 common=np.sort(np.concatenate(common)))


def stratified_draw(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw indices so that every class keeps its share, within one image.

    The fractions of images that the shares leave are given to the classes with the largest ones
    (ties: the lower label).

    Args:
        labels: Integers of shape (N,), at least 0.
        count: How many are drawn, at least one a class that occurs and at most N.
        seed: At least 0.

    Returns:
        Ascending int64 of shape (count,) without repetition; every class that occurs is drawn at
        least once.

    Raises:
        DataError: `count` is out of range.
    """
    labels = _checked(labels)
    classes = [members for members in _by_class(labels, None) if len(members)]
    if not len(classes) <= count <= len(labels):
        raise DataError(f"cannot draw {count} images from {len(labels)} images of {len(classes)} "
                        f"classes: the number must lie between {len(classes)} (one a class) and "
                        f"{len(labels)}")
    exact = [len(members) * count / len(labels) for members in classes]
    quotas = [max(1, math.floor(share)) for share in exact]
    # The quotas of tiny classes were raised to 1, so the sum may lie on either side of the count.
    while sum(quotas) != count:
        step = 1 if sum(quotas) < count else -1
        able = [i for i, q in enumerate(quotas) if (q < len(classes[i]) if step > 0 else q > 1)]
        quotas[max(able, key=lambda i: (step * (exact[i] - quotas[i]), -i))] += step
    drawn = [members[_permutation(len(members), seed, _DRAW, int(labels[members[0]]))[:quota]]
             for members, quota in zip(classes, quotas, strict=True)]
    return np.sort(np.concatenate(drawn))


def _permutation(count: int, seed: int, stream: int, label: int) -> np.ndarray:
    """Return a permutation of range(count) that depends on the four numbers only."""
    keys = np.random.PCG64(np.random.SeedSequence([seed, stream, label])).random_raw(count)
    return np.argsort(keys, kind="stable")


def _share(count: int, fraction: float) -> int:
    """Return round(count * fraction), halves up, at least 1; it grows with the fraction."""
    return max(1, math.floor(count * fraction + 0.5 + 1e-9))


def _complement(count: int, taken: np.ndarray) -> np.ndarray:
    keep = np.ones(count, dtype=bool)
    keep[taken] = False
    return np.flatnonzero(keep).astype(np.int64)


def _by_class(labels: np.ndarray, classes: int | None) -> list[np.ndarray]:
    """Return the ascending indices of each class 0..classes-1."""
    largest = int(labels.max())
    if classes is not None and largest >= classes:
        raise DataError(f"label {largest} at position {int(labels.argmax())} is outside "
                        f"0..{classes - 1}")
    order = np.argsort(labels, kind="stable").astype(np.int64)
    ends = np.searchsorted(labels[order], np.arange(1, classes or largest + 1))
    return np.split(order, ends)


def _checked(labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError("labels must be a non-empty vector of integers: got "
                        f"{labels.dtype} {labels.shape}")
    if labels.min() < 0:
        raise DataError(f"label {int(labels.min())} at position {int(labels.argmin())} is "
                        "negative")
    return labels.astype(np.int64)


def _class(label: int, class_names: Sequence[str] | None) -> str:
    return f"class {label}" if class_names is None else f"class {class_names[label]!r}"
