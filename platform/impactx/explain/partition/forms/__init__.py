"""The forms in which a CPU runs a model faster than the module itself.

A form is a function that takes a model's graph, as ``torch.export`` gives it, and an example of its
input, (B, ...), and returns the model as a function of such inputs, of any B. It raises, with a
reason, where it does not suit a model. The forms of ``FORMS`` are tried in order, and the first
that suits is used: what decides is the model and what is installed, and no stopwatch, which two
workers that make one store could read differently.

Each form is one file, and none knows of another: without its file a form is not there.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor, fx

log = logging.getLogger(__name__)

Score = Callable[[Tensor], Tensor]
Form = Callable[[fx.GraphModule, Tensor], Score]

FORMS: list[Form] = []
with contextlib.suppress(ImportError):
    from impactx.explain.partition.forms.torchscript import torchscript

    FORMS.append(torchscript)
with contextlib.suppress(ImportError):
    from impactx.explain.partition.forms.inductor import inductor

    FORMS.append(inductor)
with contextlib.suppress(ImportError):
    from impactx.explain.partition.forms.folded import folded

    FORMS.append(folded)


def fastest(graph: fx.GraphModule, example: Tensor) -> Score:
    """Return a model in the first form that suits it, or its graph where none does.

    A form that gives other scores for the example, or fails for a part of it, does not suit.

    Args:
        graph: The model, (B, ...) to (B, K).
        example: Inputs, (B, ...); at least 3.
    """
    parts = (example, example[:3], example[:1])
    expected = [graph(part) for part in parts]
    for form in FORMS:
        try:
            score = form(graph, example)
            for part, scores in zip(parts, expected, strict=True):
                score(part)  # the first call may specialise it
                if not close(score(part), scores):
                    raise ValueError("it gives other scores")
        except Exception as reason:  # any model may come; one without a form is only slower
            log.info("the model does not run as %s: %s", form.__name__, first_line(reason))
            continue
        return score
    return graph


def close(a: Tensor, b: Tensor) -> bool:
    """Return whether two results are equal but for rounding, as a share of the largest."""
    tolerance = 1e-4 if b.dtype == torch.float32 else 1e-10
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * (b.abs().max() + 1e-6))


def first_line(reason: Exception) -> str:
    """Return the first line of an error's message; those of torch.export have dozens."""
    return next(iter(str(reason).strip().splitlines()), type(reason).__name__)
