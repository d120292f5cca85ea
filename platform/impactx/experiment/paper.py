"""The results of the paper: Table 2 of arXiv 2502.12222v2.

It gives one test accuracy for each approach in each cell, without a spread.
"""

from __future__ import annotations

from impactx.datasets.sources.base import finder_of
from impactx.settings import DatasetSettings

_APPROACHES = ("baseline", "impactx", "abn", "wae")
_TABLE2 = {  # in percent
    ("cifar10", "lenet5"): (67.96, 70.65, 68.49, 68.10),
    ("cifar10", "mobilenet"): (94.63, 96.27, 95.41, 94.75),
    ("cifar10", "efficientnet_b2"): (98.06, 98.38, 98.19, 98.08),
    ("cifar100", "lenet5"): (36.23, 39.49, 37.62, 36.20),
    ("cifar100", "mobilenet"): (76.72, 79.37, 78.24, 76.98),
    ("cifar100", "efficientnet_b2"): (87.88, 89.06, 88.89, 88.27),
    ("stl10", "lenet5"): (52.59, 55.86, 53.36, 52.99),
    ("stl10", "mobilenet"): (91.07, 95.79, 92.71, 91.42),
    ("stl10", "efficientnet_b2"): (98.76, 99.00, 98.59, 98.65),
}


def paper_accuracy(dataset: str, model: str, approach: str) -> float | None:
    """Return the paper's test accuracy.

    Args:
        dataset: The data set's name in this package, such as "cifar10".
        model: The model's name in this package, such as "lenet5".
        approach: The approach's name in this package, such as "impactx".

    Returns:
        A fraction in [0, 1], or None if the paper has none.
    """
    row = _TABLE2.get((dataset, model))
    return row[_APPROACHES.index(approach)] / 100 if row and approach in _APPROACHES else None


def published(dataset: DatasetSettings, model: str, approach: str) -> float | None:
    """Return the paper's test accuracy if it may be compared with ours, else None.

    That is so if the data set is the paper's, and not another of the same name, and if all of its
    images are used.

    Args:
        dataset: The data set.
        model: The model's name.
        approach: The approach's name.
    """
    published_as = (finder_of(dataset).published_as() or "").lower()
    same = dataset.subset is None and published_as == dataset.name
    return paper_accuracy(dataset.name, model, approach) if same else None
