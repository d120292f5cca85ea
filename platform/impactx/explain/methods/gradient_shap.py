"""Gradient SHAP (expected gradients), by captum.

Lundberg and Lee, "A Unified Approach to Interpreting Model Predictions", 2017, as captum has it:
the gradient at a random point between a random baseline and the image, with noise where that is
wanted, is multiplied with image minus baseline and averaged over samples. A map adds up to f(image)
- mean f(baseline) in expectation only, so this is no additive attribution here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from impactx.explain.attribution import BatchedAttribution, Explanations, attribution
from impactx.explain.masking import parse_masker
from impactx.explain.scores import ClassScores, chunks
from impactx.settings.base import MaskerName


@attribution
class GradientShap(BatchedAttribution):
    """Gradient SHAP (Lundberg and Lee 2017), by captum; additive in expectation only.

    Each image has random numbers of its own, from the seed and its index: a map does not depend on
    the images beside it, on who makes it, or on the device.
    """

    method: Literal["gradient_shap"] = "gradient_shap"
    baselines: Annotated[tuple[MaskerName, ...], Field(min_length=1)] = Field(
        ("0", "1"), alias="maskers", description=(
            "the baselines that are drawn from, each a colour in [0,1] or blur(k,k)"))
    samples: int = Field(50, ge=1, le=100_000, description="random points for each image")
    noise: float = Field(0.0, ge=0, allow_inf_nan=False, description=(
        "standard deviation of the noise that is added to the image of each sample, in units of "
        "[0,1]; 0 is captum's default"))
    seed: int = Field(0, ge=0, lt=2**31, description=(
        "of the draws; each image has its own, whoever explains it"))

    requires: ClassVar[tuple[str, ...]] = ("captum",)

    @property
    def maskers(self) -> tuple[str, ...]:
        """See `Attribution.maskers`: the baselines."""
        return self.baselines

    def evaluations(self, size: tuple[int, int] | None = None) -> int | None:
        """See `Attribution.evaluations`: a gradient for each sample, the image, its baselines."""
        return 3 * self.samples + 1 + len(self.baselines)

    def maps_of(self, scores: ClassScores, rows: int) -> Explanations:
        """See `BatchedAttribution.maps_of`; base values are the baselines' mean scores."""
        from captum import attr

        x, y = scores.images, scores.labels
        baselines = torch.stack(
            [parse_masker(name).background(x) for name in self.baselines], dim=1)  # (N, b, C, H, W)
        of_images = scores.of_class(x, rows)
        base_values = np.mean([scores.of_class(baselines[:, b], rows, "baseline of image")
                               for b in range(len(self.baselines))], 0)
        explainer = attr.GradientShap(scores)
        maps = []
        for i, name in enumerate(scores.names):
            with _random_numbers_of_image(self.seed, name) as generator:
                noisy = x[i].expand(self.samples, *x[i].shape)
                if self.noise:
                    noise = torch.randn(noisy.shape, generator=generator).to(x.device)
                    noisy = noisy + self.noise * noise
                parts = [explainer.attribute(noisy[part], baselines[i], n_samples=1, stdevs=0.0,
                                             target=y[i]) for part in chunks(self.samples, rows)]
            maps.append(torch.cat([part.detach() for part in parts]).mean(0))
        return Explanations(scores.finite(torch.stack(maps)), of_images, base_values)


@contextlib.contextmanager
def _random_numbers_of_image(seed: int, index: int) -> Iterator[torch.Generator]:
    """Seed all random numbers of a block for one image; the states of before return afterwards.

    Args:
        seed: The attribution's own seed.
        index: The image's position in its data set.

    Yields:
        torch's generator for the block. NumPy's global one, which captum draws from, is seeded too.
    """
    ours = np.random.SeedSequence([seed, index]).generate_state(2)
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        np.random.seed(int(ours[0]))
        try:
            yield torch.Generator().manual_seed(int(ours[1]))
        finally:
            np.random.set_state(numpy_state)
