"""Convolution, pooling and resizing."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.engine.programs.onnx_import.call import Call
from worker.engine.programs.onnx_import.layers import hold, trained
from worker.engine.programs.onnx_import.table_shapes import pad

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MAX = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
_AVERAGE = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)
_ADAPTIVE = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d)


class Window:
    """What convolutions and pools have in common: kernel, stride, dilation and padding, one number per axis."""

    def __init__(self, call: Call, rank: int, kernel: list[int]) -> None:
        self.rank, self.kernel = rank, kernel
        self.stride = list(call.attribute("strides", (1,) * rank))
        self.dilation = list(call.attribute("dilations", (1,) * rank))
        pads = list(call.attribute("pads", (0,) * (2 * rank)))
        self.auto = call.attribute("auto_pad", "NOTSET")
        lengths = {len(self.kernel), len(self.stride), len(self.dilation), len(pads) // 2, rank}
        wanted = [*self.kernel, *self.stride, *self.dilation]
        if len(lengths) > 1 or min(wanted) < 1 or max([*wanted, *pads]) > 2**20 or min(pads) < 0:
            call.refuse("kernel, stride, dilation and padding do not fit together")
        if self.auto not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
            call.refuse(f"the padding {self.auto!a} is not known")
        self.before: list[Any]
        self.after: list[Any]
        self.before, self.after = (pads[:rank], pads[rank:]) if self.auto == "NOTSET" else ([0] * rank, [0] * rank)
        self.known = True
        """Whether the padding is the same for every input."""

    def fit(self, sizes: list[Any]) -> None:
        """Work out the padding where it is such that size / stride elements come out."""
        if not self.auto.startswith("SAME"):
            return
        before: list[Any] = []
        after: list[Any] = []
        for axis, size in enumerate(sizes):
            reach, stride = (self.kernel[axis] - 1) * self.dilation[axis] + 1, self.stride[axis]
            if stride == 1:
                total: Any = reach - 1
            else:
                self.known = self.known and isinstance(size, int)
                total = torch.sym_max((-(-size // stride) - 1) * stride + reach - size, 0)
            small, large = total // 2, total - total // 2
            before.append(large if self.auto == "SAME_LOWER" else small)
            after.append(small if self.auto == "SAME_LOWER" else large)
        self.before, self.after = before, after

    @property
    def even(self) -> bool:
        """Whether torch's layers can pad so themselves."""
        return self.known and self.before == self.after


def convolution(call: Call) -> Any:
    """Conv."""
    tensor, weight = call.tensor(0), call.value(1)
    rank, groups = tensor.dim() - 2, call.attribute("group", 1)
    window = Window(call, rank, list(weight.shape[2:]))
    window.fit(list(tensor.shape[2:]))
    padding: Any = tuple(window.before)
    if not window.even:
        tensor, padding = pad(tensor, window.before, window.after), (0,) * rank
    options = (tuple(window.stride), padding, tuple(window.dilation))
    if not 1 <= rank <= 3:
        return call.refuse(f"it has {rank} axes besides batch and channels")
    if trained(call, 1) is None or (call.has(2) and trained(call, 2) is None):
        function = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
        return function(tensor, call.tensor(1), call.tensor(2) if call.has(2) else None, *options, groups)
    bias = call.has(2)

    def make() -> nn.Module:
        return _CONVOLUTIONS[rank - 1](weight.shape[1] * groups, weight.shape[0], tuple(window.kernel), options[0],  # type: ignore[arg-type]
                                       options[1], options[2], groups, bias, device="meta")  # fmt: skip

    return hold(call, "conv", make, {"weight": 1, "bias": 2}, (*options, groups))(tensor)


def transposed_convolution(call: Call) -> Any:
    """ConvTranspose."""
    tensor, weight = call.tensor(0), call.value(1)
    rank, groups = tensor.dim() - 2, call.attribute("group", 1)
    window = Window(call, rank, list(weight.shape[2:]))
    extra = list(call.attribute("output_padding", (0,) * rank))
    if call.attribute("output_shape") is not None:
        return call.refuse("an output_shape is not taken; give pads")
    if window.auto.startswith("SAME"):
        totals = [
            (kernel - 1) * dilation + 1 - stride + more
            for kernel, dilation, stride, more in zip(window.kernel, window.dilation, window.stride, extra, strict=True)
        ]
        if min(totals) < 0:
            return call.refuse("its kernel is smaller than its stride")
        small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
        upper = window.auto == "SAME_UPPER"
        window.before, window.after = (small, large) if upper else (large, small)
    cropped = not window.even
    padding: Any = (0,) * rank if cropped else tuple(window.before)
    options = (tuple(window.stride), padding, tuple(extra), tuple(window.dilation))
    if not 1 <= rank <= 3 or len(extra) != rank:
        return call.refuse(f"it has {rank} axes besides batch and channels")
    if trained(call, 1) is None or (call.has(2) and trained(call, 2) is None):
        return call.refuse("its weight is no constant of the file")
    bias = call.has(2)

    def make() -> nn.Module:
        return _TRANSPOSED[rank - 1](weight.shape[0], weight.shape[1] * groups, tuple(window.kernel), options[0],  # type: ignore[arg-type]
                                     options[1], options[2], groups, bias, options[3], device="meta")  # fmt: skip

    result = hold(call, "conv_transpose", make, {"weight": 1, "bias": 2}, (*options, groups))(tensor)
    if cropped:
        result = pad(result, [-size for size in window.before], [-size for size in window.after])
    return result


def max_pool(call: Call) -> Any:
    """MaxPool."""
    tensor = call.tensor(0)
    rank = tensor.dim() - 2
    window = Window(call, rank, list(call.attribute("kernel_shape")))
    if call.wants(1) or call.attribute("storage_order", 0):
        return call.refuse("its indices are read")
    window.fit(list(tensor.shape[2:]))
    padding = window.before
    if not window.even or any(2 * size > kernel for size, kernel in zip(padding, window.kernel, strict=True)):
        tensor, padding = pad(tensor, window.before, window.after, value=float("-inf")), [0] * rank
    ceil = bool(call.attribute("ceil_mode", 0))
    return _MAX[rank - 1](tensor, window.kernel, window.stride, padding, window.dilation, ceil)


def average_pool(call: Call) -> Any:
    """AveragePool."""
    tensor = call.tensor(0)
    rank = tensor.dim() - 2
    window = Window(call, rank, list(call.attribute("kernel_shape")))
    if any(size != 1 for size in window.dilation):
        return call.refuse("dilation is not taken")
    window.fit(list(tensor.shape[2:]))
    ceil, whole = bool(call.attribute("ceil_mode", 0)), bool(call.attribute("count_include_pad", 0))
    pool = _AVERAGE[rank - 1]
    small = all(2 * size <= kernel for size, kernel in zip(window.before, window.kernel, strict=True))
    if window.even and small:
        return pool(tensor, window.kernel, window.stride, window.before, ceil, whole)
    padded = pad(tensor, window.before, window.after)
    if whole:
        return pool(padded, window.kernel, window.stride, 0, ceil)
    # The mean over what is no padding: divide by the share of real elements in each window.
    share = pool(
        pad(torch.ones_like(tensor[:1, :1]), window.before, window.after), window.kernel, window.stride, 0, ceil
    )
    return pool(padded, window.kernel, window.stride, 0, ceil) / share


def global_average_pool(call: Call) -> Any:
    """GlobalAveragePool."""
    tensor = call.tensor(0)
    return _ADAPTIVE[tensor.dim() - 3](tensor, [1] * (tensor.dim() - 2))  # type: ignore[arg-type]


def global_max_pool(call: Call) -> Any:
    """GlobalMaxPool."""
    tensor = call.tensor(0)
    return tensor.amax(list(range(2, tensor.dim())), keepdim=True)


def resize(call: Call) -> Any:
    """Resize and Upsample of the last axes."""
    tensor = call.tensor(0)
    rank = tensor.dim() - 2
    mode, scales, sizes = call.attribute("mode", "nearest"), None, None
    place = 2 if call.node.op == "Resize" and call.opset >= 11 else 1
    if call.has(3):
        sizes = call.sizes(3)
    elif call.attribute("scales") is not None or call.has(place):
        given = call.attribute("scales") or call.numbers(place, "scales").reshape(-1).tolist()
        scales = [float(scale) for scale in given]
    axes = call.attribute("axes")
    named = axes is None or [axis % tensor.dim() for axis in axes] == list(range(2, tensor.dim()))
    if (
        not named
        or call.attribute("keep_aspect_ratio_policy", "stretch") != "stretch"
        or call.attribute("antialias", 0)
    ):
        return call.refuse("axes, antialiasing and aspect ratios are not taken")
    if scales and axes is None and (len(scales) != tensor.dim() or scales[:2] != [1.0, 1.0]):
        return call.refuse("batch or channels are resized")
    if not scales and not sizes:
        return call.refuse("neither scales nor sizes are given")
    size: Any = sizes[-rank:] if sizes else None
    scale: Any = scales[-rank:] if scales else None
    where = call.attribute("coordinate_transformation_mode", "half_pixel" if place == 2 else "asymmetric")
    if mode == "nearest":
        return _nearest(call, tensor, size, scale, where)
    kinds = {"linear": ("linear", "bilinear", "trilinear"), "cubic": ("", "bicubic", "")}
    kind = kinds[mode][rank - 1] if mode in kinds and 1 <= rank <= 3 else ""
    weight = call.attribute("cubic_coeff_a", -0.75)
    if not kind or where not in ("half_pixel", "pytorch_half_pixel", "align_corners") or weight != -0.75:
        return call.refuse(f"the mode {mode!a} with the coordinates {where!a} is not taken")
    if call.attribute("exclude_outside", 0):
        return call.refuse("exclude_outside is not taken")
    return functional.interpolate(tensor, size, scale, kind, align_corners=where == "align_corners")


def _nearest(call: Call, tensor: Tensor, size: Any, scale: Any, where: str) -> Any:
    rounding = call.attribute("nearest_mode", "round_prefer_floor")
    if call.node.op == "Upsample" or call.opset < 11:
        rounding = "floor"
    if where == "asymmetric" and rounding == "floor":
        return functional.interpolate(tensor, size, scale, "nearest")
    # An enlargement by a whole number repeats each element, wherever its centre is taken to be.
    grows = scale or [
        wanted / own if isinstance(wanted, int) and isinstance(own, int) else 0.5
        for wanted, own in zip(size, tensor.shape[2:], strict=True)
    ]
    if where in ("half_pixel", "pytorch_half_pixel") and rounding.startswith("round"):
        if all(float(factor).is_integer() and factor >= 1 for factor in grows):
            return functional.interpolate(tensor, size, scale, "nearest")
        if rounding == "round_prefer_ceil":
            return functional.interpolate(tensor, size, scale, "nearest-exact")
    return call.refuse(f"nearest with the coordinates {where!a} and {rounding!a} is not taken for these sizes")


def local_response_norm(call: Call) -> Any:
    """LRN."""
    alpha, beta, bias = call.attribute("alpha", 1e-4), call.attribute("beta", 0.75), call.attribute("bias", 1.0)
    if call.attribute("size") % 2 == 0:
        return call.refuse("its size is even")
    return functional.local_response_norm(call.tensor(0), call.attribute("size"), alpha, beta, bias)
