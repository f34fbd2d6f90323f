"""Weights in few bits as modules: buffers with the codes, and a call that decodes them to float32.

The numbers are exactly those of the encoding. Sums and products are taken in place: what is decoded exists once, for
as long as its layer computes. Called with indices, a weight decodes those of its rows only.
"""

import torch
from torch import Tensor, nn

from worker.engine.packing.encodings import Codebook, Encoding, FixedPoint, FloatFormat, Floating, Grouped
from worker.engine.programs.decoding.bits import PackedCodes, keep_columns, take_rows


class CodedWeight(nn.Module):
    """A weight of some shape. Its buffers have as many rows as axis 0 of the weight."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.tail = shape[1:]

    def forward(self, indices: Tensor | None = None) -> Tensor:
        """Return the float32 weight, or some of its rows (*indices.shape, *shape[1:])."""
        rows = self.decode(indices)
        return rows if len(self.tail) == 1 else rows.reshape(*rows.shape[:-1], *self.tail)

    def decode(self, indices: Tensor | None) -> Tensor:
        """Return rows (..., the product of the weight's other axes)."""
        raise NotImplementedError


class GroupedWeight(CodedWeight):
    """(code - zero point) * scale, by groups of columns."""

    scales: Tensor
    """float32 (rows, groups)."""

    def __init__(self, encoding: Grouped) -> None:
        super().__init__(encoding.shape)
        self.columns = encoding.codes.shape[1]
        self.groups = encoding.scales.shape[1]
        self.size = self.columns if self.groups == 1 else encoding.group_size
        missing = self.groups * self.size - self.columns
        self.codes = PackedCodes(nn.functional.pad(encoding.codes, (0, missing)), encoding.bits)
        self.register_buffer("scales", encoding.scales)
        self.middle = 2.0 ** (encoding.bits - 1)
        zeros = encoding.zero_points
        self.zero_points = None if zeros is None else PackedCodes(zeros, encoding.bits)

    def decode(self, indices: Tensor | None) -> Tensor:
        """Return rows of floats."""
        values = self.codes(indices).to(torch.float32).unflatten(-1, (self.groups, self.size))
        if self.zero_points is None:
            values.sub_(self.middle)
        else:
            values.sub_(self.zero_points(indices).to(torch.float32).unsqueeze(-1))
        values.mul_(take_rows(self.scales, indices).unsqueeze(-1))
        return keep_columns(values.flatten(-2), self.columns)


class FloatWeight(CodedWeight):
    """Floats as float16, or as integers of the same bits where numpy, which loads files too, lacks the type.

    Those of 8 bits become the 16-bit floats that begin with the same bits: few devices convert 8-bit floats.
    """

    values: Tensor
    """float16, int16 (bf16) or int8 (rows, columns)."""
    scales: Tensor | None
    """float32 (rows, 1)."""

    def __init__(self, encoding: Floating) -> None:
        super().__init__(tuple(encoding.values.shape))
        self.format: FloatFormat = encoding.format
        rows = encoding.values.reshape(len(encoding.values), -1)
        bits = {"fp16": torch.float16, "bf16": torch.int16}.get(self.format, torch.int8)
        self.register_buffer("values", rows.view(bits))
        self.register_buffer("scales", None if encoding.scales is None else encoding.scales[:, None])

    def decode(self, indices: Tensor | None) -> Tensor:
        """Return rows of floats."""
        values = take_rows(self.values, indices)
        if self.format == "bf16":
            values = values.view(torch.bfloat16)
        elif self.format == "fp8_e5m2":
            values = values.to(torch.int16).bitwise_left_shift_(8).view(torch.float16)
        elif self.format == "fp8_e4m3":
            # A byte is sign-extended: one bit below the sign, the highest of the longer exponent, has to go.
            values = values.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14)).view(torch.float16)
        wide = values.to(torch.float32)
        if self.format == "fp8_e4m3":
            # The bits of e4m3 are those of an fp16 that is 2 ** 8 times smaller.
            wide.mul_(256.0)
        return wide if self.scales is None else wide.mul_(take_rows(self.scales, indices))


class FixedWeight(CodedWeight):
    """Integers times a power of two: 8 bits and fewer packed, more as they are."""

    wide: Tensor
    """int16 (rows, columns), where there are more than 8 bits."""

    def __init__(self, encoding: FixedPoint) -> None:
        super().__init__(tuple(encoding.codes.shape))
        rows = encoding.codes.reshape(len(encoding.codes), -1)
        self.middle = 2 ** (encoding.bits - 1)
        self.unit = 2.0**-encoding.fraction_bits
        self.codes = None
        if encoding.bits > 8:
            self.register_buffer("wide", rows)
        else:
            self.codes = PackedCodes((rows + self.middle).to(torch.uint8), encoding.bits)

    def decode(self, indices: Tensor | None) -> Tensor:
        """Return rows of floats."""
        if self.codes is None:
            return take_rows(self.wide, indices).to(torch.float32).mul_(self.unit)
        codes: Tensor = self.codes(indices)
        return codes.to(torch.float32).sub_(self.middle).mul_(self.unit)


class CodebookWeight(CodedWeight):
    """Indices into the centroids of the row's codebook."""

    centroids: Tensor
    """float32 (codebooks * clusters,)."""
    offsets: Tensor | None
    """int32 (rows, 1): where the row's codebook begins; None: there is one codebook."""

    def __init__(self, encoding: Codebook) -> None:
        super().__init__(tuple(encoding.indices.shape))
        rows = encoding.indices.reshape(len(encoding.indices), -1)
        books, clusters = encoding.centroids.shape
        self.indices = PackedCodes(rows, max(clusters - 1, 1).bit_length())
        self.register_buffer("centroids", encoding.centroids.flatten())
        book_of = torch.arange(len(rows), dtype=torch.int32)[:, None] // encoding.rows_per_codebook
        self.register_buffer("offsets", None if books == 1 else book_of * clusters)

    def decode(self, indices: Tensor | None) -> Tensor:
        """Return rows of floats."""
        places: Tensor = self.indices(indices).to(torch.int32)
        if self.offsets is not None:
            places.add_(take_rows(self.offsets, indices))
        return self.centroids.index_select(0, places.flatten()).reshape(places.shape)


def make_coded(encoding: Encoding) -> CodedWeight:
    """Return the module of an encoding."""
    match encoding:
        case Grouped():
            return GroupedWeight(encoding)
        case Floating():
            return FloatWeight(encoding)
        case FixedPoint():
            return FixedWeight(encoding)
        case Codebook():
            return CodebookWeight(encoding)
