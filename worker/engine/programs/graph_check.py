"""Checking of a graph: each field is compared with the grammar and the graph is built anew from what was understood."""

import re
from dataclasses import replace
from typing import Any

from worker.engine.programs.arguments import KINDS, NUMBER_KINDS, rebuild_argument
from worker.engine.programs.json_reader import boolean, integer, items, mapping, record, text, union
from worker.engine.programs.operators import AUTOCAST, GRAD_MODE, SIZE_FUNCTIONS, find_operator
from worker.engine.programs.rejections import reject, shown
from worker.engine.programs.values import MAX_NODES, Budget, Scope, check_name, rebuild_size, rebuild_tensor_meta

_MAX_DEPTH = 8
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_GRAPH_FIELDS = ("inputs", "outputs", "nodes", "tensor_values", "sym_int_values", "sym_bool_values")
_GRAPH_OPTIONAL = ("is_single_tensor_return", "custom_obj_values", "sym_float_values")
_NODE_FIELDS = ("target", "inputs", "outputs", "metadata")
_NODE_OPTIONAL = ("is_hop_single_tensor_return", "name")


def rebuild_graph(
    value: Any, where: str, input_names: list[str] | None = None, depth: int = 0, budget: Budget | None = None
) -> dict[str, Any]:
    """Rebuild a graph. `input_names`: the inputs to keep, where the caller drops some; their order is the file's."""
    graph = record(value, where, _GRAPH_FIELDS, _GRAPH_OPTIONAL)
    if depth > _MAX_DEPTH:
        reject("bad_graph", f"{where}: graphs are nested deeper than {_MAX_DEPTH}.")
    if mapping(graph.get("custom_obj_values", {}), where):
        reject("custom_object", f"{where}: the graph uses custom objects, which only their author's code can load.")
    # First, so that a model that computes with unusual numbers hears of the operator and not only of its numbers.
    scope = Scope(where, depth=depth, budget=budget or Budget())
    scope.budget.nodes -= len(items(graph["nodes"], where))
    if scope.budget.nodes < 0:
        reject("bad_graph", f"{where}: the program has more than {MAX_NODES} operators.")
    for node in graph["nodes"]:
        _check_target(record(node, where, _NODE_FIELDS, _NODE_OPTIONAL)["target"], where)
    scope.tensors = {
        check_name(name, where): rebuild_tensor_meta(meta, f"{where}, tensor {shown(name)}", scope.budget)
        for name, meta in mapping(graph["tensor_values"], where).items()
    }
    rebuilt_sizes = {}
    for kind in ("sym_int_values", "sym_bool_values", "sym_float_values"):
        rebuilt_sizes[kind] = {
            check_name(name, where): _rebuild_size_value(size, f"{where}, size {shown(name)}", scope.budget)
            for name, size in mapping(graph.get(kind, {}), where).items()
        }
        scope.sizes.update(rebuilt_sizes[kind])
    inputs = []
    for item in items(graph["inputs"], where):
        kind, content = union(
            item, where, ("as_tensor", "as_none", "as_int", "as_float", "as_bool", "as_string", "as_sym_int")
        )
        if kind == "as_sym_int" and depth:
            name = scope.define(record(content, where, ("as_name",))["as_name"])
            inputs.append({"as_sym_int": {"as_name": name}})
        elif kind == "as_tensor":
            name = scope.define(record(content, where, ("name",))["name"])
            _require(name, scope.tensors, where)
            inputs.append({"as_tensor": {"name": name}})
        elif kind == "as_sym_int" or depth:
            reject(
                "unsupported_input",
                f"{where}: an input is a number that may vary; only tensors can be inputs.",
                "Pass the number as a tensor, or fix it when exporting.",
            )
    if input_names is not None:
        names = [item["as_tensor"]["name"] for item in inputs]
        if names != input_names:
            reject("bad_graph", f"{where}: the graph's inputs are not those of its signature.")
    nodes = [_rebuild_node(node, scope) for node in graph["nodes"]]
    single = boolean(graph.get("is_single_tensor_return", False), where)
    return {
        "inputs": inputs,
        "outputs": [rebuild_output(item, scope) for item in items(graph["outputs"], where)],
        "nodes": nodes,
        "tensor_values": scope.tensors,
        **rebuilt_sizes,
        "is_single_tensor_return": single,
        "custom_obj_values": {},
    }


def _rebuild_size_value(value: Any, where: str, budget: Budget) -> dict[str, Any]:
    kind, content = union(value, where, ("as_int", "as_expr", "as_bool", "as_float"))
    if kind == "as_bool":
        return {"as_bool": boolean(content, where)}
    if kind == "as_float":
        reject("bad_structure", f"{where}: a size is a fixed fraction.")
    return rebuild_size(value, where, budget, low=-(2**40))


def rebuild_output(value: Any, scope: Scope) -> dict[str, Any]:
    """Rebuild one output of a graph: a value that exists, or a constant."""
    kind, _ = union(
        value, scope.where, ("as_tensor", "as_sym_int", "as_sym_bool", "as_int", "as_float", "as_bool", "as_none")
    )
    del kind
    return rebuild_argument(value, scope, rebuild_graph, KINDS)


def _require(name: str, known: dict[str, Any], where: str) -> None:
    if name not in known:
        reject("bad_graph", f"{where}: nothing describes the value {name}.")


def _check_target(value: Any, where: str) -> str:
    target = text(value, where, 200)
    if find_operator(target) is None and target not in SIZE_FUNCTIONS and target not in (GRAD_MODE, AUTOCAST):
        reject(
            "unsupported_operator",
            f"The model calls the operator {shown(target)}, which Pare cannot import.",
            "Replace the operator in the model's code by common tensor operators and export again.",
        )
    return target


def _rebuild_node(value: Any, scope: Scope) -> dict[str, Any]:
    where = scope.where
    node = record(value, where, _NODE_FIELDS, _NODE_OPTIONAL)
    target = _check_target(node["target"], where)
    operator = find_operator(target)
    here = f"{where}, operator {target}"
    inner = replace(scope, where=here)
    inputs, seen = [], set()
    known = {argument.name for argument in operator._schema.arguments} if operator else set()
    for item in items(node["inputs"], here, 10_000):
        argument = record(item, here, ("name", "arg"), ("kind",))
        name = text(argument["name"], here, 100)
        if operator is not None and (name not in known or name in seen):
            reject("bad_graph", f"{here}: unknown or repeated argument {shown(name)}.")
        if operator is None and name:
            check_name(name, here)
        seen.add(name)
        kind = argument.get("kind")
        inputs.append(
            {
                "name": name,
                "arg": rebuild_argument(argument["arg"], inner, rebuild_graph, _kinds(target)),
                "kind": None if kind is None else integer(kind, here, 0, 2),
            }
        )
    if operator is not None:
        missing = [a.name for a in operator._schema.arguments if not a.has_default_value() and a.name not in seen]
        if missing:
            reject("bad_graph", f"{here}: the argument {missing[0]} is missing.")
    outputs = [_rebuild_result(item, inner) for item in items(node["outputs"], here, 10_000)]
    single = node.get("is_hop_single_tensor_return")
    rebuilt = {
        "target": target,
        "inputs": inputs,
        "outputs": outputs,
        "metadata": _module_path(node["metadata"], here),
        "is_hop_single_tensor_return": None if single is None else boolean(single, here),
    }
    if node.get("name") is not None:
        rebuilt["name"] = check_name(node["name"], here)
    return rebuilt


def _kinds(target: str) -> tuple[str, ...]:
    # Python's own arithmetic: on a list or a text it would repeat, join or format.
    return NUMBER_KINDS if target in SIZE_FUNCTIONS else KINDS


def _rebuild_result(value: Any, scope: Scope) -> dict[str, Any]:
    kind, content = union(
        value, scope.where, ("as_tensor", "as_tensors", "as_sym_int", "as_sym_bool", "as_sym_float", "as_none")
    )
    if kind == "as_none":
        return {"as_none": True}
    if kind == "as_tensors":
        names = [record(item, scope.where, ("name",))["name"] for item in items(content, scope.where, 10_000)]
        if not names:
            reject("bad_graph", f"{scope.where}: an empty list of results.")
        for name in names:
            _require(scope.define(name), scope.tensors, scope.where)
        return {"as_tensors": [{"name": name} for name in names]}
    label = "name" if kind == "as_tensor" else "as_name"
    name = scope.define(record(content, scope.where, (label,))[label])
    _require(name, scope.tensors if kind == "as_tensor" else scope.sizes, scope.where)
    return {kind: {label: name}}


def _module_path(value: Any, where: str) -> dict[str, str]:
    # Of all metadata only the path of the calling module is kept: it names layers that share a weight.
    stack = mapping(value, where).get("nn_module_stack")
    if not isinstance(stack, str):
        return {}
    parts = stack.rsplit(";", 1)[-1].split(",")
    if len(parts) < 2 or not _PATH.fullmatch(parts[1]):
        return {}
    return {"nn_module_stack": f"module,{parts[1]},module"}
