"""A sample of the evaluated masks, scored again by the plain module, one at a time.

A map sums to f(image) - f(masked) whatever the scores in between are: they cancel. So additivity
shows that each score was credited where it belongs, and that the queue lost none; it cannot show
that a score is right. This sample does. It is drawn from the masks that the queues of a group
really popped, and is composed anew from image and background, so it covers everything between: the
first layer that was split off, the form of the model, and the company of other images in a batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from impactx.explain.partition.difference import first_difference
from impactx.explain.partition.fast import FastScore
from impactx.explain.partition.forward import PartitionError, Score
from impactx.explain.partition.lockstep import Group

SHARE = 1000  # one evaluation in so many; alone it takes about ten times as long as in a batch
AT_LEAST = 8  # of a group
AT_FIRST = 32  # more in the first group of a form; to make the form took longer than they take


class FormError(Exception):
    """The fast form of a model gives other scores than the model itself."""


def check_group(group: Group, score: Score | FastScore) -> None:
    """Check a group that is explained.

    Args:
        group: The group; its queues hold all masks that were evaluated.
        score: What scored them.

    Raises:
        FormError: A fast form differs from its module; the message has both scores.
        PartitionError: The score of an image depends on the images beside it in the batch; the
            message has both scores.
    """
    plain = score.plain if isinstance(score, FastScore) else score
    count = max(AT_LEAST, math.ceil(int(group.spent.sum()) / SHARE))
    if isinstance(score, FastScore):
        count, score.checked = count + (0 if score.checked else AT_FIRST), True
    image, slot = _drawn(group, count)
    masked, position = group.masked(image, slot)
    scored = group.scores[image, position].double()
    alone = torch.cat([_selected(group, plain, masked[k : k + 1].clone(), image[k : k + 1])
                       for k in range(count)])
    spent = (group.spent + 2).tolist()
    evaluated = [group.scores[i, : spent[i]] for i in image.tolist()]
    at_most = torch.stack([scores.amax(0) for scores in evaluated]).double()
    at_least = torch.stack([scores.amin(0) for scores in evaluated]).double()
    tolerance = _coarseness(group.scores.dtype) * (
        1e-4 * (at_most - at_least) + 2e-6 * torch.maximum(at_most.abs(), at_least.abs()))
    wrong = ~((scored - alone).abs() <= tolerance).all(1)
    for k in wrong.nonzero()[:, 0].tolist():
        _judge(group, score, plain, masked[k : k + 1], image[k : k + 1], scored[k], alone[k],
               tolerance[k])


def _judge(
    group: Group, score: Score | FastScore, plain: Score, masked: Tensor, image: Tensor,
    scored: Tensor, alone: Tensor, tolerance: Tensor,
) -> None:
    """Find out why a masked image was scored otherwise than alone; see `check_group`."""
    def close(one: Tensor, other: Tensor) -> bool:
        return bool(((one - other).abs() <= tolerance).all())

    name = group.forward.outputs.names[group.first + int(image)]
    again = _selected(group, plain, masked.clone(), image)[0]
    if not close(again, alone):
        raise _company(name, again, alone)
    tolerance = tolerance + 2 * _rounding(group, plain, masked, image, alone)
    beside = torch.cat([masked, group.images, group.backgrounds])[: group.forward.forward_batch]
    among = _selected(group, plain, beside, image)[0]
    if not close(among, alone):
        raise _company(name, among, alone)
    if close(scored, alone):
        return
    if isinstance(score, FastScore) and score.faster:
        raise FormError(f"it gives a masked version of image {name} the score {_shown(scored)}, "
                        f"the model itself gives {_shown(alone)}: "
                        f"{first_difference(score, masked)}")
    raise _company(name, scored, alone)


def _drawn(group: Group, count: int) -> tuple[Tensor, Tensor]:
    """Draw images and slots of their queues: by turns an image's deepest mask, and any of them.

    With two or more for each image, each image's deepest is there.

    Returns:
        int64 (count,) and (count,), on the group's device.
    """
    random = np.random.default_rng(abs(int(group.forward.outputs.names[group.first])))
    order, used = random.permutation(group.n), group.queue.used.tolist()
    images, slots = [], []
    for number in range(count):
        again, place = divmod(number, group.n)
        image = int(order[place])
        if (place + again) % 2 == 0:
            depth = group.tree.tree.depth[group.queue.node[image, : used[image]].cpu().numpy()]
            slot = random.choice(np.flatnonzero(depth == depth.max()))
        else:  # the slot 0 stands for the whole image
            slot = random.integers(used[image]) if random.random() < 0.75 else 0
        images.append(image)
        slots.append(int(slot))
    return (torch.tensor(images, device=group.device), torch.tensor(slots, device=group.device))


def _selected(group: Group, plain: Score, images: Tensor, image: Tensor) -> Tensor:
    """Return the explained scores of the first of some images, float64 (1, n_outputs)."""
    return group.forward.outputs.select(plain(images)[:1], group.first + image).double()


def _coarseness(dtype: torch.dtype) -> float:
    """Return how much more a dtype rounds than float32 does."""
    return max(1e-6, torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)


def _rounding(
    group: Group, plain: Score, masked: Tensor, image: Tensor, alone: Tensor
) -> Tensor:
    """Return how far the module's own score moves where its input is rounded otherwise.

    A threshold in a model turns a difference in the last bit into a large one, in any two ways to
    compute it; that is no error of either.
    """
    generator = torch.Generator().manual_seed(0)
    step = 8 * torch.finfo(masked.dtype).eps
    moved = torch.zeros_like(alone)
    for _ in range(8):
        noise = 2 * torch.rand(masked.shape, generator=generator, dtype=masked.dtype) - 1
        near = (masked * (1 + step * noise.to(masked.device))).clamp(0, 1)
        moved = torch.maximum(moved, (_selected(group, plain, near, image)[0] - alone).abs())
    return moved


def _company(name: int, among: Tensor, alone: Tensor) -> PartitionError:
    return PartitionError(
        f"score is {_shown(among)} for a masked version of image {name} beside other images or at "
        f"another time, and {_shown(alone)} alone: it depends on the images beside it in the batch "
        "(their mean or maximum, their number, a branch on all of them) or on chance; only a score "
        "that each image has by itself can be explained")


def _shown(scores: Tensor) -> str:
    values = [f"{value:.6g}" for value in scores.tolist()]
    return values[0] if len(values) == 1 else f"[{', '.join(values)}]"
