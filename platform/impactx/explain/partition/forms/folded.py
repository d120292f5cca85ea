"""The model's graph, channels last, with its batch norms folded into the convolutions."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx

from impactx.explain.partition.forms import Score

_aten = torch.ops.aten


def folded(graph: fx.GraphModule, example: Tensor) -> Score:
    """Return a model with folded batch norms, in channels-last order; see `forms`."""
    layout = torch.channels_last
    whole = copy.deepcopy(graph)
    for norm in list(whole.graph.nodes):
        if norm.target is _aten.batch_norm.default:
            _fold(whole, norm)
    whole.graph.eliminate_dead_code()
    whole.recompile()
    whole.to(memory_format=layout)
    return lambda images: whole(images.contiguous(memory_format=layout))


def _fold(whole: fx.GraphModule, norm: Any) -> None:
    """Fold one batch norm, where it follows a convolution that nothing else reads."""
    conv, *statistics, training, _, epsilon, _ = norm.args
    if not isinstance(conv, fx.Node) or len(conv.users) != 1 or training is not False \
            or conv.target not in (_aten.conv2d.default, _aten.conv2d.padding):
        return
    given: list[Any] = [*[*conv.args[1:], None][:2], *statistics]
    if any(node is not None and node.op != "get_attr" for node in given):
        return
    kernel, bias, scale, shift, mean, variance = (_tensor(whole, node) for node in given)
    if kernel is None or mean is None or variance is None:
        return
    factor = (variance + float(epsilon)).rsqrt() * (1 if scale is None else scale)
    folded_bias = (0 if bias is None else bias) * factor + (
        (0 if shift is None else shift) - mean * factor)
    with whole.graph.inserting_before(conv):
        new = [_constant(whole, f"folded_{conv.name}_{name}", value) for name, value in (
            ("kernel", kernel * factor[:, None, None, None]), ("bias", folded_bias))]
    conv.args = (conv.args[0], *new, *conv.args[3:])
    norm.replace_all_uses_with(conv)
    whole.graph.erase_node(norm)


def _tensor(whole: fx.GraphModule, node: Any) -> Tensor | None:
    tensor: Tensor | None = None if node is None else operator.attrgetter(node.target)(whole)
    return tensor


def _constant(whole: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    whole.register_buffer(name, value)
    return whole.graph.get_attr(name)
