"""Codes of any number of bits in bytes, and back by operators that every device has.

A code of 4, 2 or 1 bits is a part of a byte; one of 3, 5, 6 or 7 bits is split into such parts, so that no bit is
wasted. The first columns of a row are the lowest parts of its bytes, the next columns the parts above: what comes out
of a shift is a run of neighbours, and putting runs behind each other costs a third of interleaving them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

PARTS = (8, 4, 2, 1)
LIFTS = torch.tensor([[2**shift] for shift in range(7, -1, -1)], dtype=torch.uint8)
"""What a byte is multiplied by so that its first, second, ... bit is the highest; bits above it fall off."""


class PackedCodes(nn.Module):
    """uint8 codes (rows, columns), each row in bytes of its own; called with indices, it returns those rows only."""

    lifts: Tensor
    """Where there are single bits: LIFTS."""

    def __init__(self, codes: Tensor, bits: int) -> None:
        """`codes` are below 2 ** bits, at most 8 bits."""
        super().__init__()
        self.columns = codes.shape[1]
        self.widths = tuple(width for width in PARTS if bits & width)
        if bits & 1:
            self.register_buffer("lifts", LIFTS)
        shift = 0
        for width in self.widths:
            self.register_buffer(f"bits_{width}", _pack((codes >> shift) & (2**width - 1), width))
            shift += width

    def forward(self, indices: Tensor | None = None) -> Tensor:
        """Return the codes (rows, columns), or those of some rows (*indices.shape, columns)."""
        whole: Tensor | None = None
        shift = 0
        for width in self.widths:
            packed = take_rows(self.get_buffer(f"bits_{width}"), indices)
            part = _unpack(packed, width) if width > 1 else _unpack_single(packed, self.lifts)
            part = keep_columns(part, self.columns)
            whole = part if whole is None else whole | (part << shift)
            shift += width
        assert whole is not None
        return whole


def take_rows(table: Tensor, indices: Tensor | None) -> Tensor:
    """Return rows of a matrix, all of them without indices."""
    return table if indices is None else functional.embedding(indices, table)


def keep_columns(rows: Tensor, columns: int) -> Tensor:
    """Return rows without what they were filled up with at their ends."""
    return rows if rows.shape[-1] == columns else rows[..., :columns]


def _pack(codes: Tensor, width: int) -> Tensor:
    count = 8 // width
    padded = functional.pad(codes, (0, -codes.shape[1] % count)).reshape(len(codes), count, -1)
    packed = torch.zeros_like(padded[:, 0])
    for index in range(count):
        packed |= padded[:, index] << (index * width)
    return packed


def _unpack(packed: Tensor, width: int) -> Tensor:
    if width == 8:
        return packed
    mask = 2**width - 1
    shifted = [packed >> shift for shift in range(width, 8, width)]
    return torch.cat([packed & mask, *(each & mask for each in shifted[:-1]), shifted[-1]], -1)


def _unpack_single(packed: Tensor, lifts: Tensor) -> Tensor:
    # Eight runs in four operators instead of fifteen: a loaded program takes some kilobytes for each.
    return ((packed.unsqueeze(-2) * lifts) >> 7).flatten(-2)
