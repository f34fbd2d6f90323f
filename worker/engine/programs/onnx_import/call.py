"""One call of an ONNX operator while the graph runs: its arguments as tensors, as sizes, or as known numbers.

A value of the graph is a tensor, or an array of numbers that are known before anything runs. The second kind holds
constants and arithmetic on shapes; its elements are numbers, or sizes (torch.SymInt) where a shape may vary. Shapes
are therefore never computed by tensors, and torch.export can follow a batch that varies.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from worker.engine.programs.onnx_import.read import EXPORT_FIX, Node
from worker.engine.programs.onnx_import.tensors import Array
from worker.engine.programs.rejections import reject

if TYPE_CHECKING:
    from worker.engine.programs.onnx_import.interpreter import Interpreter

Given = Tensor | Array
Operator = Callable[["Call"], Any]
MAX_KNOWN = 2**16
"""Numbers that arithmetic on shapes may hold at once."""


class Call:
    """The arguments of one node."""

    def __init__(self, owner: "Interpreter", node: Node, values: dict[str, Given]) -> None:
        self.owner, self.node, self._values = owner, node, values
        self.opset = owner.opset

    def __len__(self) -> int:
        return len(self.node.inputs)

    def has(self, index: int) -> bool:
        """Whether an optional argument is given."""
        return index < len(self.node.inputs) and self.node.inputs[index] != ""

    def wants(self, index: int) -> bool:
        """Whether a result is read by anything."""
        return index < len(self.node.outputs) and self.node.outputs[index] in self.owner.read

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute of the node."""
        return self.node.attributes.get(name, default)

    def value(self, index: int) -> Given:
        """Return an argument as it is."""
        return self._values[self.node.inputs[index]]

    def known(self, index: int) -> Array | None:
        """Return an argument that is known before anything runs, or None."""
        value = self.value(index) if self.has(index) else None
        return value if isinstance(value, np.ndarray) else None

    def numbers(self, index: int, what: str) -> Array:
        """Return an argument that must be known."""
        value = self.known(index)
        if not self.has(index):
            reject("bad_graph", f"{self}: {what} are missing.", EXPORT_FIX)
        if value is None:
            reject(
                "data_dependent_size",
                f"{self}: {what} are computed from the values of a tensor; only arithmetic on shapes can be imported.",
                "Export the model again with torch.onnx.export(..., dynamo=True), or so that no tensor's size depends "
                "on the values of another.",
            )
        return value

    def sizes(self, index: int, what: str = "sizes") -> list[Any]:
        """Return a known vector as integers or variable sizes."""
        return [item if isinstance(item, torch.SymInt) else int(item) for item in self.numbers(index, what).reshape(-1)]

    def integers(self, index: int, what: str) -> list[int]:
        """Return a known vector without variable sizes."""
        found = self.sizes(index, what)
        if not all(isinstance(item, int) for item in found):
            self.refuse(f"{what} vary with the shape of an input")
        return found

    def listed(self, name: str, index: int) -> list[int] | None:
        """Return integers that older operators take as an attribute and newer ones as an argument."""
        given = self.attribute(name)
        if given is not None:
            return [int(item) for item in (given if isinstance(given, tuple) else (given,))]
        return self.integers(index, name) if self.has(index) else None

    def number(self, name: str, index: int) -> float | None:
        """Return one number that older operators take as an attribute and newer ones as a known argument."""
        given = self.attribute(name)
        if given is None and self.has(index):
            array = self.known(index)
            if array is None or array.size != 1 or array.dtype == object:
                return self.refuse(f"{name} is not one number known in advance")  # type: ignore[no-any-return]
            given = array.reshape(-1)[0].item()
        return None if given is None else float(given)

    def tensor(self, index: int) -> Tensor:
        """Return an argument as a tensor."""
        return self.owner.as_tensor(self.node.inputs[index], self.value(index))

    def operand(self, index: int, rank: int) -> Any:
        """Return an argument as a plain number where it is one and does not widen a tensor of `rank` axes."""
        value = self.value(index)
        if isinstance(value, np.ndarray) and value.size == 1 and value.ndim <= rank:
            item = value.reshape(-1)[0]
            if isinstance(item, torch.SymInt) or value.dtype == object:
                return item
            if np.isfinite(item):
                return item.item()
        return self.tensor(index)

    def refuse(self, detail: str) -> Any:
        """Reject the model because of this call."""
        reject("unsupported_operator", f"{self}: {detail}.", EXPORT_FIX)

    def __str__(self) -> str:
        name = f" ({self.node.name[:80]!a})" if self.node.name else ""
        return f"The operator {self.node.op}{name}"


def pack(items: list[Any], shape: tuple[int, ...] | None = None) -> Array:
    """Return integers and variable sizes as a known value."""
    varies = any(isinstance(item, torch.SymInt) for item in items)
    array = np.empty(len(items), dtype=object if varies else np.int64)
    for index, item in enumerate(items):
        array[index] = item
    return array if shape is None else array.reshape(shape)


def settle(array: Array) -> Array:
    """Return a known value whose elements are all plain integers as integers."""
    if array.dtype == object and not any(isinstance(item, torch.SymInt) for item in array.reshape(-1)):
        return array.astype(np.int64)
    return array
