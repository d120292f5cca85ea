"""The decoder D (paper Fig. 2; the filter counts are ours, docs/METHOD.md)."""

from __future__ import annotations

from torch import Tensor, nn

LARGEST_START = 12  # the paper's own two cases start at 8x8 (32 px) and 12x12 (96 px)
START_CHANNELS = 32
FEWEST_FILTERS = 8


def decoder_sizes(image_size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return heights and widths from the decoder's start to the native size.

    There is one more entry than blocks. Going back from the native size each entry is half of the
    next one, rounded up, until the longer side is at most 12; there is at least one block. 32 -> 8,
    16, 32; 96 -> 12, 24, 48, 96; 28 -> 7, 14, 28; 100 -> 7, 13, 25, 50, 100; 224 -> 7, 14, ...,
    224. A side that is no multiple of 2^blocks is met by up-sampling to the exact size of the next
    entry (13 -> 25 instead of 26).

    Args:
        image_size: Native (height, width) in pixels.

    Raises:
        ValueError: A side is not positive.
    """
    sizes = [(int(image_size[0]), int(image_size[1]))]
    if min(sizes[0]) < 1:
        raise ValueError(f"an image size has two positive sides, got {image_size}")
    while len(sizes) < 2 or max(sizes[0]) > LARGEST_START:
        sizes.insert(0, (-(-sizes[0][0] // 2), -(-sizes[0][1] // 2)))
    return sizes


class Decoder(nn.Module):
    """The decoder: z (B, latent) in (0, 1) -> maps (B, channels, H, W) in scaled units, unbounded.

    A fully connected layer to 32 channels at the start size, then for each doubling [Conv 3x3,
    ReLU, Conv 3x3, ReLU, UpSampling x2 (nearest)] with 32, 16, 8, 8, ... filters, then a linear 3x3
    convolution to `channels`. 32x32: two blocks from 8x8; 96x96 (STL-10): three from 12x12 (paper
    4.3: one more block). Other sizes: see `decoder_sizes`.

    Args:
        latent: Length of z.
        image_size: Native (height, width) in pixels.
        channels: Of the maps.
    """

    def __init__(self, latent: int, image_size: tuple[int, int], channels: int = 3) -> None:
        super().__init__()
        self.latent, self.channels = latent, channels
        sizes = decoder_sizes(image_size)
        height, width = sizes[0]
        self.expand = nn.Linear(latent, START_CHANNELS * height * width)
        self.unflatten = nn.Unflatten(1, (START_CHANNELS, height, width))
        blocks, filters_in = [], START_CHANNELS
        for level, size in enumerate(sizes[1:]):
            filters = max(START_CHANNELS >> level, FEWEST_FILTERS)
            blocks.append(nn.Sequential(
                nn.Conv2d(filters_in, filters, 3, padding=1), nn.ReLU(),
                nn.Conv2d(filters, filters, 3, padding=1), nn.ReLU(),
                nn.Upsample(size=size, mode="nearest")))
            filters_in = filters
        self.blocks = nn.Sequential(*blocks)
        self.to_map = nn.Conv2d(filters_in, channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Return the maps of latent codes."""
        maps: Tensor = self.to_map(self.blocks(self.unflatten(self.expand(z))))
        return maps
