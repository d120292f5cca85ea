"""Initial weights that depend on a seed and on nothing else."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def seeded(seed: int, part: str) -> Iterator[None]:
    """Draw the CPU's random numbers of the block from `seed` and `part`.

    Every part of a model ("trunk", "head", "decoder", ...) has a stream of its own, so another
    number of classes or another decoder leaves the initial weights of the other parts as they were.
    The global generators (CPU and GPU) continue undisturbed after the block.

    Args:
        seed: Of the whole model.
        part: Name of the part.
    """
    digest = hashlib.sha256(f"{seed}/{part}".encode()).digest()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed: that would seed the GPUs' generators as well.
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        yield
