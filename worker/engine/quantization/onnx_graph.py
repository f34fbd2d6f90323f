"""An ONNX graph while its nodes are being replaced: initializers and users by name."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper


class OnnxGraph:
    """Edits `model` in place. Nodes are put out one by one, in order, by whoever walks over `nodes`."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.nodes: list[NodeProto] = list(model.graph.node)
        self._initializers = {each.name: each for each in model.graph.initializer}
        self._written: list[NodeProto] = []

    def constant(self, name: str) -> NDArray[Any] | None:
        """Return the numbers of an initializer, None where `name` is something else."""
        each = self._initializers.get(name)
        return None if each is None else numpy_helper.to_array(each)

    def scalar(self, name: str) -> float | None:
        """Return the one number of an initializer, None where `name` is something else."""
        array = self.constant(name)
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None

    def users(self, name: str) -> list[NodeProto]:
        """Return the nodes that read `name`."""
        return [node for node in self.nodes if name in node.input]

    def store(self, name: str, array: NDArray[Any]) -> str:
        """Add an initializer once, and return its name."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def has_written(self, name: str) -> bool:
        """Whether a node that was put out makes `name`."""
        return any(name in node.output for node in self._written)

    def read_inside(self, node: NodeProto) -> set[str]:
        """Return what the bodies of a condition or loop read."""
        return _read_inside([node])

    def keep(self, node: NodeProto) -> None:
        """Write a node as it is."""
        self._written.append(node)

    def write(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Write a new node that is named like its output, and return the output."""
        self.write_many(kind, inputs, [output], **attributes)
        return output

    def write_many(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        """Write a new node with several outputs."""
        name = f"{outputs[0]}_{kind}"
        self._written.append(helper.make_node(kind, list(inputs), list(outputs), name=name, **attributes))

    def finish(self) -> ModelProto:
        """Put what was written into the model, with the initializers that are still read."""
        graph = self.model.graph
        del graph.node[:], graph.initializer[:]
        graph.node.extend(self._written)
        read = {name for node in self._written for name in node.input} | {each.name for each in graph.output}
        read |= _read_inside(self._written)
        graph.initializer.extend(each for name, each in self._initializers.items() if name in read)
        return self.model


def _read_inside(nodes: Sequence[NodeProto]) -> set[str]:
    """Return what the bodies of conditions and loops read."""
    found: set[str] = set()
    for node in nodes:
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                found |= {name for each in graph.node for name in each.input} | _read_inside(graph.node)
                found |= {each.name for each in graph.output}
    return found
