"""Data parallel: replicas of the model, each with a share of every batch; their gradients are summed.

A replica may itself be split among the ranks of the tensor axis, which then all have the same share of the batch.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from worker.engine.parallel.gradients import GradientSum
from worker.engine.parallel.group import Group, RankFinished, spread
from worker.engine.parallel.ranked import Ranked
from worker.engine.parallel.splitting import split_channels
from worker.engine.parallel.strategy import Fact, Objective, Part, scale_gradients
from worker.engine.parallel.synchronized import synchronize
from worker.engine.programs.program import Program


class Replicas(Ranked):
    """Every rank holds the whole module, or its part of it; replicas hold the same bits after every step."""

    def __init__(
        self, module: nn.Module, extra: Iterable[nn.Parameter], group: Group, program: Program | None = None
    ) -> None:
        """`program` is given where its module shall be split."""
        super().__init__(module, group)
        equalize([*module.state_dict().values(), *extra], group)
        self._split = None if program is None else split_channels(program, group)
        self._undo: Callable[[], None] = synchronize(module, group)
        trained = dict.fromkeys([*(each for each in module.parameters() if each.requires_grad), *extra])
        self._gradients = GradientSum(list(trained), group)

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self._module(*inputs)
        return outputs

    def backward(self, parts: Sequence[Part], objective: Objective) -> Tensor:
        with self._observed.step():
            total = torch.zeros((), device=objective.device)
            for index, part in enumerate(parts):
                if index == len(parts) - 1:
                    self._gradients.arm()
                loss = objective.compute(self._module, part)
                loss.backward()
                total += loss.detach()
            self._gradients.finish()
            return self._group.sum(total, "data")

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> None:
        parts = {} if self._split is None else self._split.slices
        device = self._group.device
        whole = sum_squares((each for each in parameters if each not in parts), device)
        if parts:
            whole += self._group.sum(sum_squares((each for each in parameters if each in parts), device), "tensor")
        scale_gradients(parameters, whole.sqrt(), max_norm)

    def held(self, parameter: nn.Parameter) -> nn.Parameter:
        return parameter

    def part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        return whole if self._split is None else self._split.take(parameter, whole)

    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        return part if self._split is None else self._split.join(parameter, part)

    def finish(self) -> dict[str, Fact]:
        self._gradients.close()
        self._undo()
        facts = self._observed.conclude()
        if self._split is not None:
            self._split.undo()
            facts |= {"groups_split": self._split.num_groups}
        if self._group.rank != 0:
            raise RankFinished
        return facts


def equalize(tensors: Iterable[Tensor], group: Group) -> None:
    """Give every rank rank 0's numbers: each has computed its own, from the same seed."""
    with torch.no_grad(), group.waiting():
        for tensor in tensors:
            spread(tensor, 0)


def sum_squares(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Return the squared norm of all their gradients."""
    # In one type, whatever the parameters have: another rank's may have another.
    squares = [each.grad.square().sum().float() for each in parameters if each.grad is not None]
    return torch.stack(squares).sum() if squares else torch.zeros((), device=device)
