"""The shapes that flow through a graph, and what a reshape does to the axes."""

from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from worker.engine.programs.program import Program

Shape = tuple[int, ...]


def allowed_batch(program: Program, wanted: int) -> int:
    """Return the batch size nearest to the wanted one that the program takes."""
    lowest, highest = program.signature.dynamic_ranges.get("batch", (1, None))
    return program.signature.batch_size or max(min(wanted, highest or wanted), lowest)


def record_shapes(program: Program, batch_size: int) -> dict[fx.Node, Any]:
    """Return the shape at every node: sizes, a list of such, or None. The module ends in eval mode."""
    recorder = _Recorder(program.module.eval())
    with torch.no_grad():
        recorder.run(*program.example_inputs(batch_size))
    return recorder.shapes


def split_axes(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Return which axes of a reshape's input become which axes of its output, as the finest possible groups."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [], []
        if i < len(before):
            left.append(i)
            i += 1
        if j < len(after):
            right.append(j)
            j += 1
        while prod(before[k] for k in left) != prod(after[k] for k in right):
            if prod(before[k] for k in left) < prod(after[k] for k in right):
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        groups.append((left, right))
    return groups


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and keep the shape of what it makes."""
        result = super().run_node(n)
        self.shapes[n] = _shape(result)
        return result


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(int(size) for size in value.shape)
    return [_shape(item) for item in value] if isinstance(value, (tuple, list)) else None
