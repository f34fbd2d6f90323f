"""What the catalogue knows of an architecture: how to read its parameters from weights, and how to build it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a tensor of the state dict -> its shape."""
Values = dict[str, int | float]
"""Parameter of an architecture -> its value."""


@dataclass(frozen=True)
class Entry:
    """One architecture."""

    infer: Callable[[Shapes], Values]
    """Reads what the shapes tell; leaves out what they do not."""
    build: Callable[[Values, Shapes], nn.Module]
    """Makes the module, from complete values; the shapes tell variants apart that no parameter names."""
    inputs: Callable[[Values], tuple[dict[str, Tensor], dict[str, dict[int, Any]]]]
    """Named example inputs with batch 2, and the further axes that vary."""
    rename: Callable[[str], str] = field(default=lambda name: name)
    """Name in another common source -> name here."""
    optional: tuple[str, ...] = ()
    """Ends of names that state dicts may hold besides, and the module does not need."""


def count(shapes: Shapes, prefix: str) -> int:
    """Return how many numbered children stand under a prefix: 1 + the largest number."""
    numbers = [name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)]
    return 1 + max((int(number) for number in numbers if number.isdigit() and len(number) < 6), default=-1)


def read_sizes(shapes: Shapes, places: Mapping[str, tuple[str, int]]) -> Values:
    """Return parameter -> size of an axis of a tensor, for those that are there."""
    return {key: shapes[name][axis] for key, (name, axis) in places.items() if axis < len(shapes.get(name, ()))}
