"""Operators on values that are known before anything runs: arithmetic on shapes, with sizes that may vary."""

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from worker.engine.programs.onnx_import.call import MAX_KNOWN, Call, pack, settle
from worker.engine.programs.onnx_import.tensors import NUMPY_TYPES, Array

_Known = Callable[[Call], Any]


def _bounded(function: Callable[[Call], Any]) -> _Known:
    def run(call: Call) -> Any:
        given = [call.known(index) for index in range(len(call)) if call.has(index)]
        if any(array is None for array in given) or sum(array.size for array in given if array is not None) > MAX_KNOWN:
            return NotImplemented
        result = function(call)
        return result if result is NotImplemented or isinstance(result, tuple) else settle(np.asarray(result))

    return run


def _pair(function: Callable[[Any, Any], Any], *, integers: Callable[[Any, Any], Any] | None = None) -> _Known:
    """Return an operator of two values. Booleans on sizes are decided, so that no branch depends on them."""

    def run(call: Call) -> Any:
        left, right = call.numbers(0, "numbers"), call.numbers(1, "numbers")
        if np.broadcast(left, right).size > MAX_KNOWN:
            return NotImplemented
        exact = left.dtype == object or right.dtype == object
        chosen = integers if integers and left.dtype.kind in "iuO" else function
        if exact:
            return np.frompyfunc(chosen, 2, 1)(left, right)
        with np.errstate(all="ignore"):
            # Numbers of one type stay of that type.
            result = np.asarray(chosen(left, right))
            return result if result.dtype == bool else result.astype(left.dtype)

    return _bounded(run)


def _divide(left: Any, right: Any) -> Any:
    if isinstance(left, np.ndarray):
        # Towards zero. A division by zero is the model's mistake and shows as a shape that fits nothing.
        divisor = np.where(right == 0, 1, right)
        return np.sign(left) * np.sign(divisor) * (np.abs(left) // np.abs(divisor))
    return left // right


def _compare(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def run(left: Any, right: Any) -> Any:
        result = function(left, right)
        if isinstance(result, torch.SymBool):
            return True if statically_known_true(result) else bool(result)
        return result

    return run


def _extreme(symbolic: Callable[[Any, Any], Any], plain: Callable[[Any, Any], Any]) -> _Known:
    def run(call: Call) -> Any:
        arrays = [call.numbers(index, "numbers") for index in range(len(call))]
        result = arrays[0]
        for array in arrays[1:]:
            if result.dtype == object or array.dtype == object:
                result = np.frompyfunc(symbolic, 2, 1)(result, array)
            else:
                result = plain(result, array)
        return result

    return _bounded(run)


def _unary(function: Callable[[Array], Any]) -> _Known:
    def run(call: Call) -> Any:
        array = call.numbers(0, "numbers")
        if array.dtype == object:
            return NotImplemented
        with np.errstate(all="ignore"):
            return np.asarray(function(array)).astype(array.dtype, copy=False)

    return _bounded(run)


def _cast(call: Call) -> Any:
    array, wanted = call.numbers(0, "numbers"), NUMPY_TYPES.get(call.attribute("to"))
    if wanted is None:
        return NotImplemented
    if array.dtype == object:
        return array if wanted in ("int64", "int32") else NotImplemented
    return array.astype(wanted)


def _gather(call: Call) -> Any:
    array, indices = call.numbers(0, "numbers"), call.numbers(1, "indices")
    if indices.dtype == object or array.size * max(1, indices.size) > MAX_KNOWN:
        return NotImplemented
    return np.take(array, indices, axis=call.attribute("axis", 0))


def _slice(call: Call) -> Any:
    array = call.numbers(0, "numbers")
    if any(call.numbers(index, "bounds").dtype == object for index in range(1, len(call)) if call.has(index)):
        return NotImplemented
    starts, ends, axes = call.listed("starts", 1), call.listed("ends", 2), call.listed("axes", 3)
    steps = call.integers(4, "steps") if call.has(4) else None
    if starts is None or ends is None:
        return NotImplemented
    parts = [slice(None)] * array.ndim
    for position, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis, step = axes[position] if axes else position, steps[position] if steps else 1
        # Going backwards, "before the first" is written as a very small number.
        parts[axis] = slice(start, None if step < 0 and end < -array.shape[axis] else end, step)
    return array[tuple(parts)]


def _axes(call: Call, array: Array, extra: int = 0) -> tuple[int, ...]:
    axes = call.listed("axes", 1)
    if axes is None:
        return tuple(axis for axis, size in enumerate(array.shape) if size == 1)
    return tuple(axis % (array.ndim + extra) for axis in axes)


def _unsqueeze(call: Call) -> Any:
    array = call.numbers(0, "numbers")
    count = len(call.listed("axes", 1) or ())
    return np.expand_dims(array, _axes(call, array, count))


def _squeeze(call: Call) -> Any:
    array = call.numbers(0, "numbers")
    return np.squeeze(array, _axes(call, array))


def _reshape(call: Call) -> Any:
    array, shape = call.numbers(0, "numbers"), call.numbers(1, "sizes")
    if shape.dtype == object or call.attribute("allowzero", 0):
        return NotImplemented
    return array.reshape([array.shape[axis] if size == 0 else int(size) for axis, size in enumerate(shape)])


def _expand(call: Call) -> Any:
    array, shape = call.numbers(0, "numbers"), call.numbers(1, "sizes")
    if shape.dtype == object or math.prod(int(size) for size in shape) > MAX_KNOWN:
        return NotImplemented
    return np.broadcast_to(array, np.broadcast_shapes(array.shape, tuple(int(size) for size in shape)))


def _constant_of_shape(call: Call) -> Any:
    shape = call.numbers(0, "sizes")
    if shape.dtype == object or not 0 <= math.prod(int(size) for size in shape) <= 1024:
        return NotImplemented
    value = call.attribute("value", np.zeros(1, np.float32))
    return np.full([int(size) for size in shape], value.reshape(-1)[0], value.dtype)


def _range(call: Call) -> Any:
    given = [call.numbers(index, "bounds") for index in range(3)]
    if any(array.dtype.kind not in "iu" for array in given):
        return NotImplemented
    values = [int(array.reshape(-1)[0]) for array in given]
    if values[2] == 0 or len(range(*values)) > 1024:
        return NotImplemented
    return np.arange(*values, dtype=given[0].dtype)


def _where(call: Call) -> Any:
    condition, yes, no = (call.numbers(index, "numbers") for index in range(3))
    if condition.dtype == object or np.broadcast(condition, yes, no).size > MAX_KNOWN:
        return NotImplemented
    return np.where(condition, yes, no)


def _concat(call: Call) -> Any:
    return np.concatenate([call.numbers(index, "numbers") for index in range(len(call))], call.attribute("axis", 0))


def _reduce(function: Callable[[Any, Any], Any]) -> _Known:
    def run(call: Call) -> Any:
        array = call.numbers(0, "numbers")
        if array.ndim != 1 or array.dtype.kind not in "iO" or not array.size:
            return NotImplemented
        total = array[0]
        for item in array[1:]:
            total = function(total, item)
        total = total if isinstance(total, torch.SymInt) else int(total)
        return pack([total], (1,) if call.attribute("keepdims", 1) else ())

    return _bounded(run)


def shape_of(call: Call) -> Any:
    """Shape: sizes of a tensor, which may vary."""
    value = call.value(0)
    start, end = call.attribute("start", 0), call.attribute("end")
    return pack(list(value.shape)[start:end])


def size_of(call: Call) -> Any:
    """Size: number of elements."""
    return pack([math.prod(call.value(0).shape)], ())


KNOWN: dict[str, _Known] = {
    "Add": _pair(operator.add),
    "Sub": _pair(operator.sub),
    "Mul": _pair(operator.mul),
    "Div": _pair(operator.truediv, integers=_divide),
    "Mod": _pair(np.fmod, integers=operator.mod),
    "Equal": _pair(_compare(operator.eq)),
    "Less": _pair(_compare(operator.lt)),
    "LessOrEqual": _pair(_compare(operator.le)),
    "Greater": _pair(_compare(operator.gt)),
    "GreaterOrEqual": _pair(_compare(operator.ge)),
    "And": _pair(operator.and_),
    "Or": _pair(operator.or_),
    "Min": _extreme(torch.sym_min, np.minimum),
    "Max": _extreme(torch.sym_max, np.maximum),
    "Identity": _bounded(lambda call: call.numbers(0, "numbers")),
    "Not": _unary(np.logical_not),
    "Neg": _unary(np.negative),
    "Sqrt": _unary(np.sqrt),
    "Floor": _unary(np.floor),
    "Ceil": _unary(np.ceil),
    "Reciprocal": _unary(lambda array: 1 / array),
    "Abs": _unary(np.abs),
    "Cast": _bounded(_cast),
    "Gather": _bounded(_gather),
    "Slice": _bounded(_slice),
    "Unsqueeze": _bounded(_unsqueeze),
    "Squeeze": _bounded(_squeeze),
    "Reshape": _bounded(_reshape),
    "Expand": _bounded(_expand),
    "ConstantOfShape": _bounded(_constant_of_shape),
    "Range": _bounded(_range),
    "Where": _bounded(_where),
    "Concat": _bounded(_concat),
    "ReduceProd": _reduce(operator.mul),
    "ReduceSum": _reduce(operator.add),
    "ReduceMax": _reduce(torch.sym_max),
    "ReduceMin": _reduce(torch.sym_min),
    "Shape": shape_of,
    "Size": size_of,
}
"""Operator -> its result on known values; NotImplemented where tensors must be used."""
