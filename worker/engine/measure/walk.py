"""Visiting layers in the order of the graph, each fed by the already changed layers before it.

    def visit(found: dict[str, Gram]) -> None: ...     # change the layers named; what later ones see comes from them
    Walk(program, batches, ["fc1", "fc2"], Gram).run(visit)

Between two visits only one point of the graph is held: the values that cross it, for all calibration batches. From
there each wave of layers (those that do not feed one another, e.g. query, key and value) is fed batch by batch, so that
besides the model memory holds one point, one batch on its way, and the statistics of one wave.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx, nn

from worker.engine.devices import move
from worker.engine.measure.activations import Accumulator, can_collect, collect, iterate_rows
from worker.engine.programs.capture import evaluating
from worker.engine.programs.placement import on_device
from worker.engine.programs.program import Program

MIN_HOLD_BYTES = 2**25
Values = dict[fx.Node, Any]
A = TypeVar("A", bound=Accumulator)


class Walk(Generic[A]):
    """One way through a program's graph with the same calibration batches."""

    def __init__(
        self,
        program: Program,
        batches: Sequence[Sequence[Tensor]],
        layers: Sequence[str],
        make_statistics: Callable[[nn.Module], A],
        hold_bytes: int | None = None,
    ) -> None:
        """`make_statistics(layer)` returns what is to see the layer's inputs.

        `hold_bytes`: what may be held at a point; None: a quarter of the model, at least 32 MiB. A point with more is
        passed without holding it: what follows is computed again from the last point held.
        """
        self._program, self._make = program, make_statistics
        self._batches: list[Sequence[Tensor]] = list(batches)
        weights = sum(each.numel() * each.element_size() for each in program.module.parameters())
        self._hold_bytes = max(MIN_HOLD_BYTES, weights // 4) if hold_bytes is None else hold_bytes
        self._nodes = list(program.module.graph.nodes)
        self._inputs = [node for node in self._nodes if node.op == "placeholder"]
        index = {node: position for position, node in enumerate(self._nodes)}
        self._last_uses: list[list[fx.Node]] = [[] for _ in self._nodes]
        for node in self._nodes:
            self._last_uses[max((index[user] for user in node.users), default=index[node])].append(node)
        self._interpreter = fx.Interpreter(program.module, garbage_collect_values=False)
        self._modules = dict(program.module.named_modules())
        self._mutates = [_mutates(node, self._modules) for node in self._nodes]
        self._owners = self._find_calls({name for name in layers if can_collect(self._modules[name])})
        self.max_held_bytes = 0
        """Largest sum of what was held at a point, for all batches."""

    def run(
        self, visit: Callable[[dict[str, A]], None], report: Callable[[float, str], None] = lambda *_: None
    ) -> None:
        """Visit every layer once; of several that share a weight, the first. What the graph never calls is left out.

        `visit` takes the statistics of one wave by layer name, and changes the layers' weights in place. Both are on
        the program's device meanwhile.
        """
        waiting: dict[int, str] = {}
        for position, name in self._owners.items():
            if name not in waiting.values():
                waiting[position] = name
        num_layers = len(waiting)
        with on_device(self._program) as device, evaluating(self._program):
            self._batches = [move(inputs, device) for inputs in self._batches]
            early = self._collect_early()
            sizes = self._measure_points() if waiting else []
            held: list[Values] = [dict(zip(self._inputs, inputs, strict=True)) for inputs in self._batches]
            start = 0
            while waiting:
                wave, skipped = self._find_wave(start, waiting)
                found, watched = self._make_statistics(wave, early)
                with torch.inference_mode():
                    for values in held:
                        self._advance(self._copy(values, start, max(wave) + 1), start, max(wave) + 1, skipped, watched)
                del watched
                visit(found)
                del found
                for position in wave:
                    del waiting[position]
                report(1 - len(waiting) / num_layers, f"{num_layers - len(waiting)} of {num_layers} layers")
                end = self._choose_point(start, min(waiting, default=0), sizes)
                with torch.inference_mode():
                    for index, values in enumerate(held):
                        held[index] = self._advance(self._copy(values, start, end), start, end)
                start = max(start, end)

    def _find_calls(self, wanted: set[str]) -> dict[int, str]:
        """Return position -> name of the layer called there; layers that share a weight go by the first one's name."""
        names: dict[int, str] = {}
        return {
            position: names.setdefault(id(self._modules[str(node.target)].weight), str(node.target))
            for position, node in enumerate(self._nodes)
            if node.op == "call_module" and node.target in wanted
        }

    def _collect_early(self) -> dict[str, A]:
        """Return what flows, before any change, into layers with several calls: they may feed themselves."""
        owners = list(self._owners.values())
        several = {name for name in owners if owners.count(name) > 1}
        called = {str(self._nodes[position].target): name for position, name in self._owners.items() if name in several}
        if not called:
            return {}
        found = collect(self._program, called, self._batches, self._make)
        return {name: found[other] for other, name in called.items()}

    def _find_wave(self, start: int, waiting: dict[int, str]) -> tuple[list[int], set[fx.Node]]:
        """Return where the next layers are that none of them feeds, and the nodes between that depend on them."""
        wave: list[int] = []
        tainted: set[fx.Node] = set()
        for position in range(start, max(waiting) + 1):
            node = self._nodes[position]
            dependent = any(source in tainted for source in node.all_input_nodes)
            if position in waiting:
                if dependent:
                    break
                wave.append(position)
            if dependent or self._owners.get(position) in {waiting[each] for each in wave}:
                tainted.add(node)
        return wave, tainted

    def _make_statistics(
        self, wave: list[int], early: dict[str, A]
    ) -> tuple[dict[str, A], dict[fx.Node, tuple[nn.Module, A]]]:
        """Return the statistics of a wave by layer, and the nodes that fill them."""
        found: dict[str, A] = {}
        watched: dict[fx.Node, tuple[nn.Module, A]] = {}
        by_input: dict[Any, A] = {}
        for position in wave:
            node, name = self._nodes[position], self._owners[position]
            if name in early:
                found[name] = early.pop(name)
                continue
            layer = self._modules[name]
            # Query, key and value are fed the same rows: counted once.
            key = node.args[0] if isinstance(layer, nn.Linear) else node
            if key not in by_input:
                by_input[key] = self._make(layer)
                watched[node] = layer, by_input[key]
            found[name] = by_input[key]
        return found, watched

    def _copy(self, values: Values, start: int, stop: int) -> Values:
        """Return the values to start from: copies of tensors where an operator on the way changes its input."""
        if not any(self._mutates[start:stop]):
            return dict(values)
        return {node: fx.node.map_aggregate(value, _clone) for node, value in values.items()}

    def _advance(
        self,
        values: Values,
        start: int,
        stop: int,
        skipped: set[fx.Node] | frozenset[fx.Node] = frozenset(),
        watched: dict[fx.Node, tuple[nn.Module, A]] | None = None,
    ) -> Values:
        """Run the nodes of one batch, and forget each value after its last use."""
        self._interpreter.env = values
        for position in range(start, stop):
            node = self._nodes[position]
            if watched and node in watched:
                layer, statistics = watched[node]
                for rows in iterate_rows(layer, values[node.args[0]]):
                    statistics.add(rows)
            if node not in skipped and node.op not in ("placeholder", "output"):
                values[node] = self._interpreter.run_node(node)
            for dead in self._last_uses[position]:
                values.pop(dead, None)
        self._interpreter.env = {}
        return values

    @torch.inference_mode()
    def _measure_points(self) -> list[float]:
        """Return the bytes that cross each point for all batches; infinite where it cannot be held."""
        first = self._batches[0]
        scale = sum(len(inputs[0]) for inputs in self._batches) / len(first[0])
        values = self._copy(dict(zip(self._inputs, first, strict=True)), 0, len(self._nodes))
        changes = any(self._mutates)
        sizes = [0.0]
        for position in range(len(self._nodes) - 1):
            values = self._advance(values, position, position + 1)
            storages = [
                value.untyped_storage()
                for node, value in values.items()
                if node.op != "get_attr" and isinstance(value, Tensor)
            ]
            unique = {storage.data_ptr(): storage.nbytes() for storage in storages}
            # Copies of two views of one tensor would not change together.
            alone = not changes or len(unique) == len(storages)
            sizes.append(scale * sum(unique.values()) if alone else float("inf"))
        return sizes

    def _choose_point(self, start: int, end: int, sizes: list[float]) -> int:
        """Return the last point up to `end` that may be held; `start` where there is none."""
        limit = max(self._hold_bytes, sizes[start])
        chosen = next((position for position in range(end, start, -1) if sizes[position] <= limit), start)
        self.max_held_bytes = max(self.max_held_bytes, int(sizes[chosen]))
        return chosen


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _mutates(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
