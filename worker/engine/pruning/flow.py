"""What is learnt about the channels of a program while its graph is followed, and what the rules do with it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, fx

from worker.engine.programs.program import Program
from worker.engine.pruning.labels import Ids, Labels
from worker.engine.pruning.shapes import Shape, split_axes

Axes = list[Ids | None]
"""Labels of the positions of each axis of a tensor; None: the axis has nothing to do with a parameter."""


@dataclass(frozen=True)
class Split:
    """A reshape that makes several axes of one: only one of them can become shorter."""

    node: fx.Node
    candidates: tuple[int, ...]
    """Sizes-wise possible axes of the output, the likeliest first."""
    labels: Ids


@dataclass(frozen=True)
class Reading:
    """A place where a sum, a mean or a norm runs over labelled positions: only those that are kept count."""

    node: fx.Node
    argument: int
    axis: int
    labels: Ids


@dataclass
class Flow:
    """What was learnt about a program. `roles` say what a layer does with an axis: "in", "out" or "scale"."""

    program: Program
    shapes: dict[fx.Node, Any]
    labels: Labels = field(default_factory=Labels)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    """Node -> Axes, or a list of such."""
    tensors: dict[str, Axes] = field(default_factory=dict)
    """Name of a parameter or buffer (the first, where it has several) -> its labels."""
    roles: dict[tuple[str, int], set[str]] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    choices: dict[str, int] = field(default_factory=dict)
    """Name of a splitting node -> which candidate it takes."""
    skip: frozenset[str] = frozenset()
    names: dict[int, str] = field(default_factory=dict)
    free: dict[fx.Node, str] = field(default_factory=dict)
    """Node that fetches a parameter -> its name."""

    def axes(self, node: Any) -> Axes | None:
        """Return the labels of a node that is one tensor."""
        if not isinstance(node, fx.Node):
            return None
        value = self.values.get(node)
        return value if isinstance(self.shapes.get(node), tuple) else None

    def shape(self, node: fx.Node) -> Shape:
        """Return the shape of a node that is one tensor."""
        shape: Shape = self.shapes[node]
        return shape

    def tensor(self, tensor: Tensor) -> tuple[str, Axes]:
        """Return the name and the labels of a parameter or buffer."""
        name = self.names[id(tensor)]
        if name not in self.tensors:
            self.tensors[name] = [self.labels.new(size) if size > 1 else None for size in tensor.shape]
        return name, self.tensors[name]

    def bind(self, tensor: Tensor | None, axis: int, ids: Ids | None, role: str, why: str = "") -> Ids | None:
        """Unite an axis of a parameter with labels, and return its labels. Without labels the axis is frozen."""
        if tensor is None:
            return ids
        name, axes = self.tensor(tensor)
        own = axes[axis]
        self.roles.setdefault((name, axis), set()).add(role)
        if own is None:
            if ids is not None:
                self.labels.freeze(ids, f"{_layer(name)} is one channel wide")
            return None
        if ids is None:
            self.labels.freeze(own, why or f"{_layer(name)} reads values whose number is fixed")
        else:
            self.labels.unite(own, ids)
        return own

    def freeze(self, value: Any, reason: str) -> None:
        """Let everything that a value's axes hold stay."""
        if isinstance(value, list):
            for item in value:
                self.freeze(item, reason)
        elif isinstance(value, np.ndarray):
            self.labels.freeze(value, reason)

    def unite_axes(self, parts: Sequence[tuple[Ids | None, int]], where: str) -> Ids | None:
        """Return the labels of an axis at which several tensors meet. A size of 1 is stretched to the others."""
        wide = [ids for ids, size in parts if size > 1]
        known = [ids for ids in wide if ids is not None]
        if not known:
            return None
        for ids in known[1:]:
            self.labels.unite(known[0], ids)
        if len(known) < len(wide):
            self.labels.freeze(known[0], f"its channels meet values whose number is fixed at {where}")
        return known[0]

    def reshape(self, node: fx.Node, axes: Axes, before: Shape, after: Shape) -> Axes:
        """Return the labels behind a reshape."""
        result: Axes = [None] * len(after)
        for left, right in split_axes(before, after):
            source = [axis for axis in left if before[axis] > 1]
            target = [axis for axis in right if after[axis] > 1]
            labelled = [axis for axis in source if axes[axis] is not None]
            if not labelled:
                continue
            ids = axes[labelled[0]]
            assert ids is not None
            if len(labelled) > 1:
                for axis in labelled:
                    self.freeze(axes[axis], f"two prunable axes become one at {node.name}")
                continue
            if len(source) == 1 and len(target) == 1:
                result[target[0]] = ids
                continue
            inner = int(np.prod([before[a] for a in source if a > labelled[0]], dtype=np.int64))
            outer = int(np.prod([before[a] for a in source if a < labelled[0]], dtype=np.int64))
            merged = np.tile(np.repeat(ids, inner), outer)
            if len(target) == 1:
                result[target[0]] = merged
                continue
            self._split(node, merged.reshape([after[a] for a in target]), target, before, left, result)
        return result

    def _split(
        self, node: fx.Node, block: Ids, target: list[int], before: Shape, left: list[int], result: Axes
    ) -> None:
        roots = self.labels.find(block)
        for place, axis in enumerate(target):
            rows = np.moveaxis(roots, place, 0).reshape(roots.shape[place], -1)
            if (rows == rows[:, :1]).all() and len(np.unique(rows[:, 0])) > 1:
                result[axis] = np.moveaxis(block, place, 0).reshape(rows.shape)[:, 0]
                return
        places = list(range(len(target)))
        # Images: the groups of a shuffle stay. Sequences: the width of a head and the 3 of a joint projection stay.
        likely = places[-1] if left == [1] and len(before) >= 4 else places[-2]
        candidates = [likely, *(place for place in reversed(places) if place != likely)]
        self.splits.append(Split(node, tuple(target[place] for place in candidates), block.ravel()))
        place = candidates[min(self.choices.get(node.name, 0), len(candidates) - 1)]
        rows = np.moveaxis(block, place, 0).reshape(block.shape[place], -1)
        for column in range(1, rows.shape[1]):
            self.labels.unite(rows[:, 0], rows[:, column])
        result[target[place]] = rows[:, 0]


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name
