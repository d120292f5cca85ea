"""A model in the form in which a CPU runs it fastest, its first layer split off where that pays.

``fast_score(module, shape)`` brings a module into one of the ``forms``; on one core it is about
twice as fast as the module itself. Where the module begins with an affine layer and a max-pool, it
is also cut there (``split``): the engine then never runs the first layer on masked images.

Everything is made from the graph that ``torch.export`` gives. A module whose operations depend on
the values in its images (a branch, a loop, a number that is read from a tensor) has no such graph,
and runs as it is. What remains can differ from the module all the same: code that runs otherwise
while it is exported, state outside of the weights, an error in a form. So whoever uses a
``FastScore`` checks it against ``plain`` on what it really computes: the engine in every group of
images (``check``), and a call of the ``FastScore`` itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from impactx.explain.partition.forms import close, fastest, first_line
from impactx.explain.partition.split import Head, whole
from impactx.explain.partition.split import split as split_off
from impactx.explain.scores import training_part

log = logging.getLogger(__name__)

Score = Callable[[Tensor], Tensor]
_EXAMPLES = 50
CHECKED_EACH = 1000  # of so many images that are scored, one is scored again by the module itself


@dataclass
class FastScore:
    """A model's fast form.

    Attributes:
        plain: The module itself, (B, C, H, W) to scores (B, K).
        score: The same, faster; or the module itself.
        head: The model's beginning, where it is split off.
        rest: What comes after the head, (B, c, h // pool, w // pool) to (B, K).
        graph: The operations of which the form was made, where there is one.
        trusted: Whether the form was never found to differ from the module.
        checked: Whether the form was checked already on what it really computes.
    """

    plain: nn.Module
    score: Score
    head: Head | None = None
    rest: Score | None = None
    graph: fx.GraphModule | None = None
    trusted: bool = True
    checked: bool = False
    _until_check: int = field(default=0, repr=False)

    @property
    def faster(self) -> bool:
        """Whether there is a form beside the module itself that may be used."""
        return self.trusted and (self.score is not self.plain or self.head is not None)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the scores (B, K) of images (B, C, H, W).

        The first image of the first call, and then one in every `CHECKED_EACH`, is scored again by
        the module itself. If it finds another score, the module alone is used from then on.
        """
        if not self.faster:
            scores: Tensor = self.plain(images)
            return scores
        fast = self.score(images)
        self._until_check -= len(images)
        if self._until_check < 0:
            self._until_check = CHECKED_EACH
            alone = self.plain(images[:1])
            scale = fast.abs().max() if len(fast) else alone.abs().max()
            if not bool(((fast[:1] - alone).abs() <= 1e-4 * scale).all()):
                self.distrust(f"it gives an image the scores {fast[0].tolist()}, the model itself "
                              f"gives {alone[0].tolist()}")
                scores = self.plain(images)
                return scores
        return fast

    def distrust(self, reason: object) -> None:
        """Use the module itself from now on, and say why."""
        self.trusted = False
        log.warning("the fast form of the model (%s) is wrong: %s. The model itself is used from "
                    "here on, which is slower", type(self.plain).__name__, reason)


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
        ValueError: The module, or a part of it, is in training mode.
    """
    if (part := training_part(module)) is not None:
        raise ValueError(f"fast_score: {part} is in training mode; call eval() first")
    parameter = next(module.parameters(), torch.empty(0))
    if parameter.device.type != "cpu":
        return FastScore(module, module)
    generator = torch.Generator().manual_seed(0)
    example = torch.rand((_EXAMPLES, *shape), dtype=dtype, generator=generator)
    try:
        graph = _graph(module, example)
    except Exception as reason:  # any model may come; one without a graph is only slower
        log.info("the model runs as it is: %s", first_line(reason))
        return FastScore(module, module)
    form = fastest(graph, example)
    fast = FastScore(module, module if form is graph else form, graph=graph)
    if split:
        try:
            head, rest = split_off(graph)
            pooled = head(example)
            if not close(rest(pooled), graph(example)):
                raise ValueError("the two parts together give other scores")
            pooled = pooled.to(memory_format=torch.channels_last)
            fast.head, fast.rest = head, fastest(rest, pooled)
        except Exception as reason:
            log.info("the first layer is not split off: %s", first_line(reason))
    return fast


def _graph(module: nn.Module, example: Tensor) -> fx.GraphModule:
    """Return a module's operations, none of which depends on the values of its images."""
    batch = torch.export.Dim("batch", min=2, max=1 << 20)
    graph = whole(torch.export.export(module, (example,), dynamic_shapes=({0: batch},)).module())
    for node in graph.graph.nodes:
        name = str(node.target)
        if name.startswith(("aten.item", "aten._local_scalar_dense", "cond", "while_loop")):
            raise ValueError(f"{name} depends on the values of the images")
    for part in (example, example[:3], example[:1]):
        if not close(graph(part), module(part)):
            raise ValueError("its graph gives other scores")
    return graph
