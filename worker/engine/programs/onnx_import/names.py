"""Where layers and loose weights go in the module: at the names that the file's tensors or nodes have."""

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from torch import nn

from worker.engine.programs.onnx_import.read import Node

if TYPE_CHECKING:
    from worker.engine.programs.onnx_import.interpreter import Interpreter

_SUFFIX = re.compile(
    r"(.+?)[._/](?:weight|bias|kernel|gamma|beta|scale|w|b|W|B|(?:weight|bias)_(?:ih|hh)_l[0-9]+(?:_reverse)?)(?::0)?"
)
_UNNAMED = re.compile(r"(onnx::.*|val_[0-9]+|[0-9]+|node_.*|.*__[0-9]+|const_.*|_v_[0-9]+|Identity_[0-9]+)")
_OPERATION = re.compile(
    r"(conv[123]?d?|conv|matmul|gemm|add|mul|div|sub|biasadd|fusedbatchnorm(v[23])?|gather|lstm|gru|rnn|prelu|read_?variable_?op|"
    r"resourcegather|embedding_lookup|depthwise|conv2d_transpose|.*normalization)(_[0-9]+)?",
    re.IGNORECASE,
)
_MODULE = nn.Module()
_MAX_LENGTH = 150


class Names:
    """The names of one module, each given once."""

    def __init__(self, owner: "Interpreter") -> None:
        self._owner = owner
        self._leaves: set[str] = set()
        """Paths of layers and loose tensors; nothing lies inside of them."""
        self._containers: set[str] = set()
        self._counts: defaultdict[str, int] = defaultdict(lambda: 1)

    def layer(self, kind: str, node: Node, hints: dict[str, str]) -> str:
        """Return a free path for a layer."""
        # A table that is an output layer, too, has one name in the file; where it is read tells the other.
        scope = _clean(node.scope) if kind == "embedding" else ""
        return self._free(scope or self._wish(node, hints) or kind)

    def _wish(self, node: Node, hints: dict[str, str]) -> str:
        constants = self._owner.constants
        names = {name: constants.is_filler(name) for hint in hints.values() for name in constants.origins(hint)}
        telling = self._from_tensors([name for name, filler in names.items() if not filler])
        if telling:
            return telling
        return _clean(node.scope) or _from_node(node) or self._from_tensors(list(names))

    def _from_tensors(self, names: list[str]) -> str:
        for name in names:
            match = _SUFFIX.fullmatch(name)
            if match and not _UNNAMED.fullmatch(name):
                return _clean(match[1])
        return ""

    def loose(self, name: str) -> str:
        """Return a free path for a tensor that belongs to no layer."""
        if _UNNAMED.fullmatch(name) or name not in self._owner.constants.trained:
            name = f"constants.{name}"
        return self._free(_clean(name) or "constants.value")

    def put(self, path: str, module: nn.Module) -> None:
        """Add a layer."""
        holder, _, name = path.rpartition(".")
        self.container(holder).add_module(name, module)

    def container(self, path: str) -> nn.Module:
        """Return the module that holds others under a path."""
        module: nn.Module = self._owner.root
        for part in path.split(".") if path else ():
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        return module

    def _free(self, wish: str) -> str:
        parts = wish.split(".")
        if any(".".join(parts[:end]) in self._leaves for end in range(1, len(parts))):
            # Nothing lies inside a layer.
            wish = wish.replace(".", "_")
        path = wish
        while path in self._leaves or path in self._containers:
            self._counts[wish] += 1
            path = f"{wish}_{self._counts[wish]}"
        self._leaves.add(path)
        parts = path.split(".")
        self._containers.update(".".join(parts[:end]) for end in range(1, len(parts)))
        return path


def _from_node(node: Node) -> str:
    """Return the path in names such as /layer1/layer1.0/conv1/Conv (torch) and model/dense/MatMul (Keras)."""
    parts = [part for part in node.name.split("/") if part]
    if len(parts) < 2 or node.name.startswith("node_"):
        return ""
    if _OPERATION.fullmatch(parts[-1]) or parts[-1].startswith(node.op):
        parts.pop()
    path: list[str] = []
    for part in parts:
        if part in ("StatefulPartitionedCall", "PartitionedCall"):
            continue
        # torch repeats a list's name in front of its members: layer1/layer1.0.
        if path and part.startswith(f"{path[-1]}."):
            path[-1] = part
        else:
            path.append(part)
    return _clean(".".join(path))


def _clean(path: str) -> str:
    """Return a path that can become attributes of modules."""
    parts = [re.sub(r"[^A-Za-z0-9_]+", "_", part).strip("_") for part in re.split(r"[./]", path)]
    # What every module has (type, half, forward) cannot be the name of a member.
    parts = [f"{part}_" if hasattr(_MODULE, part) else part for part in parts if part]
    return ".".join(parts)[:_MAX_LENGTH].strip(".")
