"""Partition SHAP (Owen values of nested boxes) for many images at once.

The values are those of shap.PartitionExplainer. The algorithm, an image at a time, stands in
``tests/reference/partition_twin.py``; the comments there teach it. Here the images of a group go in
lockstep (``lockstep``). ``batch_size`` masks are evaluated before their consequences are seen, as
in shap: it is part of the estimate, not a matter of speed. Speed has its own settings
(``forward_batch``, ``images_in_flight``), which change nothing but rounding, and
``fast.fast_score`` brings a module into the form that runs fastest on a CPU.

Sources: Lundberg's shap 0.51 (explainers/_partition.py, maskers/_image.py); the paper, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from impactx.explain.masking import MaskerSpec, parse_masker
from impactx.explain.partition.check import FormError, check_group
from impactx.explain.partition.fast import FastScore
from impactx.explain.partition.forward import Forward, Outputs, PartitionError, Score
from impactx.explain.partition.lockstep import Group, Room
from impactx.explain.partition.tree import TreeOnDevice, build_tree

GIB = 1 << 30
_NO_IMAGE = torch.empty(0)


class AdditivityError(ArithmeticError):
    """A map whose sum is not f(image) - f(masked image)."""


@dataclass(frozen=True)
class PartitionResult:
    """The maps of N images.

    Attributes:
        values: float32 (N, n_outputs, C, H, W), in the units of the score.
        scores: float64 (N, n_outputs), f(image).
        base_values: float64 (N, n_outputs), f(image with everything hidden).
        evaluations: int64 (N,), masks evaluated, those two included.
    """

    values: np.ndarray
    scores: np.ndarray
    base_values: np.ndarray
    evaluations: np.ndarray


def check_additivity(
    values: np.ndarray, scores: np.ndarray, base_values: np.ndarray, *, tolerance: float = 1e-5,
    names: Sequence[int] | None = None,
) -> None:
    """Check that each map sums to score - base value.

    Args:
        values: (N, n_outputs, C, H, W).
        scores: (N, n_outputs).
        base_values: (N, n_outputs).
        tolerance: Allowed difference, relative to the sum of the map's absolute values.
        names: (N,), what the message calls the images; default: 0 to N-1.

    Raises:
        AdditivityError: A map does not; the message names the first such image and output, and
            both numbers.
    """
    flat = values.reshape(*values.shape[:2], -1)
    total = flat.sum(-1, dtype=np.float64)
    expected = scores - base_values
    size = np.abs(flat).sum(-1, dtype=np.float64)
    allowed = tolerance * size + 1e-9 * (np.abs(scores) + np.abs(base_values))
    wrong = np.argwhere(~(np.abs(total - expected) <= allowed))
    if len(wrong):
        image, output = wrong[0]
        name = image if names is None else names[image]
        raise AdditivityError(
            f"the map of image {name}, output {output}, sums to {total[image, output]:.9g}, but "
            f"f(image) - f(masked) = {expected[image, output]:.9g} ({len(wrong)} of {total.size} "
            "maps differ)"
        )


@torch.inference_mode()
def partition_shap(
    score: Score | FastScore,
    images: Tensor | np.ndarray,
    outputs: Tensor | np.ndarray | str,
    *,
    masker: MaskerSpec = "blur(16,16)",
    max_evals: int = 2000,
    batch_size: int = 50,
    fixed_context: int | None = None,
    memory_limit_bytes: int = GIB,
    forward_batch: int | None = None,
    images_in_flight: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    names: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
    check: bool = True,
) -> PartitionResult:
    """Make partition SHAP maps, equal to ``shap.PartitionExplainer``'s with the same settings.

    A sample of the evaluated masks is scored again, one at a time, by the module itself. If the
    module's fast form is found to be wrong, a warning says where, and all images of this
    call are explained again by the module, as those of later calls with this form are.

    Args:
        score: (B, C, H, W) of ``dtype`` in [0, 1] to (B, K) floating point scores; a module must be
            in eval mode. Or a module's fast form.
        images: uint8 (N, H, W, C), or floating point (N, C, H, W) in [0, 1].
        outputs: Which scores are explained: class indices (N,) or (N, n), ``"all"``, or floating
            point weights (N, K) for one weighted sum of scores for each image. An entry's priority
            is its largest over these outputs, so the choice changes the maps.
        masker: What stands in for hidden pixels, see ``masking.parse_masker``.
        max_evals: Evaluations for each image, f(masked) and f(image) included; at least 4.
        batch_size: Evaluations between two looks at the queue (shap's; it changes the estimate).
        fixed_context: None averages over both contexts of a split; 0 or 1 takes one and leaves the
            interaction on the node.
        memory_limit_bytes: Bounds the engine's own working memory (queues, scores, masked images;
            not the result, not the model's activations). It decides how many images are in flight.
        forward_batch: Masks in one forward; default by device. Out of memory on an accelerator
            halves it.
        images_in_flight: Images in lockstep; default 32 on a CPU, 2048 elsewhere, fewer where
            memory demands.
        dtype: float32, or float64 to verify (``score`` must then take float64).
        device: By default that of ``images``, or of the module's parameters where images are an
            array.
        names: (N,), what messages call the images, such as their indices in a data set; default: 0
            to N-1.
        progress: Called with the number of finished images after each group.
        check: Whether to score a sample again. Not where the model runs in a lower precision than
            ``dtype``: there scores differ by more than float rounding.

    Raises:
        PartitionError: A setting or score is outside what is allowed (``masking.MaskerError`` for
            the masker), or a score depends on the images beside it in the batch.
        AdditivityError: A map does not sum to f(image) - f(masked).
    """
    _check_settings(max_evals, batch_size, fixed_context, dtype)
    target = _device(device, images, score)
    stack, channels_first = _open(images)
    n_images, a, b, c = stack.shape
    if not n_images:
        raise PartitionError("images: there are none")
    tree = TreeOnDevice(build_tree((a, b, c) if channels_first else (c, a, b)), target)
    selected = Outputs(outputs, n_images, target, names)
    room = Room.plan(tree, max_evals, batch_size, fixed_context, dtype, memory_limit_bytes,
                     forward_batch, target)
    parsed = parse_masker(masker)

    def explain() -> PartitionResult:
        forward = Forward(score, selected, room.forward_batch)

        def group_of(first: int, count: int) -> Group:
            batch = _prepare(stack[first : first + count], channels_first, selected.names[first:],
                             dtype, target)
            return Group(tree, forward, parsed, batch, first, room)

        # Two evaluations show how many scores there are: then the memory can be planned.
        probe = group_of(0, 1)
        in_flight = room.images_in_flight(
            selected.count(forward.n_scores or 1), images_in_flight,
            0 if probe.ahead is None else probe.ahead.bytes_an_image,
        )
        del probe
        parts: list[tuple[np.ndarray, ...]] = []
        first = 0
        while first < n_images:
            group = group_of(first, in_flight)
            part = group.explain()
            check_additivity(part[0], part[1], part[2], names=selected.names[first:])
            if check:
                check_group(group, score)
            parts.append(part)
            first += group.n
            if progress is not None:
                progress(first)
        return PartitionResult(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    if not (isinstance(score, FastScore) and score.faster):
        return explain()
    try:
        return explain()
    except torch.OutOfMemoryError:
        raise
    except (FormError, PartitionError, AdditivityError, RuntimeError) as reason:
        # What is the model's or the caller's own fault, the model itself raises again.
        score.trusted, faults = False, reason
    result = explain()
    score.distrust(faults)
    return result


def _check_settings(
    max_evals: int, batch_size: int, fixed_context: int | None, dtype: torch.dtype
) -> None:
    if max_evals < 4:
        raise PartitionError(
            f"max_evals = {max_evals}: one split costs 2 evaluations beside f(image) and "
            "f(masked); allowed: 4 or more"
        )
    if batch_size < 1:
        raise PartitionError(f"batch_size = {batch_size}; allowed: 1 or more")
    if fixed_context not in (None, 0, 1) or isinstance(fixed_context, bool):
        raise PartitionError(f"fixed_context = {fixed_context!r}; allowed: None, 0 or 1")
    if dtype not in (torch.float32, torch.float64):
        raise PartitionError(f"dtype = {dtype}; allowed: torch.float32 or torch.float64")


def _device(
    device: torch.device | str | None, images: Tensor | np.ndarray, score: Score | FastScore
) -> torch.device:
    if device is not None:
        return torch.device(device)
    if isinstance(images, Tensor):
        return images.device
    plain = score.plain if isinstance(score, FastScore) else score
    parameter = next(plain.parameters(), _NO_IMAGE) if isinstance(plain, nn.Module) else _NO_IMAGE
    return parameter.device


def _open(images: Tensor | np.ndarray) -> tuple[Tensor, bool]:
    """Return the images as a tensor, and whether channels come first."""
    stack = images if isinstance(images, Tensor) else torch.from_numpy(images)
    readable = stack.dtype == torch.uint8 or stack.is_floating_point()
    if stack.ndim != 4 or 0 in stack.shape[1:] or not readable:
        raise PartitionError(
            f"images: {stack.dtype} {tuple(stack.shape)}; allowed: uint8 (N, H, W, C) or floating "
            "point (N, C, H, W)"
        )
    return stack, stack.dtype != torch.uint8


def _prepare(
    part: Tensor, channels_first: bool, names: Sequence[int], dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return images (n, C, H, W) of ``dtype`` in [0, 1] on the device."""
    part = part.to(device)
    if not channels_first:
        return (part.permute(0, 3, 1, 2).to(dtype) / 255).contiguous()
    outside = ~((part >= 0) & (part <= 1)).flatten(1).all(dim=1)
    if bool(outside.any()):
        image = int(outside.nonzero()[0])
        raise PartitionError(f"images: image {names[image]} has values outside [0, 1] (or NaN)")
    return part.to(dtype).contiguous()
