"""Partition SHAP the slow way: one image, one mask, one queue. Read this to learn what the fast engine computes.

The question. A model f gives a score. Hide parts of the image x (blur them) and the score changes. How much of
f(x) - f(everything hidden) is each pixel's doing? Shapley's answer averages, over all orders in which pixels could be
shown, what a pixel adds when its turn comes. That is far too many orders, so pixels are grouped in a tree
of boxes (Owen's values): first the two halves of the image share the credit between them, then the two
quarters of each half share what the half was given, and so on.

Two players, left and right, share f11 - f00 (both shown, none shown) like this, where f10 has only the left shown:

    left  gets  1/2 (f10 - f00)  +  1/2 (f11 - f01)        it came first, or it came second
    right gets  1/2 (f01 - f00)  +  1/2 (f11 - f10)

Each of these four differences is a smaller problem of the same kind: "what happens between (the context, this box
hidden) and (the context, this box shown)". So a problem is (box, context, f_hidden, f_shown, weight), and splitting it
costs two evaluations and makes four problems with half the weight. There are more problems than we can
afford, so the largest (weighted) difference goes first, and when the budget is spent each open problem leaves its
difference to its whole box, evenly.

Everything here is float64 and plain; only ``batch_size`` needs a word: shap evaluates that many masks together, so it
takes several problems from the queue before it sees what the first of them leads to. The estimate depends on it.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass
class Box:
    """Rows x columns x channels, half open, and its two halves (None for a single pixel of one channel)."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    channels: tuple[int, int]
    left: Box | None = None
    right: Box | None = None
    value: np.ndarray | float = 0.0

    @property
    def area(self) -> tuple[slice, slice, slice]:
        """Where the box lies in a (C, H, W) array."""
        return slice(*self.channels), slice(*self.rows), slice(*self.columns)


def grow(box: Box) -> Box:
    """Split a box down to single elements: rows while the box is at least as tall as wide, else columns, then channels.

    shap cuts at side // 2, counted from the far end (its leaves are numbered backwards), and calls that end left.
    """
    rows, columns, channels = box.rows, box.columns, box.channels
    height, width, depth = (stop - start for start, stop in (rows, columns, channels))
    if height >= width and height > 1:
        cut = rows[1] - height // 2
        far, near = Box((cut, rows[1]), columns, channels), Box((rows[0], cut), columns, channels)
    elif width > 1:
        cut = columns[1] - width // 2
        far, near = Box(rows, (cut, columns[1]), channels), Box(rows, (columns[0], cut), channels)
    elif depth > 1:
        cut = channels[1] - depth // 2
        far, near = Box(rows, columns, (cut, channels[1])), Box(rows, columns, (channels[0], cut))
    else:
        return box
    box.left, box.right = grow(far), grow(near)
    return box


def blurred(image: np.ndarray, kernel_width: int, kernel_height: int) -> np.ndarray:
    """cv2.blur of a (C, H, W) image: the mean over a window that starts kernel // 2 before the pixel.

    Beyond the border the image is mirrored without repeating the border pixel (REFLECT_101).
    """

    def mirrored(position: int, length: int) -> int:
        while not 0 <= position < length:
            if length == 1:
                return 0
            position = -position if position < 0 else 2 * (length - 1) - position
        return position

    _, height, width = image.shape
    result = np.zeros_like(image, dtype=np.float64)
    for row in range(height):
        window_rows = [mirrored(row - kernel_height // 2 + k, height) for k in range(kernel_height)]
        for column in range(width):
            window_columns = [mirrored(column - kernel_width // 2 + k, width) for k in range(kernel_width)]
            result[:, row, column] = image[:, window_rows][:, :, window_columns].mean(axis=(1, 2))
    return result


def partition_values(
    score: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    background: np.ndarray,
    outputs: list[int],
    max_evals: int,
    batch_size: int,
    fixed_context: int | None = None,
) -> np.ndarray:
    """The map (n_outputs, C, H, W) of one image.

    Args:
        score: (B, C, H, W) float64 -> (B, K).
        image, background: (C, H, W) float64: what is shown and what stands where the image is hidden.
        outputs: the scores that are explained.
    """

    def evaluate(masks: list[np.ndarray]) -> np.ndarray:
        return score(np.stack([np.where(mask, image, background) for mask in masks]))[:, outputs]

    channels, height, width = image.shape
    root = grow(Box((0, height), (0, width), (0, channels)))
    nothing, everything = np.zeros(image.shape, bool), np.ones(image.shape, bool)
    f_nothing, f_everything = evaluate([nothing])[0], evaluate([everything])[0]
    budget, spent = max_evals - 2, 0  # those two count

    order = itertools.count()  # equal priorities: first come, first served
    open_problems: list[tuple] = []

    def put(box: Box, context: np.ndarray, hidden: np.ndarray, shown: np.ndarray, weight: float) -> None:
        priority = np.max(np.abs(shown - hidden)) * weight
        heapq.heappush(open_problems, (-priority, next(order), box, context, hidden, shown, weight))

    put(root, nothing, f_nothing, f_everything, 1.0)
    while open_problems and spent < budget:
        # take problems until their masks fill a batch; two masks a problem
        batch = []
        while open_problems and 2 * len(batch) < batch_size and spent + 2 * len(batch) < budget:
            _, _, box, context, hidden, shown, weight = heapq.heappop(open_problems)
            if box.left is None:
                box.value = box.value + (shown - hidden) * weight  # nothing to split: costs nothing
                continue
            with_left, with_right = context.copy(), context.copy()
            with_left[box.left.area] = True
            with_right[box.right.area] = True
            batch.append((box, context, with_left, with_right, hidden, shown, weight))
        if not batch:
            continue
        results = evaluate([mask for problem in batch for mask in problem[2:4]])
        spent += len(results)
        for i, (box, context, with_left, with_right, f00, f11, weight) in enumerate(batch):
            f10, f01 = results[2 * i], results[2 * i + 1]
            interaction = (f11 - f10 - f01 + f00) * weight
            share = weight / 2
            if fixed_context is not None:  # only one of the two contexts, and what is left over stays on the box
                share = weight
                box.value = box.value + (interaction if fixed_context == 0 else -interaction)
            if fixed_context in (None, 0):  # the other half hidden
                put(box.left, context, f00, f10, share)
                put(box.right, context, f00, f01, share)
            if fixed_context in (None, 1):  # the other half shown
                put(box.left, with_right, f01, f11, share)
                put(box.right, with_left, f10, f11, share)

    for _, _, box, _, hidden, shown, weight in open_problems:
        box.value = box.value + (shown - hidden) * weight

    values = np.zeros((len(outputs), *image.shape))
    stack = [root]
    while stack:
        box = stack.pop()
        n_elements = np.prod([part.stop - part.start for part in box.area])
        values[(slice(None), *box.area)] += np.reshape(box.value / n_elements, (-1, 1, 1, 1))
        stack += [half for half in (box.left, box.right) if half is not None]
    return values
