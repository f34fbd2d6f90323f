"""Multiply-accumulate operations of one example, counted from the shapes that flow through the program.

Counted: linear layers, convolutions, recurrent layers, matrix products and attention. Elementwise work, norms, pooling
and lookups are no MACs by convention. Products that have no formula here are named in `uncounted`.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from worker.engine.programs.layers import ScaledDotProductAttention, arguments_of
from worker.engine.programs.operators import CONTRACTIONS
from worker.engine.programs.program import Program
from worker.engine.programs.trial import ShapeRun

_CONTRACTIONS = frozenset(CONTRACTIONS.split())
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MATRIX_PRODUCTS = {"mm": "self", "_int_mm": "self", "bmm": "self", "matmul": "self", "addmm": "mat1",
                    "baddbmm": "batch1", "mv": "self", "dot": "self", "linear": "input"}  # fmt: skip


@dataclass
class MacCount:
    """MACs of one example."""

    total: int = 0
    by_layer: dict[str, int] = field(default_factory=dict)
    """Path of a layer -> its share; a layer that is called twice counts twice."""
    uncounted: tuple[str, ...] = ()
    """Operators that multiply and add, but have no formula: the total leaves them out."""


def count_macs(program: Program) -> MacCount:
    """Count the program's MACs for one example. Nothing is computed: only shapes are passed through the graph."""
    batch_size = program.signature.batch_size or 1
    counter = _Counter(program)
    counter.run_shapes(batch_size)
    count = counter.count
    count.total //= batch_size
    count.by_layer = {name: macs // batch_size for name, macs in count.by_layer.items()}
    count.uncounted = tuple(sorted(counter.uncounted))
    return count


class _Counter(ShapeRun):
    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.count = MacCount()
        self.uncounted: set[str] = set()
        self._layers = dict(program.module.named_modules())

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and add what it costs."""
        result = super().run_node(n)
        if n.op == "call_module":
            path = str(n.target)
            macs = _layer_macs(self._layers[path], self.fetch_args_kwargs_from_env(n)[0], result)
            self.count.total += macs
            self.count.by_layer[path] = self.count.by_layer.get(path, 0) + macs
        elif n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload):
            name = n.target._schema.name.removeprefix("aten::")
            if name in _CONTRACTIONS:
                given: Any = fx.node.map_aggregate(arguments_of(n), self._known)
                product = _function_macs(name, given, result)
                if product is None:
                    self.uncounted.add(str(n.target))
                else:
                    self.count.total += product
        return result

    def _known(self, item: Any) -> Any:
        return self.env[item] if isinstance(item, fx.Node) else item


def _layer_macs(layer: nn.Module, args: tuple[Any, ...], result: Any) -> int:
    first = args[0]
    if isinstance(layer, nn.Linear):
        return int(result.numel() * layer.weight.shape[1])
    if isinstance(layer, _TRANSPOSED):
        return int(first.numel() * layer.weight[0].numel())
    if isinstance(layer, nn.modules.conv._ConvNd):
        return int(result.numel() * layer.weight[0].numel())
    if isinstance(layer, nn.RNNBase):
        # Every weight matrix is applied once per step and example.
        steps = math.prod(first.shape[:-1])
        return int(steps) * sum(
            weight.numel() for name, weight in layer.named_parameters() if name.startswith("weight")
        )
    if isinstance(layer, ScaledDotProductAttention):
        return _attention_macs(args[0], args[1], args[2])
    return 0


def _function_macs(name: str, given: dict[str, Any], result: Any) -> int | None:
    if name in _MATRIX_PRODUCTS:
        return int(result.numel() * given[_MATRIX_PRODUCTS[name]].shape[-1])
    if name == "scaled_dot_product_attention":
        return _attention_macs(given["query"], given["key"], given["value"])
    if "conv" in name:
        transposed = given.get("transposed", "transpose" in name)
        source = given["input"] if transposed else result
        return int(source.numel() * given["weight"][0].numel())
    if name == "einsum":
        return _einsum_macs(given["equation"], given["tensors"])
    if name in ("outer", "kron"):
        return int(result.numel())
    return None


def _attention_macs(query: Tensor, key: Tensor, value: Tensor) -> int:
    return int(math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


def _einsum_macs(equation: str, tensors: list[Tensor]) -> int | None:
    operands = equation.replace(" ", "").partition("->")[0].split(",")
    if len(operands) != 2 or "." in equation:
        return None
    sizes: dict[str, int] = {}
    for labels, tensor in zip(operands, tensors, strict=True):
        sizes.update(zip(labels, tensor.shape, strict=True))
    return math.prod(sizes.values())
