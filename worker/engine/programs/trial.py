"""A first run of an imported program on shapes alone: a graph that contradicts itself ends here, not in a job."""

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from worker.engine.programs.capture import evaluating, tracing_batch_size
from worker.engine.programs.program import Program
from worker.engine.programs.rejections import reject

_MAX_BYTES = 2**38


class ShapeRun(fx.Interpreter):
    """Passes shapes, not values, through a program. Nothing is computed, changed or allocated."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module, garbage_collect_values=True)
        self._program = program
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def run_shapes(self, batch_size: int) -> tuple[Tensor, ...]:
        """Run at a batch size and return outputs without values."""
        inputs = self._program.example_inputs(batch_size)
        with evaluating(self._program), torch.no_grad(), self._mode:
            outputs: tuple[Tensor, ...] = self.run(*(self._mode.from_tensor(value) for value in inputs))
        return outputs

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a stand-in for a tensor of the module: the graph may change it in place."""
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value) if isinstance(value, Tensor) else value


def try_shapes(program: Program) -> None:
    """Raise what the program's first call would raise."""
    outputs = _Trial(program).run_shapes(tracing_batch_size(program))
    for facts, value in zip(program.signature.outputs, outputs, strict=True):
        found = tuple(value.shape)
        if len(found) != len(facts.shape) or any(
            isinstance(size, int) and size != other for size, other in zip(facts.shape, found, strict=True)
        ):
            reject(
                "graph_not_runnable",
                f"The output {facts.name} is described with shape {facts.shape}, but the graph computes {found}.",
            )


class _Trial(ShapeRun):
    def run_node(self, n: fx.Node) -> Any:
        """Run one node and refuse a result that no machine holds."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.numel() * result.element_size() > _MAX_BYTES:
            reject("tensor_too_large", f"The operator {n.target} makes a tensor of shape {tuple(result.shape)}.")
        return result
