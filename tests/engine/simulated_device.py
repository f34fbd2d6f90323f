"""A device that is not the CPU on machines that have none: real numbers, and torch's rules about mixing devices.

    with simulated_device() as simulated:
        model.to(DEVICE)(inputs.to(DEVICE))
        assert simulated.num_operators > 0

Tensors on it hold their numbers in CPU tensors, but say that they are elsewhere, and take no part in anything a CUDA
tensor takes no part in: operators that mix devices, `.numpy()`. So code that forgets to move something fails here as it
would on a GPU. It goes by the name of a second meta device: gradients of meta tensors are computed on the calling
thread, which torch does for no other device but the CPU, and nobody else asks for one with a number.
Autocast is that of CUDA (simulated_autocast.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from tests.engine.simulated_autocast import autocast_as_on_cuda

DEVICE = torch.device("meta", 1)
CPU = torch.device("cpu")
aten = torch.ops.aten
_COPIES = {aten._to_copy.default}
_ANY_DEVICE = {aten.copy_.default}
_INDEXED = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default}
"""These take indices from the CPU."""
_JOINS = {aten.stack.default, aten.cat.default}
"""These take no single number from the CPU beside tensors of the device, as operators element by element do."""
_READS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten._unique2.default, aten.bincount.default,
}  # fmt: skip
"""What these return, or its size, is known to the host only when the device has done all that it was told before."""


class RemoteTensor(Tensor):
    """A tensor on the simulated device; `held` has the numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "RemoteTensor":
        return Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _context: None, _size: Any, _stride: Any) -> "RemoteTensor":
        return RemoteTensor(inner["held"])

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        assert isinstance(other, RemoteTensor)
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.held = other.held

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"RemoteTensor({self.held!r})"

    def numpy(self, **_: Any) -> Any:
        raise TypeError("a tensor on another device has no numpy array; bring it to the CPU first")

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.to(CPU).tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


class SimulatedDevice(TorchDispatchMode):
    """Runs every operator, here or there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_operators = 0
        """Run there so far, copies aside."""
        self.num_waits = 0
        """How often the host would have waited for the device."""
        self.room: int | None = None
        """Operators until its memory is full for one of them; None: never."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _concerns(args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        # In inference mode operators that are made of others come as they are; the others have the rules.
        with self:
            made = func.decompose(*args, **(kwargs or {}))
        if made is not NotImplemented:
            return made
        if self.room is not None and self.num_operators >= self.room:
            self.room = None
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
        self.num_operators += func not in _COPIES | _ANY_DEVICE
        self.num_waits += _waits(func, args, kwargs or {})
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    wanted = kwargs.get("device")
    if func not in _COPIES | _ANY_DEVICE:
        _check(func, [args[0], *args[2:]] if func in _INDEXED else (args, kwargs))
    plain = {**kwargs, "device": CPU} if wanted is not None else kwargs
    made = func(*tree_map(_unwrap, args), **tree_map(_unwrap, plain))
    if func.namespace == "c10d":  # ranks that tell each other in place, as NCCL does
        return made
    if func in _ANY_DEVICE:
        return args[0]
    if wanted is not None and torch.device(wanted) != DEVICE:
        return made
    return return_and_correct_aliasing(func, args, kwargs, tree_map(_wrap, made))


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    if func in _READS:
        return True
    if func in _INDEXED:
        return any(isinstance(each, RemoteTensor) and each.dtype == torch.bool for each in tree_leaves(args[1]))
    if func in _COPIES:
        return isinstance(args[0], RemoteTensor) and kwargs.get("device") == CPU
    return func in _ANY_DEVICE and isinstance(args[1], RemoteTensor) and not isinstance(args[0], RemoteTensor)


def _check(func: Any, arguments: Any) -> None:
    for each in tree_leaves(arguments):
        is_here = isinstance(each, Tensor) and not isinstance(each, RemoteTensor)
        if is_here and (each.dim() > 0 or func in _JOINS):
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, but one of shape {tuple(each.shape)} is on "
                "the CPU"
            )


def _concerns(args: Any, kwargs: dict[str, Any]) -> bool:
    wanted = kwargs.get("device")
    there = wanted is not None and torch.device(wanted) == DEVICE
    return there or any(isinstance(each, RemoteTensor) for each in tree_leaves((args, kwargs)))


def _unwrap(value: Any) -> Any:
    return value.held if isinstance(value, RemoteTensor) else value


def _wrap(value: Any) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, RemoteTensor):
        return value
    if isinstance(value, AsyncCollectiveTensor):
        value = value.wait()  # each rank at once: one that asks for nothing more may leave before another has its part
    # Views of parameters are no inference tensors, in inference mode either.
    with torch.inference_mode(False):
        return RemoteTensor(value)


@contextmanager
def simulated_device() -> Iterator[SimulatedDevice]:
    """Within it, DEVICE is a device of its own."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    # As between the CPU and CUDA, a parameter that moves stays the same object; also where somebody knows it weakly, as
    # whoever has counted with fake tensors does, which torch forbids for swaps and allows for `.data`.
    torch.__future__.set_swap_module_params_on_conversion(True)
    known_to_nobody = SimpleNamespace(getweakrefs=lambda _: [])
    try:
        with (
            patch.object(torch.utils, "weakref", known_to_nobody),
            autocast_as_on_cuda(),
            SimulatedDevice() as simulated,
        ):
            yield simulated
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
