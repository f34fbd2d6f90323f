"""Running a program again after a few of its weights have changed: only what comes after them is computed anew."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

Outputs = tuple[Tensor, ...]

MAX_KEPT_BYTES = 2**30
"""Of intermediate values of one batch; a program that needs more is computed whole each time."""


class Replay:
    """Keeps the intermediate values of one batch and computes the rest of the program from where it differs.

    Which nodes read a parameter is looked up by identity, so a tied weight counts wherever it is used. An operator that
    changes its input in place gets a copy, so that what is kept stays as it was; where that input is also known under
    another name (it has other readers, or is a view), nothing is kept.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self._nodes = list(module.graph.nodes)
        self._changed_inputs = {node: _find_changed_inputs(node) for node in self._nodes}
        self._inputs: tuple[Tensor, ...] = ()
        self._values: dict[fx.Node, Any] = {}
        self._after: dict[tuple[str, ...], list[fx.Node]] = {}
        self.nodes_run = 0
        """Nodes computed so far, those of the first runs included."""

    @property
    def num_nodes(self) -> int:
        """Nodes of one whole run."""
        return len(self._nodes)

    @torch.inference_mode()
    def start(self, inputs: tuple[Tensor, ...]) -> Outputs:
        """Run the program whole on a batch, keep what can be kept, and return its outputs."""
        self._inputs, self._values = inputs, {}
        given = iter(inputs)
        holders: dict[int, int] = {}
        kept = 0
        for node in self._nodes:
            if any(not self._is_alone(each, holders) for each in self._changed_inputs[node]):
                return self._give_up()
            value = next(given) if node.op == "placeholder" else self._run(node, self._values)
            self._values[node] = value
            for storage in _storages(value):
                holders[storage.data_ptr()] = holders.get(storage.data_ptr(), 0) + 1
                if holders[storage.data_ptr()] == 1 and node.op != "get_attr":
                    kept += storage.nbytes()
            if kept > MAX_KEPT_BYTES:
                return self._give_up()
        self.nodes_run += len(self._nodes)
        return _as_tuple(self._values[self._nodes[-1]])

    @torch.inference_mode()
    def run(self, changed: Iterable[str]) -> Outputs:
        """Return the outputs for the same batch now that the named parameters have other values."""
        if not self._values:
            return self._run_whole()
        names = tuple(changed)
        if names not in self._after:
            self._after[names] = self._find_after(names)
        fresh: dict[fx.Node, Any] = {}
        for node in self._after[names]:
            fresh[node] = self._run(node, fresh)
        self.nodes_run += len(fresh)
        last = self._nodes[-1]
        return _as_tuple(fresh.get(last, self._values[last]))

    def _is_alone(self, node: fx.Node, holders: dict[int, int]) -> bool:
        """Whether a value has one reader and no other name."""
        return len(node.users) == 1 and all(
            holders[storage.data_ptr()] == 1 for storage in _storages(self._values[node])
        )

    def _give_up(self) -> Outputs:
        self._values = {}
        return self._run_whole()

    def _run_whole(self) -> Outputs:
        self.nodes_run += len(self._nodes)
        return _as_tuple(self._module(*self._inputs))

    def _run(self, node: fx.Node, fresh: dict[fx.Node, Any]) -> Any:
        changed = self._changed_inputs[node]

        def read(item: fx.Node) -> Any:
            value = fresh[item] if item in fresh else self._values[item]
            return value.clone() if item in changed else value

        if node.op == "get_attr":
            return _attribute(self._module, str(node.target))
        arguments, keywords = fx.node.map_arg(node.args, read), fx.node.map_arg(node.kwargs, read)
        if node.op == "output":
            return arguments[0]
        if node.op == "call_module":
            return self._module.get_submodule(str(node.target))(*arguments, **keywords)
        if node.op == "call_method":
            return getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
        assert callable(node.target)
        return node.target(*arguments, **keywords)

    def _find_after(self, names: tuple[str, ...]) -> list[fx.Node]:
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        changed = {id(parameters[name]) for name in names}
        after: dict[fx.Node, None] = {}
        for node in self._nodes:
            if any(each in after for each in node.all_input_nodes) or self._reads(node, changed):
                after[node] = None
        return list(after)

    def _reads(self, node: fx.Node, changed: set[int]) -> bool:
        if node.op == "call_module":
            layer: nn.Module = self._module.get_submodule(str(node.target))
            return any(id(each) in changed for each in layer.parameters())
        return node.op == "get_attr" and id(_attribute(self._module, str(node.target))) in changed


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _as_tuple(outputs: Any) -> Outputs:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _storages(value: Any) -> list[torch.UntypedStorage]:
    tensors = (each for each in torch.utils._pytree.tree_leaves(value) if isinstance(each, Tensor))
    return [each.untyped_storage() for each in tensors if each.numel()]


def _find_changed_inputs(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the values that a node changes in place."""
    if node.op == "call_method":
        return tuple(node.all_input_nodes) if str(node.target).endswith("_") else ()
    if not isinstance(node.target, torch._ops.OpOverload):
        return ()
    places = [
        (index, argument.name)
        for index, argument in enumerate(node.target._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    given = [node.kwargs.get(name, node.args[index] if index < len(node.args) else None) for index, name in places]
    return tuple(each for each in given if isinstance(each, fx.Node))
