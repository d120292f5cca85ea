"""The model compiled by torch's Inductor, its weights as constants, where there is a compiler."""

from __future__ import annotations

import shutil

import torch
from torch import Tensor, fx

from impactx.explain.partition.forms import Score

# Compiling takes a second for a few convolutions and minutes for EfficientNet-B2's 69.
MOST_CONVOLUTIONS = 30


def inductor(graph: fx.GraphModule, example: Tensor) -> Score:
    """Return a model compiled for any number of inputs; see `forms`."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise ValueError("there is no C++ compiler")
    convolutions = sum(str(node.target).startswith("aten.conv") for node in graph.graph.nodes)
    if convolutions > MOST_CONVOLUTIONS:
        raise ValueError(f"{convolutions} convolutions would take minutes to compile")
    compiled: Score = torch.compile(graph, dynamic=True, options={"freezing": True})
    return compiled
