"""Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391), by captum's LayerGradCam, at the image's native size.

The layer's channels are summed with the mean gradients of the class's score as weights (equations 1 and 2), and the
small map that comes out is enlarged bilinearly.  Where a store wants (C, H, W), each channel gets an equal share, so
a map's sum over the channels is Grad-CAM's own value.  There is no base value, and nothing adds up.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from impactx.explain.attribution import Explanations
from impactx.explain.precision import forward_precision
from impactx.explain.scores import (
    AttributionError,
    ClassScores,
    Score,
    captum_attr,
    chunks,
    names_of,
    open_images,
    rows_that_fit,
    until_it_fits,
)
from impactx.settings import GradCamSettings

SHOWN = 30


class GradCamAttribution:
    """captum.attr.LayerGradCam for each image's class, upsampled."""

    additive = False

    def __init__(self, settings: GradCamSettings) -> None:
        self.settings = settings
        self.captum = captum_attr(settings.method)

    @forward_precision("float32")
    def explain(self, score: Score, images: np.ndarray, labels: np.ndarray, *, device: torch.device | str = "cpu",
                memory_bytes: int = 2**29, indices: np.ndarray | None = None) -> Explanations:
        """See `Attribution.explain`. Raises AttributionError where there is no such layer, naming those there are."""
        s = self.settings
        x, y = open_images(images, labels, device)
        scores = ClassScores(score, s.explain, x, y, names_of(indices, len(x)))
        layer = find_layer(score, s.layer, x[:1])
        return until_it_fits(lambda rows: self._maps(scores, layer, rows), rows_that_fit(scores, memory_bytes))

    def _maps(self, scores: ClassScores, layer: nn.Module, rows: int) -> Explanations:
        s, x, y = self.settings, scores.images, scores.labels
        found = scores.of_class(x, rows)
        maps = []
        for part in chunks(len(x), rows):
            # Parameters may be frozen: the gradient then has to be asked for from the image on.
            small = self.captum.LayerGradCam(scores, layer).attribute(x[part].clone().requires_grad_(), target=y[part],
                                                         relu_attributions=s.relu).detach()
            if small.ndim != 4:
                raise AttributionError(f"the layer {s.layer!r} gives {tuple(small.shape)} and no map of places: "
                                       f"allowed are {_listed(_used(scores.score, x[:1]))}")
            maps.append(self.captum.LayerAttribution.interpolate(small, tuple(x.shape[2:]), "bilinear"))
        channels = x.shape[1]
        return Explanations(scores.finite(torch.cat(maps).expand(-1, channels, -1, -1) / channels), found,
                            np.full(len(x), np.nan))


def find_layer(score: Score, name: str | None, image: torch.Tensor) -> nn.Module:
    """The layer of that name, or the convolution that the model calls last. image: (1, C, H, W).

    Raises AttributionError where there is none, with the names of the convolutions that the model calls.
    """
    if not isinstance(score, nn.Module):
        raise AttributionError(f"grad_cam needs a torch module, whose layers have names, not a {type(score).__name__}")
    used = _used(score, image)
    if not used:
        raise AttributionError("grad_cam needs a convolution, and this model calls none: choose another attribution")
    if name is None:
        return used[-1][1]
    for known, layer in used:
        if known == name:
            return layer
    there = dict(score.named_modules())
    problem = "is not called for an image" if isinstance(there.get(name), nn.Conv2d) else (
        "is no convolution" if name in there else "does not exist")
    raise AttributionError(f"attribution.layer = {name!r}: this layer {problem}; the model's convolutions: "
                           f"{_listed(used)}")


@torch.no_grad()
def _used(score: nn.Module, image: torch.Tensor) -> list[tuple[str, nn.Module]]:
    """The convolutions that a forward calls, in that order."""
    called: list[tuple[str, nn.Module]] = []
    hooks = [layer.register_forward_hook(lambda m, i, o, name=name: called.append((name, m)))
             for name, layer in score.named_modules() if isinstance(layer, nn.Conv2d)]
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
