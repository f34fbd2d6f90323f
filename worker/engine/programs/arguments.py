"""Checking of the arguments of a graph's operators."""

import re
from collections.abc import Callable
from typing import Any

from worker.engine.programs.json_reader import boolean, integer, items, number, record, text, union
from worker.engine.programs.rejections import reject, shown
from worker.engine.programs.values import CPU, Scope, check_device, check_dtype, check_name

_WORD = re.compile(r"[A-Za-z0-9_,.\-> ]{0,200}")
KINDS = (
    *("as_none", "as_tensor", "as_tensors", "as_int", "as_ints", "as_float", "as_floats", "as_string", "as_sym_int"),
    *("as_sym_ints", "as_scalar_type", "as_memory_format", "as_layout", "as_device", "as_bool", "as_bools"),
    *("as_sym_bool", "as_sym_float", "as_graph", "as_optional_tensors", "as_optional_tensor"),
)
NUMBER_KINDS = ("as_int", "as_float", "as_bool", "as_sym_int", "as_sym_bool", "as_sym_float")
_SIZE_KINDS = {"as_sym_int": "as_int", "as_sym_bool": "as_bool", "as_sym_float": "as_float"}
_LONG = 100_000


def rebuild_argument(
    value: Any, scope: Scope, rebuild_graph: Callable[..., dict[str, Any]], kinds: tuple[str, ...]
) -> dict[str, Any]:
    """Rebuild one argument of one of the kinds. `rebuild_graph` checks a graph that is an argument."""
    kind, content = union(value, scope.where, kinds)
    return {kind: _rebuild(kind, content, scope, rebuild_graph)}


def _rebuild(kind: str, content: Any, scope: Scope, rebuild_graph: Callable[..., dict[str, Any]]) -> Any:
    where = scope.where
    match kind:
        case "as_none":
            return True
        case "as_tensor":
            return _tensor(content, scope)
        case "as_tensors":
            return [_tensor(item, scope) for item in items(content, where, _LONG)]
        case "as_int":
            return integer(content, where)
        case "as_ints":
            return [integer(item, where) for item in items(content, where, _LONG)]
        case "as_float":
            return number(content, where)
        case "as_floats":
            return [number(item, where) for item in items(content, where, _LONG)]
        case "as_bool":
            return boolean(content, where)
        case "as_bools":
            return [boolean(item, where) for item in items(content, where, _LONG)]
        case "as_string":
            return _word(content, where)
        case "as_sym_int" | "as_sym_bool" | "as_sym_float":
            return _size(content, _SIZE_KINDS[kind], scope)
        case "as_sym_ints":
            return [_size(item, "as_int", scope) for item in items(content, where, _LONG)]
        case "as_scalar_type":
            return check_dtype(content, where)
        case "as_memory_format":
            return integer(content, where, 1, 4)
        case "as_layout":
            if integer(content, where, 0, 7) != 7:
                reject("unsupported_layout", f"{where}: only dense (strided) tensors can be imported.")
            return 7
        case "as_device":
            check_device(content, where)
            return CPU
        case "as_optional_tensor":
            return _optional(content, scope)
        case "as_optional_tensors":
            return [_optional(item, scope) for item in items(content, where, _LONG)]
        case "as_graph":
            graph = record(content, where, ("name", "graph"))
            name = check_name(graph["name"], where)
            return {
                "name": name,
                "graph": rebuild_graph(graph["graph"], f"{where}, graph {name}", None, scope.depth + 1, scope.budget),
            }
    raise AssertionError(kind)


def _tensor(content: Any, scope: Scope) -> dict[str, str]:
    return {"name": scope.use(record(content, scope.where, ("name",))["name"])}


def _optional(content: Any, scope: Scope) -> dict[str, Any]:
    kind, value = union(content, scope.where, ("as_tensor", "as_none"))
    return {"as_none": True} if kind == "as_none" else {"as_tensor": _tensor(value, scope)}


def _size(content: Any, constant: str, scope: Scope) -> dict[str, Any]:
    kind, value = union(content, scope.where, ("as_name", constant))
    if kind == "as_name":
        return {"as_name": scope.use(value)}
    if kind == "as_bool":
        return {kind: boolean(value, scope.where)}
    return {kind: number(value, scope.where) if kind == "as_float" else integer(value, scope.where)}


def _word(content: Any, where: str) -> str:
    word = text(content, where, 200)
    if not _WORD.fullmatch(word):
        reject("bad_structure", f"{where}: the text argument {shown(word)} holds characters that no operator takes.")
    return word
