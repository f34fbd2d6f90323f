"""Plain values as JSON and back: what layers are configured with and what a graph passes to its operators."""

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from worker.engine.checkpoints.archive import NotRestorable
from worker.engine.programs.operators import SIZE_FUNCTIONS, find_operator

_NAMED = {
    "dtype": (torch.dtype, "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128"),
    "layout": (torch.layout, "strided"),
    "memory_format": (torch.memory_format, "contiguous_format preserve_format channels_last channels_last_3d"),
}
_CONSTANTS = {kind: {name: getattr(torch, name) for name in names.split()} for kind, (_, names) in _NAMED.items()}
_MODULES: dict[str, Any] = {"_operator": operator, "torch": torch, "math": math}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(_MODULES[name.rpartition(".")[0]], name.rpartition(".")[2])
    for name in (*SIZE_FUNCTIONS, "_operator.getitem")
}
_DEVICE = re.compile(r"cpu|meta|cuda(:\d{1,3})?")


def encode(value: Any) -> Any:
    """Return JSON for a value; a node is written as its name. Raises NotRestorable."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return {"list": [encode(each) for each in value]}
    if isinstance(value, tuple):
        return {"tuple": [encode(each) for each in value]}
    if isinstance(value, slice):
        return {"slice": [encode(each) for each in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, (type_, _) in _NAMED.items():
        if isinstance(value, type_):
            return {kind: str(value).removeprefix("torch.")}
    raise NotRestorable(f"a checkpoint cannot hold a {type(value).__name__}")


def decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """Return the value of a JSON; raises NotRestorable where it is none that `encode` writes."""
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "node" and content in nodes:
            return nodes[content]
        if kind in _CONSTANTS and content in _CONSTANTS[kind]:
            return _CONSTANTS[kind][content]
        if kind == "device" and isinstance(content, str) and _DEVICE.fullmatch(content):
            return torch.device(content)
        if kind in ("list", "tuple", "slice") and isinstance(content, list):
            items = [decode(each, nodes) for each in content]
            return items if kind == "list" else tuple(items) if kind == "tuple" else slice(*items)
    raise NotRestorable(f"no value: {str(value)[:100]}")


def name_function(target: Any) -> str:
    """Return the name of an operator or of a function on sizes. Raises NotRestorable for any other."""
    if isinstance(target, torch._ops.OpOverload):
        name = f"torch.ops.{target.namespace}.{target._opname}.{target._overloadname}"
    else:
        name = f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}"
    if find_function(name) is not target:
        raise NotRestorable(f"a checkpoint cannot hold the function {name}")
    return name


def find_function(name: str) -> Callable[..., Any] | None:
    """Return the function of a name, None where no graph of ours may call it."""
    found = _FUNCTIONS.get(name)
    return found if found is not None else find_operator(name)
