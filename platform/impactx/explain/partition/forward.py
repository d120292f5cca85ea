"""Evaluating masks: compose, run the model, keep the outputs that are explained.

The work of a step (the masks of many images) is cut into even chunks of at most ``forward_batch``
masks. Out of memory on an accelerator halves the chunk and goes on. What comes back from the model
is checked here, once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from impactx.explain.partition.fast import FastScore
from impactx.explain.partition.split import Head
from impactx.explain.scores import training_part

log = logging.getLogger(__name__)

Score = Callable[[Tensor], Tensor]


class PartitionError(ValueError):
    """A setting or score with which nothing can be explained; the message says what is allowed."""


class Outputs:
    """Which outputs are explained: indices an image, weights an image, or all.

    Args:
        spec: ``"all"``; whole numbers (N,) or (N, n), the outputs of each image; or floating point
            weights (N, K).
        n_images: The number of images, N.
        device: Where the scores are.
        names: What messages call the images, (N,); default: 0 to N-1.

    Raises:
        PartitionError: ``spec`` is something else, or has another number of images.
    """

    def __init__(
        self, spec: object, n_images: int, device: torch.device, names: Sequence[int] | None = None
    ) -> None:
        if names is not None and len(names) != n_images:
            raise PartitionError(
                f"names: {len(names)} for {n_images} images; allowed: one for each image")
        self.names = range(n_images) if names is None else names
        self.indices: Tensor | None = None
        self.weights: Tensor | None = None
        if isinstance(spec, str):
            if spec != "all":
                raise PartitionError(
                    f"outputs = {spec!r}; allowed: 'all', class indices or weights")
            return
        tensor = torch.tensor(spec) if isinstance(spec, np.ndarray) else torch.as_tensor(spec)
        tensor = tensor.to(device)
        if tensor.ndim not in (1, 2) or len(tensor) != n_images or tensor.numel() == 0:
            raise PartitionError(
                f"outputs has the shape {tuple(tensor.shape)}; allowed for {n_images} images: "
                f"({n_images},) or ({n_images}, n) class indices, or ({n_images}, K) floating "
                "point weights"
            )
        if tensor.is_floating_point():
            if tensor.ndim != 2 or not bool(torch.isfinite(tensor).all()):
                raise PartitionError(
                    "outputs given as weights must be finite, with the shape (N, K)")
            self.weights = tensor.double()
        elif tensor.dtype == torch.bool:
            raise PartitionError(
                "outputs is boolean; allowed: class indices (whole numbers) or weights")
        else:
            self.indices = (tensor[:, None] if tensor.ndim == 1 else tensor).long()

    def check(self, n_scores: int) -> None:
        """Check that the outputs fit a model of ``n_scores`` scores.

        Raises:
            PartitionError: They do not; the message names the image.
        """
        if self.indices is not None:
            wrong = ((self.indices < 0) | (self.indices >= n_scores)).any(dim=1).nonzero()
            if len(wrong):
                image = int(wrong[0])
                raise PartitionError(
                    f"outputs: image {self.names[image]} asks for {self.indices[image].tolist()}, "
                    f"the model has {n_scores} scores; allowed: 0 to {n_scores - 1}"
                )
        if self.weights is not None and self.weights.shape[1] != n_scores:
            raise PartitionError(f"outputs: {self.weights.shape[1]} weights an image, the model "
                                 f"has {n_scores} scores")

    def count(self, n_scores: int) -> int:
        """Return how many outputs there are for an image, of a model of ``n_scores`` scores."""
        if self.indices is not None:
            return self.indices.shape[1]
        return n_scores if self.weights is None else 1

    def select(self, scores: Tensor, image: Tensor) -> Tensor:
        """Pick the outputs, (B, n), of scores (B, K).

        Args:
            scores: Floating point (B, K).
            image: int64 (B,), the image of each row.
        """
        if self.indices is not None:
            return scores.gather(1, self.indices[image])
        if self.weights is not None:
            return (scores.double() * self.weights[image]).sum(1, keepdim=True).to(scores.dtype)
        return scores.clone()  # it may be a view of an input buffer that is written again


class Forward:
    """Runs ``score`` on composed inputs in chunks and checks what comes back.

    Args:
        score: (B, ...) to scores (B, K).
        outputs: Which of the scores are kept.
        forward_batch: How many masks go through the model together at most; halved for good when an
            accelerator runs out of memory.

    Raises:
        PartitionError: ``score``, or a part of it, is a module in training mode.
    """

    def __init__(self, score: Score | FastScore, outputs: Outputs, forward_batch: int) -> None:
        fast = score if isinstance(score, FastScore) and score.faster else None
        plain = score.plain if isinstance(score, FastScore) else score
        if (part := training_part(plain)) is not None:
            raise PartitionError(f"score: {part} is in training mode (dropout, batch statistics): "
                                 "call eval() first")
        self.fast = fast
        self.score = plain if fast is None else fast.score
        self.outputs = outputs
        self.forward_batch = forward_batch
        self.n_scores: int | None = None

    @property
    def head(self) -> Head | None:
        """The first layer of the score, where it is split off."""
        return None if self.fast is None else self.fast.head

    def __call__(
        self, compose: Callable[..., Tensor], image: Tensor, *mask: Tensor, first_image: int,
        after_head: bool = False,
    ) -> Tensor:
        """Evaluate B masks.

        Args:
            compose: (which, *mask) to inputs of ``score``.
            image: int64 (B,), each mask's image, as its index in the group.
            *mask: Further tensors (B,) that ``compose`` takes.
            first_image: The number of the group's first image among all.
            after_head: Whether ``compose`` gives what comes out of a ``FastScore``'s head.

        Returns:
            The selected scores, (B, n).

        Raises:
            PartitionError: A score has another form, or is not finite; the message names the image.
            torch.OutOfMemoryError: Not even one mask fits.
        """
        score = self.fast.rest if after_head and self.fast is not None else self.score
        assert score is not None
        total, done = len(image), 0
        results = []
        while done < total:
            remaining = total - done
            size = math.ceil(remaining / math.ceil(remaining / self.forward_batch))
            part = slice(done, done + size)
            try:
                scores = score(compose(image[part], *(m[part] for m in mask)))
            except torch.OutOfMemoryError:
                if size <= 1:
                    raise
                self.forward_batch = max(1, size // 2)
                log.warning("out of memory with %d masks a forward: going on with %d", size,
                            self.forward_batch)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            self._check_shape(scores, size)
            results.append(self.outputs.select(scores, image[part] + first_image))
            done += size
        selected = results[0] if len(results) == 1 else torch.cat(results)
        finite = torch.isfinite(selected).all(dim=1)
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0])
            name = self.outputs.names[int(image[bad]) + first_image]
            raise PartitionError(
                f"score returned NaN or infinite values for image {name}: "
                f"{selected[bad].tolist()}; scores must be finite for every masked version of an "
                "image"
            )
        return selected

    def _check_shape(self, scores: object, size: int) -> None:
        if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != size \
                or scores.shape[1] < 1:
            returned = (f"a tensor of shape {tuple(scores.shape)}" if isinstance(scores, Tensor)
                        else f"{type(scores)}")
            raise PartitionError(f"score returned {returned} for {size} inputs; allowed: a tensor "
                                 f"({size}, K), K >= 1")
        if not scores.is_floating_point():
            raise PartitionError(f"score returned {scores.dtype}; allowed: floating point scores")
        if self.n_scores is None:
            self.n_scores = scores.shape[1]
            self.outputs.check(self.n_scores)
        elif scores.shape[1] != self.n_scores:
            raise PartitionError(
                f"score returned {scores.shape[1]} scores, and {self.n_scores} before")
