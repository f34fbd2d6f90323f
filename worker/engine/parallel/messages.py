"""Sending the values between two pipeline stages: tensors of any shape, and whole numbers, with a header each.

They travel through main memory, also between GPUs: what NCCL sends between two ranks, it sends one after the other, and
two stages that send to each other before they receive would wait for ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from worker.engine.devices import CPU
from worker.engine.parallel.group import Group, as_bytes

Value = Tensor | int
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.complex64, torch.complex128,
)  # fmt: skip
MAX_AXES = 8
_NUMBER = -1


@dataclass
class Messenger:
    """The neighbours of a stage. What is sent goes out in the background until `settle`."""

    group: Group
    _pending: list[tuple[dist.Work, Tensor]] = field(default_factory=list)

    def send(self, value: Value, to: int) -> None:
        """Send one value to a stage."""
        tensor = torch.tensor(value) if isinstance(value, int) else value.detach().to(CPU).contiguous()
        kind = _NUMBER if isinstance(value, int) else DTYPES.index(tensor.dtype)
        needs = isinstance(value, Tensor) and value.requires_grad
        header = [kind, int(needs), tensor.ndim, *tensor.shape, *([0] * (MAX_AXES - tensor.ndim))]
        self._start(torch.tensor(header), to)
        self._start(tensor, to)

    def receive(self, source: int) -> Value:
        """Return the next value from a stage; a leaf where gradients are wanted for it."""
        header = torch.empty(3 + MAX_AXES, dtype=torch.int64)
        self._wait_for(header, source)
        kind, needs, num_axes, *shape = header.tolist()
        tensor = torch.empty(shape[:num_axes], dtype=torch.int64 if kind == _NUMBER else DTYPES[kind])
        self._wait_for(tensor, source)
        return int(tensor) if kind == _NUMBER else tensor.to(self.group.device).requires_grad_(bool(needs))

    def send_gradients(self, values: Sequence[Value], to: int) -> None:
        """Send the gradients of received values back, and before them which have one."""
        leaves = [each for each in values if isinstance(each, Tensor) and each.requires_grad]
        if leaves:
            self._start(torch.tensor([each.grad is not None for each in leaves]), to)
        for leaf in leaves:
            if leaf.grad is not None:
                self._start(leaf.grad.to(CPU).contiguous(), to)

    def receive_gradients(self, values: Sequence[Tensor], source: int) -> list[Tensor | None]:
        """Return the gradients of sent values; None for one on which the loss does not depend."""
        if not values:
            return []
        there = torch.empty(len(values), dtype=torch.bool)
        self._wait_for(there, source)
        gradients = [
            torch.empty(each.shape, dtype=each.dtype) if found else None
            for each, found in zip(values, there.tolist(), strict=True)
        ]
        for gradient in gradients:
            if gradient is not None:
                self._wait_for(gradient, source)
        return [None if each is None else each.to(self.group.device) for each in gradients]

    def settle(self) -> None:
        """Wait until everything has gone out."""
        with self.group.waiting():
            for work, _ in self._pending:
                work.wait()
        self._pending.clear()

    def _start(self, tensor: Tensor, to: int) -> None:
        work = dist.isend(as_bytes(tensor), group=self.group.along("pipeline"), group_dst=to)
        assert work is not None
        self._pending.append((work, tensor))

    def _wait_for(self, tensor: Tensor, source: int) -> None:
        with self.group.waiting():
            dist.recv(as_bytes(tensor), group=self.group.along("pipeline"), group_src=source)
