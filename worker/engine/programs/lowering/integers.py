"""Which layers ONNX Runtime computes from integer codes, and the operands of its operator for that.

The operator is com.microsoft MatMulNBits, which on CPUs takes 2, 4 and 8 bits in blocks of 16 to 256 inputs. It is
told to round activations to 8 bits, block by block (accuracy level 4). Measured on a CPU with AVX2 against fp32: at
that level one row takes 0.3 to 0.7 of the time, 64 rows 0.8 to 2 times; with floating point activations 4 bits take
0.6 to 1.5 times, 2 and 8 bits 3 to 30 times. So do 2 bits at any level in blocks of 16 or 256: those of 16 are stored
as 4 bits, those of 256 in blocks of 128.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from worker.engine.packing.encodings import Grouped
from worker.engine.programs.lowering.bits import pack_bits
from worker.engine.programs.program import Program

ACCURACY_LEVEL = 4
LARGEST_BLOCK = {2: 128, 4: 256, 8: 128}
"""Bits of the operator -> larger groups are split, their scales repeated."""
OPERATOR_BITS = {2: 2, 3: 4, 4: 4, 8: 8}
"""Bits of the codes -> bits the operator stores them in."""


def has_integer_operator(encoding: object) -> bool:
    """Whether a linear layer with this weight is computed from its codes."""
    return (
        isinstance(encoding, Grouped)
        and len(encoding.shape) == 2
        and encoding.bits in OPERATOR_BITS
        and encoding.group_size >= 16
        and encoding.group_size.bit_count() == 1
    )


def choose_bits(encoding: Grouped) -> int:
    """Return in how many bits ONNX stores a code."""
    if encoding.bits == 2 and encoding.group_size == 16 and has_integer_operator(encoding):
        return 4
    bits = OPERATOR_BITS.get(encoding.bits, 8)
    # A group ends where a byte ends.
    splits = encoding.group_size < encoding.codes.shape[1] and encoding.group_size % (8 // bits)
    return 8 if splits else bits


def find_integer_layers(program: Program) -> list[str]:
    """Return the linear layers that an ONNX file of the program computes from integer codes."""
    parameters = dict(program.module.named_parameters(remove_duplicate=False))
    coded = {id(parameters[name]) for name, each in program.encodings.items() if has_integer_operator(each)}
    return [
        name
        for name, layer in program.module.named_modules(remove_duplicate=False)
        if isinstance(layer, nn.Linear) and id(layer.weight) in coded
    ]


@dataclass(frozen=True)
class Operands:
    """What MatMulNBits takes besides the input: rows of blocks."""

    codes: NDArray[np.uint8]
    """(rows, blocks, bytes of a block), the first code in the lowest bits."""
    scales: NDArray[np.float32]
    """(rows, blocks)."""
    zero_points: NDArray[np.uint8] | None
    """(rows, blocks), one a byte; None: 2 ** (bits - 1)."""
    bits: int
    block_size: int
    columns: int

    @property
    def packed_zero_points(self) -> NDArray[np.uint8] | None:
        """The zero points as the operator wants them: (rows, bytes), the first in the lowest bits."""
        return None if self.zero_points is None else pack_bits(self.zero_points, self.bits)


def make_operands(encoding: Grouped, block_size: int | None = None) -> Operands:
    """Return the weight in blocks of `block_size`, at least a row or dividing the group size; None: the group size.

    For MatMulNBits, larger groups than it takes are split.
    """
    bits = choose_bits(encoding)
    if block_size is None:
        largest = LARGEST_BLOCK[bits] if has_integer_operator(encoding) else encoding.group_size
        block_size = min(encoding.group_size, largest)
    codes = encoding.codes.numpy()
    rows, columns = codes.shape
    num_blocks = -(-columns // block_size)
    group_of = np.arange(num_blocks) * block_size // encoding.group_size
    scales = encoding.scales.numpy()[:, group_of]
    zero_points = None
    if encoding.zero_points is not None:
        zero_points = encoding.zero_points.numpy()[:, group_of]
    elif bits != encoding.bits:
        zero_points = np.full(scales.shape, 2 ** (encoding.bits - 1), np.uint8)
    padded = np.zeros((rows, num_blocks * block_size), np.uint8)
    padded[:, :columns] = codes
    return Operands(
        pack_bits(padded.reshape(rows, num_blocks, block_size), bits), scales, zero_points, bits, block_size, columns
    )
