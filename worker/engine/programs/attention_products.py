"""Attention in single products, as nn.MultiheadAttention computes it unless need_weights is False, as one operator.

    softmax(bmm(q * c, k.transpose(-2, -1)), -1)  or  softmax(baddbmm(mask, q * c, k.transpose(-2, -1)), -1)
    bmm(that, v).transpose(0, 1).reshape(...)
        ->  scaled_dot_product_attention(q, k, v, mask, scale=c).permute([2, 0, 1, 3]).reshape(...)

q, k and v are (batch * heads, length, width), views of what the projections made; behind the arrow batch and heads are
two axes (attention_shapes.py). Only where nobody reads the weights of attention, and none is dropped out.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from worker.engine.programs.attention_shapes import (
    call,
    is_view,
    mask_of_all_heads,
    remove_unread,
    replace,
    same,
    shape_of,
    sizes_of,
    turned_from,
)

aten = torch.ops.aten


@dataclass
class _Product:
    """softmax(scale * q @ k.T + mask) @ v; the first three are views (length, batch * heads, width)."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    mask: fx.Node | None
    """Given for (batch * heads, length, length of the keys)."""


def join_attention(graph: fx.Graph) -> None:
    """Rewrite an exported graph in place. What looks otherwise stays as it is."""
    for node in reversed(graph.nodes):
        remove_unread(graph, node)  # the mean of weights that nobody asked for
    for node in list(graph.nodes):
        if node.users and is_view(node) and (product := _read(node)) is not None:
            _rewrite(graph, node, product)


def _read(last: fx.Node) -> _Product | None:
    turned = _only_read(last.args[0], aten.transpose.int, (0, 1))
    second = turned and _only_read(turned.args[0], aten.bmm.default)
    weights = second and _only_read(second.args[0], aten.softmax.int, (-1,))
    scores = weights and _only_read(weights.args[0], aten.bmm.default, aten.baddbmm.default)
    if not second or not scores or scores.kwargs or len(second.args) != 2:
        return None
    *masks, queries, keys = scores.args
    scaled = _only_read(queries, aten.mul.Tensor)
    turned_keys = _only_read(keys, aten.transpose.int, (-2, -1))
    if not scaled or not turned_keys or not isinstance(scaled.args[-1], float):
        return None
    query, key, value = (turned_from(each) for each in (scaled.args[0], turned_keys.args[0], second.args[1]))
    mask = masks[0] if masks else None
    if not query or not key or not value or not (mask is None or isinstance(mask, fx.Node)):
        return None
    heads = {_count_heads(view) for view in (query, key, value)}
    return _Product(query, key, value, scaled.args[-1], mask) if len(heads) == 1 and 0 not in heads else None


def _rewrite(graph: fx.Graph, last: fx.Node, product: _Product) -> None:
    with graph.inserting_before(last):
        parts = [_part(graph, view) for view in (product.query, product.key, product.value)]
        batch, _, _, _ = shape_of(parts[0])
        mask = product.mask
        if mask is not None:
            narrow = mask_of_all_heads(mask)
            if narrow is not None and same(shape_of(narrow)[:1], [batch]):
                mask = narrow
            elif same(shape_of(mask)[:1], [1]):
                mask = call(graph, aten.unsqueeze.default, mask, 0)
            else:
                return
        attended = call(graph, aten.scaled_dot_product_attention.default, *parts, mask, scale=product.scale)
        ordered = call(graph, aten.permute.default, attended, [2, 0, 1, 3])
        replace(graph, last, call(graph, aten.reshape.default, ordered, sizes_of(last)))


def _count_heads(view: fx.Node) -> int:
    """Return how many heads a view makes of the last axis; 0 where it does something else."""
    before, after = shape_of(view.args[0]), shape_of(view)
    if len(before) != 3 or len(after) != 3 or not isinstance(before[2], int) or not isinstance(after[2], int):
        return 0
    heads, rest = divmod(before[2], after[2])
    return heads if not rest and same(after[:2], [before[0], before[1] * heads]) else 0


def _part(graph: fx.Graph, view: fx.Node) -> fx.Node:
    """Return (batch, heads, length, width) of a view (length, batch * heads, width)."""
    source, length = view.args[0], sizes_of(view)[0]
    _, batch, _ = shape_of(source)
    size = batch if isinstance(batch, int) else call(graph, aten.sym_size.int, source, 1)
    parted = call(graph, aten.view.default, source, [length, size, _count_heads(view), shape_of(view)[2]])
    return call(graph, aten.permute.default, parted, [1, 2, 0, 3])


def _only_read(node: Any, *targets: Any) -> fx.Node | None:
    """Return a node that is a call of one of the targets and has one reader; a last tuple is its further arguments."""
    rest = targets[-1] if isinstance(targets[-1], tuple) else None
    if not isinstance(node, fx.Node) or node.target not in targets or len(node.users) != 1:
        return None
    return node if rest is None or node.args[1:] == rest else None
