"""Operators that work element by element, reductions, and comparisons."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from worker.engine.programs.onnx_import.call import Call, Operator
from worker.engine.programs.onnx_import.tensors import NUMPY_TYPES


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda call: function(call.tensor(0))


def _pair(function: Callable[[Any, Any], Any]) -> Operator:
    def run(call: Call) -> Any:
        left, right = call.value(0), call.value(1)
        if isinstance(left, Tensor):
            return function(left, call.operand(1, left.dim()))
        if isinstance(right, Tensor):
            return function(call.operand(0, right.dim()), right)
        return function(call.tensor(0), call.tensor(1))

    return run


def _several(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def run(call: Call) -> Any:
        result = call.tensor(0)
        for index in range(1, len(call)):
            result = function(result, call.tensor(index))
        return result

    return run


def _tensors(function: Callable[[Tensor, Tensor], Any]) -> Operator:
    return lambda call: function(call.tensor(0), call.tensor(1))


def _divide(left: Any, right: Any) -> Any:
    whole = left if isinstance(left, Tensor) else right
    if whole.is_floating_point():
        return left / right
    return torch.div(left, right, rounding_mode="trunc")


def _power(call: Call) -> Any:
    base, exponent = call.tensor(0), call.operand(1, call.tensor(0).dim())
    if isinstance(exponent, float) and exponent.is_integer() and base.is_floating_point():
        exponent = int(exponent)
    result = torch.pow(base, exponent)
    return result.to(base.dtype) if result.dtype != base.dtype else result


def _modulo(call: Call) -> Any:
    left, right = call.tensor(0), call.tensor(1)
    return torch.fmod(left, right) if call.attribute("fmod", 0) else torch.remainder(left, right)


def _clip(call: Call) -> Any:
    tensor = call.tensor(0)
    low, high = call.number("min", 1), call.number("max", 2)
    if low is None and high is None:
        return tensor
    bounds: list[Any] = [low, high]
    if not tensor.is_floating_point():
        bounds = [None if bound is None else int(bound) for bound in bounds]
    # Exporters write "no bound" as the largest number there is.
    bounds = [None if bound is None or abs(bound) >= 3e38 else bound for bound in bounds]
    if bounds == [0.0, 6.0]:
        return functional.relu6(tensor)
    return tensor if bounds == [None, None] else torch.clamp(tensor, *bounds)


def _cast(call: Call) -> Any:
    name = NUMPY_TYPES.get(call.attribute("to"))
    if name is None:
        return call.refuse(f"it makes numbers of type {call.attribute('to')}, which are not taken")
    return call.tensor(0).to(getattr(torch, name))


def _where(call: Call) -> Any:
    yes, no = call.value(1), call.value(2)
    rank = max(call.value(0).ndim, yes.ndim, no.ndim)
    condition = call.tensor(0)
    if isinstance(yes, Tensor) and yes.is_floating_point():
        return torch.where(condition, yes, call.operand(2, rank))
    if isinstance(no, Tensor) and no.is_floating_point():
        return torch.where(condition, call.operand(1, rank), no)
    return torch.where(condition, call.tensor(1), call.tensor(2))


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def run(call: Call) -> Any:
        tensor, axes = call.tensor(0), call.listed("axes", 1)
        if not axes:
            if call.attribute("noop_with_empty_axes", 0):
                return tensor
            axes = list(range(tensor.dim()))
        if not axes:
            return function(tensor.unsqueeze(0), [0], False)
        return function(tensor, [axis % tensor.dim() for axis in axes], bool(call.attribute("keepdims", 1)))

    return run


def _product(tensor: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        tensor = torch.prod(tensor, axis, keep)
    return tensor.to(tensor.dtype)


def _extreme_index(function: Any) -> Operator:
    def run(call: Call) -> Any:
        if call.attribute("select_last_index", 0):
            return call.refuse("select_last_index is not taken")
        return function(call.tensor(0), call.attribute("axis", 0), bool(call.attribute("keepdims", 1)))

    return run


def _softmax(function: Any) -> Operator:
    def run(call: Call) -> Any:
        tensor = call.tensor(0)
        axis = call.attribute("axis", -1 if call.opset >= 13 else 1)
        if call.opset >= 13 or axis % tensor.dim() == tensor.dim() - 1:
            return function(tensor, axis)
        # Older versions see a matrix: all axes from this one on are one.
        return function(tensor.flatten(axis), -1).reshape(tensor.shape)

    return run


def _cumulate(call: Call) -> Any:
    tensor, axis = call.tensor(0), int(call.numbers(1, "axes").reshape(-1)[0])
    turned = tensor.flip(axis) if call.attribute("reverse", 0) else tensor
    total = torch.cumsum(turned, axis, dtype=tensor.dtype)
    if call.attribute("exclusive", 0):
        total = total - turned
    return total.flip(axis) if call.attribute("reverse", 0) else total


def _gelu(call: Call) -> Any:
    return functional.gelu(call.tensor(0), approximate=call.attribute("approximate", "none"))


def _hard_sigmoid(call: Call) -> Any:
    alpha, beta = call.attribute("alpha", 0.2), call.attribute("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return functional.hardsigmoid(call.tensor(0))
    return torch.clamp(call.tensor(0) * alpha + beta, 0.0, 1.0)


def _shrink(call: Call) -> Any:
    tensor, limit, bias = call.tensor(0), call.attribute("lambd", 0.5), call.attribute("bias", 0.0)
    zero = torch.zeros_like(tensor)
    return torch.where(tensor < -limit, tensor + bias, torch.where(tensor > limit, tensor - bias, zero))


def _selu(call: Call) -> Any:
    alpha, gamma = call.attribute("alpha", 1.6732632423543772), call.attribute("gamma", 1.0507009873554805)
    tensor = call.tensor(0)
    return gamma * torch.where(tensor > 0, tensor, alpha * torch.expm1(tensor))


def _swish(call: Call) -> Any:
    tensor, alpha = call.tensor(0), call.attribute("alpha", 1.0)
    return functional.silu(tensor) if alpha == 1.0 else tensor * torch.sigmoid(alpha * tensor)


def _equal(left: Any, right: Any) -> Any:
    return left == right if isinstance(left, Tensor) else right == left


ELEMENTWISE: dict[str, Operator] = {
    **{
        name: _unary(cast("Callable[[Tensor], Tensor]", function))
        for name, function in {
            "Abs": torch.abs,
            "Neg": torch.neg,
            "Exp": torch.exp,
            "Log": torch.log,
            "Sqrt": torch.sqrt,
            "Reciprocal": torch.reciprocal,
            "Floor": torch.floor,
            "Ceil": torch.ceil,
            "Round": torch.round,
            "Sign": torch.sign,
            "Sin": torch.sin,
            "Cos": torch.cos,
            "Tan": torch.tan,
            "Asin": torch.asin,
            "Acos": torch.acos,
            "Atan": torch.atan,
            "Sinh": torch.sinh,
            "Cosh": torch.cosh,
            "Asinh": torch.asinh,
            "Acosh": torch.acosh,
            "Atanh": torch.atanh,
            "Tanh": torch.tanh,
            "Sigmoid": torch.sigmoid,
            "Relu": functional.relu,
            "Erf": torch.erf,
            "Not": torch.logical_not,
            "Softplus": functional.softplus,
            "Softsign": functional.softsign,
            "IsNaN": torch.isnan,
            "BitwiseNot": torch.bitwise_not,
            "HardSwish": functional.hardswish,
            "Mish": functional.mish,
            "Identity": lambda tensor: tensor,
        }.items()
    },
    "Add": _pair(lambda left, right: left + right),
    "Sub": _pair(lambda left, right: left - right),
    "Mul": _pair(lambda left, right: left * right),
    "Div": _pair(_divide),
    "Equal": _pair(_equal),
    "Greater": _pair(lambda left, right: left > right),
    "GreaterOrEqual": _pair(lambda left, right: left >= right),
    "Less": _pair(lambda left, right: left < right),
    "LessOrEqual": _pair(lambda left, right: left <= right),
    "And": _tensors(torch.logical_and),
    "Or": _tensors(torch.logical_or),
    "Xor": _tensors(torch.logical_xor),
    "BitwiseAnd": _tensors(torch.bitwise_and),
    "BitwiseOr": _tensors(torch.bitwise_or),
    "BitwiseXor": _tensors(torch.bitwise_xor),
    "Pow": _power,
    "Mod": _modulo,
    "Min": _several(torch.minimum),
    "Max": _several(torch.maximum),
    "Sum": _several(torch.add),
    "Mean": lambda call: _several(torch.add)(call) / len(call),
    "Clip": _clip,
    "Cast": _cast,
    "CastLike": lambda call: call.tensor(0).to(call.tensor(1).dtype),
    "Where": _where,
    "LeakyRelu": lambda call: functional.leaky_relu(call.tensor(0), call.attribute("alpha", 0.01)),
    "Elu": lambda call: functional.elu(call.tensor(0), call.attribute("alpha", 1.0)),
    "Celu": lambda call: functional.celu(call.tensor(0), call.attribute("alpha", 1.0)),
    "Selu": _selu,
    "Gelu": _gelu,
    "Swish": _swish,
    "HardSigmoid": _hard_sigmoid,
    "Shrink": _shrink,
    "ThresholdedRelu": lambda call: functional.threshold(call.tensor(0), call.attribute("alpha", 1.0), 0.0),
    "Softmax": _softmax(functional.softmax),
    "LogSoftmax": _softmax(functional.log_softmax),
    "ReduceMean": _reduction(lambda tensor, axes, keep: tensor.mean(axes, keep)),
    "ReduceSum": _reduction(lambda tensor, axes, keep: tensor.sum(axes, keep, dtype=tensor.dtype)),
    "ReduceMax": _reduction(lambda tensor, axes, keep: tensor.amax(axes, keep)),
    "ReduceMin": _reduction(lambda tensor, axes, keep: tensor.amin(axes, keep)),
    "ReduceProd": _reduction(_product),
    "ReduceL1": _reduction(lambda tensor, axes, keep: tensor.abs().sum(axes, keep, dtype=tensor.dtype)),
    "ReduceL2": _reduction(lambda tensor, axes, keep: tensor.square().sum(axes, keep).sqrt()),
    "ReduceSumSquare": _reduction(lambda tensor, axes, keep: tensor.square().sum(axes, keep, dtype=tensor.dtype)),
    "ReduceLogSum": _reduction(lambda tensor, axes, keep: tensor.sum(axes, keep).log()),
    "ReduceLogSumExp": _reduction(lambda tensor, axes, keep: tensor.logsumexp(axes, keep)),
    "ArgMax": _extreme_index(torch.argmax),
    "ArgMin": _extreme_index(torch.argmin),
    "CumSum": _cumulate,
}
"""Operator -> its result."""
