"""Running a graph node by node: torch's layers are made where they are first met, and found again in later runs."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from worker.engine.errors import EngineFailure
from worker.engine.programs.onnx_import.call import Call, Given
from worker.engine.programs.onnx_import.constants import Constants
from worker.engine.programs.onnx_import.names import Names
from worker.engine.programs.onnx_import.read import EXPORT_FIX, Node, OnnxGraph
from worker.engine.programs.onnx_import.shape_arithmetic import KNOWN
from worker.engine.programs.onnx_import.table import TABLE
from worker.engine.programs.onnx_import.tensors import Array
from worker.engine.programs.onnx_import.work import count_steps
from worker.engine.programs.rejections import reject, shown

_MAX_BYTES, _MAX_LIVE_BYTES = 2**32, 2**34
_MAX_FOLDED_STEPS = 10**10


class Interpreter:
    """Runs `nodes`. Layers are made in the first run, on real tensors, and found again in later ones."""

    def __init__(self, graph: OnnxGraph, nodes: list[Node], constants: Constants) -> None:
        self.root = nn.Module()
        """Holds the layers, parameters and buffers."""
        self.opset = graph.opset
        self.names = Names(self)
        self.constants = constants
        self.nodes = nodes
        self.outputs = [value.name for value in graph.outputs]
        self.read = {name for node in nodes for name in node.inputs} | set(self.outputs)
        self.makers = {name: node for node in nodes for name in node.outputs if name}
        self.running: Node | None = None
        self.steps = 0
        """Multiplications, about, of the last run on shapes."""
        self.finished = False
        """Whether all layers and parameters are there: what is met later becomes a constant of the graph."""
        self._inputs = [value.name for value in graph.inputs]
        self._layers: dict[Any, str] = {}
        self._stored: dict[str, str] = {}
        """Constant -> path of the parameter or buffer that holds it."""
        self._last = _last_readers(nodes, self.outputs)

    def interpret(self, inputs: list[Tensor]) -> list[Tensor]:
        """Return the graph's outputs for its inputs."""
        values: dict[str, Given] = dict(zip(self._inputs, inputs, strict=True))
        values.update(self.constants.arrays)
        live = 0
        self.steps = 0 if not self.finished else self.steps
        for node, done in zip(self.nodes, self._last, strict=True):
            self.running = node
            for name, result in zip(node.outputs, self.run_node(node, values), strict=False):
                if name:
                    values[name] = result
                    live += 0 if self.finished else _size_bytes(result)
            if live > _MAX_LIVE_BYTES:
                reject("tensor_too_large", f"At {node.op}, {live} bytes would be in use at once.", EXPORT_FIX)
            for name in done:
                value = values.pop(name, None)
                live -= 0 if value is None or name in self.constants.arrays or self.finished else _size_bytes(value)
        self.running = None
        # An output that is an input or a weight, too, must be another tensor.
        return [
            tensor.clone() if isinstance(tensor, nn.Parameter) or any(tensor is given for given in inputs) else tensor
            for tensor in (self.as_tensor(name, values[name]) for name in self.outputs)
        ]

    def run_node(self, node: Node, values: dict[str, Given]) -> tuple[Any, ...]:
        """Return the results of one node."""
        call = Call(self, node, values)
        if node.op not in TABLE:
            reject("unsupported_operator", f"{call} cannot be imported.", EXPORT_FIX)
        if node.op in KNOWN and all(self._is_number(name, values[name]) for name in node.inputs if name):
            known = KNOWN[node.op](call)
            if known is not NotImplemented:
                return known if isinstance(known, tuple) else (known,)
        try:
            result = TABLE[node.op](call)
        except (EngineFailure, torch._dynamo.exc.UserError):
            raise
        except (IndexError, KeyError) as error:
            reject("bad_graph", f"{call} lacks an argument, or one does not fit: {shown(str(error))}.", EXPORT_FIX)
        results: tuple[Any, ...] = result if isinstance(result, tuple) else (result,)
        for each in results:
            if isinstance(each, Tensor) and each.numel() * each.element_size() > _MAX_BYTES:
                reject("tensor_too_large", f"{call} makes a tensor of shape {tuple(each.shape)}.", EXPORT_FIX)
        self.steps += 0 if self.finished else count_steps(call, results)
        return results

    def _is_number(self, name: str, value: Given) -> bool:
        # Weights are known, too, but must stay parameters. The shape of one is a number like any.
        shape_only = self.running is not None and self.running.op in ("Shape", "Size")
        return isinstance(value, np.ndarray) and (shape_only or name not in self.constants.trained)

    def as_tensor(self, name: str, value: Given) -> Tensor:
        """Return a value as a tensor; a constant becomes a parameter or buffer of the module."""
        if isinstance(value, Tensor):
            return value
        if name in self._stored or (name in self.constants.arrays and not self.finished):
            if name not in self._stored:
                with unset_fake_temporarily():
                    self._stored[name] = self._store(name)
            holder, _, attribute = self._stored[name].rpartition(".")
            tensor: Tensor = getattr(self.root.get_submodule(holder), attribute)
            return tensor
        if value.dtype == object:
            items = [torch.scalar_tensor(item, dtype=torch.int64) for item in value.reshape(-1)]
            return torch.stack(items).reshape(value.shape) if value.ndim else items[0]
        return torch.tensor(value.tolist(), dtype=getattr(torch, str(value.dtype)))

    def _store(self, name: str) -> str:
        array = self.constants.arrays[name]
        path = self.names.loose(name)
        holder, _, attribute = path.rpartition(".")
        owner = self.names.container(holder)
        if self.constants.is_weight(name):
            owner.register_parameter(attribute, self.constants.parameter(name))
        else:
            owner.register_buffer(attribute, torch.from_numpy(np.array(array)))
        return path

    def layer(self, call: Call, kind: str, key: tuple[Any, ...], make: Any, hints: dict[str, str]) -> nn.Module:
        """Return the layer of a call; one that was made for the same tensors and options is found again.

        `make` builds it with its tensors. `hints`: the layer's attribute -> name of the constant it is made of.
        """
        filler = all(self.constants.is_filler(name) for name in hints.values())
        identity = (kind, *key, *sorted(hints.items()), *(call.node.outputs if filler else ()))
        if identity not in self._layers:
            path = self.names.layer(kind, call.node, hints)
            with unset_fake_temporarily():
                self.names.put(path, make().eval())
            self._layers[identity] = path
        return self.root.get_submodule(self._layers[identity])


def _last_readers(nodes: list[Node], outputs: list[str]) -> list[list[str]]:
    last: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in (*node.inputs, *node.outputs):
            last[name] = index
    done: list[list[str]] = [[] for _ in nodes]
    for name, index in last.items():
        if name and name not in outputs:
            done[index].append(name)
    return done


def fold(graph: OnnxGraph, nodes: list[Node], constants: Constants, limit_bytes: int) -> list[Node]:
    """Run what depends on constants alone, once; the results become constants. Returns the other nodes."""
    read = {name for node in nodes for name in node.inputs} | {value.name for value in graph.outputs}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    rest: list[Node] = []
    used = steps = 0
    for node in nodes:
        if node.op == "Constant":
            constants.add(node.outputs[0], _constant(node), trained=False)
            continue
        given = [name for name in node.inputs if name]
        # A weight that is repeated stays the smaller one that is trained.
        repeats = node.op in ("Expand", "Tile") and given and given[0] in constants.trained
        if not given or repeats or not all(name in constants.arrays for name in given) or constants.relabel(node):
            if node.outputs[0] not in constants.arrays:
                rest.append(node)
            continue
        folding = _Folding(graph.opset, read, constants)
        folding.running = node
        values: dict[str, Given] = {name: constants.arrays[name] for name in given}
        with torch.no_grad():
            # First on shapes alone: a few numbers can ask for a tensor of any size.
            with mode:
                used += sum(_size_bytes(result) for result in folding.run_node(node, values))
            steps += folding.steps
            if used > limit_bytes or steps > _MAX_FOLDED_STEPS:
                what = f"{limit_bytes} bytes" if used > limit_bytes else f"{_MAX_FOLDED_STEPS} multiplications"
                reject(
                    "shape_bomb",
                    f"The constants of the graph grow above {what} at the operator {node.op}.",
                    EXPORT_FIX,
                )
            results = folding.run_node(node, values)
        for name, result in zip(node.outputs, results, strict=False):
            array: Array = result.numpy() if isinstance(result, Tensor) else result
            if name:
                trained = any(source in constants.trained for source in given) and array.dtype.kind == "f"
                constants.add(name, array, trained=trained, sources=tuple(given))
    return rest


def _size_bytes(result: Any) -> int:
    return result.numel() * result.element_size() if isinstance(result, Tensor) else int(result.nbytes)


class _Folding(Interpreter):
    """Hands out constants as plain tensors."""

    def __init__(self, opset: int, read: set[str], constants: Constants) -> None:
        super().__init__(OnnxGraph(opset, [], [], []), [], constants)
        self.read, self.makers = read, {}
        self._tensors: dict[int, Tensor] = {}

    def as_tensor(self, name: str, value: Given) -> Tensor:
        """Return the constant's values."""
        del name
        if isinstance(value, Tensor):
            return value
        if id(value) not in self._tensors:
            with unset_fake_temporarily():
                self._tensors[id(value)] = torch.from_numpy(np.array(value))
        return self._tensors[id(value)]

    def layer(self, call: Call, kind: str, key: tuple[Any, ...], make: Any, hints: dict[str, str]) -> nn.Module:
        """Return a layer that is kept nowhere."""
        del call, kind, key, hints
        with unset_fake_temporarily():
            module: nn.Module = make()
        return module.eval()


def _constant(node: Node) -> Array:
    given = list(node.attributes.items())
    if len(given) == 1:
        key, value = given[0]
        if key == "value" and isinstance(value, np.ndarray):
            return value
        if key in ("value_float", "value_floats"):
            return np.array(value, np.float32)
        if key in ("value_int", "value_ints"):
            return np.array(value, np.int64)
    return reject("unsupported_operator", "A Constant holds no plain tensor.", EXPORT_FIX)
