"""The priority queues of many images side by side, as tensors.

Each image has its own queue; a step pops the best entries of every queue at once with one ``topk``. Three facts
make this small:

* An entry needs no mask and no scores of its own: (node, context) says the mask, and two numbers say where the
  scores of its lower and upper end stand among the image's evaluations. The weight follows from the depth.
* A leaf never needs to be popped: shap credits a popped leaf exactly as it credits what is left when the budget is
  spent, and a leaf costs no evaluation. So leaves are stored, never ranked.
* A key packs the priority (a float64 that is not negative sorts like its own bits) and, in its low bits, the order of
  insertion. Keys are distinct, so the order is the same on every device and for any grouping of images. shap breaks
  ties by a random number. The bits taken from the priority leave 2^-35 and better, far below a float32 score.
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
    """Queues for ``n_images`` images with room for ``capacity`` entries each (popped ones included).

    ``keep_splits`` remembers for each popped entry where its two new evaluations went (``fixed_context`` 0 and 1
    need them at the end).
    """

    def __init__(self, n_images: int, capacity: int, device: torch.device, keep_splits: bool) -> None:
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
        """Memory of one image's queue."""
        return capacity * (8 + 4 + 8 + 4 + 4 + 4)

    def push(
        self, image: Tensor, slot: Tensor, node: Tensor, context: Tensor, low: Tensor, high: Tensor,
        priority: Tensor, is_leaf: Tensor,
    ) -> None:
        """Store entries at ``slot`` of their image; ``priority`` float64, not negative."""
        order = (1 << self._order_bits) - 1 - slot
        ranked = (priority.contiguous().view(torch.int64) >> self._order_bits << self._order_bits) | order
        self.key[image, slot] = torch.where(is_leaf, _LEAF, ranked)
        self.node[image, slot] = node.to(torch.int32)
        self.context[image, slot] = context
        self.low[image, slot] = low.to(torch.int32)
        self.high[image, slot] = high.to(torch.int32)

    def reserve(self, per_image: Tensor, at_most: int) -> Tensor:
        """Room for ``per_image`` (G,) entries, no image more than ``at_most``; returns the first slots (G,)."""
        first = self.used.clone()
        self.used += per_image
        self._width = min(self.capacity, self._width + at_most)
        return first

    def pop(self, allowed: Tensor, at_most: int) -> Popped:
        """The best entries of each image: ``allowed`` (G,) of them or fewer, never more than ``at_most``."""
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
        """Note for the entries popped last where their first new evaluation stands."""
        if self.split is not None:
            self.split[self._last] = first_evaluation.to(torch.int32)

    def unspent(self, rows: slice) -> Tensor:
        """bool (g, capacity): entries of the images ``rows`` that were never split, leaves included."""
        return self.key[rows] != _GONE
