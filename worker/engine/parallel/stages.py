"""Cutting an imported graph into pipeline stages of about equal measured cost."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from worker.engine.devices import device_of, finish_work
from worker.engine.errors import RecipeRefused
from worker.engine.parallel.changes import find_changes, find_tainted, keep_together

RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal")
NUM_TIMINGS = 2


@dataclass(frozen=True)
class Stage:
    """Consecutive nodes of a graph as a module of their own: (model inputs, received values) -> values to send."""

    module: fx.GraphModule
    received: tuple[str, ...]
    """Nodes whose values come from the stage before."""
    sent: tuple[str, ...]
    """Nodes whose values go to the stage after; the last stage returns the model's outputs."""


def measure_costs(module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> list[float]:
    """Return the seconds that each node takes in a forward pass, the shortest of a few."""
    timer = _Timer(module)
    with torch.no_grad():
        for _ in range(NUM_TIMINGS):
            timer.run(*inputs)
    return [timer.seconds.get(node, 0.0) for node in module.graph.nodes]


class _Timer(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[fx.Node, float] = {}
        self._device = device_of(module)

    def run_node(self, n: fx.Node) -> Any:
        started_at = time.perf_counter()
        result = super().run_node(n)
        finish_work(self._device)
        seconds = time.perf_counter() - started_at
        self.seconds[n] = min(seconds, self.seconds.get(n, seconds))
        return result


def choose_cuts(module: fx.GraphModule, costs: Sequence[float], num_stages: int) -> list[int]:
    """Return the index of the first node of every stage but the first, so that the dearest stage costs least.

    Every stage has trainable weights; raises RecipeRefused (too_few_layers) where there are not enough layers.
    """
    nodes = list(module.graph.nodes)
    # A stage begins with a layer; what lies between two layers belongs to the first of them.
    layers = [index for index, node in enumerate(nodes) if _has_weights(module, node)]
    whole = keep_together(module, nodes, _find_free(module, nodes))
    begins = [index for index in layers[1:] if not any(first < index <= last for first, last in whole)]
    if len(begins) + 1 < num_stages or not layers:
        raise RecipeRefused(
            f"{len(layers)} layers with trainable weights, between which the model can be cut in {len(begins)} places, "
            f"cannot make {num_stages} pipeline stages",
            code="too_few_layers",
            fix="Use fewer pipeline stages.",
        )
    borders = [0, *begins, len(nodes)]
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    best: dict[int, tuple[float, list[int]]] = {end: (prefix[borders[end]], []) for end in range(1, len(borders))}
    for stage in range(2, num_stages + 1):
        best = {
            end: min(
                (max(best[middle][0], prefix[borders[end]] - prefix[borders[middle]]), [*best[middle][1], middle])
                for middle in range(stage - 1, end)
            )
            for end in range(stage, len(borders))
        }
    return [borders[middle] for middle in best[len(borders) - 1][1]]


def _has_weights(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return any(each.requires_grad for each in module.get_submodule(str(node.target)).parameters())


def cut(module: fx.GraphModule, cuts: Sequence[int]) -> list[Stage]:
    """Return the stages; they share the module's layers. What depends on the inputs alone is computed in each anew."""
    nodes = list(module.graph.nodes)
    output = nodes[-1]
    free = _find_free(module, nodes)
    place = {node: sum(index >= each for each in cuts) for index, node in enumerate(nodes)}
    last_use = {node: max((place[user] for user in node.users), default=0) for node in nodes}
    return [
        _build(module, nodes, output, free, place, last_use, stage, len(cuts) + 1) for stage in range(len(cuts) + 1)
    ]


def _build(
    module: fx.GraphModule,
    nodes: list[fx.Node],
    output: fx.Node,
    free: set[fx.Node],
    place: dict[fx.Node, int],
    last_use: dict[fx.Node, int],
    stage: int,
    num_stages: int,
) -> Stage:
    crossing = [node for node in nodes if node not in free and node is not output]
    received = [node for node in crossing if place[node] < stage <= last_use[node]]
    sent = [node for node in crossing if place[node] <= stage < last_use[node]]
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in nodes:
        if node.op == "placeholder":
            made[node] = graph.node_copy(node)
    for node in received:
        made[node] = graph.placeholder(node.name)
    for node in nodes:
        if node not in made and node is not output and (node in free or place[node] == stage):
            made[node] = graph.node_copy(node, made.__getitem__)
    if stage == num_stages - 1:
        graph.node_copy(output, made.__getitem__)
    else:
        graph.output(tuple(made[node] for node in sent))
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users and _is_pure(node):
            graph.erase_node(node)
    names = (tuple(node.name for node in received), tuple(node.name for node in sent))
    return Stage(fx.GraphModule(module, graph), *names)


def _find_free(module: fx.GraphModule, nodes: list[fx.Node]) -> set[fx.Node]:
    """Return the nodes whose values follow from the inputs and constants alone."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    changes, tainted = find_changes(nodes), set[fx.Node]()
    while True:
        free: set[fx.Node] = set()
        for node in nodes:
            if (
                node.op == "placeholder"
                or (node.op == "get_attr" and str(node.target) not in parameters)
                or (
                    node.op == "call_function"
                    and node not in tainted
                    and all(each in free for each in node.all_input_nodes)
                    and not any(word in str(node.target) for word in RANDOM)
                )
            ):
                free.add(node)
        found = find_tainted(changes, free)
        if not found:
            return free
        tainted |= found


def _is_pure(node: fx.Node) -> bool:
    if node.op in ("get_attr", "call_module"):
        return node.op == "get_attr"
    return not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)


def parameters_of(stage: Stage) -> list[nn.Parameter]:
    """Return the parameters that a stage uses, each once."""
    return list(dict.fromkeys(stage.module.parameters()))
