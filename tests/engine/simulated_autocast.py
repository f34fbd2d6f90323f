"""What torch.autocast does on CUDA, for a device that has no autocast of its own.

On the CPU torch casts by other lists: there a layer norm stays in bfloat16, which on CUDA gives float32. To see whether
a program's types fit together on a GPU, the casts must be those of CUDA.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

# From "CUDA Ops that can autocast" in torch's documentation of torch.amp, what no imported graph calls left out.
_LOWER = """
__matmul__ addbmm addmm addmv addr baddbmm bmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
convolution einsum gru linear lstm matmul mm mv prelu scaled_dot_product_attention
"""
_WIDER = """
__pow__ __rpow__ __rtruediv__ acos asin binary_cross_entropy_with_logits cdist cosh cosine_similarity cross_entropy
cumprod cumsum dist erfinv exp expm1 group_norm kl_div l1_loss layer_norm log log10 log1p log2 log_softmax mse_loss
nll_loss norm normalize pow prod reciprocal renorm rms_norm rsqrt sinh smooth_l1_loss softmax softmin softplus sum tan
"""
_WIDEST = "addcdiv addcmul atan2 bilinear cat cross dot grid_sample index_put scatter_add stack tensordot"
_POLICIES = {
    name: policy
    for policy, names in (("lower", _LOWER), ("wider", _WIDER), ("widest", _WIDEST))
    for name in names.split()
}
_CAST = (torch.float32, torch.float16, torch.bfloat16)
"""Doubles and integers stay what they are."""


class _Autocast(TorchFunctionMode):
    """Works on torch's functions, so above autograd, which then takes the casts back."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name: str = getattr(func, "_opname", None) or getattr(func, "__name__", None) or ""
        wanted = self._choose(name, (args, kwargs))
        if wanted is not None:
            args, kwargs = tree_map(lambda each: _cast(each, wanted), (args, kwargs))
        return func(*args, **(kwargs or {}))

    def _choose(self, name: str, arguments: Any) -> torch.dtype | None:
        match _POLICIES.get(name):
            case "lower":
                return self._dtype
            case "wider":
                return torch.float32
            case "widest":
                found = {each.dtype for each in tree_leaves(arguments) if isinstance(each, Tensor)}
                return torch.float32 if len(found & set(_CAST)) > 1 else None
        return None


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype in _CAST else value


@contextmanager
def autocast_as_on_cuda() -> Iterator[None]:
    """Within it torch.autocast casts as on CUDA, whatever the device."""

    def make(device_type: str, dtype: torch.dtype) -> TorchFunctionMode:  # noqa: ARG001
        return _Autocast(dtype)

    replacement: Callable[..., TorchFunctionMode] = make
    with patch.object(torch, "autocast", replacement):
        yield
