"""Programs on a device for a while: module, masks and the devices named inside the graph go there and come back.

    with on_device(program) as device:      # program.device; nothing happens where that is the CPU
        program.module(*move(inputs, device))

Between such blocks a program rests on the CPU, where exporting needs it. Parameters stay the same objects, so that what
was looked up by identity before (tied weights, optimizers, masks) still holds.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, fx, nn

from worker.engine.devices import device_of
from worker.engine.programs.program import Program

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def on_device(program: Program) -> Iterator[torch.device]:
    """Within it, the program is on `program.device`; afterwards where it was. Not for use under inference_mode."""
    assert not torch.is_inference_mode_enabled(), "parameters moved under inference_mode could never be trained again"
    before = device_of(program.module)
    if before == program.device:
        yield before
        return
    _place(program, program.device)
    try:
        yield program.device
    finally:
        _place(program, before)


def runs_on_device(function: Callable[Concatenate[Program, P], R]) -> Callable[Concatenate[Program, P], R]:
    """Let a function of a program run within `on_device`."""

    @wraps(function)
    def run(program: Program, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with on_device(program):
            return function(program, *args, **kwargs)

    return run


def move_module(module: nn.Module, device: torch.device) -> None:
    """Move a module's tensors, and let every graph in it make its constants (arange, zeros, ...) on the device."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def send(tensor: Tensor) -> Tensor:
        if tensor.device == device:
            return tensor
        # What two names shared (a buffer; torch itself takes care of parameters), they share afterwards.
        return moved.setdefault(id(tensor), (tensor, tensor.to(device)))[1]

    module._apply(send)
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            _rename_devices(part, device)


def _place(program: Program, device: torch.device) -> None:
    move_module(program.module, device)
    program.masks.update({name: mask.to(device) for name, mask in program.masks.items()})


def _rename_devices(module: fx.GraphModule, device: torch.device) -> None:
    changed = False

    def rename(value: Any) -> Any:
        nonlocal changed
        if not isinstance(value, torch.device) or value == device:
            return value
        changed = True
        return device

    for node in module.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate(node.args, rename), fx.node.map_aggregate(node.kwargs, rename)
    if changed:
        module.recompile()
