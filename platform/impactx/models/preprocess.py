"""The resize and the normalisation that a model carries with itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# For those who ask over HTTP: MLflow makes uint8 of what JSON holds before anything of ours sees
# it, so a fraction and a black pixel look alike there.
SERVED_IMAGES = ("whole numbers 0 to 255, (N, H, W, 3), RGB; no fractions: of those in a JSON "
                 "request MLflow cuts off what is behind the point, so an image in [0, 1] arrives "
                 "as a black one")


class Preprocess(nn.Module):
    """Resize and normalisation: images at native size -> the input of the network.

    Mean and std are persistent buffers: they follow .to() and .double(), and are part of a model's
    fingerprint. Everything is differentiable with respect to the image.

    Args:
        image_size: Native (height, width) in pixels.
        input_size: Height and width that the network takes; images are resized (bilinear,
            antialiased) where it differs.
        mean: Of each channel, for images in [0, 1].
        std: Of each channel.

    Raises:
        ValueError: There are not three of each, or a std is not above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, image_size: tuple[int, int], input_size: tuple[int, int],
                 mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
            raise ValueError(
                f"normalisation needs 3 means and 3 stds above 0, got {mean!r} and {std!r}")
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.input_size = (int(input_size[0]), int(input_size[1]))
        dtype = torch.get_default_dtype()
        self.register_buffer("mean", torch.tensor(mean, dtype=dtype).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=dtype).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return (value - mean) / std of resized images, (B, 3, *input_size), in their dtype.

        Args:
            x: Float (B, 3, H, W) at native size, values in [0, 1].

        Raises:
            ValueError: The images are of another shape.
            TypeError: They are integers, which were not divided by 255.
        """
        if x.ndim != 4 or x.shape[1] != 3 or tuple(x.shape[2:]) != self.image_size:
            height, width = self.image_size
            raise ValueError(f"this model takes images of shape (B, 3, {height}, {width}), "
                             f"got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"this model takes float images with values in [0, 1], got {x.dtype}: "
                            "divide by 255")
        if self.input_size != self.image_size:
            x = F.interpolate(x, size=self.input_size, mode="bilinear", align_corners=False,
                              antialias=True)
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """Return both sizes, for the printed model."""
        return f"{self.image_size} -> {self.input_size}"
