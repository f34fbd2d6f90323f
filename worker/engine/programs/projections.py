"""Projections whose weights their owner holds itself, as nn.MultiheadAttention does, become linear layers.

Self-attention multiplies by `in_proj_weight` as it is: the layer `in_proj`. Cross-attention first cuts it into the rows
of the queries and those of keys and values (or of each): the layers `in_proj_q` and `in_proj_kv` (or `in_proj_k` and
`in_proj_v`). Files for torch put such pieces together again (original_names.py).
"""

import torch
from torch import fx

from worker.engine.programs.layers import arguments_of
from worker.engine.programs.module_tree import ModuleTree

aten = torch.ops.aten
_CUTS = {aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default}
_PIECES = {2: ("q", "kv"), 3: ("q", "k", "v")}


def name_projections(names: dict[fx.Node, str], tree: ModuleTree) -> set[fx.Node]:
    """Name such weights as a layer does, in the tree and in `names` (node of a stored tensor -> name).

    Return the nodes that nothing needs any more, because what they cut off is stored by itself.
    """
    nodes = {name: node for node, name in names.items()}
    gone = set[fx.Node]()
    for name, node in list(nodes.items()):
        stem = name.removesuffix("_weight")
        if stem == name:
            continue
        bias = nodes.get(f"{stem}_bias")
        if _is_projection(node, bias):
            held = {"weight": node} | ({} if bias is None else {"bias": bias})
            if tree.rename(stem, {f"{stem}.{attribute}": names[each] for attribute, each in held.items()}):
                names |= {each: f"{stem}.{attribute}" for attribute, each in held.items()}
        else:
            gone |= _cut(names, tree, stem, node, bias)
    return gone


def _cut(names: dict[fx.Node, str], tree: ModuleTree, stem: str, weight: fx.Node, bias: fx.Node | None) -> set[fx.Node]:
    weights = _pieces(weight)
    held = {"weight": (weight, weights)}
    biases: list[fx.Node | None] = [None] * len(weights)
    if bias is not None:
        pieces = _pieces(bias)
        held["bias"] = (bias, pieces)
        biases = list(pieces)
    letters = _PIECES.get(len(weights), ())
    if not letters or len(biases) != len(weights) or not all(map(_is_projection, weights, biases)):
        return set()
    layers = [f"{stem}_{letter}" for letter in letters]
    wanted = {names[whole]: [f"{layer}.{attribute}" for layer in layers] for attribute, (whole, _) in held.items()}
    if not tree.cut(layers, wanted, [each.meta["val"].shape[0] for each in weights]):
        return set()
    gone = set[fx.Node]()
    for whole, pieces in held.values():
        names |= dict(zip(pieces, wanted[names.pop(whole)], strict=True))
        gone |= whole.users.keys()
    return gone


def _is_projection(weight: fx.Node, bias: fx.Node | None) -> bool:
    """Whether all that reads a weight is input @ weight.T with this bias, and nothing else reads that."""
    if not weight.users or not all(_multiplies_by(user, weight) for user in weight.users):
        return False
    given = {arguments_of(user)["bias"] for user in weight.users}
    return given == {bias} and (bias is None or bias.users.keys() == weight.users.keys())


def _multiplies_by(node: fx.Node, weight: fx.Node) -> bool:
    if node.target is not aten.linear.default:
        return False
    given = arguments_of(node)
    return given["weight"] is weight and given["input"] is not weight and given["bias"] is not weight


def _pieces(whole: fx.Node) -> list[fx.Node]:
    """Return the pieces, in order, where all that reads a tensor is one cut of its rows; else nothing."""
    cut, *others = whole.users or [None]
    if cut is None or others or cut.target not in _CUTS or arguments_of(cut)["dim"] != 0:
        return []
    found = {each.args[1]: each for each in cut.users}
    order = list(range(len(cut.meta["val"])))
    return [found[index] for index in order] if len(cut.users) == len(order) and found.keys() == {*order} else []
