"""A training run as it is between two optimizer steps, and that state as flat tensors and plain numbers.

`collect` and `restore` are the seam to checkpoints. Under a parallel plan every rank calls them: the state is brought
together whole, and given back under any other plan or none.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from app.recipes.metrics import Quality
from worker.engine.errors import StepFailed
from worker.engine.parallel.states import State, gather_state, load_state
from worker.engine.parallel.strategy import Strategy
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
    strategy: Strategy
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
    """The random states that a restored run goes on with; None where it was made under another plan."""
    unread: list[tuple[Tensor, float]] = field(default_factory=list)
    """Loss and learning rate of the newest steps; the losses are on the device still."""

    def read_losses(self) -> None:
        """Bring the losses of the newest steps to the host, which waits for the device here and in no step.

        Raises StepFailed (training_diverged) where one is not finite: nothing that came after it is of use.
        """
        if not self.unread:
            return
        rates = [rate for _, rate in self.unread]
        values: list[float] = torch.stack([loss for loss, _ in self.unread]).tolist()
        self.unread.clear()
        for step, (value, rate) in enumerate(zip(values, rates, strict=True), self.step - len(values) + 1):
            if not isfinite(value):
                raise StepFailed(
                    f"the loss became {value} at step {step} of {self.num_steps} with learning rate {rate:.3g}",
                    code="training_diverged",
                    fix="Lower learning_rate, raise warmup_fraction, or set gradient_clip_norm.",
                )
            if step == 1:
                self.first_loss = value
        self.last_loss = values[-1]


class Position(BaseModel):
    """The numbers of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    mesh: str
    """Of the plan under which the run was."""
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


_NUMBERS = tuple(name for name in Position.model_fields if name != "mesh")


def collect(run: Run) -> tuple[Position, Tensors]:
    """Return the whole state of a run; the tensors are its own, to be read before it goes on.

    Under a parallel plan every rank calls it, and only rank 0 gets what the weights and the optimizer hold. Raises
    StepFailed where the training has diverged.
    """
    run.read_losses()
    state = gather_state(run.strategy, run.module, run.optimizer, run.extra_parameters, run.best_state)
    tensors = {f"state/{key}/{name}": each for name, kept in state.items() for key, each in kept.items()}
    tensors |= {f"mask/{name}": mask for name, mask in run.program.masks.items()}
    for index, each in enumerate(run.stateful):
        tensors |= {f"stateful/{index}/{name}": value for name, value in each.state_dict().items()}
    for rank, states in enumerate(run.strategy.gather(get_random_state())):
        tensors |= {f"random/{rank}/{name}": value for name, value in states.items()}
    numbers = {name: getattr(run, name) for name in _NUMBERS}
    return Position(mesh=run.strategy.mesh, **numbers), tensors


def restore(run: Run, position: Position, tensors: Mapping[str, Tensor]) -> None:
    """Put a state that `collect` has returned into a new run of the same step, under whatever plan that has."""
    state: State = {}
    for path, tensor in _below("state", tensors).items():
        key, _, name = path.partition("/")
        state.setdefault(name, {})[key] = tensor
    # Rates and decays are those of the settings; the rate is set anew in every step.
    run.best_state = load_state(run.strategy, run.module, run.optimizer, state, run.extra_parameters)
    run.program.masks.clear()
    device = run.program.device
    run.program.masks |= {name: mask.to(device, copy=True) for name, mask in _below("mask", tensors).items()}
    for index, each in enumerate(run.stateful):
        each.load_state_dict(_below(f"stateful/{index}", tensors))
    for name in _NUMBERS:
        setattr(run, name, getattr(position, name))
    # Ranks of another mesh draw other numbers in any case, and no two of them may draw the same.
    same = position.mesh == run.strategy.mesh
    run.random = _below(f"random/{run.strategy.rank}", tensors) if same else None


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
