"""Checking of what a graph's values are: names, sizes, dtypes, devices, and which of them exist so far."""

import math
import re
from dataclasses import dataclass, field
from keyword import iskeyword
from typing import Any

from worker.engine.programs.expressions import rebuild_expression
from worker.engine.programs.json_reader import boolean, integer, items, record, text, union
from worker.engine.programs.rejections import reject, shown

MAX_NODES = 50_000
"""torch needs about a millisecond for each when it loads a program; a language model of 80 layers has about 10 000."""
MAX_EXPRESSIONS = 10_000
_MAX_RANK = 16
_MAX_ELEMENTS = 2**36
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
# Names that the generated Python of a graph uses itself.
_RESERVED = frozenset(["self", "torch", "device", "inf", "nan", "math", "operator", "fx_pytree", "pytree", "NoneType"])
DTYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 12: 1, 13: 2}
"""Number of a dtype in the file -> bytes per element: integers, half, float, double, bool, bfloat16."""
CPU = {"type": "cpu", "index": None}
_DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")


@dataclass
class Budget:
    """What the graphs of one program may still hold together, those inside of others included."""

    nodes: int = MAX_NODES
    expressions: int = MAX_EXPRESSIONS
    """Size expressions that differ: torch needs some milliseconds for each, and more for one of many terms."""
    known: dict[str, str] = field(default_factory=dict)

    def rebuild(self, expression: str, where: str) -> str:
        """Check a size expression, once however often it stands there."""
        if expression not in self.known:
            self._spend(1, where)
            self.known[expression], terms = rebuild_expression(expression, where)
            self._spend(terms * terms // 16, where)
        return self.known[expression]

    def _spend(self, cost: int, where: str) -> None:
        self.expressions -= cost
        if self.expressions < 0:
            reject("bad_expression", f"{where}: the program has too many different size expressions.")


@dataclass
class Scope:
    """The values of one graph: what has been defined so far, and what the file says about them."""

    where: str
    tensors: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    defined: set[str] = field(default_factory=set)
    depth: int = 0
    budget: Budget = field(default_factory=Budget)

    def define(self, name: Any) -> str:
        """Check the name of a new value."""
        checked = check_name(name, self.where)
        if checked in self.defined:
            reject("bad_graph", f"{self.where}: the value {checked} is defined twice.")
        self.defined.add(checked)
        return checked

    def use(self, name: Any) -> str:
        """Check a reference to a value."""
        if not isinstance(name, str) or name not in self.defined:
            reject("bad_graph", f"{self.where}: the value {shown(name)} is used before it is defined.")
        return name


def check_name(value: Any, where: str) -> str:
    """Return an identifier that is safe in generated Python."""
    if not isinstance(value, str) or not _NAME.fullmatch(value) or iskeyword(value) or value in _RESERVED:
        reject("bad_name", f"{where}: {shown(value)} is not an allowed name.")
    if value.startswith("__"):
        reject("bad_name", f"{where}: the name {shown(value)} starts with two underscores.")
    return value


def check_device(value: Any, where: str) -> dict[str, Any]:
    """Check a device and return the CPU: programs are always loaded there."""
    device = record(value, where, ("type",), ("index",))
    if device["type"] not in _DEVICE_TYPES:
        reject("unsupported_device", f"{where}: the device {shown(device['type'])} is not one of {_DEVICE_TYPES}.")
    if device.get("index") is not None:
        integer(device["index"], where, 0, 255)
    return CPU


def check_dtype(value: Any, where: str) -> int:
    """Return a dtype number that Pare can work with."""
    number = integer(value, where, 0, 255)
    if number not in DTYPES:
        reject(
            "unsupported_dtype",
            f"{where}: dtype number {number} (complex, 8-bit float or unsigned wide) cannot be imported.",
            "Convert the model to float32 or float16 before exporting it.",
        )
    return number


def rebuild_size(value: Any, where: str, budget: Budget | None, low: int = 0) -> dict[str, Any]:
    """Rebuild a size: an integer or, where there is a budget for it, a checked expression of input sizes."""
    kind, content = union(value, where, ("as_int", "as_expr"))
    if kind == "as_int":
        return {"as_int": integer(content, where, low, 2**40)}
    if budget is None:
        reject("bad_structure", f"{where}: the size of a stored tensor varies.")
    expression = record(content, where, ("expr_str",), ("hint",))
    rebuilt: dict[str, Any] = {"expr_str": budget.rebuild(text(expression["expr_str"], where, 10_000), where)}
    hint = expression.get("hint")
    rebuilt["hint"] = None
    if hint is not None:
        hint_kind, hint_value = union(hint, where, ("as_int", "as_bool", "as_float"))
        if hint_kind == "as_int":
            rebuilt["hint"] = {"as_int": integer(hint_value, where, -(2**40), 2**40)}
    return {"as_expr": rebuilt}


def rebuild_tensor_meta(value: Any, where: str, budget: Budget | None = None) -> dict[str, Any]:
    """Rebuild the description of a tensor: dtype, sizes, strides, device. Without a budget, no size may vary."""
    meta = record(value, where, ("dtype", "sizes", "requires_grad", "device", "strides", "storage_offset", "layout"))
    sizes = [rebuild_size(size, where, budget) for size in items(meta["sizes"], where, _MAX_RANK)]
    strides = [rebuild_size(size, where, budget) for size in items(meta["strides"], where, _MAX_RANK)]
    if len(sizes) != len(strides):
        reject("bad_graph", f"{where}: {len(sizes)} sizes but {len(strides)} strides.")
    known = [int(size["as_int"]) for size in sizes if "as_int" in size]
    if math.prod(known) > _MAX_ELEMENTS:
        reject("tensor_too_large", f"{where}: a tensor of at least {math.prod(known)} elements.")
    if integer(meta["layout"], where, 0, 7) != 7:
        reject("unsupported_layout", f"{where}: only dense (strided) tensors can be imported.")
    check_device(meta["device"], where)
    return {
        "dtype": check_dtype(meta["dtype"], where),
        "sizes": sizes,
        "requires_grad": boolean(meta["requires_grad"], where),
        "device": CPU,
        "strides": strides,
        "storage_offset": rebuild_size(meta["storage_offset"], where, budget),
        "layout": 7,
    }
