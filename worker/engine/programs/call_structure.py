"""How a program is called: nested Python containers in the file, flat tuples in Pare. No container type is loaded."""

import json
import re
from typing import Any

from worker.engine.programs.json_reader import items, mapping, parse_json, record, text
from worker.engine.programs.rejections import reject

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_MAX_DEPTH = 16
_POSITIONAL = ("builtins.tuple", "builtins.list")
_LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}


def flat_specs(num_inputs: int, num_outputs: int) -> tuple[str, str]:
    """Return the specs of a call with positional tensors that returns a tuple of tensors."""

    def several(children: list[Any]) -> dict[str, Any]:
        return {"type": "builtins.tuple", "context": "null", "children_spec": children}

    no_keywords = {"type": "builtins.dict", "context": "[]", "children_spec": []}
    arguments = several([several([_LEAF] * num_inputs), no_keywords])
    return json.dumps([1, arguments]), json.dumps([1, several([_LEAF] * num_outputs)])


def output_names(module: dict[str, Any]) -> list[str]:
    """Return a name for each leaf of the outputs: dict keys and field names where they exist, else output_<index>."""
    where = "the call structure"
    entries = items(module["module_call_graph"], where)
    if not entries:
        return []
    signature = record(entries[0], where, ("fqn",), ("signature",)).get("signature")
    if signature is None:
        return []
    spec = text(mapping(signature, where).get("out_spec"), where, 2**20)
    parsed = items(parse_json(spec, where), where, 2)
    if len(parsed) != 2 or parsed[0] != 1:
        reject("bad_structure", f"{where}: unknown version of the output structure.")
    fields = {
        key: [text(name, where) for name in items(record(value, where, ("field_names",))["field_names"], where)]
        for key, value in mapping(module.get("treespec_namedtuple_fields", {}), where).items()
    }
    names: list[str] = []
    _collect(parsed[1], [], fields, names, where)
    return names


def _collect(node: Any, path: list[str], fields: dict[str, list[str]], names: list[str], where: str) -> None:
    spec = record(node, where, ("type", "context", "children_spec"))
    children = items(spec["children_spec"], where, 10_000)
    if spec["type"] is None:
        names.append("_".join(path) or "output_0")
        return
    if len(path) > _MAX_DEPTH:
        reject("bad_structure", f"{where}: outputs are nested deeper than {_MAX_DEPTH}.")
    keys = _keys(spec, fields, len(children), where)
    for index, child in enumerate(children):
        key = keys[index] if keys else ""
        if not _IDENTIFIER.fullmatch(key):
            key = str(index) if path else f"output_{index}"
        _collect(child, [*path, key], fields, names, where)


def _keys(spec: dict[str, Any], fields: dict[str, list[str]], count: int, where: str) -> list[str]:
    kind, context = text(spec["type"], where), spec["context"]
    if kind in _POSITIONAL:
        return []
    # dict, OrderedDict, and registered classes (such as transformers' outputs) keep their keys as JSON; a named tuple
    # keeps the name of its class.
    keys: Any = []
    if isinstance(context, str):
        keys = fields.get(context) or fields.get(context.strip('"')) or _parse_keys(context)
    if isinstance(keys, list) and len(keys) == count and all(isinstance(key, str) for key in keys):
        return keys
    return []


def _parse_keys(context: str) -> Any:
    try:
        return json.loads(context) if len(context) <= 2**16 else []
    except (ValueError, RecursionError):
        return []
