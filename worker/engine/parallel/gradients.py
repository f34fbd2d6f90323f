"""Summing gradients over replicas in buckets while the backward pass still runs, as DistributedDataParallel does.

Our own, because a pipeline runs many backward passes per step, parameters may belong to the loss and not to the module,
and a parameter without a gradient must stay without one (Li et al. 2020 describe the algorithm).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from worker.engine.parallel.group import Group

BUCKET_BYTES = 8 * 1024 * 1024


@dataclass
class _Bucket:
    parameters: list[nn.Parameter]
    num_missing: int = 0
    flat: Tensor | None = None
    work: dist.Work | None = None


@dataclass
class GradientSum:
    """The gradients of some parameters, summed over an axis of the mesh."""

    parameters: Sequence[nn.Parameter]
    group: Group
    axis: str = "data"
    _buckets: list[_Bucket] = field(default_factory=list)
    _hooks: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)
    _place: dict[nn.Parameter, _Bucket] = field(default_factory=dict)
    _next: int = 0
    _armed: bool = False

    def __post_init__(self) -> None:
        # The last layers' gradients come first.
        for parameter in reversed(self.parameters):
            last = self._buckets[-1] if self._buckets else None
            full = last is None or sum(each.nbytes for each in last.parameters) + parameter.nbytes > BUCKET_BYTES
            if last is None or full or last.parameters[0].dtype != parameter.dtype:
                last = _Bucket([])
                self._buckets.append(last)
            last.parameters.append(parameter)
            self._place[parameter] = last
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._on_gradient))

    def arm(self) -> None:
        """Send each bucket as soon as the backward pass that comes now has filled it; it must be the step's last."""
        self._armed, self._next = True, 0
        for bucket in self._buckets:
            bucket.num_missing = len(bucket.parameters)

    def finish(self) -> None:
        """Send what has not been sent, wait, and put the sums in place of the gradients."""
        if not self._armed:
            self._next = 0
        self._armed = False
        while self._next < len(self._buckets):
            self._send()
        for bucket in self._buckets:
            assert bucket.work is not None
            assert bucket.flat is not None
            with self.group.waiting():
                bucket.work.wait()
            for parameter, total in zip(
                bucket.parameters, _unflatten_dense_tensors(bucket.flat, bucket.parameters), strict=True
            ):
                if parameter.grad is not None:
                    parameter.grad.copy_(total)
            bucket.flat = bucket.work = None

    def close(self) -> None:
        """Let the parameters go."""
        for hook in self._hooks:
            hook.remove()

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if not self._armed:
            return
        self._place[parameter].num_missing -= 1
        # In their order, which all ranks share, whatever order the gradients come in.
        while self._next < len(self._buckets) and self._buckets[self._next].num_missing == 0:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in bucket.parameters]
        bucket.flat = _flatten_dense_tensors(gradients)
        bucket.work = dist.all_reduce(bucket.flat, group=self.group.along(self.axis), async_op=True)
