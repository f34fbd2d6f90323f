"""Values of the graph that are known before it runs: the file's tensors, and what is computed from them alone."""

import hashlib
import re
from typing import Any

import numpy as np
import torch
from torch import nn

from worker.engine.programs.onnx_import.read import Node, OnnxGraph
from worker.engine.programs.onnx_import.tensors import Array

_SMALLEST_TIED = 64
_MASKED = 1e30
_OF_THE_EXPORTER = re.compile(r"val_[0-9]+")
"""What torch's exporter computed in advance. It writes the weights of layers so, too, but not those of no layer."""
_NEVER_TRAINED = ("inv_freq", "freqs_cis", "mask", "pixel_mean", "pixel_std")
"""Last words of names that exporters give to tables of a model, not to its weights."""


class Constants:
    """Constants by name, and the parameters that were made of them."""

    def __init__(self, graph: OnnxGraph | None = None) -> None:
        self.arrays: dict[str, Array] = dict(graph.tensors) if graph else {}
        self.trained = {
            name
            for name, array in self.arrays.items()
            if array.dtype.kind == "f" and array.size > 1 and name.rpartition(".")[2] not in _NEVER_TRAINED
        }
        """Those that are weights: floating-point numbers, more than one."""
        self.sources: dict[str, tuple[str, ...]] = {}
        """Computed constant -> what it was computed from."""
        self._turned: dict[str, str] = {}
        """Constant -> the one whose transpose it is."""
        self._same: dict[str, str] = {}
        self._parameters: dict[tuple[str, bool], nn.Parameter] = {}
        self._matrices: dict[tuple[Any, ...], nn.Parameter] = {}

    def add(self, name: str, array: Array, *, trained: bool, sources: tuple[str, ...] = ()) -> None:
        """Add a computed constant."""
        self.arrays[name] = array
        if trained and array.size > 1:
            self.trained.add(name)
        if sources:
            self.sources[name] = sources

    def relabel(self, node: Node) -> bool:
        """Take in a node that only renames or transposes a matrix, so that it stays one parameter."""
        if node.op not in ("Identity", "Transpose"):
            return False
        source, name = node.inputs[0], node.outputs[0]
        array = self.arrays[source]
        if source not in self.trained:
            return False
        if node.op == "Transpose":
            if array.ndim != 2 or tuple(node.attributes.get("perm", (1, 0))) != (1, 0):
                return False
            self._turned[name] = source
            array = array.T
        elif array.ndim > 1:
            # Of vectors, exporters merge those that happen to be equal; those were never one parameter.
            self._same[name] = source
        self.add(name, array, trained=True, sources=(source,))
        return True

    def origins(self, name: str) -> tuple[str, ...]:
        """Return a constant's name, and the names of the file's tensors that it was made of."""
        found, waiting = [name], [name]
        while waiting and len(found) < 50:
            for source in self.sources.get(waiting.pop(0), ()):
                if source in self.trained and source not in found:
                    found.append(source)
                    waiting.append(source)
        return tuple(found)

    def parameter(self, name: str, *, turned: bool = False) -> nn.Parameter:
        """Return a constant as a parameter, the same one for the same values; `turned`: its transpose."""
        while name in self._same or name in self._turned:
            turned = turned != (name in self._turned)
            name = self._same.get(name) or self._turned[name]
        if self.is_filler(name):
            return nn.Parameter(torch.from_numpy(np.array(self.arrays[name], order="C")))
        if (name, turned) not in self._parameters:
            array = self.arrays[name].T if turned else self.arrays[name]
            self._parameters[name, turned] = self._find_tied(np.array(array, order="C"))
        return self._parameters[name, turned]

    def is_weight(self, name: str) -> bool:
        """Whether a constant that belongs to no layer is trained: not a mask, nor a constant of torch's exporter."""
        array = self.arrays[name]
        if name not in self.trained or array.dtype.kind != "f" or _OF_THE_EXPORTER.fullmatch(name):
            return False
        return bool((np.abs(array) < _MASKED).all())

    def is_filler(self, name: str) -> bool:
        """Whether a constant is a vector of one number over and over, as untrained biases and norms are.

        Exporters write one such vector for all layers that have it; it was never one parameter.
        """
        array = self.arrays[name]
        return bool(array.size) and array.size == max(array.shape, default=0) and bool(array.min() == array.max())

    def _find_tied(self, array: Array) -> nn.Parameter:
        # Exporters write a tied matrix twice, once transposed. Matrices that are equal in every bit were one.
        if array.ndim < 2 or array.size < _SMALLEST_TIED or array.min() == array.max():
            return nn.Parameter(torch.from_numpy(array))
        key = (array.shape, str(array.dtype), hashlib.sha256(array.tobytes()).digest())
        if key not in self._matrices:
            self._matrices[key] = nn.Parameter(torch.from_numpy(array))
        return self._matrices[key]

    def is_zero(self, name: str, nodes: dict[str, Node]) -> bool:
        """Whether a value is zero everywhere, whatever its shape. `nodes`: value -> the node that makes it."""
        for _ in range(50):
            if name in self.arrays:
                return not self.arrays[name].any()
            node = nodes.get(name)
            if node is None:
                return False
            if node.op == "ConstantOfShape":
                return not np.any(node.attributes.get("value", 0))
            if node.op not in ("Expand", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Identity", "Transpose", "Tile"):
                return False
            name = node.inputs[0]
        return False
