"""Pipeline parallel: each rank holds one stage, and micro-batches follow each other through the stages."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from worker.engine.devices import CPU, move
from worker.engine.errors import RecipeRefused
from worker.engine.parallel.gradients import GradientSum
from worker.engine.parallel.group import Group, RankFinished, spread
from worker.engine.parallel.messages import Messenger, Value
from worker.engine.parallel.ranked import Ranked
from worker.engine.parallel.replicas import equalize, sum_squares
from worker.engine.parallel.stages import choose_cuts, cut, measure_costs, parameters_of
from worker.engine.parallel.strategy import Fact, Objective, Part, scale_gradients
from worker.engine.parallel.synchronized import synchronize
from worker.engine.quantization.fake_quantization import FakeActivation

Move = tuple[Literal["forward", "backward"], int]


class Pipeline(Ranked):
    """One stage of the module, and a replica's share of every batch."""

    def __init__(self, module: fx.GraphModule, inputs: tuple[Tensor, ...], group: Group) -> None:
        plan = group.plan
        _check_layers(module, plan.microbatches)
        super().__init__(module, group)
        self._messenger = Messenger(group)
        self._stage, self._last = group.coordinate("pipeline"), plan.pipeline - 1
        equalize(module.state_dict().values(), group)
        module.eval()
        found = group.gather(choose_cuts(module, measure_costs(module, inputs), plan.pipeline))
        self._cuts = cast(list[int], found[0])
        stages = cut(module, self._cuts)
        self._own = stages[self._stage]
        users = Counter(each for stage in stages for each in parameters_of(stage))
        self._first_user = {
            each: index for index in reversed(range(len(stages))) for each in parameters_of(stages[index])
        }
        self._mine = mine = set(parameters_of(self._own))
        self._trainable = {each: each.requires_grad for each in module.parameters()}
        self._shared = [each for each in users if users[each] > 1 and each.requires_grad]
        self._summed: list[nn.Parameter] | None = None if self._shared else []
        self._shapes = {each: each.shape for each in module.parameters()}
        self._places = {buffer: stage for stage, each in enumerate(stages) for buffer in each.module.buffers()}
        for parameter in module.parameters():
            if parameter not in mine:
                parameter.requires_grad_(False)
                parameter.data = parameter.data.new_empty(0)
        self._undo: Callable[[], None] = synchronize(module, group)
        self._gradients = GradientSum([each for each in parameters_of(self._own) if each.requires_grad], group)
        self._leaves: dict[int, list[Value]] = {}
        self._results: dict[int, list[Tensor]] = {}

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        received = [self._messenger.receive(self._stage - 1) for _ in self._own.received]
        outputs: tuple[Value, ...] = self._own.module(*inputs, *received)
        if self._stage < self._last:
            for value in outputs:
                self._messenger.send(value, self._stage + 1)
        self._messenger.settle()
        # A pickled tensor would come out on the GPU that it was on, which is another rank's.
        shown: list[object] = [move(cast(tuple[Tensor, ...], outputs), CPU) if self._stage == self._last else None]
        with self._group.waiting():
            dist.broadcast_object_list(shown, group=self._group.along("pipeline"), group_src=self._last)
        return move(cast(tuple[Tensor, ...], shown[0]), self._group.device)

    def backward(self, parts: Sequence[Part], objective: Objective) -> Tensor:
        with self._observed.step():
            total = torch.zeros((), device=self._group.device)
            for direction, index in schedule(self._group.plan.schedule, self._stage, self._last + 1, len(parts)):
                if direction == "forward":
                    total += self._forward(index, parts[index], objective)
                else:
                    self._backward(index)
            self._messenger.settle()
            self._gradients.finish()
            self._sum_shared()
            return self._group.sum(self._group.sum(total, "pipeline"), "data")

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> None:
        # What several stages share counts once.
        own = (each for each in parameters if self._first_user.get(each) == self._stage)
        square = sum_squares(own, self._group.device)
        scale_gradients(parameters, self._group.sum(square, "pipeline").sqrt(), max_norm)

    def held(self, parameter: nn.Parameter) -> nn.Parameter | None:
        return parameter if parameter in self._mine else None

    def holds(self, buffer: Tensor) -> bool:
        return self._places.get(buffer, self._stage) == self._stage

    def part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:  # noqa: ARG002
        return whole

    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:  # noqa: ARG002
        return part

    def finish(self) -> dict[str, Fact]:
        self._gradients.close()
        self._undo()
        line = self._group.along("pipeline")
        with torch.no_grad(), self._group.waiting():
            for parameter, shape in self._shapes.items():
                source = self._first_user.get(parameter, 0)
                if parameter.shape != shape:
                    parameter.data = parameter.data.new_empty(shape)
                parameter.grad = None
                spread(parameter, source, line)
            for buffer, stage in self._places.items():
                spread(buffer, stage, line)
        for parameter, trainable in self._trainable.items():
            parameter.requires_grad_(trainable)
        facts = self._observed.conclude() | {"schedule": self._group.plan.schedule}
        if self._group.rank != 0:
            raise RankFinished
        return facts

    def _forward(self, index: int, part: Part, objective: Objective) -> Tensor:
        batch, share = part
        seen = objective.move(batch)
        leaves = [self._messenger.receive(self._stage - 1) for _ in self._own.received]
        # Clones, because a stage may write into them: a leaf does not allow that, and what had no gradient when it came
        # must not be taken for something that has.
        entering = [each.clone() if isinstance(each, Tensor) else each for each in leaves]
        with objective.autocast():
            outputs = self._own.module(*seen.inputs, *entering)
        self._leaves[index] = leaves
        if self._stage == self._last:
            loss = objective.judge(outputs, seen) * share
            self._results[index] = [loss]
            return loss.detach()
        for value in outputs:
            self._messenger.send(value, self._stage + 1)
        self._results[index] = [each for each in outputs if isinstance(each, Tensor) and each.requires_grad]
        return torch.zeros((), device=self._group.device)

    def _backward(self, index: int) -> None:
        results, leaves = self._results.pop(index), self._leaves.pop(index)
        if self._stage == self._last:
            results[0].backward()
        else:
            received = self._messenger.receive_gradients(results, self._stage + 1)
            given = {each: gradient for each, gradient in zip(results, received, strict=True) if gradient is not None}
            if given:
                torch.autograd.backward(list(given), list(given.values()))
        if self._stage > 0:
            self._messenger.send_gradients(leaves, self._stage - 1)

    def _sum_shared(self) -> None:
        """Sum the gradients of what several stages use. What no stage has a gradient for, which is so in every step or
        none, stays without."""
        if self._summed is None:
            there = cast(list[list[bool]], self._group.gather([each.grad is not None for each in self._shared]))
            self._summed = [
                each for each, found in zip(self._shared, zip(*there, strict=True), strict=True) if any(found)
            ]
        for parameter in self._summed:
            mine = parameter.grad
            own = parameter.data.new_zeros(self._shapes[parameter]) if mine is None else mine
            total = self._group.sum(own, "pipeline")
            if parameter in self._mine:
                parameter.grad = total


def schedule(kind: str, stage: int, num_stages: int, num_parts: int) -> list[Move]:
    """Return the order in which a stage computes the micro-batches."""
    ahead = num_parts if kind == "gpipe" else min(num_stages - 1 - stage, num_parts)
    moves: list[Move] = [("forward", index) for index in range(ahead)]
    for index in range(ahead, num_parts):
        moves += [("forward", index), ("backward", index - ahead)]
    return [*moves, *(("backward", index) for index in range(num_parts - ahead, num_parts))]


def _check_layers(module: nn.Module, num_microbatches: int) -> None:
    what = next(filter(None, map(_whole_batch, module.modules())), None)
    if what is not None and num_microbatches > 1:
        raise RecipeRefused(
            f"the model has {what}, which would see one of {num_microbatches} micro-batches at a time",
            code="batch_norm_in_pipeline",
            fix="Set num_microbatches to 1, or use data instead of pipeline.",
        )


def _whole_batch(layer: nn.Module) -> str | None:
    """Name what makes a layer look at the whole batch, if it does."""
    if isinstance(layer, _BatchNorm):
        return "batch norms"
    if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
        return "norms with running statistics"
    return "simulated activation ranges" if isinstance(layer, FakeActivation) else None
