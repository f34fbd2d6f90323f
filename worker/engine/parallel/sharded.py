"""Data parallel with sharded state: FSDP2. Each rank keeps a share of every parameter, gradient and moment."""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from worker.engine.parallel.gradients import GradientSum
from worker.engine.parallel.group import Group, RankFinished
from worker.engine.parallel.ranked import Ranked
from worker.engine.parallel.replicas import equalize
from worker.engine.parallel.sharding import Sharding
from worker.engine.parallel.strategy import Fact, Objective, Part
from worker.engine.parallel.synchronized import synchronize


class Shards(Ranked):
    """Every rank runs the whole module on its share of the batch, and holds a share of its state."""

    def __init__(self, module: fx.GraphModule, extra: Iterable[nn.Parameter], group: Group) -> None:
        super().__init__(module, group)
        extra = list(extra)
        equalize([*module.state_dict().values(), *extra], group)
        self._undo: Callable[[], None] = synchronize(module, group)
        self._sharding = Sharding(module, group)
        self._extra = GradientSum([*extra, *(each for each in self._sharding.whole if each.requires_grad)], group)

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        # What is gathered in inference mode could not be trained with afterwards.
        with torch.inference_mode(False), torch.no_grad():
            outputs: tuple[Tensor, ...] = self._module(*(each.clone() for each in inputs))
            # After a forward pass the outermost unit stays whole, for a backward pass that does not come here.
            cast(FSDPModule, self._module).reshard()
        return outputs

    def backward(self, parts: Sequence[Part], objective: Objective) -> Tensor:
        with self._observed.step():
            total = torch.zeros((), device=objective.device)
            for part in parts:
                loss = objective.compute(self._module, part)
                loss.backward()
                total += loss.detach()
            self._extra.finish()
            return self._group.sum(total, "data")

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> None:
        gradients = [each.grad for each in parameters if each.grad is not None]
        zero = torch.zeros((), device=self._group.device)
        shares = [_local(each).square().sum() for each in gradients if isinstance(each, DTensor)]
        whole = [each.square().sum() for each in gradients if not isinstance(each, DTensor)]
        square = self._group.sum(sum(shares, zero).float(), "data") + sum(whole)
        scale = (max_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
        for each in gradients:
            _local(each).mul_(scale)

    def held(self, parameter: nn.Parameter) -> nn.Parameter:
        return self._sharding.shard_of(parameter)

    def part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        shard = self.held(parameter)
        if not isinstance(shard, DTensor):
            return whole
        # FSDP2 divides the first axis as torch.chunk does; the last ranks may get nothing.
        chunks = whole.chunk(self.num_shares)
        own = chunks[self.share] if self.share < len(chunks) else whole[:0]
        return DTensor.from_local(
            own.clone(), shard.device_mesh, shard.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:  # noqa: ARG002
        return part.full_tensor() if isinstance(part, DTensor) else part

    def finish(self) -> dict[str, Fact]:
        self._extra.close()
        self._sharding.undo()
        self._undo()
        facts = self._observed.conclude()
        if self._group.rank != 0:
            raise RankFinished
        return facts


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
