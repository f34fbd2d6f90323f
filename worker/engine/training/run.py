"""A training run as it is between two optimizer steps, and that state as flat tensors and plain numbers.

`collect` and `restore` are the seam to checkpoints: state dicts out, state dicts in. A plan that spreads a run over
processes gathers and scatters the same dicts.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from app.recipes.metrics import Quality
from worker.engine.devices import device_of
from worker.engine.programs.program import Program

Tensors = dict[str, Tensor]


class Constraint(Protocol):
    """Something that holds for the weights after every step of a training run, e.g. that pruned ones are zero."""

    def limit_gradients(self) -> None:
        """Change the gradients after the backward pass, before they are clipped and before the optimizer sees them."""

    def restore(self) -> None:
        """Make it hold again after the optimizer's step. Called without gradients."""


class Stateful(Protocol):
    """Something beside the weights that a run changes, and that must be as it was when the run goes on elsewhere."""

    def state_dict(self) -> Tensors:
        """Return its state; the tensors are only read, at once."""

    def load_state_dict(self, state: Tensors) -> None:
        """Take the state over; the tensors are not to be changed."""


@dataclass
class Run:
    """One training run. `batch` counts the optimizer steps of the current epoch."""

    program: Program
    module: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    extra_parameters: list[nn.Parameter]
    constraints: Sequence[Constraint]
    stateful: Sequence[Stateful]
    num_steps: int
    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_epoch: int = 0
    before: Quality | None = None
    quality: Quality | None = None
    """After the last epoch."""
    best_quality: Quality | None = None
    best_state: Tensors = field(default_factory=dict)
    first_loss: float = float("nan")
    last_loss: float = float("nan")
    stopped_early: bool = False
    random: Tensors | None = None
    """The random states that a restored run goes on with."""


class Position(BaseModel):
    """The numbers of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    num_steps: int
    step: int
    epoch: int
    batch: int
    best_epoch: int
    before: Quality | None
    quality: Quality | None
    best_quality: Quality | None
    first_loss: float
    last_loss: float
    stopped_early: bool


def collect(run: Run) -> tuple[Position, Tensors]:
    """Return the whole state of a run; the tensors are its own, to be read before it goes on."""
    tensors = {f"module/{name}": tensor for name, tensor in run.module.state_dict().items()}
    tensors |= {f"best/{name}": tensor for name, tensor in run.best_state.items()}
    tensors |= {f"mask/{name}": mask for name, mask in run.program.masks.items()}
    tensors |= {f"extra/{index}": each.detach() for index, each in enumerate(run.extra_parameters)}
    for place, state in run.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if value is not None:
                tensors[f"optimizer/{place}/{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    for index, each in enumerate(run.stateful):
        tensors |= {f"stateful/{index}/{name}": value for name, value in each.state_dict().items()}
    tensors |= {f"random/{name}": value for name, value in get_random_state().items()}
    numbers = {name: getattr(run, name) for name in Position.model_fields}
    return Position(**numbers), tensors


def restore(run: Run, position: Position, tensors: Mapping[str, Tensor]) -> None:
    """Put a state that `collect` has returned into a new run of the same step, on the run's device."""
    device = device_of(run.module)
    run.module.load_state_dict({name: each.to(device) for name, each in _below("module", tensors).items()})
    run.best_state = {name: tensor.to(device, copy=True) for name, tensor in _below("best", tensors).items()}
    run.program.masks.clear()
    run.program.masks |= {name: mask.to(device, copy=True) for name, mask in _below("mask", tensors).items()}
    with torch.no_grad():
        for index, parameter in enumerate(run.extra_parameters):
            parameter.copy_(tensors[f"extra/{index}"])
    states: dict[int, dict[str, Any]] = {}
    for key, value in _below("optimizer", tensors).items():
        place, _, name = key.partition("/")
        states.setdefault(int(place), {})[name] = value.clone()
    # Rates and decays are those of the settings; the rate is set anew in every step.
    run.optimizer.load_state_dict({"state": states, "param_groups": run.optimizer.state_dict()["param_groups"]})
    for index, each in enumerate(run.stateful):
        each.load_state_dict(_below(f"stateful/{index}", tensors))
    for name in Position.model_fields:
        setattr(run, name, getattr(position, name))
    run.random = _below("random", tensors)


def get_random_state() -> Tensors:
    """Return the states of all generators that torch or a library may draw from."""
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    version, state, next_gauss = random.getstate()
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {
        **cuda,
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(
            [*numpy["state"]["key"].tolist(), numpy["state"]["pos"], numpy["has_gauss"]], dtype=torch.int64
        ),
        "numpy_gauss": torch.tensor(numpy["gauss"], dtype=torch.float64),
        "python": torch.tensor([version, *state], dtype=torch.int64),
        "python_gauss": torch.tensor([] if next_gauss is None else [next_gauss], dtype=torch.float64),
    }


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Let all generators go on where `get_random_state` found them; that of CUDA where both had one."""
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].clone())
    torch.set_rng_state(state["torch"].clone())
    *words, place, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(words, np.uint32), place, has_gauss, float(state["numpy_gauss"])))
    version, *values = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(values), gauss[0] if gauss else None))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    start = f"{prefix}/"
    return {name.removeprefix(start): each for name, each in tensors.items() if name.startswith(start)}
