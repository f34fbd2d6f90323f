"""The forms in which a weight may stand in few bits. All are immutable; `decode` gives exactly the values they hold.

A technique makes an encoding and puts it on a parameter by `Program.encode`; exporters read it. None of them knows
files: how codes become bytes is the packer's business, how they become integer operators that of the ONNX exporter.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

FloatFormat = Literal["fp16", "bf16", "fp8_e4m3", "fp8_e5m2"]
FLOAT_TYPES: dict[FloatFormat, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Codebook:
    """An index per weight into the centroids of its codebook (Han et al. 2015)."""

    indices: Tensor
    """uint8, of the weight's shape."""
    centroids: Tensor
    """float32 (codebooks, clusters). Rows of the weight (axis 0) share codebooks in consecutive equal blocks."""
    rows_per_codebook: int
    """Rows of one block; the last may be shorter."""

    def decode(self) -> Tensor:
        """Return the float32 weight."""
        rows = torch.arange(self.indices.shape[0], device=self.indices.device) // self.rows_per_codebook
        flat = self.indices.reshape(self.indices.shape[0], -1).long()
        return self.centroids[rows[:, None], flat].reshape(self.indices.shape)


@dataclass(frozen=True)
class Grouped:
    """Integers with one scale, and maybe one zero point, per group of neighbouring input weights.

    The weight is seen as a matrix (shape[0], the rest); a row's last group may be shorter.
    value = (code - zero_point) * scale; codes are unsigned. Without zero points, the zero is 2 ** (bits - 1).
    """

    codes: Tensor
    """uint8 (rows, columns), each below 2 ** bits."""
    scales: Tensor
    """float32 (rows, groups)."""
    zero_points: Tensor | None
    """uint8 (rows, groups), each below 2 ** bits, or None for symmetric codes."""
    bits: int
    """2 to 8."""
    group_size: int
    """Columns of a group."""
    shape: tuple[int, ...]
    """Of the weight."""

    def decode(self) -> Tensor:
        """Return the float32 weight."""
        num_columns = self.codes.shape[1]
        scales = self.scales.repeat_interleave(self.group_size, 1)[:, :num_columns]
        if self.zero_points is None:
            zeros = torch.full((), 2.0 ** (self.bits - 1), device=self.codes.device)
        else:
            zeros = self.zero_points.float().repeat_interleave(self.group_size, 1)[:, :num_columns]
        return ((self.codes.float() - zeros) * scales).reshape(self.shape)


@dataclass(frozen=True)
class Floating:
    """Floating point numbers of 16 or 8 bits; 8-bit ones with one scale per row (axis 0)."""

    values: Tensor
    """In the format's dtype, of the weight's shape."""
    format: FloatFormat
    scales: Tensor | None
    """float32 (rows,), or None for a scale of 1."""

    def decode(self) -> Tensor:
        """Return the float32 weight."""
        wide = self.values.float()
        if self.scales is None:
            return wide
        return wide * self.scales.reshape(-1, *([1] * (wide.ndim - 1)))


@dataclass(frozen=True)
class FixedPoint:
    """Signed integers times 2 ** -fraction_bits (Qm.n)."""

    codes: Tensor
    """int16 of the weight's shape, in two's complement of `bits` bits."""
    bits: int
    fraction_bits: int

    def decode(self) -> Tensor:
        """Return the float32 weight."""
        return self.codes.float() * 2.0**-self.fraction_bits


Encoding = Codebook | Grouped | Floating | FixedPoint


def bring_to_cpu(encoding: Encoding) -> Encoding:
    """Return the same encoding with its tensors on the CPU."""
    moved: dict[str, Any] = {
        name: value.cpu() for name, value in vars(encoding).items() if isinstance(value, Tensor) and not value.is_cpu
    }
    return replace(encoding, **moved) if moved else encoding
