"""Grad-CAM, by captum's LayerGradCam, enlarged to the image's own size.

Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization", 2017, arXiv 1610.02391: the channels of a layer are summed with the mean gradients of
the class's score as weights (equations 1 and 2), and the small map that results is enlarged
bilinearly. A store of maps wants (C, H, W): each channel gets an equal share, so that a map's sum
over the channels is Grad-CAM's own value. There is no base value, and nothing adds up.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from impactx.explain.attribution import (
    AttributionError,
    BatchedAttribution,
    Explanations,
    attribution,
)
from impactx.explain.scores import ClassScores, Score, chunks

SHOWN = 30  # names of layers that a message lists at most


@attribution
class GradCam(BatchedAttribution):
    """Grad-CAM (Selvaraju et al. 2017), by captum, enlarged to the image; it needs convolutions."""

    method: Literal["grad_cam"] = "grad_cam"
    layer: str | None = Field(None, description=(
        "name of a convolutional layer; null: the last one that the model uses"))
    relu: bool = Field(True, description=(
        "true: only what speaks for the class, as the authors have it; false: signed maps"))

    requires: ClassVar[tuple[str, ...]] = ("captum",)

    def evaluations(self, size: tuple[int, int] | None = None) -> int | None:
        """See `Attribution.evaluations`: one gradient, and the image itself."""
        return 4

    def maps_of(self, scores: ClassScores, rows: int) -> Explanations:
        """See `BatchedAttribution.maps_of`.

        Raises:
            AttributionError: There is no such layer; the message lists those that there are.
        """
        from captum import attr

        x, y = scores.images, scores.labels
        layer = find_layer(scores.score, self.layer, x[:1])
        of_images = scores.of_class(x, rows)
        maps = []
        for part in chunks(len(x), rows):
            # The image asks for the gradient too: the model's parameters may be frozen.
            small = attr.LayerGradCam(scores, layer).attribute(
                x[part].clone().requires_grad_(), target=y[part], relu_attributions=self.relu)
            small = small.detach()
            if small.ndim != 4:
                used = _convolutions_used(scores.score, x[:1])
                raise AttributionError(
                    f"the layer {self.layer!r} gives {tuple(small.shape)}, which is no map of "
                    f"positions: allowed are {_listed(used)}")
            maps.append(attr.LayerAttribution.interpolate(small, tuple(x.shape[2:]), "bilinear"))
        channels = x.shape[1]
        return Explanations(scores.finite(torch.cat(maps).expand(-1, channels, -1, -1) / channels),
                            of_images, np.full(len(x), np.nan))


def find_layer(score: Score, name: str | None, image: torch.Tensor) -> nn.Module:
    """Return the layer of a name, or the convolution that the model calls last.

    Args:
        score: The model.
        name: The layer's name in the model, or None.
        image: float32 (1, C, H, W); one forward shows which convolutions are called.

    Raises:
        AttributionError: There is no such layer; the message lists the convolutions that are
            called.
    """
    if not isinstance(score, nn.Module):
        raise AttributionError("grad_cam needs a torch module, whose layers have names, not a "
                               f"{type(score).__name__}")
    used = _convolutions_used(score, image)
    if not used:
        raise AttributionError("grad_cam needs a convolution, and this model calls none: choose "
                               "another attribution")
    if name is None:
        return used[-1][1]
    for used_name, layer in used:
        if used_name == name:
            return layer
    layers = dict(score.named_modules())
    problem = "is not called for an image" if isinstance(layers.get(name), nn.Conv2d) else (
        "is no convolution" if name in layers else "does not exist")
    raise AttributionError(f"attribution.layer = {name!r}: this layer {problem}; the model's "
                           f"convolutions: {_listed(used)}")


@torch.no_grad()
def _convolutions_used(
    score: Score, image: torch.Tensor
) -> list[tuple[str, nn.Module]]:
    """Return the convolutions that a forward calls, with their names, in the order of the calls."""
    called: list[tuple[str, nn.Module]] = []
    modules = score.named_modules() if isinstance(score, nn.Module) else ()
    hooks = [module.register_forward_hook(
        lambda module, inputs, output, name=name: called.append((name, module)))
        for name, module in modules if isinstance(module, nn.Conv2d)]
    try:
        score(image)
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _listed(used: list[tuple[str, nn.Module]]) -> str:
    names = [name for name, _ in used]
    more = f"{len(names) - SHOWN} before, " if len(names) > SHOWN else ""
    return more + ", ".join(names[-SHOWN:])
