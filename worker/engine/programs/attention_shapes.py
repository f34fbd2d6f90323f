"""Attention as torch.nn.functional.multi_head_attention_forward writes it, in shapes that keep batch and heads apart.

It cuts queries, keys and values out of one product by select, counts heads into the batch, (length, batch * heads,
width), and multiplies by the last weight in two axes, (length * batch, features). In these forms heads can neither be
removed nor shared out among ranks. The same numbers in the forms that most models use:

    unflatten(x, -1, [3, e]).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous().select(0, i)
                                                               ->  chunk(x, 3, -1)[i].contiguous()
    view(x, [l, b * h, w]).transpose(0, 1).view([b, h, l, w])  ->  view(x, [l, b, h, w]).permute([1, 2, 0, 3])
    a mask (b, 1, 1, l), expanded for b * h heads              ->  the mask
    linear(reshape(x, [l * b, e])).view([l, b, f])             ->  linear(reshape(x, [l, b, e]))

Attention in single products is rewritten in attention_products.py.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from worker.engine.programs.layers import arguments_of

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_ATTENTION = aten.scaled_dot_product_attention.default


def part_heads_from_batch(graph: fx.Graph) -> None:
    """Rewrite an exported graph in place. What looks otherwise stays as it is."""
    for node in list(graph.nodes):
        for rule in (_chunk, _part, _mask, _project):
            if node.op == "call_function" and node.users:
                rule(graph, node)


def _chunk(graph: fx.Graph, unflattened: fx.Node) -> None:
    if unflattened.target is not aten.unflatten.int:
        return
    given = arguments_of(unflattened)
    source, sizes = given["self"], given["sizes"]
    chain = list(_follow(unflattened))
    if len(sizes) != 2 or sizes[0] not in (2, 3) or given["dim"] not in (-1, len(shape_of(source)) - 1):
        return
    expected = (
        (aten.unsqueeze.default, (0,)),
        (aten.transpose.int, (0, -2)),
        (aten.squeeze.dim, (-2,)),
        (aten.contiguous.default, ()),
    )
    if [(node.target, node.args[1:]) for node in chain[1:5]] != list(expected):
        return
    users = list(chain[4].users)
    if not all(user.target is aten.select.int and user.args[1] == 0 for user in users):
        return
    with graph.inserting_after(chain[4]):
        chunks = call(graph, aten.chunk.default, source, sizes[0], -1)
    for user in users:
        with graph.inserting_before(user):
            piece = call(graph, operator.getitem, chunks, user.args[2])
            replace(graph, user, call(graph, aten.contiguous.default, piece))


def _part(graph: fx.Graph, last: fx.Node) -> None:
    first = turned_from(last.args[0]) if is_view(last) else None
    if first is None:
        return
    source, sizes = first.args[0], sizes_of(last)
    before, merged, after = shape_of(source), shape_of(first), shape_of(last)
    if [len(each) for each in (before, merged, after)] != [3, 3, 4]:
        return
    batch, heads, length, width = after
    if same(before, [length, batch, heads * width]) and same(merged, [length, batch * heads, width]):
        with graph.inserting_before(last):
            parted = call(graph, aten.view.default, source, [sizes[2], sizes[0], sizes[1], sizes[3]])
            replace(graph, last, call(graph, aten.permute.default, parted, [1, 2, 0, 3]))


def _mask(graph: fx.Graph, attention: fx.Node) -> None:
    if attention.target is not _ATTENTION:
        return
    mask = arguments_of(attention)["attn_mask"]
    narrow = mask_of_all_heads(mask.args[0]) if is_view(mask) else None
    if narrow is None or len(shape_of(mask)) != 4:
        return
    batch, _, one, length = shape_of(mask)
    if same(shape_of(narrow), [batch, 1, one, length]) and mask in attention.args:
        attention.args = tuple(narrow if each is mask else each for each in attention.args)
        remove_unread(graph, mask)


def _project(graph: fx.Graph, last: fx.Node) -> None:
    product: Any = last.args[0] if is_view(last) else None
    if not isinstance(product, fx.Node) or product.target is not aten.linear.default or len(product.users) != 1:
        return
    flat: Any = product.args[0]
    if not is_view(flat) or len(flat.users) != 1:
        return
    source, sizes = flat.args[0], sizes_of(last)
    before, wide = shape_of(flat), shape_of(last)
    if len(before) != 2 or len(wide) != 3:
        return
    if same([before[0], shape_of(product)[1]], [wide[0] * wide[1], wide[2]]):
        with graph.inserting_before(last):
            apart = call(graph, aten.reshape.default, source, [*sizes[:2], before[1]])
            replace(graph, last, call(graph, aten.linear.default, apart, *product.args[1:], like=product))


def turned_from(turned: Any) -> fx.Node | None:
    """Return the view (length, batch * heads, width) of which a node is the transpose of the first two axes."""
    if not isinstance(turned, fx.Node) or turned.target is not aten.transpose.int or turned.args[1:] != (0, 1):
        return None
    first: Any = turned.args[0]
    return first if is_view(first) else None


def mask_of_all_heads(merged: Any) -> fx.Node | None:
    """Return the mask (batch, 1, 1, length) of which a node is reshape(expand(it), [batch * heads, 1, length])."""
    if not is_view(merged):
        return None
    expanded = merged.args[0]
    if not isinstance(expanded, fx.Node) or expanded.target is not aten.expand.default:
        return None
    narrow, shape = expanded.args[0], shape_of(expanded)
    if not isinstance(narrow, fx.Node) or len(shape) != 4 or len(shape_of(merged)) != 3:
        return None
    batch, heads, one, length = shape
    fits = same(shape_of(narrow), [batch, 1, one, length]) and same(shape_of(merged), [batch * heads, one, length])
    return narrow if fits else None


def is_view(node: Any) -> bool:
    """Whether a node is a call that gives a tensor other sizes."""
    return isinstance(node, fx.Node) and node.target in _VIEWS and len(node.args) == 2


def sizes_of(view: fx.Node) -> list[Any]:
    """Return the sizes that a view is called with: numbers and nodes."""
    return list(view.args[1])  # type: ignore[arg-type]


def _follow(node: fx.Node) -> Iterator[fx.Node]:
    """Yield a node and what reads it, as long as that is one node."""
    while True:
        yield node
        if len(node.users) != 1:
            return
        node = next(iter(node.users))


def shape_of(node: Any) -> list[Any]:
    """Return the sizes of the tensor that a node makes, empty where it makes none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return list(value.shape) if isinstance(value, Tensor) else []


def same(left: list[Any], right: list[Any]) -> bool:
    """Whether sizes are equal whatever the variable ones are; that they are so in one example is not enough."""
    return [_expression(each) for each in left] == [_expression(each) for each in right]


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def call(
    graph: fx.Graph, target: Callable[..., Any], *args: Any, like: fx.Node | None = None, **options: Any
) -> fx.Node:
    """Insert a call, with what it returns for the tensors of the graph, and another call's place in the model."""
    node = graph.call_function(target, args, options)
    values = fx.node.map_aggregate(args, lambda each: each.meta["val"] if isinstance(each, fx.Node) else each)
    if like is not None:
        node.meta |= like.meta
    node.meta["val"] = target(*values, **options)
    return node


def replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    """Let all that reads `old` read `new`."""
    old.replace_all_uses_with(new)
    remove_unread(graph, old)


def remove_unread(graph: fx.Graph, node: fx.Node) -> None:
    """Remove a call that nothing reads, and what was read by it alone."""
    unread, gone = [node], set[fx.Node]()
    while unread:
        node = unread.pop()
        if node not in gone and not node.users and node.op == "call_function" and not _changes(node.target):
            unread += node.all_input_nodes
            graph.erase_node(node)
            gone.add(node)


def _changes(target: Any) -> bool:
    """Whether a call may change a tensor: operators say so; calls of nested graphs are taken to."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    return isinstance(target, torch._ops.HigherOrderOperator)
