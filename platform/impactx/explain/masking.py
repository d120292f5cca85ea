"""What a hidden pixel looks like: blurred, or one constant colour.

A masker turns images into *backgrounds*; a masked image takes each pixel either from the image or from its
background, never a blend. Two maskers are offered, with the names that shap's image masker uses:

* ``blur(kw,kh)``: the box blur of ``cv2.blur`` (border REFLECT_101, even kernels off-centre by half a pixel,
  sums in float64), computed once an image;
* a constant colour in [0, 1]: one number for all channels, or one a channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from impactx.settings.masker import ALLOWED, BlurSpec, ConstantSpec, MaskerError, read_masker

MaskerSpec = "str | float | Sequence[float] | np.ndarray | Masker"


class Masker(Protocol):
    """Anything that makes backgrounds; ``name`` is its canonical spelling and belongs to a fingerprint."""

    @property
    def name(self) -> str: ...

    def background(self, images: Tensor) -> Tensor:
        """Backgrounds (N, C, H, W) of ``images`` (N, C, H, W): same dtype, same device."""
        ...


@dataclass(frozen=True)
class Blur(BlurSpec):
    """``cv2.blur`` with a kernel of ``width`` x ``height`` pixels (shap's ``blur(width,height)``)."""

    def background(self, images: Tensor) -> Tensor:
        _require_images(images, self.name)
        rows = _box_counts(images.shape[-2], self.height).to(images.device)
        columns = _box_counts(images.shape[-1], self.width).to(images.device)
        sums = rows @ images.to(torch.float64) @ columns.T
        return (sums * (1.0 / (self.width * self.height))).to(images.dtype)


@dataclass(frozen=True)
class Constant(ConstantSpec):
    """One colour for every hidden pixel: one value for all channels, or one a channel, each in [0, 1]."""

    def background(self, images: Tensor) -> Tensor:
        _require_images(images, self.name)
        channels = images.shape[1]
        if len(self.colour) not in (1, channels):
            raise MaskerError(
                f"masker {self.name} has {len(self.colour)} channel values, the images have {channels} channel(s); "
                f"allowed: 1 value, or {channels}"
            )
        colour = torch.tensor(self.colour, dtype=images.dtype, device=images.device)
        return colour.view(1, -1, 1, 1).expand_as(images).contiguous()


def parse_masker(spec: MaskerSpec) -> Masker:  # type: ignore[valid-type]
    """The masker that ``spec`` describes.

    Args:
        spec: ``"blur(16,16)"`` (width, height), a number, a sequence of numbers, ``"0.5"``, ``"0.5,0.4,0.3"``,
            ``"constant(0.5,0.4,0.3)"``, or a masker, which is returned as it is. Colours lie in [0, 1].

    Raises:
        MaskerError: anything else, with the value and what is allowed.
    """
    if isinstance(spec, (bool, type(None))):
        raise MaskerError(f"masker {spec!r} is not a masker; allowed: {ALLOWED}")
    if isinstance(spec, str):
        read = read_masker(spec)
        return Blur(read.width, read.height) if isinstance(read, BlurSpec) else Constant(read.colour)
    if isinstance(spec, (int, float, np.floating, np.integer)):
        return Constant((float(spec),))
    if isinstance(spec, (Sequence, np.ndarray)):
        try:
            return Constant(tuple(float(value) for value in spec))
        except (TypeError, ValueError) as error:
            raise MaskerError(f"masker {spec!r} is not a list of numbers; allowed: {ALLOWED}") from error
    if hasattr(spec, "background") and hasattr(spec, "name"):
        return spec  # type: ignore[no-any-return]
    raise MaskerError(f"masker {spec!r} is not a masker; allowed: {ALLOWED}")


def _require_images(images: Tensor, name: str) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise MaskerError(
            f"masker {name} needs floating point images (N, C, H, W), got {tuple(images.shape)} {images.dtype}"
        )


@lru_cache(maxsize=64)
def _box_counts(length: int, kernel: int) -> Tensor:
    """How often input pixel j falls into the window of output pixel i: (length, length), float64.

    The window of i covers i - kernel//2 ... i - kernel//2 + kernel - 1; positions outside are mirrored without
    repeating the border pixel, again and again where the kernel is larger than the image (REFLECT_101).
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
