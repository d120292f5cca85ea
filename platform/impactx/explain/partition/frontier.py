"""The priority queues of many images side by side, as tensors.

Each image has its own queue; a step pops the best entries of every queue at once with one ``topk``.
Three facts make this small:

* An entry needs no mask and no scores of its own: (node, context) gives the mask, and two numbers
  give the positions of the scores of its lower and upper end among the image's evaluations. The
  weight follows from the depth.
* A leaf never needs to be popped: shap credits a popped leaf exactly as it credits what is left
  when the budget is spent, and a leaf costs no evaluation. So leaves are stored, never ranked.
* A key packs the priority (a float64 that is not negative sorts like its own bits) and, in its low
  bits, the order of insertion. Keys are distinct, so the order is the same on every device and for
  any grouping of images. shap breaks ties by a random number. The bits taken from the priority
  leave 2^-35 and better, far below a float32 score.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LEAF = -1
_GONE = -2


@dataclass
class Popped:
    """Entries taken from the queues: all tensors int64 (M,), ordered by image, best first."""

    image: Tensor
    rank: Tensor
    node: Tensor
    context: Tensor
    low: Tensor
    high: Tensor


class Frontier:
    """The queues of a group of images.

    Args:
        n_images: The number of images, G.
        capacity: Room for so many entries for each image, popped ones included.
        device: Where the queues lie.
        keep_splits: Whether to remember for each popped entry where its two new evaluations went;
            ``fixed_context`` 0 and 1 need them at the end.
    """

    def __init__(
        self, n_images: int, capacity: int, device: torch.device, keep_splits: bool
    ) -> None:
        def table(dtype: torch.dtype, fill: int) -> Tensor:
            return torch.full((n_images, capacity), fill, dtype=dtype, device=device)

        self.key = table(torch.int64, _GONE)
        self.node = table(torch.int32, 0)
        self.context = table(torch.int64, 0)
        self.low = table(torch.int32, 0)
        self.high = table(torch.int32, 0)
        self.split = table(torch.int32, -1) if keep_splits else None
        self.used = torch.zeros(n_images, dtype=torch.int64, device=device)
        self.capacity = capacity
        self._order_bits = capacity.bit_length()
        self._width = 0  # an upper bound of used, known without asking the device

    @staticmethod
    def bytes_an_image(capacity: int) -> int:
        """Return the memory of one image's queue, in bytes."""
        return capacity * (8 + 4 + 8 + 4 + 4 + 4)

    def push(
        self, image: Tensor, slot: Tensor, node: Tensor, context: Tensor, low: Tensor, high: Tensor,
        priority: Tensor, is_leaf: Tensor,
    ) -> None:
        """Store M entries.

        Args:
            image: int64 (M,), the entry's image.
            slot: int64 (M,), the entry's slot among its image's.
            node: int64 (M,).
            context: int64 (M,).
            low: int64 (M,), the position of the lower end's score among the evaluations.
            high: int64 (M,), the position of the upper end's score.
            priority: float64 (M,), not negative.
            is_leaf: bool (M,).
        """
        order = (1 << self._order_bits) - 1 - slot
        bits = priority.contiguous().view(torch.int64)
        ranked = (bits >> self._order_bits << self._order_bits) | order
        self.key[image, slot] = torch.where(is_leaf, _LEAF, ranked)
        self.node[image, slot] = node.to(torch.int32)
        self.context[image, slot] = context
        self.low[image, slot] = low.to(torch.int32)
        self.high[image, slot] = high.to(torch.int32)

    def reserve(self, per_image: Tensor, at_most: int) -> Tensor:
        """Reserve slots.

        Args:
            per_image: int64 (G,), how many each image needs.
            at_most: An upper bound of them.

        Returns:
            int64 (G,), the first reserved slot of each image.
        """
        first = self.used.clone()
        self.used += per_image
        self._width = min(self.capacity, self._width + at_most)
        return first

    def pop(self, allowed: Tensor, at_most: int) -> Popped:
        """Take the best entries of each image.

        Args:
            allowed: int64 (G,), how many of each image at most.
            at_most: An upper bound of them.
        """
        k = min(at_most, self._width)
        keys, slots = self.key[:, : self._width].topk(k, dim=1)
        taken = (keys >= 0) & (torch.arange(k, device=keys.device) < allowed[:, None])
        image, rank = taken.nonzero(as_tuple=True)
        slot = slots[image, rank]
        self.key[image, slot] = _GONE
        self._last = (image, slot)
        return Popped(
            image, rank, self.node[image, slot].long(), self.context[image, slot],
            self.low[image, slot].long(), self.high[image, slot].long(),
        )

    def remember_split(self, first_evaluation: Tensor) -> None:
        """Note the positions (M,) of the first new evaluation of the entries popped last."""
        if self.split is not None:
            self.split[self._last] = first_evaluation.to(torch.int32)

    def unspent(self, rows: slice) -> Tensor:
        """Return which entries of some images were never split: bool (g, capacity).

        Leaves are among them.
        """
        return self.key[rows] != _GONE
