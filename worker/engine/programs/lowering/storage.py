"""How an encoded weight is stored in ONNX: arrays whose first axis is the weight's, and operators that decode them.

The operators are standard ones of opset 18. On whole arrays they are constant, so a runtime computes them once, when it
loads the file. On single rows, which an embedding looks up, they run every time, and the table stays small in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from worker.engine.packing.encodings import Encoding, FixedPoint, Floating, Grouped
from worker.engine.programs.lowering.integers import Operands, choose_bits, has_integer_operator, make_operands

Array = NDArray[Any]
Write = Callable[..., str]
"""write(operator, *inputs, **attributes): adds a node and returns the name of its output."""
Constant = Callable[[Array], str]
"""Adds a small constant and returns its name."""
BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class Storage:
    """An encoded weight as arrays of rows."""

    arrays: dict[str, Array]
    """Suffix -> array with as many rows as the weight. bfloat16 numbers stand as uint16 under the suffix `bfloat16`."""
    decode: Callable[[dict[str, str], Write, Constant], str]
    """Takes names of rows of the arrays, by suffix, adds operators, returns their output: rows of floats, maybe padded,
    maybe in further axes."""
    width: int
    """Numbers of a decoded row, padding included."""


def store(encoding: Encoding) -> Storage | None:
    """Return how the weight is stored, or None where plain floats are as good."""
    if isinstance(encoding, Grouped):
        if has_integer_operator(encoding):
            return _store_blocks(make_operands(encoding))
        columns = encoding.codes.shape[1]
        per_byte = 8 // choose_bits(encoding)
        # Nothing demands blocks of certain sizes here: the only group of a short row is filled up to whole bytes.
        alone = encoding.group_size >= columns
        return _store_blocks(make_operands(encoding, -(-columns // per_byte) * per_byte if alone else None))
    if isinstance(encoding, Floating):
        return _store_floats(encoding)
    if isinstance(encoding, FixedPoint):
        return _store_fixed(encoding)
    return None


def _store_blocks(operands: Operands) -> Storage:
    rows, blocks = operands.scales.shape
    arrays: dict[str, Array] = {"codes": operands.codes, "scales": operands.scales.reshape(rows, blocks, 1, 1)}
    if operands.zero_points is not None:
        arrays["zero_points"] = operands.zero_points.reshape(rows, blocks, 1, 1)

    def decode(names: dict[str, str], write: Write, constant: Constant) -> str:
        count = 8 // operands.bits
        last = constant(np.array([-1], np.int64))
        parts = []
        for index in range(count):
            part = names["codes"]
            if index:
                shift = constant(np.array(index * operands.bits, np.uint8))
                part = write("BitShift", part, shift, direction="RIGHT")
            if index < count - 1:
                part = write("BitwiseAnd", part, constant(np.array(2**operands.bits - 1, np.uint8)))
            parts.append(write("Unsqueeze", part, last))
        codes = parts[0] if count == 1 else write("Concat", *parts, axis=-1)
        wide = write("Cast", codes, to=TensorProto.FLOAT)
        if "zero_points" in names:
            zeros = write("Cast", names["zero_points"], to=TensorProto.FLOAT)
        else:
            zeros = constant(np.array(2.0 ** (operands.bits - 1), np.float32))
        return write("Mul", write("Sub", wide, zeros), names["scales"])

    return Storage(arrays, decode, blocks * operands.block_size)


def _store_floats(encoding: Floating) -> Storage:
    values = encoding.values
    ones = [1] * (values.ndim - 1)
    arrays: dict[str, Array] = {}
    if encoding.format == "bf16":
        arrays[BFLOAT16] = values.view(torch.int16).numpy().view(np.uint16)
    elif encoding.format == "fp16":
        arrays["float16"] = values.numpy()
    else:
        arrays[encoding.format] = values.view(torch.uint8).numpy()
    if encoding.scales is not None:
        arrays["scales"] = encoding.scales.numpy().reshape(-1, *ones)
    stored = next(iter(arrays))

    def decode(names: dict[str, str], write: Write, constant: Constant) -> str:
        if encoding.format in ("fp16", "bf16"):
            wide = write("Cast", names[stored], to=TensorProto.FLOAT)
        else:
            # ONNX has these types from opset 19 on, and few operators for them: a table of all 256 values is exact.
            table = torch.arange(256, dtype=torch.uint8).view(values.dtype).float().numpy()
            index = write("Cast", names[stored], to=TensorProto.INT32)
            wide = write("Gather", constant(table), index, axis=0)
        return write("Mul", wide, names["scales"]) if "scales" in names else wide

    return Storage(arrays, decode, values[0].numel())


def _store_fixed(encoding: FixedPoint) -> Storage:
    codes = encoding.codes
    if encoding.bits <= 4:
        matrix = codes.reshape(len(codes), -1)
        unsigned = Grouped(
            codes=(matrix + 2 ** (encoding.bits - 1)).to(torch.uint8),
            scales=torch.full((len(matrix), 1), 2.0**-encoding.fraction_bits),
            zero_points=None,
            bits=encoding.bits,
            group_size=matrix.shape[1],
            shape=tuple(codes.shape),
        )
        stored = store(unsigned)
        assert stored is not None
        return stored
    dtype = np.int8 if encoding.bits <= 8 else np.int16

    def decode(names: dict[str, str], write: Write, constant: Constant) -> str:
        wide = write("Cast", names["codes"], to=TensorProto.FLOAT)
        return write("Mul", wide, constant(np.array(2.0**-encoding.fraction_bits, np.float32)))

    return Storage({"codes": codes.numpy().astype(dtype)}, decode, codes[0].numel())
