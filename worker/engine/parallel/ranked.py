"""What the strategies of several ranks have in common."""

from typing import Any

from torch import Tensor, nn

from worker.engine.parallel.group import Group
from worker.engine.parallel.observed import Observed


class Ranked:
    """A rank's place in the mesh, and what all ranks tell each other beside gradients and activations."""

    def __init__(self, module: nn.Module, group: Group) -> None:
        self._module, self._group = module, group
        plan = group.plan
        self.mesh, self.rank = plan.describe(), group.rank
        self.num_shares, self.share = plan.data, group.coordinate("data")
        self.num_stages = plan.pipeline
        # Ranks of one tensor axis drop the same activations: what they hold in common must stay the same.
        self.seed_offset = self.share * plan.pipeline + group.coordinate("pipeline")
        self._observed = Observed(group)

    def holds(self, buffer: Tensor) -> bool:  # noqa: ARG002
        return True

    def gather(self, value: object) -> list[Any]:
        return self._group.gather(value)

    def decide(self, answer: bool) -> bool:
        return self._group.decide(answer)

    def meet(self) -> None:
        self._group.meet()
