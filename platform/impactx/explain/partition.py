"""Partition SHAP (Owen values of nested boxes) for many images at once: shap.PartitionExplainer's values.

The algorithm, an image at a time, stands in ``tests/reference/partition_twin.py``; the comments there teach it. Here
the images of a group go in lockstep: a step pops the best entries of every image's queue (``frontier``), evaluates
all their masks with one forward (``compose``, ``forward``), and pushes the children. Only the order of popping
depends on the data, and ``batch_size`` entries are popped before their children are seen, as in shap: it is part
of the estimate, not a matter of speed. Speed has its own settings (``forward_batch``, ``images_in_flight``), which change
nothing but rounding.

Sources: Lundberg's shap 0.51 (explainers/_partition.py, maskers/_image.py); the paper, section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from impactx.explain.compose import Composer
from impactx.explain.fast import FastScore
from impactx.explain.forward import Forward, Outputs, PartitionError, Score
from impactx.explain.frontier import Frontier
from impactx.explain.head import HeadComposer
from impactx.explain.masking import Masker, MaskerSpec, parse_masker
from impactx.explain.tree import TreeOnDevice, build_tree

GIB = 1 << 30
_NO_IMAGE = torch.empty(0)


class AdditivityError(ArithmeticError):
    """A map whose sum is not f(image) - f(masked image)."""


@dataclass(frozen=True)
class PartitionResult:
    """The maps of N images.

    Attributes:
        values: float32 (N, n_outputs, C, H, W).
        scores: float64 (N, n_outputs): f(image).
        base_values: float64 (N, n_outputs): f(image with everything hidden).
        evaluations: int64 (N,): masks evaluated, those two included.
    """

    values: np.ndarray
    scores: np.ndarray
    base_values: np.ndarray
    evaluations: np.ndarray


def check_additivity(
    values: np.ndarray, scores: np.ndarray, base_values: np.ndarray, *, tolerance: float = 1e-5, first_image: int = 0
) -> None:
    """Raise unless each map sums to score - base value.

    Args:
        values: (N, n_outputs, C, H, W). scores, base_values: (N, n_outputs).
        tolerance: allowed difference, relative to the sum of the map's absolute values.

    Raises:
        AdditivityError: names the first image (counted from ``first_image``) and output, and both numbers.
    """
    flat = values.reshape(*values.shape[:2], -1)
    total = flat.sum(-1, dtype=np.float64)
    expected = scores - base_values
    size = np.abs(flat).sum(-1, dtype=np.float64)
    allowed = tolerance * size + 1e-9 * (np.abs(scores) + np.abs(base_values))
    wrong = np.argwhere(~(np.abs(total - expected) <= allowed))
    if len(wrong):
        image, output = wrong[0]
        raise AdditivityError(
            f"the map of image {image + first_image}, output {output}, sums to {total[image, output]:.9g}, but "
            f"f(image) - f(masked) = {expected[image, output]:.9g} ({len(wrong)} of {total.size} maps differ)"
        )


@torch.inference_mode()
def partition_shap(
    score: Score,
    images: Tensor | np.ndarray,
    outputs: Tensor | np.ndarray | str,
    *,
    masker: MaskerSpec = "blur(16,16)",  # type: ignore[valid-type]
    max_evals: int = 2000,
    batch_size: int = 50,
    fixed_context: int | None = None,
    memory_limit_bytes: int = GIB,
    forward_batch: int | None = None,
    images_in_flight: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    progress: Callable[[int], None] | None = None,
) -> PartitionResult:
    """Partition SHAP maps, equal to ``shap.PartitionExplainer``'s with the same first four settings.

    Args:
        score: (B, C, H, W) of ``dtype`` in [0, 1] -> (B, K) floating point scores; a module must be in eval mode.
        images: uint8 (N, H, W, C), or floating point (N, C, H, W) in [0, 1].
        outputs: which scores are explained: class indices (N,) or (N, n), ``"all"``, or floating point weights
            (N, K) for one weighted sum of scores an image. An entry's priority is its largest over these outputs,
            so the choice changes the maps.
        masker: how hidden pixels look, see ``masking.parse_masker``.
        max_evals: evaluations an image, f(masked) and f(image) included; at least 4.
        batch_size: evaluations between two looks at the queue (shap's; changes the estimate).
        fixed_context: None averages over both contexts of a split; 0 or 1 takes one and leaves the interaction
            on the node.
        memory_limit_bytes: bounds the engine's own working memory (queues, scores, masked images; not the result,
            not the model's activations). It decides how many images are in flight.
        forward_batch: masks a forward; default by device. Out of memory on an accelerator halves it.
        images_in_flight: images in lockstep; default 32 on a CPU, 2048 elsewhere, fewer where memory demands.
        dtype: float32, or float64 to verify (``score`` must then take float64).
        device: default: that of ``images``, or of the module's parameters where images are an array.
        progress: called with the number of finished images after each group.

    Raises:
        PartitionError: a setting or score outside what is allowed (``masking.MaskerError`` for the masker).
        AdditivityError: a map that does not sum to f(image) - f(masked).
    """
    _check_settings(max_evals, batch_size, fixed_context, dtype)
    place = _device(device, images, score)
    stack, channels_first = _open(images)
    n_images = len(stack)
    shape = tuple(stack.shape[1:]) if channels_first else (stack.shape[3], *stack.shape[1:3])
    tree = TreeOnDevice(build_tree(shape), place)
    selected = Outputs(outputs, n_images, place)
    room = _Room.plan(tree, max_evals, batch_size, fixed_context, dtype, memory_limit_bytes, forward_batch, place)
    forward = Forward(score, selected, room.forward_batch)
    parsed = parse_masker(masker)

    parts: list[tuple[np.ndarray, ...]] = []
    first = 0
    in_flight = 1  # the first image shows how many scores there are, then the memory can be planned
    while first < n_images:
        batch = _prepare(stack[first : first + in_flight], channels_first, first, dtype, place)
        group = _Group(tree, forward, parsed, batch, first, room)
        part = group.explain()
        check_additivity(part[0], part[1], part[2], first_image=first)
        parts.append(part)
        first += len(batch)
        in_flight = room.images_in_flight(
            selected.count(forward.n_scores or 1), images_in_flight, 0 if group.ahead is None else group.ahead.bytes_an_image
        )
        if progress is not None:
            progress(first)
    if not parts:
        raise PartitionError("images: there are none")
    return PartitionResult(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True)
class _Room:
    """What the settings mean in numbers, and how much memory an image takes."""

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
        cls, tree: TreeOnDevice, max_evals: int, batch_size: int, fixed_context: int | None, dtype: torch.dtype,
        memory: int, forward_batch: int | None, device: torch.device,
    ) -> _Room:
        budget = max_evals - 2
        splits = min(math.ceil(budget / 2), tree.tree.splits_possible(fixed_context))
        children = 4 if fixed_context is None else 2
        pixel_bytes = math.prod(tree.tree.shape) * dtype.itemsize
        if forward_batch is None:
            wanted = 4096 if device.type != "cpu" else max(8, min(100, (3 << 20) // pixel_bytes))
            forward_batch = max(1, min(wanted, memory // 4 // (pixel_bytes * (1 if device.type == "cpu" else 6))))
        elif forward_batch < 1:
            raise PartitionError(f"forward_batch = {forward_batch}; allowed: 1 or more")
        return cls(
            budget, math.ceil(batch_size / 2), fixed_context, 1 + children * splits, 2 + 2 * splits, dtype,
            forward_batch, memory, tree,
        )

    def images_in_flight(self, n_outputs: int, wanted: int | None, head_bytes: int) -> int:
        """How many images fit into the memory, at most ``wanted``; ``head_bytes`` is what an image's head takes."""
        host = self.tree.tree
        pixels = math.prod(host.shape)
        credit = 8 * (self.capacity + 2 * host.n_nodes + 2 * pixels)  # one output of one image at a time at worst
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
                f"memory_limit_bytes = {self.memory} is too small: one image takes {an_image + credit} bytes, and "
                f"{self.forward_batch} masked images (forward_batch) {chunk}"
            )
        return int(min(wanted, fit))


class _Group:
    """Images that go in lockstep, from the first two evaluations to their maps."""

    def __init__(
        self, tree: TreeOnDevice, forward: Forward, masker: Masker, images: Tensor, first: int, room: _Room
    ) -> None:
        self.tree, self.forward, self.room, self.first = tree, forward, room, first
        self.n = len(images)
        self.device = images.device
        backgrounds = masker.background(images)
        # a box's share of the first layer pays where boxes occur again and again: not with a fixed context
        score = forward.score
        self.ahead = None
        if isinstance(score, FastScore) and score.head is not None and room.fixed_context is None:
            self.ahead = HeadComposer(tree, score.head, images, backgrounds, room.forward_batch)
        self.compose = Composer(tree, images, backgrounds).compose if self.ahead is None else self.ahead.compose
        everyone = torch.arange(self.n, device=self.device)
        base = forward(lambda which: backgrounds[which], everyone, first_image=first)
        full = forward(lambda which: images[which], everyone, first_image=first)
        self.scores = torch.empty((self.n, room.evaluations, base.shape[1]), dtype=base.dtype, device=self.device)
        self.scores[:, 0], self.scores[:, 1] = base, full
        self.spent = torch.zeros(self.n, dtype=torch.int64, device=self.device)
        self.queue = Frontier(self.n, room.capacity, self.device, keep_splits=room.fixed_context is not None)
        zero = torch.zeros_like(everyone)
        slot = self.queue.reserve(torch.ones_like(everyone), 1)
        self._push(everyone, slot, zero, zero, zero, zero + 1)

    def explain(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """values, scores, base values and evaluations of the group, as arrays."""
        while self._step():
            pass
        values = self._credit()
        ends = self.scores[:, :2].double().cpu().numpy()
        return values, ends[:, 1], ends[:, 0], (self.spent + 2).cpu().numpy()

    def _step(self) -> bool:
        """One look at every queue; False when there is nothing left to do."""
        room, tree, queue = self.room, self.tree, self.queue
        # shap pops while masks < batch_size and evaluations + masks < budget, two masks a pop
        allowed = ((room.budget - self.spent + 1) // 2).clamp(0, room.pops_a_step)
        popped = queue.pop(allowed, room.pops_a_step)
        if len(popped.image) == 0:
            return False
        image, node, context = popped.image, popped.node, popped.context
        left, right = tree.left[node], tree.right[node]
        with_left = context | (1 << tree.depth[node])  # as the right child's context; the left's "with right"
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
        slot = queue.reserve(len(children) * counts, len(children) * room.pops_a_step)[image] + len(children) * popped.rank
        columns = [torch.stack(column, dim=1).flatten() for column in zip(*children, strict=True)]
        ranks = torch.arange(len(children), device=self.device)
        self._push(image.repeat_interleave(len(children)), (slot[:, None] + ranks).flatten(), *columns)
        return True

    def _push(self, image: Tensor, slot: Tensor, node: Tensor, context: Tensor, low: Tensor, high: Tensor) -> None:
        difference = self.scores[image, high].double() - self.scores[image, low].double()
        priority = difference.abs().amax(dim=1) * self._weight(node)
        self.queue.push(image, slot, node, context, low, high, priority, self.tree.left[node] < 0)

    def _weight(self, node: Tensor) -> Tensor:
        """What a difference counts: each split halves it, unless the context is fixed."""
        if self.room.fixed_context is not None:
            return torch.ones(node.shape, dtype=torch.float64, device=self.device)
        return torch.exp2(-self.tree.depth[node].double())

    def _credit(self) -> np.ndarray:
        """Give every entry's difference to its node, and every node's value evenly to its leaves."""
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
                values[rows, k : k + some] = spread.float().cpu().numpy().reshape(values[rows, k : k + some].shape)
        return values

    def _node_values(self, rows: slice, outputs: slice) -> Tensor:
        """float64 (g, outputs, nodes): the sum of what each node was credited with."""
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
        total = torch.zeros((*scores.shape[:2], self.tree.tree.n_nodes), dtype=torch.float64, device=self.device)
        return total.scatter_add_(2, node[:, None].expand_as(credit), credit)


def _check_settings(max_evals: int, batch_size: int, fixed_context: int | None, dtype: torch.dtype) -> None:
    if max_evals < 4:
        raise PartitionError(
            f"max_evals = {max_evals}: one split costs 2 evaluations beside f(image) and f(masked); allowed: 4 or more"
        )
    if batch_size < 1:
        raise PartitionError(f"batch_size = {batch_size}; allowed: 1 or more")
    if fixed_context not in (None, 0, 1) or isinstance(fixed_context, bool):
        raise PartitionError(f"fixed_context = {fixed_context!r}; allowed: None, 0 or 1")
    if dtype not in (torch.float32, torch.float64):
        raise PartitionError(f"dtype = {dtype}; allowed: torch.float32 or torch.float64")


def _device(device: torch.device | str | None, images: Tensor | np.ndarray, score: Score) -> torch.device:
    if device is not None:
        return torch.device(device)
    if isinstance(images, Tensor):
        return images.device
    parameter = next(score.parameters(), _NO_IMAGE) if isinstance(score, nn.Module) else _NO_IMAGE
    return parameter.device


def _open(images: Tensor | np.ndarray) -> tuple[Tensor, bool]:
    """The images as a tensor, and whether channels come first."""
    stack = images if isinstance(images, Tensor) else torch.from_numpy(images)
    if stack.ndim != 4 or 0 in stack.shape[1:] or not (stack.dtype == torch.uint8 or stack.is_floating_point()):
        raise PartitionError(
            f"images: {stack.dtype} {tuple(stack.shape)}; allowed: uint8 (N, H, W, C) or floating point (N, C, H, W)"
        )
    return stack, stack.dtype != torch.uint8


def _prepare(part: Tensor, channels_first: bool, first: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n, C, H, W) of ``dtype`` in [0, 1] on the device."""
    part = part.to(device)
    if not channels_first:
        return (part.permute(0, 3, 1, 2).to(dtype) / 255).contiguous()
    outside = ~((part >= 0) & (part <= 1)).flatten(1).all(dim=1)
    if bool(outside.any()):
        image = int(outside.nonzero()[0])
        raise PartitionError(f"images: image {image + first} has values outside [0, 1] (or NaN)")
    return part.to(dtype).contiguous()
