"""A first run of an imported program on shapes alone: a graph that contradicts itself ends here, not in a job."""

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from worker.engine.programs.capture import evaluating, tracing_batch_size
from worker.engine.programs.program import Program
from worker.engine.programs.rejections import reject

_MAX_BYTES = 2**38


def try_shapes(program: Program) -> None:
    """Raise what the program's first call would raise. Nothing is computed and no memory is taken."""
    inputs = program.example_inputs(tracing_batch_size(program))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with evaluating(program), torch.no_grad(), fake:
        outputs = _Shapes(program.module, garbage_collect_values=True).run(
            *(fake.from_tensor(value) for value in inputs)
        )
    for facts, value in zip(program.signature.outputs, outputs, strict=True):
        found = tuple(value.shape)
        if len(found) != len(facts.shape) or any(
            isinstance(size, int) and size != other for size, other in zip(facts.shape, found, strict=True)
        ):
            reject(
                "graph_not_runnable",
                f"The output {facts.name} is described with shape {facts.shape}, but the graph computes {found}.",
            )


class _Shapes(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        """Run one node and refuse a result that no machine holds."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.numel() * result.element_size() > _MAX_BYTES:
            reject("tensor_too_large", f"The operator {n.target} makes a tensor of shape {tuple(result.shape)}.")
        return result
