"""Masked images from (image, node, context), without a table of masks.

There are two ways to the same bits. On a CPU a Numba kernel copies the background and then the few
boxes that the mask shows: a mask is a union of at most ``max_depth`` boxes, so this is a handful of
short row copies for each evaluation. Elsewhere the mask comes from a small batched matrix product
(``TreeOnDevice.masks``) and ``torch.where`` picks.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from impactx.explain.partition.tree import PartitionTree, TreeOnDevice


@numba.njit(nogil=True, cache=True)
def _copy_boxes(  # type: ignore[no-untyped-def]
        images, backgrounds, which, nodes, contexts, siblings, boxes, out):
    for b in range(len(which)):
        image = images[which[b]]
        target = out[b]
        target[:] = backgrounds[which[b]]
        context = contexts[b]
        level = 0
        while context != 0:
            if context & 1:
                box = boxes[siblings[nodes[b], level]]
                first, last = box[2], box[3]
                for z in range(box[4], box[5]):
                    for r in range(box[0], box[1]):
                        for c in range(first, last):
                            target[z, r, c] = image[z, r, c]
            context >>= 1
            level += 1


class Composer:
    """Builds masked images of one group of images.

    Args:
        tree: The partition tree of the images' shape, as tensors on the images' device.
        images: Floating point (G, C, H, W).
        backgrounds: (G, C, H, W), of the same device and dtype.
    """

    def __init__(self, tree: TreeOnDevice, images: Tensor, backgrounds: Tensor) -> None:
        self.tree = tree
        self.images = images.contiguous()
        self.backgrounds = backgrounds.contiguous()
        self._arrays = None
        self._out = np.empty(0)
        if images.device.type == "cpu":
            host: PartitionTree = tree.tree
            self._arrays = (
                self.images.numpy(), self.backgrounds.numpy(), host.siblings, host.boxes)

    def compose(self, which: Tensor, nodes: Tensor, contexts: Tensor) -> Tensor:
        """Return masked images.

        Args:
            which: int64 (B,), each mask's image, as its index in the group.
            nodes: int64 (B,), each mask's node.
            contexts: int64 (B,), each mask's context.

        Returns:
            (B, C, H, W); on a CPU in a buffer that the next call writes again.
        """
        if self._arrays is None:
            shown = self.tree.masks(nodes, contexts)
            return torch.where(shown, self.images[which], self.backgrounds[which])
        images, backgrounds, siblings, boxes = self._arrays
        if len(self._out) < len(which):
            self._out = np.empty((len(which), *images.shape[1:]), dtype=images.dtype)
        out = self._out[: len(which)]
        _copy_boxes(images, backgrounds, which.numpy(), nodes.numpy(), contexts.numpy(), siblings,
                    boxes, out)
        return torch.from_numpy(out)
