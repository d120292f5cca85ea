"""The background that stands in for hidden pixels: the blurred image, or one constant colour.

A masker turns images into *backgrounds*; a masked image takes each pixel either from the image or
from its background, never a blend. There are two maskers, with the names that shap's image masker
uses:

* ``blur(kw,kh)``: the box blur of ``cv2.blur`` (border REFLECT_101, even kernels off-centre by half
  a pixel, sums in float64), computed once for each image;
* a constant colour in [0, 1]: one number for all channels, or one for each channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from impactx.settings.masker import ALLOWED, BlurSpec, ConstantSpec, MaskerError, read_masker


class Masker(Protocol):
    """Anything that makes backgrounds."""

    @property
    def name(self) -> str:
        """The masker's canonical spelling, which belongs to fingerprints."""

    def background(self, images: Tensor) -> Tensor:
        """Return the backgrounds of images.

        Args:
            images: Floating point (N, C, H, W) in [0, 1].

        Returns:
            Backgrounds of the same shape and dtype, on the same device.
        """
        ...


MaskerSpec: TypeAlias = str | float | Sequence[float] | np.ndarray | Masker


@dataclass(frozen=True)
class Blur(BlurSpec):
    """``cv2.blur`` by a kernel of ``width`` x ``height`` pixels, as shap's image masker has it."""

    def background(self, images: Tensor) -> Tensor:
        """See `Masker.background`."""
        _require_images(images, self.name)
        rows = _box_counts(images.shape[-2], self.height).to(images.device)
        columns = _box_counts(images.shape[-1], self.width).to(images.device)
        sums = rows @ images.to(torch.float64) @ columns.T
        return (sums * (1.0 / (self.width * self.height))).to(images.dtype)


@dataclass(frozen=True)
class Constant(ConstantSpec):
    """One colour for every hidden pixel: one value for all channels, or one for each, in [0, 1]."""

    def background(self, images: Tensor) -> Tensor:
        """See `Masker.background`.

        Raises:
            MaskerError: The colour has another number of channels than the images.
        """
        _require_images(images, self.name)
        channels = images.shape[1]
        if len(self.colour) not in (1, channels):
            raise MaskerError(
                f"masker {self.name} has {len(self.colour)} channel values, the images have "
                f"{channels} channel(s); allowed: 1 value, or {channels}"
            )
        colour = torch.tensor(self.colour, dtype=images.dtype, device=images.device)
        return colour.view(1, -1, 1, 1).expand_as(images).contiguous()


def parse_masker(spec: MaskerSpec) -> Masker:
    """Return the masker that ``spec`` describes.

    Args:
        spec: ``"blur(16,16)"`` (width, height), a number, a sequence of numbers, ``"0.5"``,
            ``"0.5,0.4,0.3"``, ``"constant(0.5,0.4,0.3)"``, or a masker, which is returned as it is.
            Colours lie in [0, 1].

    Raises:
        MaskerError: Anything else; the message names the value and what is allowed.
    """
    if isinstance(spec, (bool, type(None))):
        raise MaskerError(f"masker {spec!r} is not a masker; allowed: {ALLOWED}")
    if isinstance(spec, str):
        read = read_masker(spec)
        if isinstance(read, BlurSpec):
            return Blur(read.width, read.height)
        return Constant(read.colour)
    if isinstance(spec, (int, float, np.floating, np.integer)):
        return Constant((float(spec),))
    if isinstance(spec, (Sequence, np.ndarray)):
        try:
            return Constant(tuple(float(value) for value in spec))
        except (TypeError, ValueError) as error:
            raise MaskerError(
                f"masker {spec!r} is not a list of numbers; allowed: {ALLOWED}") from error
    if hasattr(spec, "background") and hasattr(spec, "name"):
        return spec
    raise MaskerError(f"masker {spec!r} is not a masker; allowed: {ALLOWED}")


def _require_images(images: Tensor, name: str) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise MaskerError(
            f"masker {name} needs floating point images (N, C, H, W), got {tuple(images.shape)} "
            f"{images.dtype}"
        )


@lru_cache(maxsize=64)
def _box_counts(length: int, kernel: int) -> Tensor:
    """Count how often input pixel j falls into the window of output pixel i.

    The window of i covers i - kernel//2 ... i - kernel//2 + kernel - 1; positions outside are
    mirrored without repeating the border pixel, again and again where the kernel is larger than the
    image (REFLECT_101).

    Returns:
        float64 (length, length).
    """
    positions = np.arange(length)[:, None] - kernel // 2 + np.arange(kernel)[None, :]
    if length == 1:
        mirrored = np.zeros_like(positions)
    else:
        period = 2 * (length - 1)
        folded = positions % period
        mirrored = np.minimum(folded, period - folded)
    counts = np.zeros((length, length))
    np.add.at(counts, (np.repeat(np.arange(length), kernel), mirrored.ravel()), 1.0)
    return torch.from_numpy(counts)
