"""Masked images after a model's first layer, without running that layer on them.

The first layer is affine (``split.Head``): on a masked image it gives what it gives on the
background, plus one contribution for each box that the mask shows,

    affine(masked) = affine(background)
                     + sum over shown boxes b of [affine(b x (image - background)) - affine(0)].

A contribution is zero outside its box, widened by the kernel. It is computed once for an image and
box, when the box is first shown: a child's mask differs from its parent's in one box, so those are
the two halves of the node that is split. About a tenth as many boxes as masks occur, so the layer
is hardly ever run; a mask costs some additions on small patches, then ReLU and max-pool. A sum over
at most ``max_depth`` patches in fixed order keeps float rounding where a convolution has it.

Patches lie in one flat buffer, as (phase, row, column, channel) with the rows and columns of the
pooled map; phase is the position within a pooling window, so pooling is a maximum over phases of
contiguous runs.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from impactx.explain.partition.split import Head
from impactx.explain.partition.tree import TreeOnDevice


@numba.njit(nogil=True, cache=True)
def _store_patches(  # type: ignore[no-untyped-def]
        full, zero, pool_h, pool_w, patches, used, places, rows):
    """Cut each contribution to the window where it is not zero and append it to ``patches``."""
    n, channels = full.shape[0], full.shape[1]
    height, width = full.shape[2] // pool_h, full.shape[3] // pool_w
    for i in range(n):
        r0, r1, c0, c1 = height, 0, width, 0
        for k in range(channels):
            for r in range(height * pool_h):
                for c in range(width * pool_w):
                    if full[i, k, r, c] != zero[0, k, r, c]:
                        r0, r1 = min(r0, r // pool_h), max(r1, r // pool_h + 1)
                        c0, c1 = min(c0, c // pool_w), max(c1, c // pool_w + 1)
        r0, c0 = min(r0, r1), min(c0, c1)
        place = places[rows[i]]
        place[0], place[1], place[2], place[3], place[4] = used, r0, r1, c0, c1
        for a in range(pool_h):
            for b in range(pool_w):
                for r in range(r0, r1):
                    for c in range(c0, c1):
                        for k in range(channels):
                            patches[used] = full[i, k, r * pool_h + a, c * pool_w + b] - zero[
                                0, k, r * pool_h + a, c * pool_w + b]
                            used += 1
    return used


@numba.njit(nogil=True, cache=True)
def _add_and_pool(  # type: ignore[no-untyped-def]
        base, patches, places, slots, which, nodes, contexts, siblings, relu, work, out):
    """out[b] = pool(relu(base + patches of the shown boxes)); all maps flat, channels innermost."""
    phases, height, width, channels = base.shape[1], base.shape[2], base.shape[3], base.shape[4]
    row_length = width * channels
    plane = height * row_length
    for b in range(len(which)):
        image = which[b]
        work[:] = base[image].reshape(phases * plane)
        context = contexts[b]
        level = 0
        while context != 0:
            if context & 1:
                place = places[slots[image, siblings[nodes[b], level]]]
                source = place[0]
                run = (place[4] - place[3]) * channels
                for phase in range(phases):
                    for r in range(place[1], place[2]):
                        first = phase * plane + r * row_length + place[3] * channels
                        # Views: plain loops from 0 become vector code.
                        target = work[first : first + run]
                        patch = patches[source : source + run]
                        for j in range(run):
                            target[j] += patch[j]
                        source += run
            context >>= 1
            level += 1
        result = out[b].reshape(plane)
        result[:] = work[:plane]
        for phase in range(1, phases):
            other = work[phase * plane : (phase + 1) * plane]
            for j in range(plane):
                result[j] = other[j] if other[j] > result[j] else result[j]
        if relu:
            for j in range(plane):
                result[j] = result[j] if result[j] > 0 else 0


class HeadComposer:
    """Builds the inputs of ``FastScore.rest`` for one group of images on a CPU.

    Args:
        tree: The partition tree of the images' shape.
        head: The model's affine beginning.
        images: Floating point (G, C, H, W), on a CPU.
        backgrounds: (G, C, H, W), of the same dtype.
        forward_batch: How many boxes go through the head together.
    """

    def __init__(
        self, tree: TreeOnDevice, head: Head, images: Tensor, backgrounds: Tensor,
        forward_batch: int,
    ) -> None:
        self.tree, self.head, self.forward_batch = tree.tree, head, forward_batch
        self.difference = images - backgrounds
        self.zero = head.affine(torch.zeros_like(images[:1])).contiguous()
        base = torch.cat([head.affine(part) for part in torch.split(backgrounds, forward_batch)])
        (ph, pw), (n, channels, h, w) = head.pool, base.shape
        height, width = h // ph, w // pw
        base = base[:, :, : height * ph, : width * pw].reshape(n, channels, height, ph, width, pw)
        base = base.permute(0, 3, 5, 2, 4, 1).reshape(n, ph * pw, height, width, channels)
        self.base = base.contiguous().numpy()
        self.full_size = self.base[0].size
        self.patches = np.empty(4 * self.full_size, self.base.dtype)
        self.used = 0
        self.places = np.zeros((256, 5), np.int64)
        self.n_places = 0
        self.slots = np.full((n, self.tree.n_nodes), -1, np.int32)
        self._work = np.empty(self.full_size, self.base.dtype)
        self._out = np.empty((0, *self.base.shape[2:]), self.base.dtype)

    @property
    def bytes_an_image(self) -> int:
        """About what an image takes, in bytes.

        The boxes of a level are disjoint, so a level is a few maps, kernel borders included
        (measured: 14 maps in all at 2000 evaluations and 12 levels).
        """
        maps = int(self.base.itemsize * self.full_size) * (1 + 3 * self.tree.max_depth)
        return maps + 4 * self.tree.n_nodes

    def prepare(self, image: Tensor, node: Tensor) -> None:
        """Compute the contributions of boxes that are not there yet.

        Args:
            image: int64 (M,), each box's image.
            node: int64 (M,), each box's node.
        """
        flat = np.unique(image.numpy() * self.tree.n_nodes + node.numpy())
        flat = flat[self.slots.reshape(-1)[flat] < 0]
        if not len(flat):
            return
        rows = np.arange(self.n_places, self.n_places + len(flat))
        self.slots.reshape(-1)[flat] = rows
        self.n_places += len(flat)
        while len(self.places) < self.n_places:
            self.places = np.concatenate([self.places, np.zeros_like(self.places)])
        for i in range(0, len(flat), self.forward_batch):
            self._add(flat[i : i + self.forward_batch], rows[i : i + self.forward_batch])

    def _add(self, flat: np.ndarray, rows: np.ndarray) -> None:
        images, nodes = np.divmod(flat, self.tree.n_nodes)
        boxed = torch.zeros((len(flat), *self.difference.shape[1:]), dtype=self.difference.dtype)
        for i, (image, node) in enumerate(zip(images, nodes, strict=True)):
            r0, r1, c0, c1, z0, z1 = self.tree.boxes[node]
            boxed[i, z0:z1, r0:r1, c0:c1] = self.difference[image, z0:z1, r0:r1, c0:c1]
        full = self.head.affine(boxed).contiguous().numpy()
        if len(self.patches) < self.used + len(flat) * self.full_size:
            grown = np.empty(2 * self.used + (len(flat) + 1) * self.full_size, self.patches.dtype)
            grown[: self.used] = self.patches[: self.used]
            self.patches = grown
        self.used = _store_patches(
            full, self.zero.numpy(), *self.head.pool, self.patches, self.used, self.places, rows
        )

    def compose(self, which: Tensor, nodes: Tensor, contexts: Tensor) -> Tensor:
        """Return the inputs of the rest of the model, for masks.

        Args:
            which: int64 (B,), each mask's image, as its index in the group.
            nodes: int64 (B,), each mask's node.
            contexts: int64 (B,), each mask's context.

        Returns:
            (B, c, h, w) in channels-last order, in a buffer that the next call writes again.
        """
        if len(self._out) < len(which):
            self._out = np.empty((len(which), *self.base.shape[2:]), self.base.dtype)
        out = self._out[: len(which)]
        _add_and_pool(
            self.base, self.patches, self.places, self.slots, which.numpy(), nodes.numpy(),
            contexts.numpy(), self.tree.siblings, self.head.relu, self._work, out,
        )
        return torch.from_numpy(out).permute(0, 3, 1, 2)
