"""How the training loop uses a plan: what it asks for, and the answer of one process alone."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from worker.engine.devices import mixed_precision, move_batch
from worker.engine.errors import RecipeRefused
from worker.engine.failures import is_failed_compilation
from worker.engine.training.examples import Batch

Fact = float | int | str | bool | None
Predict = Callable[..., tuple[Tensor, ...]]
Part = tuple[Batch, float]
"""Some examples, still on the host, and the share of the batch's mean loss that their own mean loss has."""

_MIXED = ("dtype", "scalar type", "not implemented for 'BFloat16'")
"""In what torch says of tensors of several types, or of one that an operator does not take."""


@dataclass(frozen=True)
class Seen:
    """The examples that a model has just seen, where it is, and their inputs on the host."""

    inputs: tuple[Tensor, ...]
    labels: Tensor | None
    host_inputs: tuple[Tensor, ...]


Loss = Callable[[tuple[Tensor, ...], Seen], Tensor]
"""(model outputs, what they were made from) -> mean loss. Outputs are float32 whatever the precision.

It should not read a number back from the device (`item`, boolean indexing): each time the host would wait for it."""


@dataclass(frozen=True)
class Objective:
    """What training lowers, in two halves, because they may happen on different ranks."""

    loss: Loss
    precision: str
    device: torch.device

    def move(self, batch: Batch) -> Seen:
        """Send examples to the device; the host does not wait for their arrival."""
        inputs, labels = move_batch(batch, self.device)
        return Seen(inputs, labels, batch[0])

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Within it is the forward pass. Raises RecipeRefused where an operator does not take bfloat16."""
        bf16 = self.precision == "bf16"
        try:
            with mixed_precision(self.device, bf16=bf16):
                yield
        except RuntimeError as error:
            if not bf16 or is_failed_compilation(error) or not any(each in str(error) for each in _MIXED):
                raise
            raise RecipeRefused(
                f"the model has an operator that does not compute in bfloat16: {str(error)[:300]}",
                code="bf16_not_computable",
                fix="Set precision to 'fp32'.",
            ) from error

    def judge(self, outputs: tuple[Tensor, ...], seen: Seen) -> Tensor:
        """Return the mean loss of a part's outputs, which are brought to float32."""
        outputs = tuple(each.float() if each.dtype == torch.bfloat16 else each for each in outputs)
        return self.loss(outputs, seen)

    def compute(self, predict: Predict, part: Part) -> Tensor:
        """Return a part's contribution to the batch's loss."""
        batch, share = part
        seen = self.move(batch)
        with self.autocast():
            outputs = predict(*seen.inputs)
        return self.judge(outputs, seen) * share


class Strategy(Protocol):
    """One rank's way of training a module. Every method is called on all ranks, in the same order."""

    mesh: str
    """The plan in words; "one process" without one."""
    rank: int
    num_shares: int
    """Into how many shares each part of a batch is cut, and which of them is this rank's."""
    share: int
    num_stages: int
    """Ranks among which the layers are dealt out."""
    seed_offset: int
    """Added to the seed of dropout: ranks with different examples or layers drop different activations."""

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the module's outputs on every rank, for measuring."""

    def backward(self, parts: Sequence[Part], objective: Objective) -> Tensor:
        """Leave the gradients of the whole batch in the parameters; return its loss, the same on every rank."""

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> None:
        """Scale the gradients so that the norm over all parameters, wherever they are, is at most `max_norm`."""

    def held(self, parameter: nn.Parameter) -> nn.Parameter | None:
        """Return what this rank trains in a parameter's place; None where other ranks do."""

    def holds(self, buffer: Tensor) -> bool:
        """Tell whether a buffer is here what it has become; where layers are dealt out, others hold the first one."""

    def part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """Return this rank's part of a tensor of a parameter's whole shape."""

    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """Return the whole of which this rank and others each hold a part."""

    def gather(self, value: object) -> list[Any]:
        """Return a small value of every rank, in their order."""

    def decide(self, answer: bool) -> bool:
        """Return rank 0's answer, so that all do the same; cheap enough for every step."""

    def meet(self) -> None:
        """Wait for all ranks; unlike anywhere else, one of them may be busy for minutes, e.g. with a slow disk."""

    def finish(self) -> dict[str, Fact]:
        """Bring the whole weights together in rank 0's module, as it was before the plan, and return the facts of the
        run. Raises RankFinished on every other rank."""


@dataclass
class Alone:
    """One process, the whole batch."""

    module: nn.Module
    call: Predict
    """The module as it is called in training, perhaps compiled."""
    mesh: str = field(default="one process", init=False)
    rank: int = field(default=0, init=False)
    num_shares: int = field(default=1, init=False)
    share: int = field(default=0, init=False)
    num_stages: int = field(default=1, init=False)
    seed_offset: int = field(default=0, init=False)

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.module(*inputs)
        return outputs

    def backward(self, parts: Sequence[Part], objective: Objective) -> Tensor:
        total = torch.zeros((), device=objective.device)
        for part in parts:
            loss = objective.compute(self.call, part)
            loss.backward()
            total += loss.detach()
        return total

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> None:
        nn.utils.clip_grad_norm_(parameters, max_norm)

    def held(self, parameter: nn.Parameter) -> nn.Parameter:
        return parameter

    def holds(self, buffer: Tensor) -> bool:  # noqa: ARG002
        return True

    def part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:  # noqa: ARG002
        return whole

    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:  # noqa: ARG002
        return part

    def gather(self, value: object) -> list[Any]:
        return [value]

    def decide(self, answer: bool) -> bool:
        return answer

    def meet(self) -> None:
        pass

    def finish(self) -> dict[str, Fact]:
        return {}


def scale_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Do what torch's clip_grad_norm_ does once the norm is known."""
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
