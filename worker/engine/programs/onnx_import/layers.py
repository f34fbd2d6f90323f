"""Operators that are a torch.nn layer: one is made of the file's tensors, and called."""

from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.programs.onnx_import.call import Call


def trained(call: Call, index: int) -> str | None:
    """Return the name of an argument that is a constant floating-point tensor, or None."""
    name = call.node.inputs[index] if call.has(index) else ""
    array = call.owner.constants.arrays.get(name)
    return name if array is not None and array.dtype.kind == "f" else None


def _vector(call: Call, index: int, size: int) -> bool:
    """Whether an argument is left out or a constant vector of this size."""
    if not call.has(index):
        return True
    name = trained(call, index)
    return name is not None and call.owner.constants.arrays[name].shape == (size,)


def fill(call: Call, module: nn.Module, held: dict[str, int], *, turned: tuple[str, ...] = ()) -> nn.Module:
    """Give a layer its tensors: attribute -> argument. Attributes in `turned` hold the argument's transpose."""
    constants = call.owner.constants
    for attribute, index in held.items():
        parameter = constants.parameter(call.node.inputs[index], turned=attribute in turned)
        if attribute in module._buffers:
            setattr(module, attribute, parameter.detach().clone())
        else:
            setattr(module, attribute, parameter)
    return module


def hold(call: Call, kind: str, make: Any, held: dict[str, int], key: tuple[Any, ...] = (),
         turned: tuple[str, ...] = ()) -> nn.Module:  # fmt: skip
    """Return the layer of this call. `make`: builds it on the meta device."""
    held = {attribute: index for attribute, index in held.items() if call.has(index)}
    hints = {attribute: call.node.inputs[index] for attribute, index in held.items()}
    return call.owner.layer(call, kind, key, lambda: fill(call, make(), held, turned=turned), hints)


def linear(call: Call, weight: int, bias: int, *, turned: bool) -> Tensor | None:
    """Return x @ W^T + b as nn.Linear; `turned`: the argument is W^T. None where the arguments are no weights."""
    name = trained(call, weight)
    if name is None or call.owner.constants.arrays[name].ndim != 2:
        return None
    shape = call.owner.constants.arrays[name].shape
    size_in, size_out = shape if turned else reversed(shape)
    if not _vector(call, bias, size_out):
        return None
    held = {"weight": weight, "bias": bias}
    has_bias = call.has(bias)

    def make() -> nn.Module:
        return nn.Linear(size_in, size_out, bias=has_bias, device="meta")

    layer = hold(call, "linear", make, held, (turned,), ("weight",) if turned else ())
    result: Tensor = layer(call.tensor(0))
    return result


def gemm(call: Call) -> Any:
    """Gemm: alpha A B + beta C."""
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    if alpha == beta == 1.0 and not call.attribute("transA", 0):
        result = linear(call, 1, 2, turned=not call.attribute("transB", 0))
        if result is not None:
            return result
    left, right = call.tensor(0), call.tensor(1)
    product = torch.matmul(left.t() if call.attribute("transA", 0) else left,
                           right.t() if call.attribute("transB", 0) else right)  # fmt: skip
    product = product if alpha == 1.0 else product * alpha
    if not call.has(2):
        return product
    return product + (call.tensor(2) if beta == 1.0 else call.tensor(2) * beta)


def matmul(call: Call) -> Any:
    """MatMul; also with a bias that was added behind it, as the third argument."""
    if call.known(0) is None:
        result = linear(call, 1, 2, turned=True)
        if result is not None:
            return result
    product = torch.matmul(call.tensor(0), call.tensor(1))
    return product + call.tensor(2) if call.has(2) else product


def embedding(call: Call) -> Tensor | None:
    """Gather of rows of a weight as nn.Embedding; None where it is another Gather."""
    name = trained(call, 0)
    if name is None or call.attribute("axis", 0) != 0 or call.node.inputs[1] in call.owner.constants.arrays:
        return None
    array = call.owner.constants.arrays[name]
    if array.ndim != 2 or name not in call.owner.constants.trained:
        return None
    rows, width = array.shape
    layer = hold(call, "embedding", lambda: nn.Embedding(rows, width, device="meta"), {"weight": 0})
    result: Tensor = layer(call.tensor(1))
    return result


def batch_norm(call: Call) -> Any:
    """BatchNormalization with stored statistics."""
    tensor = call.tensor(0)
    if call.attribute("training_mode", 0) or any(call.wants(index) for index in range(1, 5)):
        return call.refuse("it is in training mode")
    kinds: dict[int, type[nn.Module]] = {
        2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d,
    }  # fmt: skip
    size = tensor.shape[1] if tensor.dim() > 1 else 0
    if tensor.dim() not in kinds or not isinstance(size, int) or not all(_vector(call, i, size) for i in range(1, 5)):
        return call.refuse("its arguments are no constant vectors of one number per channel")
    epsilon, momentum = call.attribute("epsilon", 1e-5), 1 - call.attribute("momentum", 0.9)
    variance = call.owner.constants.arrays[call.node.inputs[4]]
    if bool((variance < 0).any()):
        return call.refuse("a stored variance is negative")

    def make() -> nn.Module:
        module: nn.Module = kinds[tensor.dim()](size, eps=epsilon, momentum=round(momentum, 7), device="meta")
        module.num_batches_tracked = torch.zeros((), dtype=torch.long)
        return module

    held = {"weight": 1, "bias": 2, "running_mean": 3, "running_var": 4}
    return hold(call, "batch_norm", make, held, (epsilon, momentum, tensor.dim()))(tensor)


def layer_norm(call: Call) -> Any:
    """LayerNormalization over the last axes."""
    tensor, axis = call.tensor(0), call.attribute("axis", -1)
    if call.wants(1) or call.wants(2):
        return call.refuse("its mean and deviation are read")
    shape = list(tensor.shape[axis % tensor.dim() :])
    epsilon = call.attribute("epsilon", 1e-5)
    arrays = call.owner.constants.arrays
    fits = all(
        call.node.inputs[index] in arrays and list(arrays[call.node.inputs[index]].shape) == shape
        for index in (1, 2)
        if call.has(index)
    )
    if fits and all(isinstance(size, int) for size in shape):
        bias = call.has(2)

        def make() -> nn.Module:
            return nn.LayerNorm(shape, eps=epsilon, bias=bias, device="meta")

        return hold(call, "layer_norm", make, {"weight": 1, "bias": 2}, (epsilon,))(tensor)
    normal = nn.functional.layer_norm(tensor, shape, eps=epsilon) * call.tensor(1)
    return normal + call.tensor(2) if call.has(2) else normal


def rms_norm(call: Call) -> Any:
    """RMSNormalization over the last axes."""
    tensor, axis = call.tensor(0), call.attribute("axis", -1)
    shape, epsilon = list(tensor.shape[axis % tensor.dim() :]), call.attribute("epsilon", 1e-5)
    array = call.owner.constants.arrays.get(call.node.inputs[1])
    if array is None or list(array.shape) != shape:
        return nn.functional.rms_norm(tensor, shape, eps=epsilon) * call.tensor(1)
    layer = hold(call, "rms_norm", lambda: nn.RMSNorm(shape, eps=epsilon, device="meta"), {"weight": 1}, (epsilon,))
    return layer(tensor)


def group_norm(call: Call) -> Any:
    """GroupNormalization; before version 21 there is one scale per group."""
    tensor, groups = call.tensor(0), call.attribute("num_groups")
    size, epsilon = tensor.shape[1], call.attribute("epsilon", 1e-5)
    if isinstance(size, int) and _vector(call, 1, size) and _vector(call, 2, size):

        def make() -> nn.Module:
            return nn.GroupNorm(groups, size, eps=epsilon, device="meta")

        return hold(call, "group_norm", make, {"weight": 1, "bias": 2}, (groups, epsilon))(tensor)
    shape = [1, -1] + [1] * (tensor.dim() - 2)
    each = [call.tensor(index).repeat_interleave(size // groups).reshape(shape) for index in (1, 2)]
    return nn.functional.group_norm(tensor, groups, eps=epsilon) * each[0] + each[1]


def instance_norm(call: Call) -> Any:
    """InstanceNormalization."""
    tensor, epsilon = call.tensor(0), call.attribute("epsilon", 1e-5)
    kinds: dict[int, type[nn.Module]] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
    size = tensor.shape[1]
    ones = all(_is_plain(call, index, number) for index, number in ((1, 1.0), (2, 0.0)))
    if ones or tensor.dim() not in kinds or not isinstance(size, int) or not all(
        trained(call, index) and _vector(call, index, size) for index in (1, 2)
    ):  # fmt: skip
        weight, bias = (None, None) if ones else (call.tensor(1), call.tensor(2))
        return nn.functional.instance_norm(tensor, weight=weight, bias=bias, eps=epsilon)

    def make() -> nn.Module:
        module: nn.Module = kinds[tensor.dim()](size, eps=epsilon, affine=True, device="meta")
        return module

    return hold(call, "instance_norm", make, {"weight": 1, "bias": 2}, (epsilon, tensor.dim()))(tensor)


def _is_plain(call: Call, index: int, number: float) -> bool:
    array = call.owner.constants.arrays.get(call.node.inputs[index])
    return array is not None and bool((array == number).all())


def prelu(call: Call) -> Any:
    """PRelu: one slope, or one per channel."""
    tensor, name = call.tensor(0), trained(call, 1)
    array = call.known(1)
    size = tensor.shape[1] if tensor.dim() > 1 else 0
    if array is not None and array.size == 1:
        return nn.functional.leaky_relu(tensor, float(array.reshape(-1)[0]))
    per_channel = name is not None and array is not None and array.size == size and (
        array.shape[:1] == (size,) if array.ndim == tensor.dim() - 1 else array.shape[:2] == (1, size)
    )  # fmt: skip
    if not per_channel:
        slope = call.tensor(1)
        return torch.where(tensor < 0, tensor * slope, tensor)
    constants = call.owner.constants
    assert name is not None

    def make() -> nn.Module:
        module = nn.PReLU(size, device="meta")
        module.weight = nn.Parameter(constants.parameter(name).detach().reshape(-1).clone())
        return module

    return call.owner.layer(call, "prelu", (), make, {"weight": name})(tensor)
