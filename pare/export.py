"""A live torch.nn.Module to a .pt2 file: the batch may vary where it can, and the module stays as it was."""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pare.errors import ExportFailed, SetupMissing, UsageError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Exported:
    """What export_module wrote."""

    path: Path
    dynamic_batch: bool
    notes: tuple[str, ...]
    """Sentences for the user, e.g. why the batch is fixed."""


def export_module(
    module: "nn.Module",
    example_inputs: Any,
    path: Path | str,
    *,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
) -> Exported:
    """Export `module`, as it behaves in eval mode, to a .pt2 file.

    `example_inputs` is a tensor, a sequence of them, or a mapping of keyword arguments to them. Axis 0 of all of them
    is the batch; it may vary in the result unless the module computes with its value, in which case the program is made
    for the examples' batch and the notes say why. `dynamic_shapes` is passed to torch.export as it is, for models with
    more variable sizes. The module keeps its weights, its device and the train or eval mode of each of its parts.
    """
    torch = _torch()
    args, kwargs = _split(torch, example_inputs)
    tensors = [*args, *kwargs.values()]
    target = Path(path)
    notes: list[str] = []
    with torch.no_grad(), _on_cpu_in_eval_mode(module) as ready:
        args, kwargs = tuple(t.detach().cpu() for t in args), {k: t.detach().cpu() for k, t in kwargs.items()}
        program = None
        if dynamic_shapes is not None:
            program = _export(torch, ready, args, kwargs, dynamic_shapes)
        elif dynamic_batch:
            program, reason = _try_dynamic_batch(torch, ready, args, kwargs, tensors)
            if program is None:
                notes.append(f"exported with the fixed batch of the example inputs ({_batch(tensors)}): {reason}")
        if program is None:
            program = _export(torch, ready, args, kwargs, None)
    # The file shall hold the model, not the user's examples.
    program.example_inputs = None
    torch.export.save(program, target)
    varies = dynamic_shapes is not None or (dynamic_batch and not notes)
    return Exported(target, dynamic_batch=varies, notes=tuple(notes))


def _try_dynamic_batch(
    torch: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Any]
) -> tuple[Any, str]:
    """Return (program, "") or (None, why the batch cannot vary)."""
    batches = {t.shape[0] for t in tensors if t.ndim > 0}
    if len(batches) != 1:
        return None, f"axis 0 of the inputs is not one batch: {[tuple(t.shape) for t in tensors]}"
    # torch.export treats sizes 0 and 1 as constants, so a single example is traced as two.
    if batches == {1}:
        args = tuple(torch.cat([t, t]) if t.ndim else t for t in args)
        kwargs = {name: torch.cat([t, t]) if t.ndim else t for name, t in kwargs.items()}
    batch = torch.export.Dim("batch")
    shapes = {
        "args": tuple({0: batch} if t.ndim else None for t in args),
        "kwargs": {name: {0: batch} if t.ndim else None for name, t in kwargs.items()},
    }
    try:
        return _export(torch, module, args, kwargs, _shapes_by_parameter(module, shapes)), ""
    except ExportFailed as error:
        return None, error.detail


def _shapes_by_parameter(module: Any, shapes: dict[str, Any]) -> Any:
    """Return dynamic_shapes in the form torch.export wants: in call order, or by name when there are keywords."""
    if not shapes["kwargs"]:
        return shapes["args"]
    import inspect

    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, shapes["args"], strict=False)), **shapes["kwargs"]}


def _export(torch: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> Any:
    try:
        with warnings.catch_warnings():
            # They tell authors of torch about its insides; what matters to the user is whether it worked.
            warnings.simplefilter("ignore")
            return torch.export.export(module, args, kwargs or None, dynamic_shapes=shapes)
    except Exception as error:  # torch.export lets out whatever the user's forward() and its own passes raise
        raise ExportFailed(f"{type(module).__name__}: {_first_sentence(error)}") from error


@contextmanager
def _on_cpu_in_eval_mode(module: Any) -> Iterator[Any]:
    """Give the module in eval mode on the CPU (a copy, if its weights live elsewhere) and restore every part's mode."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.device.type != "cpu" for t in tensors):
        module = copy.deepcopy(module).cpu()
    modes = {part: part.training for part in module.modules()}
    try:
        yield module.eval()
    finally:
        for part, training in modes.items():
            part.training = training


def _split(torch: Any, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword inputs."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, torch.Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, Sequence):
        args = tuple(example_inputs)
    for value in (*args, *kwargs.values()):
        if not isinstance(value, torch.Tensor):
            raise UsageError(f"example_inputs holds a {type(value).__name__}", fix="Give tensors only.")
    if not args and not kwargs:
        raise UsageError(
            f"example_inputs is {example_inputs!r:.100}",
            fix="Give a tensor, a tuple of tensors, or a dict of keyword arguments to tensors.",
        )
    return args, kwargs


def _batch(tensors: list[Any]) -> int | str:
    sizes = sorted({t.shape[0] for t in tensors if t.ndim})
    return sizes[0] if len(sizes) == 1 else str(sizes)


def _first_sentence(error: Exception) -> str:
    """Return the line of a torch.export error that says what is wrong; the rest is advice for its authors."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith(("from user code", "The above exception", "File "))]
    return f"{type(error).__name__}: {lines[0]}"[:400] if lines else type(error).__name__


def _torch() -> Any:
    try:
        import torch
        import torch.export
    except ImportError as error:
        raise SetupMissing("exporting a torch.nn.Module", "torch", "engine") from error
    return torch
