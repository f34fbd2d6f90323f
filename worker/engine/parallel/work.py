"""What a rank gets from rank 0: the program, the step and its context, in a file of the step's scratch directory.

It is a pickle, written and read inside one sandbox. Two things are not pickled as their libraries would: memory maps
are opened again and not copied, and graphs are sent node by node, because fx would trace them anew and fold constants.
"""

import mmap
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn

from app.recipes.base import BaseStep
from worker.engine.programs.program import Program
from worker.engine.techniques.base import Context


def write_work(path: Path, program: Program, step: BaseStep, context: Context) -> None:
    """Write the file."""
    followed = None if context.checkpoints is None else context.checkpoints.follow()
    work = (program, step, replace(context, report=say_nothing, checkpoints=followed))
    torch.save(work, path, pickle_module=sys.modules[__name__])


def read_work(path: Path) -> tuple[Program, Any, Context]:
    """Read the file; the weights stay in it until they are written to."""
    work: tuple[Program, Any, Context] = torch.load(path, weights_only=False, mmap=True)
    return work


def say_nothing(*_: object, **__: object) -> None:
    """Report nothing: rank 0 speaks for all."""


class Pickler(pickle.Pickler):
    """What torch.save looks for in its pickle_module."""

    def reducer_override(self, value: Any) -> Any:
        """Return how to make a value again."""
        if isinstance(value, np.memmap):
            return _reduce_map(value)
        if isinstance(value, fx.GraphModule):
            return _reduce_graph(value)
        if isinstance(value, torch._ops.OpOverload):
            return _find_operator, (value._schema.name, value._overloadname)
        return NotImplemented


def _reduce_map(array: np.memmap) -> tuple[Any, ...]:
    if isinstance(array.base, mmap.mmap) and array.filename is not None:
        order = "C" if array.flags.c_contiguous else "F"
        return np.memmap, (array.filename, array.dtype, "r", array.offset, array.shape, order)
    return np.asarray, (np.array(array),)


def _reduce_graph(module: fx.GraphModule) -> tuple[Any, ...]:
    state = {name: value for name, value in vars(module).items() if name not in ("_graph", "_code", "meta")}
    nodes = [
        (node.name, node.op, node.target, _name(node.args), _name(dict(node.kwargs))) for node in module.graph.nodes
    ]
    return _build_graph, (state, nodes)


def _name(arguments: Any) -> Any:
    return fx.node.map_aggregate(
        arguments, lambda each: cast(Any, _Ref(each.name)) if isinstance(each, fx.Node) else each
    )


class _Ref:
    """A node, named."""

    def __init__(self, name: str) -> None:
        self.name = name


def _build_graph(state: dict[str, Any], nodes: list[tuple[str, str, Any, Any, Any]]) -> fx.GraphModule:
    graph, made = fx.Graph(), dict[str, fx.Node]()

    def resolve(value: Any) -> Any:
        return fx.node.map_aggregate(value, lambda each: made[each.name] if isinstance(each, _Ref) else each)

    for name, op, target, args, kwargs in nodes:
        made[name] = graph.create_node(op, target, resolve(args), resolve(kwargs), name)
    root = nn.Module()
    vars(root).update(state)
    module = fx.GraphModule(root, graph)
    vars(module).update({name: value for name, value in state.items() if not name.startswith("_graphmodule")})
    return module


def _find_operator(name: str, overload: str) -> Any:
    namespace, _, packet = name.partition("::")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
