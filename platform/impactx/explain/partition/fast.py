"""A model in the form in which a CPU runs it fastest, its first layer split off where that pays.

``fast_score(module, shape)`` freezes a module (TorchScript: constants and batch norms folded; in
oneDNN's layout where the whole network can stay in it, else channels-last); on one core it is about
twice as fast as the module itself. Where the module begins with

    image -> affine steps (normalisation, resize, a convolution) -> [ReLU]
          -> max-pool without overlap -> the rest

it is also cut there: ``FastScore.head`` and ``FastScore.rest``. The engine then never runs the head
on masked images (see ``head``). The cut is found in the graph that ``torch.export`` gives, so a
model needs to know nothing of it, and is verified on random inputs before it is used: a head that
is not affine, or a cut that changes the scores, is not taken.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

log = logging.getLogger(__name__)

Score = Callable[[Tensor], Tensor]
_TRACE_BATCH = 50


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


@dataclass(frozen=True)
class FastScore:
    """A model's fast form.

    Attributes:
        score: (B, C, H, W) to scores (B, K).
        head: The model's beginning, where it is split off.
        rest: What comes after the head, (B, c, h // pool, w // pool) to (B, K).
    """

    score: Score
    head: Head | None = None
    rest: Score | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return the scores (B, K) of images (B, C, H, W)."""
        return self.score(images)


@torch.no_grad()
def fast_score(
    module: nn.Module, shape: tuple[int, int, int], *, dtype: torch.dtype = torch.float32,
    split: bool = True,
) -> FastScore:
    """Return a module in its fastest form.

    Scores agree with the module's to float rounding. Where a step does not work for a module, the
    log says so and the step is left out; on an accelerator the module is taken as it is.

    Args:
        module: (B, C, H, W) in [0, 1] to scores (B, K), in eval mode.
        shape: (C, H, W) of the images.
        dtype: Of the images.
        split: Whether to split the first layer off.

    Raises:
        ValueError: The module is in training mode.
    """
    if module.training:
        raise ValueError("fast_score: the module is in training mode; call eval() first")
    parameter = next(module.parameters(), torch.empty(0))
    if parameter.device.type != "cpu":
        return FastScore(module)
    generator = torch.Generator().manual_seed(0)
    example = torch.rand((_TRACE_BATCH, *shape), dtype=dtype, generator=generator)
    whole = _frozen(module, example)
    if not split:
        return FastScore(whole)
    try:
        head, rest = _cut(module, example)
    except Exception as reason:  # any model may come; one that cannot be exported is only slower
        log.info("the first layer is not split off: %s", reason)
        return FastScore(whole)
    pooled = nn.functional.max_pool2d(head.affine(example), head.pool)
    pooled = (pooled.relu() if head.relu else pooled).to(memory_format=torch.channels_last)
    return FastScore(whole, head, _frozen(rest, pooled))


def _frozen(module: nn.Module, example: Tensor) -> Score:
    """Return a module frozen for inference, or itself where that fails or changes the scores."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frozen: Score = torch.jit.optimize_for_inference(_trace(module, example))
            if _layout_changes(frozen.graph) > 1:  # type: ignore[attr-defined]
                frozen = _channels_last(module, example)
            for part in (example, example[:3], example[:1]):
                frozen(part)  # the first calls specialise it
                if not _close(frozen(part), module(part)):
                    raise RuntimeError("the frozen form gives other scores")
    except Exception as reason:
        log.info("the model runs as it is, not frozen: %s", reason)
        return module
    return frozen


def _trace(module: nn.Module, example: Tensor) -> torch.jit.ScriptModule:
    traced = torch.jit.trace(  # type: ignore[no-untyped-call]
        module.eval(), example, check_trace=False)
    frozen: torch.jit.ScriptModule = torch.jit.freeze(traced)
    return frozen


def _layout_changes(graph: torch.Graph | torch.Block) -> int:
    """Count how often a frozen graph goes over to oneDNN's layout.

    Once is what pays. A network with operations that oneDNN's form lacks (EfficientNet's SiLU) goes
    there and back at each of them: EfficientNet-B2 108 times, at less than half the speed of the
    channels-last form (docs/LOG.md).
    """
    inner = (block for node in graph.nodes() for block in node.blocks())
    here = sum(node.kind() == "aten::to_mkldnn" for node in graph.nodes())
    return here + sum(map(_layout_changes, inner))


def _channels_last(module: nn.Module, example: Tensor) -> Score:
    """Return a module frozen with all its tensors in channels-last order."""
    layout = torch.channels_last
    copied = copy.deepcopy(module).to(memory_format=layout)
    traced = _trace(copied, example.contiguous(memory_format=layout))
    return lambda images: traced(images.contiguous(memory_format=layout))


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-4 if b.dtype == torch.float32 else 1e-10
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * (b.abs().max() + 1e-6))


def _cut(module: nn.Module, example: Tensor) -> tuple[Head, nn.Module]:
    """Return the head and the rest of a module; raise with the reason where it has none."""
    batch = torch.export.Dim("batch", min=2, max=1 << 20)
    graph = torch.export.export(module, (example,), dynamic_shapes=({0: batch},)).module()
    begin = next(node for node in graph.graph.nodes if node.op == "placeholder")
    node, affine_end, relu, pool = begin, None, False, None
    while pool is None:
        followers = [
            user for user in node.users if user.op == "call_function" and not _is_size(user)]
        if len(followers) != 1:
            raise ValueError("the first layer feeds more than one other")
        node = followers[0]
        if _is_relu(node):
            relu = True
        elif node.target is torch.ops.aten.max_pool2d.default:
            pool = _plain_pool(*node.args[1:])
        elif relu:
            raise ValueError("there is no max-pool after the first activation")
        else:
            affine_end = node
    if affine_end is None:
        raise ValueError("there is no affine layer before the first max-pool")
    after = [user for user in node.users if _is_relu(user)]
    if not relu and len(node.users) == len(after) == 1:
        node, relu = after[0], True
    head = Head(_part(graph, begin, affine_end), relu, pool)
    rest = _part(graph, node, next(n for n in graph.graph.nodes if n.op == "output").args[0][0])
    _verify(module, head, rest, example)
    return head, rest


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


def _part(graph: fx.GraphModule, begin: fx.Node, end: fx.Node) -> fx.GraphModule:
    """Return the computation from ``begin`` (its input) to ``end`` (its output)."""
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
    return fx.GraphModule(graph, part)


def _verify(module: nn.Module, head: Head, rest: nn.Module, example: Tensor) -> None:
    a, b = 2 * example[:4] - 1, 2 * example[4:8] - 1  # differences of images: of both signs
    zero = head.affine(torch.zeros_like(a))
    if zero.ndim != 4 or not _close(head.affine(a) + head.affine(b) - zero, head.affine(a + b)):
        raise ValueError("the first layers are not affine")
    pooled = nn.functional.max_pool2d(head.affine(example), head.pool)
    if not _close(rest(pooled.relu() if head.relu else pooled), module(example)):
        raise ValueError("the two parts together give other scores")
