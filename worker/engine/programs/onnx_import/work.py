"""How much a call of an operator computes, about: a file of a hundred bytes can ask for a day of it."""

import math
from typing import Any

from torch import Tensor

from worker.engine.programs.onnx_import.call import Call

_SLOW = 10
"""Comparisons of a pool are made one by one, multiplications of a product eight or more at once."""


def count_steps(call: Call, results: tuple[Any, ...]) -> int:
    """Return the multiplications of a call, or what takes as long, from the shapes of its arguments and results.

    Zero for operators that do a few steps for each number that they take or give.
    """
    produced = results[0].numel() if results and isinstance(results[0], Tensor) else 0
    match call.node.op:
        case "Conv":
            return produced * math.prod(_shape(call, 1)[1:])
        case "ConvTranspose":
            return math.prod(_shape(call, 0)) * math.prod(_shape(call, 1)[1:])
        case "MatMul":
            return produced * _shape(call, 0)[-1]
        case "Gemm":
            return produced * _shape(call, 0)[0 if call.attribute("transA", 0) else -1]
        case "Einsum":
            return _einsum_steps(call)
        case "MaxPool" | "AveragePool":
            return produced * int(math.prod(call.attribute("kernel_shape", ()))) * _SLOW
        case "LRN":
            return produced * int(call.attribute("size", 1)) * _SLOW
        case "LSTM" | "GRU" | "RNN":
            return math.prod(_shape(call, 0)[:2]) * (math.prod(_shape(call, 1)) + math.prod(_shape(call, 2)))
        case "Attention":
            return 2 * math.prod(_shape(call, 0)) * _shape(call, 1)[-2]
    return 0


def _shape(call: Call, index: int) -> tuple[int, ...]:
    return tuple(int(size) for size in call.value(index).shape)


def _einsum_steps(call: Call) -> int:
    sizes: dict[str, int] = {}
    operands = str(call.attribute("equation", "")).replace(" ", "").partition("->")[0].split(",")
    for index, labels in enumerate(operands):
        shape = _shape(call, index)
        if "." in labels:
            # What the dots stand for is shared by the operands where they have it.
            sizes["..."] = max(sizes.get("...", 1), math.prod(shape))
            continue
        sizes.update(zip(labels, shape, strict=False))
    return math.prod(sizes.values())
