"""LeNet-5 for RGB images (the paper's [25]; ReLU and max-pooling are ours)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from impactx.models.head import Head

MINIMUM_SIDE = 16  # below, nothing is left after the second pooling
MEAN = STD = (0.5, 0.5, 0.5)
HEAD_NAMES = ("fc1", "fc2", "fc3")  # the usual names in a weights file


class LeNet5Trunk(nn.Module):
    """The convolutional part: conv 6@5x5, pool, conv 16@5x5, pool, flattened.

    It maps (B, 3, H, W) to (B, F) with F = 16 * h * w, h = ((H - 4) // 2 - 4) // 2: 400 at 32x32.

    Args:
        size: Height and width of its images, in pixels.

    Raises:
        ValueError: The size is below 16x16.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        if min(size) < MINIMUM_SIDE:
            raise ValueError(
                f"LeNet-5 needs images of at least {MINIMUM_SIDE}x{MINIMUM_SIDE} pixels, got "
                f"{size[0]}x{size[1]}: set the model's input_size (32 is its own)")
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        # Where an attention branch has its place; it has no tensors.
        self.between: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the features (B, F) of preprocessed images."""
        x = self.between(F.max_pool2d(F.relu(self.conv1(x)), 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return x.flatten(1)


def lenet5_head(num_features: int, num_classes: int) -> Head:
    """Build the fully connected part: FC 120, FC 84, FC K with ReLU between; (B, F) -> (B, K)."""
    hidden = nn.Sequential(nn.Linear(num_features, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU())
    return Head(hidden, nn.Linear(84, num_classes))
