"""Layers whose statistics are those of a whole batch: each replica sees a share of it, all must compute as one."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from worker.engine.parallel.group import Group
from worker.engine.quantization.fake_quantization import FakeActivation


def synchronize(module: nn.Module, group: Group) -> Callable[[], None]:
    """Let norms and simulated activation ranges look at the examples of all replicas; return what undoes it."""
    changed: list[tuple[nn.Module, str]] = []
    for layer in module.modules() if group.plan.data > 1 else ():
        if isinstance(layer, _BatchNorm):
            layer.forward = partial(_normalize, layer, group)  # type: ignore[method-assign]
            changed.append((layer, "forward"))
        elif isinstance(layer, _InstanceNorm) and layer.track_running_stats:
            layer.forward = partial(_normalize_instances, layer, group)  # type: ignore[method-assign]
            changed.append((layer, "forward"))
        elif isinstance(layer, FakeActivation):
            layer.bounds = partial(_bounds, layer, group)  # type: ignore[method-assign]
            changed.append((layer, "bounds"))

    def undo() -> None:
        for layer, name in changed:
            delattr(layer, name)

    return undo


def _bounds(layer: FakeActivation, group: Group, x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = type(layer).bounds(layer, x)
    both = torch.stack([-low, high])
    with group.waiting():
        dist.all_reduce(both, dist.ReduceOp.MAX, group=group.along("data"))
    return -both[0], both[1]


def _normalize(layer: _BatchNorm, group: Group, x: Tensor) -> Tensor:
    if not layer.training:
        return type(layer).forward(layer, x)
    normalized = _SynchronizedNorm.apply(x, layer.weight, layer.bias, layer.eps, group)  # type: ignore[no-untyped-call]
    result, mean, variance, count = cast(tuple[Tensor, ...], normalized)
    if layer.running_mean is not None and layer.running_var is not None:
        with torch.no_grad():
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.add_(1)
            momentum = layer.momentum
            if momentum is None:  # the average of all batches
                momentum = 1 / float(cast(Tensor, layer.num_batches_tracked))
            layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), momentum)
            unbiased = variance * (count / (count - 1))
            layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), momentum)
    return result


def _normalize_instances(layer: _InstanceNorm, group: Group, x: Tensor) -> Tensor:
    """Normalize every example by itself; the running statistics are means over the examples of all ranks."""
    if not layer.training:
        return type(layer).forward(layer, x)
    result = functional.instance_norm(x, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
    with torch.no_grad():
        variances, means = torch.var_mean(x.float().flatten(2), 2, correction=1)
        count = torch.full_like(means[0], len(x))
        total_mean, total_variance, total = group.sum(torch.stack([means.sum(0), variances.sum(0), count]), "data")
        for running, sums in ((layer.running_mean, total_mean), (layer.running_var, total_variance)):
            cast(Tensor, running).lerp_((sums / total).to(cast(Tensor, running).dtype), layer.momentum or 0.0)
    return result


class _SynchronizedNorm(torch.autograd.Function):
    """Batch norm over the examples of all ranks; torch's SyncBatchNorm does the same on GPUs only.

    The statistics of the ranks are joined as by Chan et al. (1979), which is exact and does not cancel.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Group
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        count = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x.float(), axes, correction=0)
        own = torch.cat([mean, variance, torch.full((1,), count, dtype=mean.dtype, device=mean.device)])
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group.along("data")))]
        with group.waiting():
            dist.all_gather(everyone, own, group=group.along("data"))
        stacked = torch.stack(everyone)
        counts = stacked[:, -1:]
        means, variances = stacked[:, :-1].chunk(2, 1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean) ** 2)).sum(0) / total
        result = functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), total)
        ctx.group, ctx.has_bias = group, bias is not None
        ctx.mark_non_differentiable(mean, variance, total)
        return result, mean, variance, total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, total = ctx.saved_tensors
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1, *([1] * (x.ndim - 2))]
        wide = gradient.float()
        normal = (x.float() - mean.view(shape)) * inverse.view(shape)
        sums = torch.stack([wide.sum(axes), (wide * normal).sum(axes)])
        own_bias, own_weight = sums.clone()
        with ctx.group.waiting():
            dist.all_reduce(sums, group=ctx.group.along("data"))
        means = (sums / total).view(2, *shape)
        scale = inverse if weight is None else inverse * weight
        of_x = ((wide - means[0] - normal * means[1]) * scale.view(shape)).to(x.dtype)
        return of_x, None if weight is None else own_weight, own_bias if ctx.has_bias else None, None, None
