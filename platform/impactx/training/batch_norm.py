"""Batch norm over the workers of a data-parallel training on CPUs.

torch's SyncBatchNorm is made for GPUs alone, where it is used. Each worker normalises its share of
a batch by the mean and the variance of the whole, so that a step is that of one worker with all of
it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from impactx.datasets.batches import Batch


def join_batch_norms(model: nn.Module, device: torch.device) -> list[JoinedBatchNorm]:
    """Let a model's batch norms take their statistics over all workers, in place.

    Names and tensors stay.

    Args:
        model: The network.
        device: Where it is trained.

    Returns:
        The layers that `counted` must be told of: on a CPU all, on a GPU none.
    """
    if not any(isinstance(layer, _BatchNorm) for layer in model.modules()):
        return []
    if device.type == "cuda":
        import timm.layers

        # torch's converter drops the activation in BatchNormAct2d.
        layers: Any = timm.layers
        layers.convert_sync_batchnorm(model)
        return []
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, JoinedBatchNorm):
            layer.__class__ = _joined(type(layer))  # type: ignore[arg-type]
    return [layer for layer in model.modules() if isinstance(layer, JoinedBatchNorm)]


def counted(layers: list[JoinedBatchNorm], batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the same batches, and keep images of weight 0 out of the layers' statistics.

    A worker without a share of a batch has such images.
    """
    for batch in batches:
        for layer in layers:
            layer.counts = bool(batch.weights.any())
        yield batch


class JoinedBatchNorm(_BatchNorm):
    """A batch norm over all workers, which `join_batch_norms` makes of an ordinary one.

    It maps (B, C) or (B, C, ...) to the same shape, B as each worker has it. In training mode every
    worker of the default process group must call it, and go backward, in the same order. In
    evaluation mode, as frozen layers are, and without a process group it is the ordinary one.

    Attributes:
        counts: Whether this worker's values are part of the statistics (see `counted`).

    Raises:
        ValueError: All workers together have less than two values for each channel.
    """

    counts = True

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised over all workers."""
        if not (self.training and torch.distributed.is_initialized()):
            return super().forward(x)
        y: Tensor = self._normalised(x)
        # timm's BatchNormAct2d does this besides.
        for name in ("drop", "act"):
            if (then := getattr(self, name, None)) is not None:
                y = then(y)
        return y

    # Its exchange is not for a compiler to reorder.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _normalised(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        counts = self.counts and x.numel() > 0
        n, mean, variance = _statistics(x.detach(), counts)
        if n < 2:
            raise ValueError("expected more than 1 value per channel over all workers when "
                             f"training, got {n:.0f}")
        if self.track_running_stats:
            batches, running_mean, running_var = (
                self.num_batches_tracked, self.running_mean, self.running_var)
            assert batches is not None and running_mean is not None and running_var is not None
            batches.add_(1)
            share = 1.0 / float(batches) if self.momentum is None else self.momentum
            running_mean.lerp_(mean.to(running_mean), share)
            running_var.lerp_((variance * (n / (n - 1))).to(running_var), share)
        precision = torch.promote_types(x.dtype, torch.float32)
        y: Tensor = _Normalise.apply(
            x, self.weight, self.bias, mean.to(precision), variance.to(precision), n, self.eps,
            counts)
        return y


@functools.cache
def _joined(kind: type[_BatchNorm]) -> type[JoinedBatchNorm]:
    """Return a batch norm's class with the statistics of all workers.

    Its input check and its evaluation stay its own.
    """
    return type(f"Joined{kind.__name__}", (JoinedBatchNorm, kind), {})


def _statistics(x: Tensor, counts: bool) -> tuple[float, Tensor, Tensor]:
    """Return values per channel, their mean (C,) and biased variance (C,), over all workers.

    Both are float64. Deviations are from means, never a difference of large sums: Chan, Golub and
    LeVeque, 1983, equation (2.1).
    """
    own = x.new_zeros(3, x.shape[1], dtype=torch.float64)  # values, mean, variance
    if counts:
        own[0] = x.numel() / x.shape[1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # This is what nn.BatchNorm itself calls.
        own[1], own[2] = torch.batch_norm_update_stats(wide, None, None, 0.0)
    shares = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(shares, own)
    values, means, variances = torch.stack(shares, dim=1)
    weights = values / values.sum(0)
    mean = (weights * means).sum(0)
    variance = (weights * (variances + (means - mean).square())).sum(0)
    return float(values[:, 0].sum()), mean, variance


class _Normalise(torch.autograd.Function):
    """weight * (x - mean) / sqrt(variance + eps) + bias, mean and variance those of all workers' x.

    The gradients of weight and bias are those of the own share, as DistributedDataParallel adds
    them up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
                variance: Tensor, n: float, eps: float, counts: bool) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.n, ctx.eps, ctx.counts = n, eps, counts
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        # As if mean and variance were constants; sums[0] = Σ grad * (x - mean) / deviation and
        # sums[1] = Σ grad.
        grad_x, sums = grad, [torch.zeros_like(mean)] * 2
        if x.numel():  # the operation divides by it
            grad_x, *sums = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, mean, variance, None, None, False, ctx.eps, [True] * 3)
        total = torch.stack(sums).to(torch.float64, copy=True)
        torch.distributed.all_reduce(total)
        if ctx.counts:
            inverse = (variance.double() + ctx.eps).rsqrt()
            scale = inverse / ctx.n if weight is None else inverse * weight / ctx.n
            ones = [1] * (x.dim() - 2)
            slope, shift = (v.to(mean).view(-1, *ones)
                            for v in (scale * inverse * total[0], scale * total[1]))
            away = x - mean.view(-1, *ones)
            grad_x = (grad_x - shift - away * slope).to(x)
        of_affine = [s if needed else None
                     for s, needed in zip(sums, ctx.needs_input_grad[1:3], strict=True)]
        return grad_x, *of_affine, None, None, None, None, None
