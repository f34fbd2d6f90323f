"""Operators that move, cut, join and pick elements."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker.engine.programs.onnx_import.call import Call, Operator
from worker.engine.programs.onnx_import.layers import embedding
from worker.engine.programs.onnx_import.shape_arithmetic import shape_of, size_of

_FAR = 2**31 - 2


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _reshape(call: Call) -> Any:
    tensor, wanted = call.tensor(0), call.sizes(1)
    if not call.attribute("allowzero", 0):
        wanted = [tensor.shape[axis] if isinstance(size, int) and size == 0 else size
                  for axis, size in enumerate(wanted)]  # fmt: skip
    return tensor.reshape(wanted)


def _transpose(call: Call) -> Any:
    tensor = call.tensor(0)
    return tensor.permute(call.attribute("perm", tuple(reversed(range(tensor.dim())))))


def _concat(call: Call) -> Any:
    return torch.cat([call.tensor(index) for index in range(len(call))], call.attribute("axis"))


def _split(call: Call) -> Any:
    tensor, axis = call.tensor(0), call.attribute("axis", 0)
    sizes = call.listed("split", 1)
    if sizes is not None:
        return torch.split(tensor, sizes, axis)
    count = call.attribute("num_outputs", len(call.node.outputs))
    length = tensor.shape[axis]
    return torch.split(tensor, (length + count - 1) // count, axis)


def _slice(call: Call) -> Any:
    tensor = call.tensor(0)
    rank = tensor.dim()
    starts = list(call.attribute("starts", ())) or call.sizes(1, "starts")
    ends = list(call.attribute("ends", ())) or call.sizes(2, "ends")
    axes = call.listed("axes", 3) or list(range(len(starts)))
    steps = call.integers(4, "steps") if call.has(4) else [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 0:
            tensor = _slice_backwards(call, tensor, axis % rank, start, end, step)
            continue
        stop = None if isinstance(end, int) and end > _FAR else end
        tensor = torch.ops.aten.slice.Tensor(tensor, axis % rank, start, stop, step)
    return tensor


def _slice_backwards(call: Call, tensor: Tensor, axis: int, start: Any, end: Any, step: int) -> Tensor:
    size = tensor.shape[axis]
    if step == -1 and isinstance(start, int) and (start == -1 or start > _FAR) and isinstance(end, int) and end < -_FAR:
        return tensor.flip(axis)
    if not all(isinstance(item, int) for item in (size, start, end)):
        return call.refuse("a slice goes backwards along an axis whose size varies")  # type: ignore[no-any-return]
    picked = list(range(size))[slice(start, None if end < -size else end, step)]
    return tensor.index_select(axis, torch.tensor(picked, dtype=torch.int64))


def _axes(call: Call) -> list[int]:
    return call.listed("axes", 1) or []


def _squeeze(call: Call) -> Any:
    tensor, axes = call.tensor(0), _axes(call)
    if not axes:
        axes = [axis for axis, size in enumerate(tensor.shape) if _is_one(size)]
    wrong = [axis for axis in axes if not _is_one(tensor.shape[axis])]
    if wrong:
        return call.refuse(f"axis {wrong[0]} of the shape {tuple(tensor.shape)} is not 1")
    return tensor.squeeze(axes)


def _unsqueeze(call: Call) -> Any:
    tensor, axes = call.tensor(0), _axes(call)
    rank = tensor.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        tensor = tensor.unsqueeze(axis)
    return tensor


def _expand(call: Call) -> Any:
    # Both sides broadcast: where the wanted size is 1, the tensor's own stays.
    tensor, wanted = call.tensor(0), call.sizes(1)
    rank = max(tensor.dim(), len(wanted))
    own = [1] * (rank - tensor.dim()) + list(tensor.shape)
    wanted = [1] * (rank - len(wanted)) + wanted
    lead = rank - tensor.dim()
    sizes = [
        size if axis < lead else -1 if _is_one(size) or not _is_one(own[axis]) else size
        for axis, size in enumerate(wanted)
    ]
    for mine, size in zip(own, wanted, strict=True):
        if isinstance(mine, int) and isinstance(size, int) and 1 not in (mine, size) and mine != size:
            return call.refuse(f"the shape {tuple(own)} does not broadcast to {tuple(wanted)}")
    return tensor.expand(sizes)


def _tile(call: Call) -> Any:
    return call.tensor(0).repeat(call.sizes(1, "repeats"))


def _flatten(call: Call) -> Any:
    tensor, axis = call.tensor(0), call.attribute("axis", 1)
    axis = axis + tensor.dim() if axis < 0 else axis
    if axis == 1 and tensor.dim() > 1:
        return tensor.flatten(1)
    return tensor.reshape(math.prod(tensor.shape[:axis]), math.prod(tensor.shape[axis:]))


def pad(tensor: Tensor, before: list[Any], after: list[Any], mode: str = "constant", value: float = 0.0) -> Tensor:
    """Return a tensor with elements added before and after each axis. Lists cover the last axes."""
    flat: list[Any] = []
    for left, right in zip(reversed(before), reversed(after), strict=True):
        flat += [left, right]
    while len(flat) > 2 and all(isinstance(size, int) and size == 0 for size in flat[-2:]):
        del flat[-2:]
    if all(isinstance(size, int) and size == 0 for size in flat):
        return tensor
    return functional.pad(tensor, flat, mode, value) if mode == "constant" else functional.pad(tensor, flat, mode)


def _pad(call: Call) -> Any:
    tensor = call.tensor(0)
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    mode = modes.get(call.attribute("mode", "constant"))
    if mode is None:
        return call.refuse(f"the mode {call.attribute('mode')!a} is not taken")
    sizes: list[Any] = list(call.attribute("pads", ())) or call.sizes(1, "pads")
    axes = [axis % tensor.dim() for axis in call.integers(3, "axes")] if call.has(3) else list(range(tensor.dim()))
    before, after = [0] * tensor.dim(), [0] * tensor.dim()
    for position, axis in enumerate(axes):
        before[axis], after[axis] = sizes[position], sizes[position + len(axes)]
    value = call.number("value", 2) or 0.0
    return pad(tensor, before, after, mode, value if tensor.is_floating_point() else int(value))


def _wrapped(indices: Tensor, size: Any) -> Tensor:
    # ONNX counts negative indices from the end.
    return torch.where(indices < 0, indices + size, indices)


def _gather(call: Call) -> Any:
    layer = embedding(call)
    if layer is not None:
        return layer
    tensor, axis = call.tensor(0), call.attribute("axis", 0)
    axis = axis % tensor.dim()
    known = call.known(1)
    if known is not None and known.dtype != object and known.size == 1:
        index = int(known.reshape(-1)[0])
        if known.ndim == 0:
            return tensor.select(axis, index)
        if known.ndim == 1:
            return torch.ops.aten.slice.Tensor(tensor, axis, index, index + 1 if index != -1 else None)
    indices = _wrapped(call.tensor(1), tensor.shape[axis]).to(torch.int64)
    picked = tensor.index_select(axis, indices.reshape(-1))
    return picked.reshape([*tensor.shape[:axis], *indices.shape, *tensor.shape[axis + 1 :]])


def _gather_elements(call: Call) -> Any:
    tensor, axis = call.tensor(0), call.attribute("axis", 0)
    return tensor.gather(axis, _wrapped(call.tensor(1), tensor.shape[axis]).to(torch.int64))


def _positions(call: Call, tensor: Tensor, index: int) -> tuple[Tensor, ...]:
    indices = call.tensor(index)
    parts = indices.unbind(-1)
    return tuple(_wrapped(part, tensor.shape[axis]).to(torch.int64) for axis, part in enumerate(parts))


def _gather_nd(call: Call) -> Any:
    if call.attribute("batch_dims", 0):
        return call.refuse("batch_dims are not taken")
    tensor = call.tensor(0)
    return tensor[_positions(call, tensor, 1)]


def _scatter_nd(call: Call) -> Any:
    if call.attribute("reduction", "none") != "none":
        return call.refuse("a reduction is not taken")
    tensor = call.tensor(0)
    return tensor.index_put(_positions(call, tensor, 1), call.tensor(2))


def _scatter_elements(call: Call) -> Any:
    if call.attribute("reduction", "none") != "none":
        return call.refuse("a reduction is not taken")
    tensor, axis = call.tensor(0), call.attribute("axis", 0)
    return tensor.scatter(axis, _wrapped(call.tensor(1), tensor.shape[axis]).to(torch.int64), call.tensor(2))


def _depth_to_space(call: Call) -> Any:
    tensor, size = call.tensor(0), call.attribute("blocksize")
    if call.attribute("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(tensor, size)
    batch, channels, height, width = tensor.shape
    parts = tensor.reshape(batch, size, size, channels // size**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(batch, channels // size**2, height * size, width * size)


def _space_to_depth(call: Call) -> Any:
    tensor, size = call.tensor(0), call.attribute("blocksize")
    batch, channels, height, width = tensor.shape
    parts = tensor.reshape(batch, channels, height // size, size, width // size, size).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(batch, channels * size**2, height // size, width // size)


def _triangle(call: Call) -> Any:
    diagonal = int(call.integers(1, "diagonals")[0]) if call.has(1) else 0
    return (torch.triu if call.attribute("upper", 1) else torch.tril)(call.tensor(0), diagonal)


def _constant_of_shape(call: Call) -> Any:
    value = call.attribute("value")
    kind = torch.float32 if value is None else getattr(torch, str(value.dtype))
    return torch.full(call.sizes(0), 0.0 if value is None else value.reshape(-1)[0].item(), dtype=kind)


def _range(call: Call) -> Any:
    bounds = [call.numbers(index, "bounds").reshape(-1)[0] for index in range(3)]
    known = call.known(0)
    kind = torch.int64 if known is None or known.dtype == object else getattr(torch, str(known.dtype))
    limits: list[Any] = [bound if isinstance(bound, torch.SymInt) else bound.item() for bound in bounds]
    return torch.arange(limits[0], limits[1], limits[2], dtype=kind)


def _one_hot(call: Call) -> Any:
    depth, axis = int(call.integers(1, "depths")[0]), call.attribute("axis", -1)
    indices, values = call.tensor(0), call.tensor(2)
    axis = axis % (indices.dim() + 1)
    shape = [1] * (indices.dim() + 1)
    shape[axis] = depth
    places = torch.arange(depth, dtype=indices.dtype).reshape(shape)
    return torch.where(_wrapped(indices, depth).unsqueeze(axis) == places, values[1], values[0])


def _top_k(call: Call) -> Any:
    tensor, axis = call.tensor(0), call.attribute("axis", -1)
    count = call.listed("k", 1)
    if not count:
        return call.refuse("k is missing")
    values, indices = torch.topk(tensor, count[0], axis, bool(call.attribute("largest", 1)))
    return values, indices


SHAPES: dict[str, Operator] = {
    "Shape": shape_of,
    "Size": size_of,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Tile": _tile,
    "Flatten": _flatten,
    "Pad": _pad,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "ScatterElements": _scatter_elements,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Trilu": _triangle,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "OneHot": _one_hot,
    "TopK": _top_k,
}
"""Operator -> its result."""
