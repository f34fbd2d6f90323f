"""Random flips and shifts of image batches, the same for inputs and for labels that are images themselves."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.errors import RecipeRefused

SHIFT_FRACTION = 8
"""Shifts go up to this part of the height and of the width."""


@dataclass(frozen=True)
class _Draw:
    """What happens to each example of a batch. Numbers from 0 to 1, so that inputs of several sizes move alike."""

    flipped: Tensor | None
    down: Tensor | None
    right: Tensor | None


def augment(
    inputs: tuple[Tensor, ...], labels: Tensor | None, kinds: Sequence[str], seed: tuple[int, ...]
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Return a batch whose 4-d inputs (batch, channels, height, width) are mirrored and shifted at random.

    `flip` mirrors left and right with probability one half; `crop` shifts by up to an eighth of the size and fills the
    border with its mirror image, which has no colour of its own to depend on how inputs are normalized. Labels of an
    image's height and width (segmentation, image to image) move along. The same `seed` gives the same bits.
    """
    if not kinds:
        return inputs, labels
    sizes = {tensor.shape[-2:] for tensor in inputs if tensor.ndim == 4}
    if not sizes:
        raise RecipeRefused(
            f"augmentations {list(kinds)} are for 4-d image inputs; the inputs have shapes "
            f"{[list(tensor.shape) for tensor in inputs]}",
            code="no_image_input",
            fix="Leave augmentations empty.",
        )
    draw = _draw(len(inputs[0]), kinds, seed)
    moved = tuple(_move(tensor, draw) if tensor.ndim == 4 else tensor for tensor in inputs)
    if labels is not None and labels.ndim >= 3:
        if labels.shape[-2:] not in sizes:
            raise RecipeRefused(
                f"augmentations move the images, and labels of shape {list(labels.shape)} cannot be moved along",
                code="labels_cannot_move",
                fix="Leave augmentations empty, or use labels of the images' height and width.",
            )
        labels = _move(labels, draw)
    return moved, labels


def _draw(num_rows: int, kinds: Sequence[str], seed: tuple[int, ...]) -> _Draw:
    # A generator of its own: batches are made in another thread than the one that draws dropout.
    generator = torch.Generator().manual_seed(_mix(seed))
    coins = torch.rand(3, num_rows, generator=generator)
    return _Draw(
        flipped=coins[0] < 0.5 if "flip" in kinds else None,
        down=coins[1] if "crop" in kinds else None,
        right=coins[2] if "crop" in kinds else None,
    )


def _mix(seed: tuple[int, ...]) -> int:
    mixed = 0
    for part in seed:
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return mixed


def _move(images: Tensor, draw: _Draw) -> Tensor:
    height, width = images.shape[-2:]
    rows, columns = _positions(height, draw.down, len(images)), _positions(width, draw.right, len(images))
    if draw.flipped is not None:
        columns = torch.where(draw.flipped[:, None], columns.flip(1), columns)
    batch = torch.arange(len(images))[:, None, None]
    # (batch, height, width, ...) puts the two moved axes next to the batch, so that one gather moves them.
    moved = images.movedim((-2, -1), (1, 2))[batch, rows[:, :, None], columns[:, None, :]]
    return moved.movedim((1, 2), (-2, -1)).contiguous()


def _positions(size: int, coins: Tensor | None, num_rows: int) -> Tensor:
    """Return, for each example, the source index of each position; beyond the border they turn back."""
    positions = torch.arange(size).expand(num_rows, size)
    limit = min(size // SHIFT_FRACTION, size - 1)
    if coins is None or limit == 0:
        return positions
    shifts = (coins * (2 * limit + 1)).long().clamp(max=2 * limit) - limit
    shifted = (positions + shifts[:, None]).abs()
    return torch.where(shifted >= size, 2 * (size - 1) - shifted, shifted)
