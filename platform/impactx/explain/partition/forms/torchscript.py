"""The model as frozen TorchScript: constants and batch norms folded, in oneDNN's layout or not.

torch has deprecated TorchScript. While it lasts it is the fastest of the forms, and takes the least
time to make.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, fx

from impactx.explain.partition.forms import Score


def torchscript(graph: fx.GraphModule, example: Tensor) -> Score:
    """Return a model frozen for inference; see `forms`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frozen: Score = torch.jit.optimize_for_inference(trace(graph, example))
        if layout_changes(frozen.graph) <= 1:  # type: ignore[attr-defined]
            return frozen
        layout = torch.channels_last
        copied = copy.deepcopy(graph).to(memory_format=layout)
        traced = trace(copied, example.contiguous(memory_format=layout))
    return lambda images: traced(images.contiguous(memory_format=layout))


def trace(graph: torch.nn.Module, example: Tensor) -> torch.jit.ScriptModule:
    """Return the trace of a model, with its weights as constants."""
    traced = torch.jit.trace(graph, example, check_trace=False)  # type: ignore[no-untyped-call]
    frozen: torch.jit.ScriptModule = torch.jit.freeze(traced.eval())
    return frozen


def layout_changes(graph: torch.Graph | torch.Block) -> int:
    """Count how often a frozen graph goes over to oneDNN's layout.

    Once is what pays. A network with operations that oneDNN's form lacks (EfficientNet's SiLU) goes
    there and back at each of them: EfficientNet-B2 108 times, at less than half the speed of the
    channels-last form (docs/LOG.md).
    """
    inner = (block for node in graph.nodes() for block in node.blocks())
    here = sum(node.kind() == "aten::to_mkldnn" for node in graph.nodes())
    return here + sum(map(layout_changes, inner))
