"""Following the channels of a program through its graph: which positions of which parameters belong together.

Nothing is guessed about a model. Every operator has a rule that says what it does to the positions of its axes, or
whatever reaches it keeps its size. removal.py proves on real numbers that the rules were right.
"""

from typing import Any

import numpy as np
from torch import fx, nn

from worker.engine.programs.program import Program
from worker.engine.pruning.flow import Axes, Flow, Split
from worker.engine.pruning.layer_rules import pass_layer
from worker.engine.pruning.operator_rules import pass_operator
from worker.engine.pruning.shapes import allowed_batch, record_shapes

EXAMPLE_BATCH = 3


def follow(program: Program, skip: frozenset[str] = frozenset()) -> Flow:
    """Follow the program's channels. Where a reshape leaves a choice, the first that lets channels go is taken."""
    shapes = record_shapes(program, allowed_batch(program, EXAMPLE_BATCH))
    flow = _follow(program, shapes, skip, {})
    choices: dict[str, int] = {}
    for attempt in (1, 2):
        stuck = [split.node.name for split in flow.splits if attempt < len(split.candidates) and _is_stuck(flow, split)]
        if not stuck:
            break
        tried = _follow(program, shapes, skip, {**choices, **dict.fromkeys(stuck, attempt)})
        freed = {split.node.name for split in tried.splits if not _is_stuck(tried, split)}
        better = {name: attempt for name in stuck if name in freed}
        if better:
            choices.update(better)
            flow = tried if len(better) == len(stuck) else _follow(program, shapes, skip, choices)
    return flow


def _is_stuck(flow: Flow, split: Split) -> bool:
    roots = np.unique(flow.labels.find(split.labels)).tolist()
    return len(roots) < 2 or all(flow.labels.reason(root) is not None for root in roots)


def _follow(program: Program, shapes: dict[fx.Node, Any], skip: frozenset[str], choices: dict[str, int]) -> Flow:
    module = program.module
    flow = Flow(program, shapes, choices=choices, skip=skip)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        flow.names.setdefault(id(tensor), name)
    layers = dict(module.named_modules())
    for node in module.graph.nodes:
        shape = shapes.get(node)
        if node.op == "placeholder":
            flow.values[node] = [None] * len(shape) if isinstance(shape, tuple) else None
        elif node.op == "get_attr":
            flow.values[node] = _attribute(flow, node) if isinstance(shape, tuple) else None
        elif node.op == "call_module":
            name = str(node.target)
            flow.values[node] = pass_layer(flow, node, name, layers[name])
            if name in skip:
                flow.freeze(flow.values[node], f"{name} is in skip_layers")
        elif node.op == "call_function":
            flow.values[node] = pass_operator(flow, node)
        elif node.op == "output":
            for source in node.all_input_nodes:
                flow.freeze(flow.values[source], "its channels are an output of the model")
    return flow


def _attribute(flow: Flow, node: fx.Node) -> Axes:
    value: Any = flow.program.module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if id(value) not in flow.names:
        return [None] * value.dim()
    name, axes = flow.tensor(value)
    if isinstance(value, nn.Parameter):
        flow.free[node] = name
        for axis in range(value.dim()):
            flow.roles.setdefault((name, axis), set()).add("free")
    return list(axes)
