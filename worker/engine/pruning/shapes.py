"""The shapes that flow through a graph, and what a view does to the axes."""

from math import prod
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int)
Shapes = dict[str, tuple[tuple[int, ...] | None, tuple[int, ...] | None]]
"""Node name -> shape of its first input and of its output, where these are tensors."""


def record_shapes(module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Shapes:
    """Run the module and return the shapes at every node."""
    recorder = _Recorder(module)
    with torch.no_grad():
        recorder.run(*inputs)
    return recorder.shapes


def split_axes(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Return which axes of a view's input become which axes of its output, as the finest possible groups."""
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
        self.shapes: Shapes = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        source = self.env.get(n.all_input_nodes[0]) if n.all_input_nodes else None
        self.shapes[n.name] = (_shape(source), _shape(result))
        return result


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None
