"""What an architecture of the catalogue must be to take a model's place: its sizes, those not given read from it."""

from collections.abc import Sequence

from app.recipes.architectures import Architecture, parse_architecture
from app.recipes.facts import TensorFacts

Sizes = dict[str, int | float]
"""Parameter of an architecture -> its value."""


class StudentMisfit(ValueError):
    """An architecture cannot take a model's place; the message says why, and what to write instead."""


def complete_sizes(
    text: str, inputs: Sequence[TensorFacts], outputs: Sequence[TensorFacts]
) -> tuple[Architecture, Sizes]:
    """Return the architecture that a text names and all its sizes, for a model with these inputs and outputs.

    Raises StudentMisfit where they contradict each other, or where nothing tells a size.
    """
    architecture, given = parse_architecture(text)
    name = architecture.name
    sizes: Sizes = {key: each.default for key, each in architecture.parameters.items() if each.default is not None}
    sizes |= _read_model(architecture, inputs, outputs)
    for key, value in given.items():
        if key in ("num_classes", "channels", "image_size") and sizes.get(key, value) != value:
            raise StudentMisfit(f"{name}:{key}={value:g}, and the model's is {sizes[key]:g}")
    sizes |= given
    if "heads" in architecture.parameters and "width" in sizes:
        sizes.setdefault("heads", max(1, int(sizes["width"]) // 64))
    # Heads follow from the width.
    missing = [key for key in architecture.parameters if key not in sizes and key != "heads"]
    if missing:
        given_too = [f"{key}={value:g}" for key, value in given.items()]
        example = ",".join([*given_too, *(f"{key}=N" for key in missing)])
        raise StudentMisfit(f"{name} has no weights here to read its {', '.join(missing)} from; write {name}:{example}")
    for whole, part in (("width", "heads"), ("image_size", "patch")):
        if part in sizes and sizes[whole] % sizes[part]:
            raise StudentMisfit(f"{name}: {whole} {sizes[whole]:g} is no multiple of {part} {sizes[part]:g}")
    return architecture, sizes


def show_tensors(tensors: Sequence[TensorFacts]) -> str:
    """Return "image float32 ['batch', 3, 32, 32], ..."."""
    return ", ".join(f"{each.name} {each.dtype} {list(each.shape)}" for each in tensors)


def _read_model(architecture: Architecture, inputs: Sequence[TensorFacts], outputs: Sequence[TensorFacts]) -> Sizes:
    """Return the sizes that the model's inputs and outputs tell."""
    found: Sizes = {}
    last = outputs[0].shape[-1:]
    if last and isinstance(last[0], int):
        found["num_classes" if "num_classes" in architecture.parameters else "vocabulary"] = last[0]
    if "image_size" in architecture.parameters:
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            raise StudentMisfit(
                f"{architecture.name} takes one batch of images, the model takes {show_tensors(inputs)}"
            )
        _, channels, height, width = inputs[0].shape
        if height != width or not isinstance(height, int) or not isinstance(channels, int):
            raise StudentMisfit(
                f"{architecture.name} takes square images of one size, the model {show_tensors(inputs)}"
            )
        found |= {"channels": channels, "image_size": height}
    return found
