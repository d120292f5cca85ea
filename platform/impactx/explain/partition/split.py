"""A model cut in two where its beginning is affine: the first layer, and the rest.

Where a module begins with

    image -> affine steps (normalisation, resize, a convolution) -> [ReLU]
          -> max-pool without overlap -> the rest

the engine never runs the beginning on masked images (see ``head``). The cut is found in the graph
that ``torch.export`` gives, so a model needs to know nothing of it. That the beginning is affine is
proven from its operations, each of which must be one that is known to be linear whatever its input:
random inputs would not show a clamp that they do not reach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

Score = Callable[[Tensor], Tensor]

# Linear in their input but for a constant, in all of their modes, whatever their other arguments.
_LINEAR = frozenset({
    "aten::add", "aten::sub", "aten::rsub", "aten::mul", "aten::neg", "aten::conv2d", "aten::pad",
    "aten::avg_pool2d", "aten::upsample_nearest2d", "aten::upsample_bilinear2d",
    "aten::_upsample_bilinear2d_aa", "aten::upsample_bicubic2d", "aten::_upsample_bicubic2d_aa",
    "aten::permute", "aten::contiguous", "aten::clone", "aten::flip"})


@dataclass(frozen=True)
class Head:
    """A model's beginning.

    Attributes:
        affine: (B, C, H, W) to (B, c, h, w).
        relu: Whether a ReLU follows.
        pool: Height and width of the windows of the max-pool that follows then.
    """

    affine: Score
    relu: bool
    pool: tuple[int, int]

    def __call__(self, images: Tensor) -> Tensor:
        """Return the inputs of the rest of the model, (B, c, h // pool, w // pool), for images."""
        pooled = nn.functional.max_pool2d(self.affine(images), self.pool)
        return pooled.relu() if self.relu else pooled


def split(graph: fx.GraphModule) -> tuple[Head, fx.GraphModule]:
    """Return the head and the rest of a model.

    Args:
        graph: The model as `torch.export` gives it, (B, C, H, W) to (B, K).

    Raises:
        ValueError: The model does not begin like that; the message says where it begins otherwise.
    """
    begin = next(node for node in graph.graph.nodes if node.op == "placeholder")
    node, affine_end, pool = begin, None, None
    relu: fx.Node | None = None
    while pool is None:
        followers = [
            user for user in node.users if user.op == "call_function" and not _is_size(user)]
        if len(followers) != 1:
            raise ValueError("the first layer feeds more than one other")
        before, node = node, followers[0]
        if _is_relu(node):
            relu = node
        elif node.target is torch.ops.aten.max_pool2d.default:
            pool = _plain_pool(*node.args[1:])
        elif relu is not None:
            raise ValueError("there is no max-pool after the first activation")
        elif not _is_affine(node, before, begin):
            raise ValueError(f"{node.target} is not known to be linear")
        else:
            affine_end = node
    if affine_end is None:
        raise ValueError("there is no affine layer before the first max-pool")
    after = [user for user in node.users if _is_relu(user)]
    if relu is None and len(node.users) == len(after) == 1:
        node = relu = after[0]
    affine, in_head = _part(graph, begin, affine_end)
    rest, in_rest = _part(graph, node, _end(graph))
    _refuse_lost(graph, in_head | in_rest | ({relu} if relu is not None else set()))
    return Head(affine, relu is not None, pool), rest


def whole(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a model's graph without its checks of the input's shape."""
    begin = next(node for node in graph.graph.nodes if node.op == "placeholder")
    everything, needed = _part(graph, begin, _end(graph))
    _refuse_lost(graph, needed)
    return everything


def _end(graph: fx.GraphModule) -> fx.Node:
    result: Any = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    end: fx.Node = result[0] if isinstance(result, tuple | list) else result
    return end


def _refuse_lost(graph: fx.GraphModule, needed: set[fx.Node]) -> None:
    """Refuse what writes in place and is no part of the result: the parts would leave it out."""
    lost = [node for node in graph.graph.nodes if _writes(node) and node not in needed]
    if lost:
        raise ValueError(f"{lost[0].target} writes into what another operation gave")


def _is_affine(node: fx.Node, before: fx.Node, begin: fx.Node) -> bool:
    """Return whether an operation is affine in what the one before it gives."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    occurrences: list[fx.Node] = []

    def note(argument: fx.Node) -> fx.Node:
        occurrences.append(argument)
        return argument

    fx.node.map_arg((node.args, node.kwargs), note)
    others = [other for other in occurrences if other is not before]
    # Once: a product with itself is no linear operation. And the others must be constants.
    if len(occurrences) - len(others) != 1 or any(_reaches(other, begin) for other in others):
        return False
    name, first = node.target._schema.name, node.args[0] is before
    if name in ("aten::add", "aten::sub", "aten::mul"):
        return True
    if name == "aten::div":
        return first and not node.kwargs  # a rounding mode is no linear division
    if name == "aten::batch_norm":
        return first and node.args[5] is False and node.args[3] is not None
    if name == "aten::dropout":
        return first and node.args[2] is False
    return first and name in _LINEAR


def _reaches(node: fx.Node, begin: fx.Node) -> bool:
    """Return whether a node depends on the images, be it on their number."""
    return node is begin or any(_reaches(earlier, begin) for earlier in node.all_input_nodes)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _plain_pool(  # type: ignore[no-untyped-def]
        kernel, stride=(), padding=(0, 0), dilation=(1, 1), ceil_mode=False) -> tuple[int, int]:
    size, step = tuple(kernel) * (2 // len(kernel)), tuple(stride or kernel)
    step = step * (2 // len(step))
    if step != size or any(padding) or any(d != 1 for d in dilation) or ceil_mode:
        raise ValueError("the first max-pool overlaps, is padded or rounds up")
    return size


def _is_size(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.sym_size.int


def _is_relu(node: fx.Node) -> bool:
    return node.target in (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)


def _part(graph: fx.GraphModule, begin: fx.Node, end: fx.Node
          ) -> tuple[fx.GraphModule, set[fx.Node]]:
    """Return the computation from ``begin`` (its input) to ``end`` (its output), and its nodes."""
    needed: set[fx.Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node is begin or node in needed:
            continue
        needed.add(node)
        # The size of the batch is the same everywhere.
        if not (_is_size(node) and node.args[1] == 0):
            pending += node.all_input_nodes
        if node.op == "placeholder":
            raise ValueError("a later layer looks at the image again")
    part = fx.Graph()
    copies = {begin: part.placeholder("x")}
    for node in graph.graph.nodes:
        if node in needed:
            if _is_size(node) and node.args[1] == 0:
                copies[node] = part.call_function(torch.ops.aten.sym_size.int, (copies[begin], 0))
            else:
                copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(copies[end])
    return fx.GraphModule(graph, part), needed
