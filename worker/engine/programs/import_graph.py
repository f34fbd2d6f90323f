"""From a loaded torch.export program to an fx.GraphModule with real layers at the original names."""

import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from worker.engine.programs.attention_products import join_attention
from worker.engine.programs.attention_shapes import part_heads_from_batch
from worker.engine.programs.layers import BUILDERS, Call, Layer, arguments_of, is_affine
from worker.engine.programs.module_tree import ModuleTree
from worker.engine.programs.operators import ASSERTIONS, AUTOCAST, GRAD_MODE
from worker.engine.programs.program import Program
from worker.engine.programs.projections import name_projections
from worker.engine.programs.rejections import reject
from worker.engine.programs.reshapes import free_sizes
from worker.engine.programs.signature import build_signature

aten = torch.ops.aten
_STORED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_DROPPED = frozenset(ASSERTIONS.split())
_RECURRENT = {aten.lstm.input: 2, aten.gru.input: 1, aten.rnn_tanh.input: 1, aten.rnn_relu.input: 1}
"""Operator -> number of states it carries."""
_CONSTANT_COPIES = {aten.lift_fresh_copy.default: aten.clone.default, aten.lift_fresh.default: aten.alias.default,
                    aten.detach_.default: aten.detach.default}  # fmt: skip
"""What torch.tensor([...]) in a model's code leaves in a graph, in forms that also run outside the exporter."""


def import_program(exported: ExportedProgram, output_names: tuple[str, ...]) -> Program:
    """Return the program as a trainable module that takes and returns flat tensors."""
    return _Importer(exported).run(output_names)


class _Importer:
    def __init__(self, exported: ExportedProgram) -> None:
        self._exported = exported
        self._graph = fx.Graph()
        self._tree = ModuleTree(exported)
        self._values: dict[fx.Node, Any] = {}
        self._names: dict[fx.Node, str] = {}
        """Old node of a stored tensor -> its name."""
        self._states: dict[fx.Node, fx.Node] = {}
        """Old node of a recurrent operator -> new node of its layer."""
        self._counters: dict[str, fx.Node] = {}
        """num_batches_tracked buffer -> the new node that counts it up."""
        self._turned: set[fx.Node] = set()
        """Old nodes of matrices that are stored transposed."""
        self._gone: set[fx.Node] = set()
        """Old nodes that only cut a weight into those that are stored now."""
        self._trains = False

    def run(self, output_names: tuple[str, ...]) -> Program:
        exported = self._exported
        specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
        join_attention(exported.graph)
        part_heads_from_batch(exported.graph)
        for node in exported.graph.nodes:
            if node.op != "placeholder":
                continue
            spec = specs[node.name]
            if spec.kind in _STORED:
                assert spec.target is not None
                self._names[node] = spec.target
            else:
                self._values[node] = self._graph.placeholder(node.name)
        self._turn_input_major_weights()
        self._gone = name_projections(self._names, self._tree)
        for node in exported.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self._copy(node, exported.graph_module)
        self._finish(exported.graph.output_node())
        module = self._tree.build(self._graph)
        return Program(
            module=module,
            signature=build_signature(exported, output_names),
            exported_in="train" if self._trains else "eval",
            tied=self._tree.tied,
            renamed=self._tree.renamed,
            joined=self._tree.joined,
        )

    def _turn_input_major_weights(self) -> None:
        # GPT-2's Conv1D keeps its weight as (in, out) and calls addmm. Stored as nn.Linear stores it, it is that layer.
        once = Counter(id(tensor) for tensor in self._tree.tensors.values())
        for node, name in self._names.items():
            tensor = self._tree.tensors[name]
            held_once = once[id(tensor)] == 1 and isinstance(tensor, nn.Parameter) and tensor.dim() == 2
            if held_once and node.users and all(is_affine(user, node, self._names) for user in node.users):
                self._tree.transpose(name)
                self._turned.add(node)

    def _finish(self, output: fx.Node) -> None:
        results, outputs = self._exported.graph_signature.output_specs, []
        for spec, old in zip(results, output.args[0], strict=True):  # type: ignore[arg-type]
            if spec.kind is OutputKind.USER_OUTPUT:
                outputs.append(self._value(old))
            elif spec.kind is OutputKind.BUFFER_MUTATION:
                assert spec.target is not None
                if not self._counted_by_layer(spec.target):
                    buffer = self._graph.get_attr(spec.target)
                    self._graph.call_function(aten.copy_.default, (buffer, self._value(old)))
        self._graph.output(tuple(outputs))
        for buffer_name, node in self._counters.items():
            if self._counted_by_layer(buffer_name) and not node.users:
                self._graph.erase_node(node)
        self._graph.eliminate_dead_code(_has_effect)

    def _counted_by_layer(self, buffer_name: str) -> bool:
        path, _, name = buffer_name.rpartition(".")
        layer = self._tree.layers.get(path)
        return name == "num_batches_tracked" and isinstance(layer, nn.modules.batchnorm._NormBase)

    def _value(self, old: Any) -> Any:
        """Return what stands for an old argument in the new graph."""
        if not isinstance(old, fx.Node):
            return old
        if old not in self._values:
            value = self._graph.get_attr(self._names[old])
            self._values[old] = self._graph.call_function(aten.t.default, (value,)) if old in self._turned else value
        return self._values[old]

    def _copy(self, node: fx.Node, owner: nn.Module) -> None:
        target = node.target
        if node.op == "get_attr" or node in self._gone or node in self._names:
            return
        if isinstance(target, torch._ops.HigherOrderOperator):
            self._inline(node, owner)
        elif target is operator.getitem:
            self._values[node] = self._get_item(node)
        elif isinstance(target, torch._ops.OpOverload):
            if target._schema.name.removeprefix("aten::") in _DROPPED:
                return
            layer = self._lift(node) if target in BUILDERS else None
            self._values[node] = layer if layer is not None else self._call(node)
        else:
            self._values[node] = self._call(node)

    def _call(self, node: fx.Node) -> fx.Node:
        replaced = free_sizes(self._graph, node, self._value)
        if replaced is not None:
            return replaced
        arguments = fx.node.map_aggregate(node.args, self._value)
        keywords = fx.node.map_aggregate(node.kwargs, self._value)
        target: Any = node.target
        new = self._graph.call_function(_CONSTANT_COPIES.get(target, target), arguments, keywords)
        if node.target is aten.add_.Tensor and node.args[0] in self._names:
            self._counters[self._names[node.args[0]]] = new  # type: ignore[index]
        return new

    def _get_item(self, node: fx.Node) -> Any:
        source, index = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(index, int)
        if source in self._states:
            layer = self._states[source]
            if index == 0:
                return self._graph.call_function(operator.getitem, (layer, 0))
            states = self._graph.call_function(operator.getitem, (layer, 1))
            if _RECURRENT[source.target] == 1:  # type: ignore[index]
                return states
            return self._graph.call_function(operator.getitem, (states, index - 1))
        value = self._value(source)
        if isinstance(value, (tuple, list)):
            return value[index]
        return self._graph.call_function(operator.getitem, (value, index))

    def _inline(self, node: fx.Node, owner: nn.Module) -> None:
        """Replace a call of a nested graph by its body. Without gradients, its results are detached."""
        name = f"torch.ops.higher_order.{node.target}"
        positions = {GRAD_MODE: 1, AUTOCAST: 4}
        if name not in positions:
            reject("unsupported_operator", f"The model calls the operator {name}, which Pare cannot import.")
        position = positions[name]
        if name == AUTOCAST and node.args[2] is not False:
            reject(
                "unsupported_operator",
                f"The model calls the operator {name} with autocast switched on, which Pare cannot import.",
                "Export the model without torch.autocast.",
            )
        holder = node.args[position]
        assert isinstance(holder, fx.Node)
        assert isinstance(holder.target, str)
        body = owner.get_submodule(holder.target)
        assert isinstance(body, fx.GraphModule)
        given = iter(node.args[position + 1 :])
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                outer = next(given)
                if isinstance(outer, fx.Node) and outer in self._names:
                    self._names[inner] = self._names[outer]
                else:
                    self._values[inner] = self._value(outer)
            elif inner.op != "output":
                self._copy(inner, body)
        results = body.graph.output_node().args[0]
        detached = name == GRAD_MODE and node.args[0] is False

        def result(old: Any) -> Any:
            value = self._value(old)
            if detached and isinstance(value, fx.Node) and isinstance(old.meta.get("val"), Tensor):
                return self._graph.call_function(aten.detach.default, (value,))
            return value

        self._values[node] = result(results) if isinstance(results, fx.Node) else [result(old) for old in results]  # type: ignore[union-attr]

    def _lift(self, node: fx.Node) -> fx.Node | None:
        arguments = arguments_of(node)
        stored = {old: self._tree.tensors[name] for old, name in self._names.items()}
        first = arguments.get("input", arguments.get("self", arguments.get("query")))
        value = first.meta.get("val") if isinstance(first, fx.Node) else None
        rank = value.dim() if isinstance(value, Tensor) else 0
        size = value.shape[1] if isinstance(value, Tensor) and rank > 1 else 0
        call = Call(arguments, stored, rank, size if isinstance(size, int) else 0, self._turned)
        layer = BUILDERS[node.target](call)
        if layer is None:
            return None
        held = {attribute: self._names[old] for attribute, old in layer.held.items()}
        path = self._tree.place(layer.module, held, _module_path(node))
        if path is None:
            return None
        self._trains = self._trains or layer.trains
        new = self._graph.call_module(path, self._layer_inputs(node, layer))
        if node.target in _RECURRENT:
            self._states[node] = new
        return new

    def _layer_inputs(self, node: fx.Node, layer: Layer) -> tuple[Any, ...]:
        inputs = layer.inputs
        if node.target in _RECURRENT:
            states = inputs[1] if isinstance(inputs[1], tuple) else (inputs[1],)
            # nn.LSTM and its kin start from zeros by themselves.
            if all(isinstance(state, fx.Node) and state.target is aten.zeros.default for state in states):
                inputs = inputs[:1]
        return tuple(fx.node.map_aggregate(inputs, self._value))


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]) if stack else ""


def _has_effect(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
