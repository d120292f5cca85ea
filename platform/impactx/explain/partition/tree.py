"""The partition tree of an image, nested boxes over H x W x C, and the masks of its nodes.

A box is split by rows if h >= w and h > 1, else by columns if w > 1, else by channels; it is the
same tree for every image of a shape. The halves are those of shap 0.51 as it runs:
``maskers.Image`` cuts at side//2 but numbers the leaves backwards, so its boxes lie mirrored in the
image, in all three axes. An odd side gives the larger half first (channels {0, 1} and {2}), and the
"left" child is the later one. Even sides do not show it; single channels do.

**A mask is a node and a context.** Walk from the root down to a node: at depth j+1 the walk enters
one child and passes its sibling. Bit j of the context says whether that sibling is shown; the node
itself is hidden. So the mask of (node, context) is a union of at most ``max_depth`` disjoint boxes,
whatever the size of the image: no table of masks is needed (it would be 45 GB at 224 x 224 x 3).
"Context m of a node, plus its left child" is the mask of (right child, m | bit of that depth).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PartitionTree:
    """Nodes in level order, the root first; a node's children have larger numbers than the node.

    Attributes:
        shape: (C, H, W) of the images.
        boxes: int32 (nodes, 6), the bounds r0, r1, c0, c1, z0, z1 of rows, columns and channels
            (half open).
        left: int32 (nodes,), the left child, -1 at a leaf.
        right: int32 (nodes,), the right child, -1 at a leaf.
        parent: int32 (nodes,), -1 at the root.
        depth: int32 (nodes,), 0 at the root.
        size: int64 (nodes,), the number of leaves (pixel x channel) below a node.
        siblings: int32 (nodes, max_depth), the node passed at depth j+1 on the way to a node; 0
            (the root) beyond.
        levels: Where each level begins, and the number of nodes as the last entry.
        leaf: int32 (C*H*W,), the leaf of each channel and pixel, in the order of a (C, H, W) array.
    """

    shape: tuple[int, int, int]
    boxes: np.ndarray
    left: np.ndarray
    right: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    size: np.ndarray
    siblings: np.ndarray
    levels: tuple[int, ...]
    leaf: np.ndarray

    @property
    def n_nodes(self) -> int:
        """The number of nodes."""
        return len(self.left)

    @property
    def max_depth(self) -> int:
        """The depth of the deepest leaf; the root's is 0."""
        return len(self.levels) - 2

    def splits_possible(self, fixed_context: int | None) -> int:
        """Return how many splits there are at all: a node once for each context that reaches it.

        Args:
            fixed_context: See `engine.partition_shap`.
        """
        inner = self.depth[self.left >= 0]
        if fixed_context is not None:
            return len(inner)
        return sum(int(count) << depth for depth, count in enumerate(np.bincount(inner)))


def build_tree(shape: tuple[int, int, int]) -> PartitionTree:
    """Return the partition tree of images of ``shape`` (C, H, W); cached, so all share one.

    Raises:
        ValueError: A side is below 1, or the image so large that a context does not fit 62 bits.
    """
    channels, height, width = (int(side) for side in shape)
    if min(channels, height, width) < 1:
        raise ValueError(f"image shape (C, H, W) = {tuple(shape)}: every side must be at least 1")
    return _build(channels, height, width)


@lru_cache(maxsize=16)
def _build(channels: int, height: int, width: int) -> PartitionTree:
    level = np.array([[0, height, 0, width, 0, channels]], dtype=np.int32)
    parents = np.array([-1], dtype=np.int32)
    boxes, parent, left, right, levels = [], [], [], [], [0]
    first = 0
    while len(level):
        boxes.append(level)
        parent.append(parents)
        low, high = _split(level)
        inner = np.flatnonzero(low[:, 0] >= 0)
        first_child = first + len(level)
        left_ids = np.full(len(level), -1, dtype=np.int32)
        left_ids[inner] = first_child + 2 * np.arange(len(inner), dtype=np.int32)
        left.append(left_ids)
        right.append(np.where(left_ids >= 0, left_ids + 1, -1).astype(np.int32))
        parents = np.repeat(first + inner, 2).astype(np.int32)
        level = np.stack([low[inner], high[inner]], axis=1).reshape(-1, 6)
        first = first_child
        levels.append(first)
    mirrored = np.concatenate(boxes)
    for axis, side in enumerate((height, width, channels)):
        mirrored[:, 2 * axis : 2 * axis + 2] = side - mirrored[:, [2 * axis + 1, 2 * axis]]
    return _finish((channels, height, width), mirrored, np.concatenate(parent),
                   np.concatenate(left), np.concatenate(right), tuple(levels))


def _split(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the two halves of each box; boxes of one element come back as -1."""
    sides = boxes[:, 1::2] - boxes[:, 0::2]
    h, w, z = sides.T
    axis = np.select([(h >= w) & (h > 1), w > 1, z > 1], [0, 1, 2], default=-1)
    rows = np.arange(len(boxes))
    middle = boxes[rows, 2 * axis] + sides[rows, axis] // 2
    low, high = boxes.copy(), boxes.copy()
    low[rows, 2 * axis + 1] = middle
    high[rows, 2 * axis] = middle
    low[axis < 0] = -1
    high[axis < 0] = -1
    return low, high


def _finish(
    shape: tuple[int, int, int],
    boxes: np.ndarray,
    parent: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    levels: tuple[int, ...],
) -> PartitionTree:
    max_depth = len(levels) - 2
    if max_depth > 62:
        raise ValueError(f"image shape (C, H, W) = {shape}: the tree has depth {max_depth}, at "
                         "most 62 is supported")
    depth = np.repeat(np.arange(max_depth + 1, dtype=np.int32), np.diff(levels))
    siblings = np.zeros((len(left), max_depth), dtype=np.int32)
    for level in range(1, max_depth + 1):
        nodes = np.arange(levels[level], levels[level + 1])
        siblings[nodes] = siblings[parent[nodes]]
        # the children of one node stand side by side: the left one has the odd number
        siblings[nodes, level - 1] = np.where(nodes % 2 == 1, nodes + 1, nodes - 1)
    size = np.prod(boxes[:, 1::2].astype(np.int64) - boxes[:, 0::2], axis=1)
    leaves = np.flatnonzero(left < 0)
    leaf = np.zeros(shape, dtype=np.int32)
    leaf[boxes[leaves, 4], boxes[leaves, 0], boxes[leaves, 2]] = leaves
    arrays = (boxes, left, right, parent, depth, size, siblings)
    for array in arrays:
        array.setflags(write=False)
    return PartitionTree(shape, *arrays, levels, leaf.ravel())


class TreeOnDevice:
    """The tree's arrays as tensors of one device, with two operations of the engine."""

    def __init__(self, tree: PartitionTree, device: torch.device) -> None:
        self.tree = tree
        self.device = device
        self.left = torch.tensor(tree.left, dtype=torch.long, device=device)
        self.right = torch.tensor(tree.right, dtype=torch.long, device=device)
        self.depth = torch.tensor(tree.depth, dtype=torch.long, device=device)
        self.size = torch.tensor(tree.size, dtype=torch.float64, device=device)
        self.parent = torch.tensor(tree.parent, dtype=torch.long, device=device)
        self.leaf = torch.tensor(tree.leaf, dtype=torch.long, device=device)
        self.siblings = torch.tensor(tree.siblings, device=device)
        self.boxes = torch.tensor(tree.boxes, device=device)

    def masks(self, nodes: Tensor, contexts: Tensor) -> Tensor:
        """Return masks: bool (B, C, H, W), true where the image shows.

        The boxes of a mask are disjoint, so their union is a sum, and the sum over boxes of (rows
        and channels) x columns is one small matrix product for each mask: exact in any float type,
        and without a table.

        Args:
            nodes: int64 (B,).
            contexts: int64 (B,).
        """
        channels, height, width = self.tree.shape
        levels = torch.arange(self.tree.max_depth, device=self.device)
        shown = (contexts[:, None] >> levels) & 1 == 1
        r0, r1, c0, c1, z0, z1 = self.boxes[self.siblings[nodes].long()].unbind(-1)
        row = torch.arange(height, device=self.device)
        column = torch.arange(width, device=self.device)
        channel = torch.arange(channels, device=self.device)
        in_rows = (row >= r0[..., None]) & (row < r1[..., None]) & shown[..., None]
        in_columns = (column >= c0[..., None]) & (column < c1[..., None])
        in_channels = (channel >= z0[..., None]) & (channel < z1[..., None])
        planes = (in_channels[..., :, None] & in_rows[..., None, :]).flatten(2).float()
        union = torch.bmm(planes.transpose(1, 2), in_columns.float())
        return union.view(-1, channels, height, width) > 0.5

    def spread(self, node_values: Tensor) -> Tensor:
        """Divide each node's value evenly among its leaves.

        Args:
            node_values: float64 (..., nodes), which is overwritten.

        Returns:
            float64 (..., C*H*W).
        """
        density = node_values.div_(self.size)
        for first, last in zip(self.tree.levels[1:-1], self.tree.levels[2:], strict=True):
            density[..., first:last] += density[..., self.parent[first:last]]
        return density[..., self.leaf]
