"""Many images in lockstep through the partition algorithm.

A step pops the best entries of every image's queue (``frontier``), evaluates all their masks with
one forward (``compose`` or ``head``, and ``forward``), and pushes the children. Only the order of
popping depends on the data. ``Room`` says how much memory queues and scores take, and how many
images fit beside each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from impactx.explain.masking import Masker
from impactx.explain.partition.compose import Composer
from impactx.explain.partition.forward import Forward, PartitionError
from impactx.explain.partition.frontier import Frontier
from impactx.explain.partition.head import HeadComposer
from impactx.explain.partition.tree import TreeOnDevice


@dataclass(frozen=True)
class Room:
    """The settings in numbers, and the memory that an image takes.

    Attributes:
        budget: Evaluations of an image beside f(image) and f(masked).
        pops_a_step: Entries of an image that are popped together at most; each costs two
            evaluations.
        fixed_context: See `engine.partition_shap`.
        capacity: Entries of an image's queue at most, popped ones included.
        evaluations: Evaluations of an image at most, f(image) and f(masked) included.
        dtype: Of images and scores.
        forward_batch: Masks in one forward at most.
        memory: The engine's working memory in bytes.
        tree: The partition tree of the images' shape.
    """

    budget: int
    pops_a_step: int
    fixed_context: int | None
    capacity: int
    evaluations: int
    dtype: torch.dtype
    forward_batch: int
    memory: int
    tree: TreeOnDevice

    @classmethod
    def plan(
        cls, tree: TreeOnDevice, max_evals: int, batch_size: int, fixed_context: int | None,
        dtype: torch.dtype, memory: int, forward_batch: int | None, device: torch.device,
    ) -> Room:
        """Reckon the room that an image needs; see `engine.partition_shap` for the arguments.

        Raises:
            PartitionError: ``forward_batch`` is below 1.
        """
        budget = max_evals - 2
        splits = min(math.ceil(budget / 2), tree.tree.splits_possible(fixed_context))
        children = 4 if fixed_context is None else 2
        pixel_bytes = math.prod(tree.tree.shape) * dtype.itemsize
        if forward_batch is None:
            wanted = 4096 if device.type != "cpu" else max(8, min(400, (5 << 20) // pixel_bytes))
            copies = 1 if device.type == "cpu" else 6
            forward_batch = max(1, min(wanted, memory // 4 // (pixel_bytes * copies)))
        elif forward_batch < 1:
            raise PartitionError(f"forward_batch = {forward_batch}; allowed: 1 or more")
        return cls(
            budget, math.ceil(batch_size / 2), fixed_context, 1 + children * splits,
            2 + 2 * splits, dtype, forward_batch, memory, tree,
        )

    def images_in_flight(self, n_outputs: int, wanted: int | None, head_bytes: int) -> int:
        """Return how many images fit into the memory beside each other.

        Args:
            n_outputs: How many outputs of an image are explained.
            wanted: How many images are wanted at most; by default 32 on a CPU, 2048 elsewhere.
            head_bytes: What an image takes in a `HeadComposer`.

        Raises:
            PartitionError: ``wanted`` is below 1, or not even one image fits.
        """
        host = self.tree.tree
        pixels = math.prod(host.shape)
        # One output of one image at a time at worst.
        credit = 8 * (self.capacity + 2 * host.n_nodes + 2 * pixels)
        an_image = (
            2 * pixels * self.dtype.itemsize
            + Frontier.bytes_an_image(self.capacity)
            + self.evaluations * n_outputs * self.dtype.itemsize
            + pixels * n_outputs * 4
            + head_bytes
        )
        if wanted is None:
            wanted = 32 if self.tree.device.type == "cpu" else 2048
        elif wanted < 1:
            raise PartitionError(f"images_in_flight = {wanted}; allowed: 1 or more")
        chunk = self.forward_batch * pixels * self.dtype.itemsize
        fit = (self.memory - chunk - credit) // an_image
        if fit < 1:
            raise PartitionError(
                f"memory_limit_bytes = {self.memory} is too small: one image takes "
                f"{an_image + credit} bytes, and {self.forward_batch} masked images "
                f"(forward_batch) {chunk}"
            )
        return int(min(wanted, fit))


class Group:
    """Images that go in lockstep, from the first two evaluations to their maps.

    Args:
        tree: The partition tree of the images' shape.
        forward: The model.
        masker: Makes the backgrounds that stand in for hidden pixels.
        images: Floating point (n, C, H, W) in [0, 1], on the device.
        first: The number of the group's first image among all.
        room: The settings.
    """

    def __init__(
        self, tree: TreeOnDevice, forward: Forward, masker: Masker, images: Tensor, first: int,
        room: Room,
    ) -> None:
        self.tree, self.forward, self.room, self.first = tree, forward, room, first
        self.n = len(images)
        self.device = images.device
        backgrounds = masker.background(images)
        # A box's share of the first layer pays where boxes occur again and again: not with a fixed
        # context.
        head = None if room.fixed_context is not None else forward.head
        self.ahead = None if head is None else HeadComposer(
            tree, head, images, backgrounds, room.forward_batch)
        self.images, self.backgrounds = images, backgrounds
        self.masks = Composer(tree, images, backgrounds)
        self.compose = self.masks.compose if self.ahead is None else self.ahead.compose
        everyone = torch.arange(self.n, device=self.device)
        base = forward(lambda which: backgrounds[which], everyone, first_image=first)
        full = forward(lambda which: images[which], everyone, first_image=first)
        self.scores = torch.empty((self.n, room.evaluations, base.shape[1]), dtype=base.dtype,
                                  device=self.device)
        self.scores[:, 0], self.scores[:, 1] = base, full
        self.spent = torch.zeros(self.n, dtype=torch.int64, device=self.device)
        self.queue = Frontier(self.n, room.capacity, self.device,
                              keep_splits=room.fixed_context is not None)
        zero = torch.zeros_like(everyone)
        slot = self.queue.reserve(torch.ones_like(everyone), 1)
        self._push(everyone, slot, zero, zero, zero, zero + 1)

    def explain(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Explain the group, once.

        Returns:
            Values, scores, base values and evaluations; see `engine.PartitionResult`.
        """
        while self._step():
            pass
        values = self._credit()
        ends = self.scores[:, :2].double().cpu().numpy()
        return values, ends[:, 1], ends[:, 0], (self.spent + 2).cpu().numpy()

    def masked(self, image: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Return masks that were evaluated, as images without shortcuts, and where the scores are.

        Args:
            image: int64 (M,), the images' indices in the group.
            slot: int64 (M,), entries of their queues, of which the end is taken that was evaluated
                for them; of the first, which is all of the image, the upper one.

        Returns:
            The masked images, (M, C, H, W), and their positions among the image's evaluations,
            int64 (M,).
        """
        queue, first = self.queue, slot == 0
        node, context = queue.node[image, slot].long(), queue.context[image, slot]
        position = queue.low[image, slot].long()
        # With a fixed context of 0 all the lower ends are f(masked). A root that is a leaf has no
        # siblings, and no entry but the first.
        if self.room.fixed_context == 0 and self.tree.siblings.shape[1]:
            level = (self.tree.depth[node] - 1).clamp(min=0)
            node, context = self.tree.siblings[node, level].long(), context | 1 << level
            position = queue.high[image, slot].long()
        images = self.masks.compose(image, node, context).clone()
        images[first] = self.images[image[first]]
        return images, position.masked_fill(first, 1)

    def _step(self) -> bool:
        """Look at every queue once; return False when there is nothing left to do."""
        room, tree, queue = self.room, self.tree, self.queue
        # shap pops while masks < batch_size and evaluations + masks < budget, two masks a pop
        allowed = ((room.budget - self.spent + 1) // 2).clamp(0, room.pops_a_step)
        popped = queue.pop(allowed, room.pops_a_step)
        if len(popped.image) == 0:
            return False
        image, node, context = popped.image, popped.node, popped.context
        left, right = tree.left[node], tree.right[node]
        # The right child's context with the left child shown; the left one's "with right".
        with_left = context | (1 << tree.depth[node])
        nodes = torch.stack([right, left], dim=1).flatten()
        if self.ahead is not None:
            self.ahead.prepare(image.repeat_interleave(2), nodes)
        scores = self.forward(
            self.compose, image.repeat_interleave(2), nodes, with_left.repeat_interleave(2),
            first_image=self.first, after_head=self.ahead is not None,
        )
        f10 = self.spent[image] + 2 * popped.rank + 2
        f01 = f10 + 1
        self.scores[image, f10], self.scores[image, f01] = scores[0::2], scores[1::2]
        queue.remember_split(f10)
        counts = torch.bincount(image, minlength=self.n)
        self.spent += 2 * counts

        hidden = [(left, context, popped.low, f10), (right, context, popped.low, f01)]
        shown = [(left, with_left, f01, popped.high), (right, with_left, f10, popped.high)]
        children = {None: hidden + shown, 0: hidden, 1: shown}[room.fixed_context]
        first = queue.reserve(len(children) * counts, len(children) * room.pops_a_step)
        slot = first[image] + len(children) * popped.rank
        columns = [torch.stack(column, dim=1).flatten() for column in zip(*children, strict=True)]
        ranks = torch.arange(len(children), device=self.device)
        self._push(image.repeat_interleave(len(children)), (slot[:, None] + ranks).flatten(),
                   *columns)
        return True

    def _push(
        self, image: Tensor, slot: Tensor, node: Tensor, context: Tensor, low: Tensor, high: Tensor
    ) -> None:
        difference = self.scores[image, high].double() - self.scores[image, low].double()
        priority = difference.abs().amax(dim=1) * self._weight(node)
        self.queue.push(image, slot, node, context, low, high, priority,
                        self.tree.left[node] < 0)

    def _weight(self, node: Tensor) -> Tensor:
        """Return the weight of a difference: each split halves it, unless the context is fixed."""
        if self.room.fixed_context is not None:
            return torch.ones(node.shape, dtype=torch.float64, device=self.device)
        return torch.exp2(-self.tree.depth[node].double())

    def _credit(self) -> np.ndarray:
        """Give each entry's difference to its node, and each node's value evenly to its leaves."""
        n_outputs = self.scores.shape[2]
        host = self.tree.tree
        values = np.empty((self.n, n_outputs, *host.shape), dtype=np.float32)
        each = 8 * (4 * self.room.capacity + 2 * host.n_nodes + 2 * math.prod(host.shape))
        together = max(1, self.room.memory // 8 // each)  # images x outputs at a time
        images, some = max(1, together // n_outputs), min(n_outputs, together)
        for i in range(0, self.n, images):
            rows = slice(i, min(i + images, self.n))
            for k in range(0, n_outputs, some):
                spread = self.tree.spread(self._node_values(rows, slice(k, k + some)))
                part = values[rows, k : k + some]  # a view
                part[:] = spread.float().cpu().numpy().reshape(part.shape)
        return values

    def _node_values(self, rows: slice, outputs: slice) -> Tensor:
        """Return the sum of each node's credits: float64 (g, outputs, nodes)."""
        queue = self.queue
        scores = self.scores[rows, :, outputs].transpose(1, 2).double()
        node = queue.node[rows].long()

        def at(position: Tensor) -> Tensor:
            return scores.gather(2, position.long()[:, None].expand(-1, scores.shape[1], -1))

        gain = (at(queue.high[rows]) - at(queue.low[rows])) * self._weight(node)[:, None]
        credit = gain * queue.unspent(rows)[:, None]
        if queue.split is not None:
            split = queue.split[rows]
            first = split.clamp(min=0)
            interaction = at(queue.high[rows]) - at(first) - at(first + 1) + at(queue.low[rows])
            sign = 1.0 if self.room.fixed_context == 0 else -1.0
            credit += sign * interaction * (split >= 0)[:, None]
        total = torch.zeros((*scores.shape[:2], self.tree.tree.n_nodes), dtype=torch.float64,
                            device=self.device)
        return total.scatter_add_(2, node[:, None].expand_as(credit), credit)
