"""The whole state of a run, brought together for a checkpoint, and given back under any plan or none.

A state names tensors by parameter and holds them whole: it does not depend on how many ranks made it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from worker.engine.devices import CPU
from worker.engine.parallel.group import current_group
from worker.engine.parallel.strategy import Strategy

State = dict[str, dict[str, Tensor]]
"""Name of a parameter -> "value", what the optimizer keeps for it, and perhaps "best"; name of a buffer -> "value" and
perhaps "best"."""


def gather_state(
    strategy: Strategy,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: Sequence[nn.Parameter] = (),
    best: Mapping[str, Tensor] | None = None,
) -> State:
    """Return the state of module and optimizer on rank 0, nothing on the others; every rank calls it.

    `best` is an earlier state dict of the module that is kept along. The tensors are the run's own where they can be:
    to be read before it goes on.
    """
    best = best or {}
    speaks = strategy.rank == 0 or (strategy.num_stages > 1 and strategy.share == 0)
    mine: State = {}
    for name, parameter in _name_parameters(module, extra):
        held = strategy.held(parameter)
        if held is None:
            continue
        kept = {"value": held.detach(), **optimizer.state.get(held, {})}
        kept |= {"best": best[name]} if name in best else {}
        # Ranks that say nothing take part in bringing each tensor together, and let it go at once.
        for key, value in kept.items():
            if value is None:
                continue
            found = value if isinstance(value, Tensor) else torch.tensor(value)
            whole = strategy.whole(parameter, found) if found.shape == held.shape else found
            if speaks:
                # All that ranks hold in parts may be more than one GPU has room for.
                mine.setdefault(name, {})[key] = whole.detach() if whole is found else whole.detach().to(CPU)
    for name, buffer in module.named_buffers():
        if speaks and strategy.holds(buffer):
            kept = {"value": buffer} | ({"best": best[name]} if name in best else {})
            mine[f"buffer {name}"] = {key: value.detach() for key, value in kept.items()}
    if strategy.num_stages == 1:
        return mine
    # A pickled tensor would come out on the GPU that it was on, which is another rank's.
    mine = {name: {key: each.to(CPU) for key, each in kept.items()} for name, kept in mine.items()}
    parts: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(mine, parts if strategy.rank == 0 else None, group=current_group().control)
    return {name: kept for part in parts if part is not None for name, kept in cast(State, part).items()}


def load_state(
    strategy: Strategy,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    extra: Sequence[nn.Parameter] = (),
) -> dict[str, Tensor]:
    """Put a state into module and optimizer, each rank its part; return this rank's part of the kept state dict.

    The state's tensors are copied.
    """
    best: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in _name_parameters(module, extra):
            held = strategy.held(parameter)
            if held is None:
                continue
            kept = {key: each.to(held.device) if each.ndim else each for key, each in state[name].items()}
            value = kept.pop("value")
            held.copy_(strategy.part(parameter, value))
            if "best" in kept:
                best[name] = strategy.part(parameter, kept.pop("best")).clone()
            optimizer.state[held] = {
                key: (strategy.part(parameter, each) if each.shape == value.shape else each).clone()
                for key, each in kept.items()
            }
        for name, buffer in module.named_buffers():
            kept = state[f"buffer {name}"]
            buffer.copy_(kept["value"])
            if "best" in kept:
                best[name] = kept["best"].to(buffer.device, copy=True)
    return _as_state_dict(best, module) if best else {}


def _as_state_dict(best: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Return it with all names of shared parameters, and with what other ranks hold as it is here, which is nothing."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    names = {name: first[id(each)] for name, each in module.named_parameters(remove_duplicate=False)}
    found: dict[str, Tensor] = {}
    for name, here in module.state_dict().items():
        kept = best.get(names.get(name, name))
        found[name] = here.detach().clone() if kept is None else kept
    return found


def _name_parameters(module: nn.Module, extra: Sequence[nn.Parameter]) -> Iterator[tuple[str, nn.Parameter]]:
    yield from module.named_parameters()
    yield from ((f"extra {index}", each) for index, each in enumerate(extra))
