"""The whole state of a parallel run, brought together for a checkpoint, and given back under any plan.

A state names tensors by parameter and holds them whole, on the CPU: it does not depend on how many ranks made it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from worker.engine.parallel.strategy import Strategy

State = dict[str, dict[str, Any]]
"""Name of a parameter -> "value" and what the optimizer keeps for it; name of a buffer -> "value"."""


def gather_state(
    strategy: Strategy, module: nn.Module, optimizer: torch.optim.Optimizer, extra: Sequence[nn.Parameter] = ()
) -> State | None:
    """Return the state of module and optimizer on rank 0, None on the others; every rank calls it."""
    mine: State = {}
    for name, parameter in _name_parameters(module, extra):
        held = strategy.held(parameter)
        if held is None:
            continue
        kept = {"value": held.detach(), **optimizer.state.get(held, {})}
        mine[name] = {
            key: strategy.whole(parameter, value) if _is_like(value, held) else value for key, value in kept.items()
        }
    for name, buffer in module.named_buffers():
        if strategy.num_stages == 1 or _moves_here(strategy, module, name):
            mine[f"buffer {name}"] = {"value": buffer}
    mine = {name: {key: _copy(value) for key, value in kept.items()} for name, kept in mine.items()}
    if not dist.is_initialized() or strategy.num_stages == 1:
        return mine if not dist.is_initialized() or dist.get_rank() == 0 else None
    parts: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(mine, parts if dist.get_rank() == 0 else None)
    if dist.get_rank() != 0:
        return None
    return {name: value for part in parts for name, value in cast(State, part).items()}


def load_state(
    strategy: Strategy,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    extra: Sequence[nn.Parameter] = (),
) -> None:
    """Put a state into module and optimizer, each rank its part."""
    with torch.no_grad():
        for name, parameter in _name_parameters(module, extra):
            held = strategy.held(parameter)
            if held is None:
                continue
            kept = dict(state[name])
            held.copy_(strategy.part(parameter, kept.pop("value")))
            shape = state[name]["value"].shape
            optimizer.state[held] = {
                key: strategy.part(parameter, value) if _has_shape(value, shape) else _copy(value)
                for key, value in kept.items()
            }
        for name, buffer in module.named_buffers():
            buffer.copy_(state[f"buffer {name}"]["value"])


def _moves_here(strategy: Strategy, module: nn.Module, buffer: str) -> bool:
    """Tell whether a buffer's layer is in this rank's stage; one without a layer never moves and is everywhere."""
    own = list(module.get_submodule(buffer.rpartition(".")[0]).parameters(recurse=False)) if "." in buffer else []
    return all(strategy.held(each) is not None for each in own)


def _name_parameters(module: nn.Module, extra: Sequence[nn.Parameter]) -> Iterator[tuple[str, nn.Parameter]]:
    yield from module.named_parameters()
    yield from ((f"extra {index}", each) for index, each in enumerate(extra))


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _has_shape(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape


def _copy(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
