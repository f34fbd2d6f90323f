"""Putting FSDP2 on an imported graph, and taking it off again with the whole weights where they were."""

import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor

from worker.engine.parallel.changes import find_changes
from worker.engine.parallel.group import Group
from worker.engine.parallel.memory import USUAL_BYTES, give_back_from

UNIT_BYTES = 4 * 1024 * 1024
"""Layers that follow each other are gathered together up to this size: fewer messages, a little more memory."""


@dataclass
class Sharding:
    """A module whose parameters are DTensors, a share on each rank."""

    module: fx.GraphModule
    group: Group
    whole: set[nn.Parameter] = field(default_factory=set)
    """What FSDP2 cannot divide, and every rank has whole: scalars, and what is not of the common type."""
    _owners: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)
    _shards: dict[nn.Parameter, nn.Parameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        give_back_from(UNIT_BYTES // 4)
        # Its own hooks need no in-place operation on a view of an output; an imported graph has none.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self._owners = [
            (owner, name, parameter)
            for owner in self.module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
        ]
        common = Counter(each.dtype for each in self.module.parameters()).most_common(1)
        self.whole |= {each for each in self.module.parameters() if each.ndim == 0 or each.dtype != common[0][0]}
        mesh = self.group.mesh["data"]
        for unit in _find_units(self.module, self.whole):
            fully_shard(unit, mesh=mesh, ignored_params=self.whole)
        fully_shard(self.module, mesh=mesh, ignored_params=self.whole)
        for each in _sharded_modules(self.module):
            # The losses are shares of one mean, so gradients are summed; gloo knows no other way to scale the sum.
            each.set_gradient_divide_factor(1.0)
            each.set_force_sum_reduction_for_comms(True)
            each.set_custom_all_gather(_TimedAllGather(self.group))
            each.set_custom_reduce_scatter(_TimedReduceScatter(self.group))
        for owner, name, parameter in self._owners:
            if parameter in self.whole:
                continue
            self._shards[parameter] = cast(nn.Parameter, getattr(owner, name))
            # Whoever else holds the whole parameter must not keep its memory.
            parameter.data = parameter.data.new_empty(0)

    def shard_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return what stands for a parameter, given it or the one that was there before."""
        return self._shards.get(parameter, parameter)

    def undo(self) -> None:
        """Make it an ordinary module again: same classes, same parameter objects, whole weights on every rank."""
        for parameter, shard in self._shards.items():
            with self.group.waiting():
                parameter.data = cast(DTensor, shard.detach()).full_tensor()
            parameter.grad = None
        for each in list(_sharded_modules(self.module)):
            _take_off(cast(nn.Module, each))
        for layer in self.module.modules():
            _forget_hooks(layer)
        for owner, name, parameter in self._owners:
            setattr(owner, name, parameter)
        give_back_from(USUAL_BYTES)


def _find_units(module: fx.GraphModule, whole: set[nn.Parameter]) -> list[list[nn.Module]]:
    """Group the layers that the graph calls once and that share no parameter; the rest stays with the whole module.

    A unit is gathered again when gradients come to its last layer. So all its layers lead to the same outputs: where
    the loss does not look at one of them, all of a unit get gradients or none.
    """
    layers = dict(module.named_modules())
    nodes = [node for node in module.graph.nodes if node.op == "call_module"]
    calls = Counter(str(node.target) for node in nodes)
    holders = Counter(id(parameter) for layer in module.modules() for parameter in layer.parameters(recurse=False))
    outputs = _find_outputs(module)
    units: dict[frozenset[int], list[list[nn.Module]]] = {}
    sizes: dict[frozenset[int], int] = {}
    for node in nodes:
        name, reached = str(node.target), outputs[node]
        own = [each for each in layers[name].parameters() if each not in whole]
        if not own or calls[name] > 1 or any(holders[id(each)] > 1 for each in own):
            continue
        if sizes.get(reached, UNIT_BYTES) >= UNIT_BYTES:
            units.setdefault(reached, []).append([])
            sizes[reached] = 0
        units[reached][-1].append(layers[name])
        sizes[reached] += sum(each.nbytes for each in own)
    return [unit for each in units.values() for unit in each]


def _find_outputs(module: fx.GraphModule) -> dict[fx.Node, frozenset[int]]:
    """Return to which of the module's outputs every node leads."""
    reached: dict[fx.Node, set[int]] = {node: set() for node in module.graph.nodes}
    *nodes, output = module.graph.nodes
    families = {write.node: write.family for write in find_changes(nodes)}
    for index, each in enumerate(output.args[0]):
        if isinstance(each, fx.Node):
            reached[each].add(index)
    for node in reversed(nodes):
        for each in families.get(node, ()):  # what is written is seen there by whoever looks later
            reached[node] |= reached[each]
        for source in node.all_input_nodes:
            reached[source] |= reached[node]
    return {node: frozenset(each) for node, each in reached.items()}


def _sharded_modules(module: nn.Module) -> list[FSDPModule]:
    return [each for each in module.modules() if isinstance(each, FSDPModule)]


def _take_off(module: nn.Module) -> None:
    """Undo fully_shard, for which torch has no function."""
    module.__class__ = type(module).__mro__[2]
    for name in list(vars(module)):
        if name.startswith("__composable_api_state_key") or name in (
            "_is_fsdp_managed_module",
            "_fsdp_use_orig_params",
        ):
            delattr(module, name)


def _forget_hooks(module: nn.Module) -> None:
    for hooks in (
        module._forward_pre_hooks, module._forward_hooks, module._state_dict_pre_hooks,
        module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks,
    ):  # fmt: skip
        for key, hook in list(hooks.items()):
            if getattr(getattr(hook, "hook", hook), "__qualname__", "").startswith("FSDP"):
                del hooks[key]
                for marks in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs):
                    marks.pop(key, None)


class _TimedAllGather(DefaultAllGather):
    def __init__(self, group: Group) -> None:
        self._ranks = group

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        with self._ranks.waiting():
            return super().__call__(output_tensor, input_tensor, group, async_op)


class _TimedReduceScatter(DefaultReduceScatter):
    def __init__(self, group: Group) -> None:
        self._ranks = group

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work:
        with self._ranks.waiting():
            return super().__call__(output_tensor, input_tensor, group, op, async_op)
