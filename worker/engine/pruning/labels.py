"""Labels: which positions of which axes stand or fall together, kept in a union-find of numbers.

Every position of every axis of a parameter gets a label. Following the graph unites the labels of positions that must
be removed together; a class of united labels is the smallest thing that pruning can remove. A frozen class stays.
"""

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Labels:
    """Classes of labels, with the reason why a class must stay and what it was seen to be."""

    def __init__(self) -> None:
        self._parents: Ids = np.empty(0, dtype=np.int64)
        self._count = 0
        self._frozen: dict[int, str] = {}
        self._tags: dict[int, set[str]] = {}

    def __len__(self) -> int:
        return self._count

    def new(self, count: int) -> Ids:
        """Return fresh labels, each a class of its own."""
        ids = np.arange(self._count, self._count + count, dtype=np.int64)
        if self._count + count > len(self._parents):
            room = np.arange(len(self._parents), max(2 * len(self._parents), self._count + count), dtype=np.int64)
            self._parents = np.concatenate([self._parents, room])
        self._count += count
        return ids

    def find(self, ids: Ids) -> Ids:
        """Return the class of every label."""
        roots = ids
        while True:
            above = self._parents[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parents[ids] = roots
        return roots

    def unite(self, left: Ids, right: Ids) -> None:
        """Let the labels at equal positions belong together."""
        assert left.shape == right.shape, f"{left.shape} labels meet {right.shape}"
        one, other = self.find(left), self.find(right)
        differs = one != other
        for a, b in zip(one[differs].tolist(), other[differs].tolist(), strict=True):
            root, gone = self._root(a), self._root(b)
            if root == gone:
                continue
            root, gone = min(root, gone), max(root, gone)
            self._parents[gone] = root
            if gone in self._frozen:
                self._frozen.setdefault(root, self._frozen.pop(gone))
            if gone in self._tags:
                self._tags.setdefault(root, set()).update(self._tags.pop(gone))

    def freeze(self, ids: Ids, reason: str) -> None:
        """Let these labels stay, and all that belongs to them."""
        for root in np.unique(self.find(ids)).tolist():
            self._frozen.setdefault(root, reason)

    def tag(self, ids: Ids, tag: str) -> None:
        """Remember what these labels were seen to be."""
        for root in np.unique(self.find(ids)).tolist():
            self._tags.setdefault(root, set()).add(tag)

    def reason(self, root: int) -> str | None:
        """Return why a class must stay, or None where it may go."""
        return self._frozen.get(root)

    def tags(self, root: int) -> set[str]:
        """Return what a class was seen to be."""
        return self._tags.get(root, set())

    def _root(self, label: int) -> int:
        while (above := int(self._parents[label])) != label:
            label = above
        return label
